"""The models that are compared: dimensions and arms by name, with random weights and depths like a trained router's.

An arm is `vanilla`, `vanilla-R` (as many layer applications as R recursions need), `recursive-R` or `mor-R`; the latter
may add `-token` for token-choice, and both `-shared` or `-hybrid` for their keys and values, and `-lockstep` or
`-depthwise` for how the engine batches them where it decodes in slots (by default as `EngineOptions.lockstep` says).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mor.model.calibrate import calibrate
from mor.model.configuration_mor import MorConfig
from mor.model.decision import budget_shares
from mor.model.depth_plan import linear_capacities
from mor.model.modeling_mor import MorForCausalLM
from mor.recipes import paper_sizes

Routing = Literal["calibrated", "random"]

PAGE_ENTRIES = 16
CALIBRATION_ROWS, CALIBRATION_LENGTH = 8, 128
_NAME = re.compile(r"(vanilla|recursive|mor)(?:-(\d+))?(-token)?(?:-(shared|hybrid))?(?:-(lockstep|depthwise))?")
_SMALL: dict[str, dict[str, int]] = {
    "tiny": dict(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "small": dict(  # the 360M model at a fifth of its width
        vocab_size=8192,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=32,
        num_attention_heads=6,
        num_key_value_heads=2,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One model to measure.

    `mean_depth`: asked of the model with each request, None for its own. `wanted_depth`: the mean depth that generated
    tokens shall have, for which `mor.benchmark.settle` looks for what to ask; None where they are taken as they come.
    `routing`: in words, where its depths come from. `lockstep`, `page_entries`: see `EngineOptions`.
    """

    name: str
    model: MorForCausalLM
    tokenizer: Any
    mean_depth: float | None
    routing: str
    wanted_depth: float | None = None
    lockstep: bool | None = None
    page_entries: int = PAGE_ENTRIES


def dimensions(name: str) -> dict[str, Any]:
    """Dimensions of the vanilla model called `name`: tiny, small (14.2M parameters), or one of the paper's sizes."""
    if name in _SMALL:
        return dict(_SMALL[name])
    sizes = paper_sizes()
    if name not in sizes:
        raise ValueError(f"dimensions {name!r} are unknown; choose one of {', '.join((*_SMALL, *sizes))}")
    return dict(vocab_size=49152, **sizes[name].dimensions)


def arm_config(
    name: str, size: str, *, mean_depth: float | None = None, routing: Routing = "calibrated", max_length: int = 2048
) -> MorConfig:
    """The configuration of the arm `name`. Raises ValueError for a name that does not follow the rules above."""
    kind, number, token, cache, _ = _parse(name)
    values: dict[str, Any] = {**dimensions(size), "max_position_embeddings": max_length}
    if number:
        values["num_hidden_layers"] = layers_for(values["num_hidden_layers"], int(number))
    if kind == "vanilla":
        return MorConfig(**values)
    recursions = int(number or 1)
    values |= dict[str, Any](num_recursions=recursions, sharing="middle_cycle", kv_cache=cache or "recursion")
    if kind == "recursive":
        return MorConfig(**values)
    if token:
        return MorConfig(**values, router="token_choice")
    if routing == "calibrated":
        return MorConfig(**values, router="expert_choice")
    return MorConfig(**values, router="random", capacities=_capacities(mean_depth, recursions))


def _parse(name: str) -> tuple[str, str | None, str | None, str | None, str | None]:
    """Kind, number of recursions, whether it is token-choice, KV policy and batching, as they stand in the name."""
    match = _NAME.fullmatch(name)
    if match is not None:
        kind, number, token, cache, batching = match.groups()
        is_vanilla = kind == "vanilla" and not (token or cache or batching)
        is_recursive = kind != "vanilla" and number is not None and int(number) >= 2
        if is_vanilla or (is_recursive and not (kind == "recursive" and token)):
            return kind, number, token, cache, batching
    raise ValueError(f"arm {name!r} is unknown; write vanilla, vanilla-3, recursive-3, mor-3, mor-3-token-shared")


def layers_for(num_layers: int, num_recursions: int) -> int:
    """Layer applications, at least `num_layers`, of which all but the first and last divide among the recursions."""
    return 2 + -(-(num_layers - 2) // num_recursions) * num_recursions


def vanilla_twin(config: MorConfig) -> MorConfig:
    """The vanilla model with as many layer applications."""
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    return MorConfig(
        **{name: getattr(config, name) for name in (*names.split(), "head_dim", "max_position_embeddings")}
    )


def build_arm(
    name: str,
    size: str,
    *,
    mean_depth: float | None = None,
    routing: Routing = "calibrated",
    max_length: int = 2048,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Arm:
    """The arm `name` with random weights, always the same ones.

    `mean_depth`: wanted of what is generated, None is (R + 1) / 2; asked for as it stands until it is settled.
    `routing`: `calibrated` is the model's own router, whose thresholds are set to quantiles of its scores on random
    tokens; `random` gives each place in a sequence a random depth, the same in every sequence, at exact shares.
    """
    config = arm_config(name, size, mean_depth=mean_depth, routing=routing, max_length=max_length)
    torch.manual_seed(0)
    model: Any = MorForCausalLM(config).eval()
    model = model.to(device=device, dtype=dtype)
    asked, words = None, "none: every token takes all layers"
    if config.router == "random":
        words = "random: a hash of the token's place, at exact shares"
    elif config.router != "none":
        asked = _mean_depth(mean_depth, config.num_recursions)
        words = "calibrated: the model's random router, thresholds at quantiles of its scores on random tokens"
        _calibrate(model, asked)
    batching = _parse(name)[-1]
    return Arm(
        name=name,
        model=model,
        tokenizer=word_tokenizer(config.vocab_size),
        mean_depth=asked,
        routing=words,
        wanted_depth=asked,
        lockstep=None if batching is None else batching == "lockstep",
    )


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with a word per id, so that random tokens have a text."""
    tokenizer = Tokenizer(models.WordLevel({f"w{token}": token for token in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _calibrate(model: MorForCausalLM, mean_depth: float) -> None:
    generator = torch.Generator().manual_seed(0)
    size = CALIBRATION_ROWS, min(CALIBRATION_LENGTH, model.config.max_position_embeddings)
    rows = torch.randint(model.config.vocab_size, size, generator=generator)
    most = float(model.config.num_recursions)
    steps = (0.05, 0.1, 0.2, 0.4)  # closer together near what is wanted: scores of random weights are alike
    near = [mean_depth + sign * step for step in (0.0, *steps) for sign in (-1, 1)]
    calibrate(model, [rows], mean_depths=sorted({1.0, most, *(depth for depth in near if 1 < depth < most)}))


def _mean_depth(mean_depth: float | None, num_recursions: int) -> float:
    return (num_recursions + 1) / 2 if mean_depth is None else mean_depth


def _capacities(mean_depth: float | None, num_recursions: int) -> list[float]:
    shares = budget_shares(_mean_depth(mean_depth, num_recursions), linear_capacities(num_recursions))
    return [max(share, 1e-6) for share in shares]
