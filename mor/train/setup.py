"""Building what a run needs from its options: data, model, optimizer, and what validates it."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mor.data.loader import PackedLoader, evaluation_batches
from mor.data.prefetch import PrefetchLoader
from mor.data.shards import TokenShards
from mor.data.split import Split
from mor.model.calibrate import can_calibrate
from mor.model.configuration_mor import MorConfig
from mor.model.modeling_mor import MorForCausalLM
from mor.quiet import without_progress_bars
from mor.train import random_state
from mor.train.checkpoint import Checkpoint, CheckpointError
from mor.train.compile import compile_layers
from mor.train.fused_loss import choose_lm_loss
from mor.train.optim import build_optimizer
from mor.train.options import RunOptions, TrainingOptions
from mor.train.parallel import Parallel, choose_parallel, micro_batches
from mor.train.precision import choose_device, choose_precision
from mor.train.ranks import Ranks
from mor.train.run_folder import check_same_options
from mor.train.state import TrainingState
from mor.train.step_graph import check_cuda_graph, choose_sets
from mor.train.validation import Validator, trained_mean_depth
from mor.train.window import Window


def build_run(
    options: RunOptions, checkpoint: Checkpoint | None = None, *, ranks: Ranks | None = None
) -> tuple[TrainingState, Validator]:
    """The state a run starts from, or that of `checkpoint`, and what validates it.

    Raises ValueError for options that do not fit the data, the device, the number of ranks or the checkpoint.
    """
    ranks = Ranks() if ranks is None else ranks
    if checkpoint is not None:
        check_same_options(checkpoint.values["options"], options)
    micro_batches(options.training, ranks)
    device = choose_device(ranks.device_name(options.training.device))
    dtype = choose_precision(options.training.precision, device)
    shards = open_shards(options, "train")
    random_state.seed_all(options.training.seed)
    model = load_model(options, model_config(options, shards), checkpoint)
    parallel = choose_parallel(options.training, ranks, model.config, device=device, dtype=dtype)
    check_cuda_graph(options.training, model.config, device, ranks)
    choose_sets(options.training, model, device, dtype, ranks)
    parallel.place(model, device)
    random_state.seed_rank(options.training.seed, ranks.rank)
    state = TrainingState(
        options=options,
        device=device,
        dtype=dtype,
        tokenizer=shards.tokenizer(),
        model=model,
        optimizer=build_optimizer(model, options.optimizer),
        loader=PrefetchLoader(_loader(shards, options, options.training.seed, ranks), device=device),
        window=Window(model.config),
        lm_loss=choose_lm_loss(device),
        parallel=parallel,
    )
    if options.training.compile or (options.training.compile is None and device.type == "cuda"):
        compile_layers(model)
    validator = build_validator(options, shards, dtype, parallel)
    if checkpoint is not None:
        state.restore(checkpoint)
    return state, validator


def open_shards(options: RunOptions, split: Split) -> TokenShards:
    """The token shards of a split. ValueError without a path, or if a shard is not what its manifest says."""
    if not options.data.path:
        raise ValueError("data.path is not set: it must name a folder of token shards")
    shards = TokenShards(options.data.path, split)
    if options.data.verify:
        _verify_once(shards.folder.absolute(), split, shards.stamps())
    return shards


@functools.cache
def _verify_once(folder: Path, split: Split, stamps: tuple[tuple[int, int], ...]) -> None:
    """Read through the files that this process, which may train several models, has not read as they are now."""
    TokenShards(folder, split).verify()


def _loader(shards: TokenShards, options: RunOptions, seed: int, ranks: Ranks | None = None) -> PackedLoader:
    ranks = Ranks() if ranks is None else ranks
    return PackedLoader(
        shards,
        batch_size=options.training.micro_batch_size,
        sequence_length=options.training.sequence_length,
        seed=seed,
        document_ids=options.data.document_masking,
        rank=ranks.rank,
        world_size=ranks.size,
    )


def model_config(options: RunOptions, shards: TokenShards) -> MorConfig:
    """The configuration of the model to train. ValueError if it cannot hold the data's tokens or rows."""
    training = options.training
    values: dict[str, Any] = {
        "vocab_size": shards.vocabulary_size,
        "eos_token_id": shards.eos_token_id,
        "max_position_embeddings": training.sequence_length,
    }
    if options.initial_model is not None:
        values |= MorConfig.get_config_dict(options.initial_model)[0] | {"mean_depth": None}
    config = MorConfig(**(values | options.model))
    shards.check_vocabulary(config.vocab_size)
    if config.max_position_embeddings < training.sequence_length:
        raise ValueError(
            f"max_position_embeddings={config.max_position_embeddings} is less than "
            f"sequence_length={training.sequence_length}"
        )
    if config.mean_depth is not None and not training.calibration_tokens:
        raise ValueError(f"mean_depth={config.mean_depth} needs a calibration: calibration_tokens=0")
    config.mean_depth = None  # no budget before the thresholds are known; `default_budget` gives it to the final model
    if training.official_aux_loss_scale:
        config.router_aux_loss_coef *= training.gradient_accumulation_steps
    return config


