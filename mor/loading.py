"""Finding and loading a model and its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mor.model.modeling_mor import MorForCausalLM

CONFIG = "config.json"


def find_model(path: str | Path) -> Path:
    """The folder of the model at `path`: a model folder, a run (its finished model, or else its newest checkpoint), or
    the folder of a demo (its MoR).

    Raises FileNotFoundError or ValueError naming what is missing.
    """
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"no such model: {folder} (give a model folder or the folder of a run)")
    for candidate in (folder, folder / "final", folder / "mor" / "final"):
        if (candidate / CONFIG).is_file():
            return candidate
    checkpoints = sorted(folder.glob(f"checkpoints/step-*/{CONFIG}"))
    if checkpoints:
        return checkpoints[-1].parent
    raise ValueError(f"{folder} holds no model: neither it nor a finished run or checkpoint in it has a {CONFIG}")


def load_model(path: str | Path, *, device: str = "auto") -> tuple[MorForCausalLM, Any]:
    """The model and tokenizer at `path`, in float32 on the CPU and as stored on a GPU, ready to evaluate.

    Raises ValueError for a folder that holds another kind of model or damaged weights.
    """
    import torch
    from safetensors import SafetensorError

    from mor.data.tokenizer import load_tokenizer
    from mor.model.modeling_mor import MorForCausalLM
    from mor.quiet import without_progress_bars

    folder = find_model(path)
    _check_kind(folder)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        with without_progress_bars():
            model = MorForCausalLM.from_pretrained(folder, dtype=torch.float32 if place == "cpu" else "auto")
    except SafetensorError as error:
        raise ValueError(f"{folder}: a weight file is damaged: {error}") from error
    torch.nn.Module.to(model, place)
    return model.eval(), load_tokenizer(tokenizer_place(folder))


def tokenizer_place(folder: Path) -> Path:
    """The model's own tokenizer, or for a checkpoint of a run that of its data."""
    options = folder.parent.parent / "options.json"
    if (folder / "tokenizer.json").is_file() or not options.is_file():
        return folder
    return Path(json.loads(options.read_text(encoding="utf-8"))["data"]["path"]) / "tokenizer"


def _check_kind(folder: Path) -> None:
    try:
        kind = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG} is not a configuration: {error}") from error
    if kind != "mor":
        raise ValueError(f"{folder} holds a {kind!r} model; convert it first: mor convert --from llama {folder} OUT")
