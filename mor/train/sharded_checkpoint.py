"""Models and checkpoints that several ranks write together: whole tensors, each in the file of one rank.

    model-00001-of-00002.safetensors, ..., model.safetensors.index.json    sharded as transformers shards models
    training_state-00001-of-00002.safetensors, ...

The rows of a tensor are brought together on the rank that writes it, and no rank writes much more than its share. So a
checkpoint of any number of ranks is a model that `from_pretrained` loads, and resumes on any other number of ranks,
reading the rows it needs. torch's own distributed checkpoints would do neither without a second pass, and their index
is a pickle, which may run anything when it is read.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from mor.files import new_folder, sync
from mor.model.modeling_mor import MorForCausalLM
from mor.train import checkpoint
from mor.train.ranks import Ranks
from mor.train.sharded_tensor import gather_to

WEIGHTS, STATE = "model", "training_state"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Staged:
    """What one rank writes, on its host: tensors of the model and of the training state."""

    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What one rank wrote: fingerprints by file, and the bytes of each of the model's tensors in it."""

    files: dict[str, dict[str, Any]]
    weights: dict[str, int]


def model_tensors(model: MorForCausalLM) -> dict[str, Tensor]:
    """Parameters, tied ones once, and the buffers that are saved."""
    buffers = dict(model.named_buffers())
    return dict(model.named_parameters()) | {name: buffers[name] for name in model.state_dict() if name in buffers}


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that no later step changes."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def stage(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The whole tensors that this rank is to write, on its host. All ranks must call it, with the same names.

    Spread tensors go to the rank that has least so far; of the others the first rank's count.
    """
    loads = [0] * ranks.size
    mine: dict[str, Tensor] = on_host({n: t for n, t in tensors.items() if not isinstance(t, DTensor)})
    mine = mine if ranks.is_first else {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            owner = loads.index(min(loads))
            loads[owner] += tensor.numel()
            whole = gather_to(tensor, owner)
            if whole is not None:
                mine[name] = whole
    return mine


def save(
    folder: Path, step: int, *, model: MorForCausalLM, staged: Staged, values: dict[str, Any], keep: int, ranks: Ranks
) -> Path:
    """Write checkpoint `step` into `folder`, each rank its part, then remove old ones as `checkpoint.save` does.

    Raises CheckpointError on every rank when one cannot write; what was in `folder` before is then still there.
    """
    path = checkpoint.path_of(folder, step)

    def finish(partial: Path, parts: list[_Part]) -> None:
        _write_model_files(partial, model, parts)
        files = {name: print_ for part in parts for name, print_ in part.files.items()}
        own = {entry.name: checkpoint.fingerprint(entry) for entry in partial.iterdir() if entry.name not in files}
        checkpoint.write_values(partial, step, values, files | own)

    with checkpoint.named_failure(path):
        ranks.first(lambda: checkpoint.prepare(folder))
        _write_together(path, staged, finish, ranks)
    ranks.first(lambda: checkpoint.remove_old(folder, step, keep))
    return path


def export(path: Path, model: MorForCausalLM, tokenizer: PreTrainedTokenizerBase, ranks: Ranks) -> None:
    """Write a spread model with its tokenizer to the folder `path`, as `from_pretrained` loads it."""

    def finish(partial: Path, parts: list[_Part]) -> None:
        _write_model_files(partial, model, parts)
        tokenizer.save_pretrained(partial)

    _write_together(path, Staged(weights=stage(model_tensors(model), ranks), tensors={}), finish, ranks)


def _write_together(path: Path, staged: Staged, finish: Callable[[Path, list[_Part]], None], ranks: Ranks) -> None:
    """The folder `path` from the parts of all ranks; it appears when all are written, or not at all."""
    with ExitStack() as stack:
        partial = Path(ranks.first(lambda: str(stack.enter_context(new_folder(path, replace=True)))))
        parts = ranks.each(lambda: _write_part(partial, staged, ranks))
        ranks.first(lambda: finish(partial, parts))
        ranks.first(stack.close)


def _write_part(folder: Path, staged: Staged, ranks: Ranks) -> _Part:
    files = {}
    for kind, tensors in ((WEIGHTS, staged.weights), (STATE, staged.tensors)):
        if tensors:
            path = folder / _file_name(kind, ranks.rank, ranks.size)
            save_file(tensors, path, metadata={"format": "pt"})
            sync(path)
            files[path.name] = checkpoint.fingerprint(path)
    return _Part(files=files, weights={name: tensor.nbytes for name, tensor in staged.weights.items()})


def _file_name(kind: str, rank: int, size: int) -> str:
    return f"{kind}-{rank + 1:05d}-of-{size:05d}.safetensors"


def _write_model_files(folder: Path, model: MorForCausalLM, parts: list[_Part]) -> None:
    """Configuration, and the index that says which file holds which tensor."""
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [MorForCausalLM.__name__], torch.float32
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    places = {
        name: _file_name(WEIGHTS, rank, len(parts)) for rank, part in enumerate(parts) for name in sorted(part.weights)
    }
    size = sum(count for part in parts for count in part.weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