def default_budget(options: RunOptions, model: MorForCausalLM) -> float | None:
    """The mean depth that the finished model uses unless asked otherwise: the one configured, or the trained one.

    None for a model that was not calibrated, or is trained to no particular depth.
    """
    if not options.training.calibration_tokens or not can_calibrate(model):
        return None
    return options.model.get("mean_depth", trained_mean_depth(model))


def load_model(options: RunOptions, config: MorConfig, checkpoint: Checkpoint | None) -> MorForCausalLM:
    """The model in float32: from `checkpoint`, from the initial model, or new.

    Raises ValueError when stored weights do not fit `config`, CheckpointError when they are a checkpoint's.
    """
    if checkpoint is not None:
        model = _load(checkpoint.folder, config, CheckpointError)
    elif options.initial_model is not None:
        model = _load(options.initial_model, config, ValueError)
        _restart_schedules(model)
    else:
        model = MorForCausalLM(config)
    if options.training.gradient_checkpointing:
        # transformers 5.23 renamed the method and warns at the old name, the only one of earlier versions
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable()
    return model


def _load(folder: Any, config: MorConfig, error: type[Exception]) -> MorForCausalLM:
    with without_progress_bars():
        loaded: Any = MorForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True
        )
    model, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise error(f"weights in {folder} do not fit the model: {kind.replace('_', ' ')} {sorted(report[kind])[0]}")
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        # Loaded weights lie where the file has them; matrix products may round by alignment, so a resumed run would
        # not be the same run.
        tensor.data = tensor.data.clone()
    return model


def _restart_schedules(model: MorForCausalLM) -> None:
    """Let warm-ups of the router count this run's forwards, not those of the run that made the weights."""
    if model.model.recursion.router is not None:
        model.model.recursion.router.training_forwards.zero_()


def build_validator(
    options: RunOptions, shards: TokenShards, dtype: torch.dtype, parallel: Parallel | None = None
) -> Validator:
    """What scores the validation split and calibrates on rows at equal distances over the training split: rows of one
    document are alike, and thresholds from few documents miss the depths of others."""
    training = options.training
    end_of_text = shards.eos_token_id if options.data.document_masking else None
    rows, calibration_rows, bytes_per_token = list[Tensor](), list[Tensor](), 1.0
    if training.calibration_tokens:
        calibration_rows = _spaced(shards, training, max(training.calibration_tokens, training.sequence_length))
    if training.evaluation_tokens:
        validation = open_shards(options, "validation")
        rows, bytes_per_token = _spaced(validation, training, training.evaluation_tokens), validation.bytes_per_token
    return Validator(
        rows=rows,
        calibration_rows=calibration_rows,
        bytes_per_token=bytes_per_token,
        dtype=dtype,
        end_of_text=end_of_text,
        parallel=parallel,
    )


def _spaced(shards: TokenShards, training: TrainingOptions, max_tokens: int) -> list[Tensor]:
    """Rows of a split at equal distances."""
    shape = dict(batch_size=training.micro_batch_size, sequence_length=training.sequence_length)
    return list(evaluation_batches(shards, **shape, max_tokens=max_tokens))
