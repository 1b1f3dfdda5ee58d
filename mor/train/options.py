"""Options of a training run. Everything that decides the result of a run is in one `RunOptions`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

ScheduleKind = Literal["trapezoid", "cosine"]
Precision = Literal["auto", "float32", "bfloat16"]
Parallelism = Literal["auto", "none", "ddp", "fsdp"]
GatherPrecision = Literal["auto", "float32"]
TrackerName = Literal["tensorboard", "wandb"]


def _check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, get_args(choices)))}")


def _check_at_least(options: object, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= minimum:
            raise ValueError(f"{name}={value} must be at least {minimum}")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What to train on.

    Args:
        path: folder of token shards with their manifest and tokenizer.
        document_masking: whether attention stays inside a document. The paper's runs let it cross (False).
        verify: whether to check every shard against its hash before training.
    """

    path: str = ""
    document_masking: bool = False
    verify: bool = True


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """AdamW and gradient clipping. Defaults are the paper's 360M runs (arXiv 2507.10524, section 3).

    Args:
        learning_rate: peak of the schedule.
        weight_decay: on everything but norm weights and biases; embeddings and routers are decayed.
        beta1, beta2, epsilon: of AdamW (arXiv 1711.05101).
        max_gradient_norm: the gradient is scaled down to this L2 norm; auxiliary routers are clipped apart from the
            rest. None: no clipping.
        auxiliary_router_scale: factor on the learning rate of auxiliary routers.
    """

    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    max_gradient_norm: float | None = 1.0
    auxiliary_router_scale: float = 10.0

    def __post_init__(self) -> None:
        _check_at_least(self, 0, "learning_rate", "weight_decay", "epsilon", "auxiliary_router_scale")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1)")
        if self.max_gradient_norm is not None and not self.max_gradient_norm > 0:
            raise ValueError(f"max_gradient_norm={self.max_gradient_norm} must be positive; None turns clipping off")


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """Learning rate over steps.

    Args:
        kind: `trapezoid` (warm-up, plateau, linear decay to 0: the paper's main runs) or `cosine` (its ablations).
        warmup_steps: linear rise from 0. None: 5% of the steps, rounded.
        decay_steps: length of the trapezoid's decay. None: 20% of the steps, rounded.
        minimum_ratio: share of the peak at which the cosine ends.
    """

    kind: ScheduleKind = "trapezoid"
    warmup_steps: int | None = None
    decay_steps: int | None = None
    minimum_ratio: float = 0.1

    def __post_init__(self) -> None:
        _check_choice("kind", self.kind, ScheduleKind)
        _check_at_least(self, 0, "warmup_steps", "decay_steps")
        if not 0 <= self.minimum_ratio <= 1:
            raise ValueError(f"minimum_ratio={self.minimum_ratio} must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How long, how large, how often.

    Args:
        seed: of the initial weights, the data order and every random choice.
        steps: optimizer steps.
        micro_batch_size: rows per forward.
        gradient_accumulation_steps: forwards per optimizer step, of all processes together. Losses are means over the
            tokens of the whole step.
        sequence_length: tokens per row.
        log_interval: steps per line of metrics.jsonl.
        evaluation_interval: steps between causal evaluations; one more follows the last step. 0: only that one.
        evaluation_tokens: most validation tokens scored per evaluation. 0: no evaluation at all.
        calibration_tokens: training tokens from which the final model's thresholds of causal decisions are taken, and,
            a quarter of them, those of the evaluations before. 0: no calibration.
        checkpoint_interval: steps between checkpoints; one more follows the last step. 0: only that one.
        keep_checkpoints: newest checkpoints that are kept.
        asynchronous_checkpoints: go on training while a checkpoint, copied to the host, is written.
        trackers: where measurements go besides metrics.jsonl: `tensorboard`, `wandb` (see `mor.train.trackers`).
        spike_threshold: a loss or gradient norm this many deviations (see `mor.train.spikes`) above the median of the
            steps before goes into spikes.jsonl, with the position of its data. None: nothing does.
        spike_window: how many steps before.
        stop_at_spike: end the run there, with an error.
        device: `auto` (CUDA if present, else CPU) or a torch device.
        precision: `bfloat16` (autocast over float32 weights; CUDA only), `float32`, or `auto`: the former if possible.
        parallel: how several processes share the model: `ddp` (each has a copy), `fsdp` (each has a part of every
            weight) or `auto`: the former if copies take at most a quarter of a device. `none`: there must be one.
        shard_size: ranks over which `fsdp` spreads one copy of the weights, as the GPUs of a node; there are as many
            copies as such groups. None: all ranks share one.
        gather_precision: in which `fsdp` brings a layer's weights together: as `precision` computes (`auto`), or
            `float32`.
        reshard_after_forward: whether `fsdp` frees them again until the backward pass.
        compile: run the layers compiled by torch.compile. None: on CUDA.
        cuda_graph: replay whole steps as one CUDA graph (see `mor.train.step_graph`); token-choice and threshold-choice
            then compute padded sets (see `mor.train.padded_sets`). None: where it can be done, its memory is a small
            part of the device's, and padding takes less time than it saves.
        gradient_checkpointing: recompute activations in the backward pass.
        official_aux_loss_scale: multiply the coefficient of the router's auxiliary loss by
            `gradient_accumulation_steps`, as the authors' code does without meaning to: its published 0.001 acted as
            0.016. False: the coefficient means what it says.
    """

    seed: int = 0
    steps: int = 1000
    micro_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    sequence_length: int = 512
    log_interval: int = 10
    evaluation_interval: int = 200
    evaluation_tokens: int = 65536
    calibration_tokens: int = 32768
    checkpoint_interval: int = 200
    keep_checkpoints: int = 2
    asynchronous_checkpoints: bool = False
    trackers: tuple[TrackerName, ...] = ()
    spike_threshold: float | None = 8.0
    spike_window: int = 100
    stop_at_spike: bool = False
    device: str = "auto"
    precision: Precision = "auto"
    parallel: Parallelism = "auto"
    shard_size: int | None = None
    gather_precision: GatherPrecision = "auto"
    reshard_after_forward: bool = True
    compile: bool | None = None
    cuda_graph: bool | None = None
    gradient_checkpointing: bool = False
    official_aux_loss_scale: bool = False

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "steps", "micro_batch_size", "gradient_accumulation_steps", "log_interval")
        _check_at_least(self, 0, "evaluation_interval", "evaluation_tokens", "calibration_tokens")
        _check_at_least(self, 0, "checkpoint_interval", "seed")
        _check_at_least(self, 1, "keep_checkpoints", "shard_size")
        _check_at_least(self, 2, "sequence_length", "spike_window")
        for tracker in self.trackers:
            _check_choice("trackers", tracker, TrackerName)
        if self.spike_threshold is not None and not self.spike_threshold > 0:
            raise ValueError(f"spike_threshold={self.spike_threshold} must be positive; None turns detection off")
        _check_choice("precision", self.precision, Precision)
        _check_choice("parallel", self.parallel, Parallelism)
        _check_choice("gather_precision", self.gather_precision, GatherPrecision)

    @property
    def tokens_per_step(self) -> int:
        """Input tokens of one optimizer step."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.sequence_length


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """One training run.

    Args:
        output: run folder: options.json, metrics.jsonl, checkpoints, final model, summary.json.
        model: keyword arguments of `MorConfig`. Vocabulary size and end-of-text token come from the data's tokenizer
            when they are not given.
        initial_model: folder of a model to start from instead of random weights; `model` then overrides its
            configuration.
    """

    output: str = "runs/mor"
    model: dict[str, Any] = field(default_factory=dict)
    initial_model: str | None = None
    data: DataOptions = field(default_factory=DataOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("output='' must name the run folder")
        warmup, decay = self.warmup_steps, self.decay_steps
        if self.schedule.kind == "trapezoid" and warmup + decay > self.training.steps:
            raise ValueError(
                f"warmup_steps={warmup} and decay_steps={decay} do not fit into steps={self.training.steps}; "
                "lower one of them or train longer"
            )
        if self.schedule.kind == "cosine" and warmup > self.training.steps:
            raise ValueError(f"warmup_steps={warmup} must be at most steps={self.training.steps}")

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up: as given, or 5% of the run."""
        given = self.schedule.warmup_steps
        return round(0.05 * self.training.steps) if given is None else given

    @property
    def decay_steps(self) -> int:
        """Steps of linear decay: as given, or 20% of the run."""
        given = self.schedule.decay_steps
        return round(0.2 * self.training.steps) if given is None else given
