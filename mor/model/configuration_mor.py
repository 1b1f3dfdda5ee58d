"""Configuration of Mixture-of-Recursions models: every choice that changes the function, and nothing else."""

import difflib
import functools
from dataclasses import fields
from itertools import pairwise
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .depth_plan import KV_POLICIES, SHARINGS, DepthPlan, linear_capacities

ROUTERS = ("none", "expert_choice", "threshold_choice", "token_choice", "random", "fixed", "gate")
WITH_CAPACITIES = ("expert_choice", "threshold_choice", "random")
ROUTER_ARCHITECTURES = ("linear", "mlp", "wide_mlp")
ROUTER_ACTIVATIONS = {
    "expert_choice": ("sigmoid", "tanh", "identity"),
    "threshold_choice": ("sigmoid", "tanh", "identity"),
    "token_choice": ("softmax", "sigmoid"),
    "fixed": ("sigmoid", "tanh", "identity"),
    "gate": ("sigmoid", "tanh", "identity"),
}
CAUSAL_METHODS = ("aux_loss", "aux_router", "none")
GATINGS = ("weighted", "additive")
BALANCINGS = ("loss", "loss_free", "none")

# Keys that Hugging Face itself writes into, or passes along with, any configuration.
_HUGGING_FACE_KEYS = frozenset(
    "_name_or_path name_or_path model_type auto_map _commit_hash attn_implementation _attn_implementation "
    "_attn_implementation_internal _experts_implementation_internal experts_implementation torch_dtype "
    "output_attentions num_labels per_layer_config rope_theta rope_scaling partial_rotary_factor quantization_config "
    "is_decoder tie_last_hidden_states transformers_weights max_cache_len".split()
)


@strict
class MorConfig(PreTrainedConfig):
    r"""Configuration of a Llama-like decoder whose middle block is applied up to `num_recursions` times to each token.

    `num_recursions=1` is a vanilla model, `router="none"` the recursive baseline: the same code, so that a comparison
    compares one thing. Dimensions, rotary parameters and token ids are named as in `LlamaConfig`.

    Args:
        num_hidden_layers: layer *applications* of a fully recursed token (the paper's N_L), not unique layers.
        num_recursions: how often the shared block may be applied (the paper's N_r).
        sharing: `none | cycle | middle_cycle | sequence | middle_sequence` (arXiv 2507.10524, Table 1). Routers need a
            cycle sharing.
        kv_cache: `recursion` (own keys and values where a token was active), `shared` (those of the first recursion) or
            `hybrid` (own where active, the first recursion's elsewhere).
        router: `none` (every token takes every recursion), `expert_choice`, `threshold_choice` (its scores against
            running thresholds, in training as in decoding), `token_choice`, or a control: `random` (expert-choice on
            uniform scores), `fixed` (depths by position from `fixed_depths`), `gate` (every token takes every
            recursion, with the gated residual).
        router_architecture: `linear`, `mlp` (hidden width 2D) or `wide_mlp` (4D, as the paper says; the authors' code
            uses 2D for both, so its `wide_mlp` is our `mlp`).
        router_activation: `sigmoid | tanh | identity` for expert-choice and threshold-choice, `softmax | sigmoid` for
            token-choice. Default: `sigmoid` and `softmax`.
        router_alpha: factor on the gate; not applied with `identity`. Default 0.1, and 1.0 for softmax.
        router_temperature: divides the router's input.
        gating: `weighted` adds gate * block output to the residual stream, `additive` the output alone.
        capacities: share of tokens active at each recursion, non-increasing. Default (R - r) / R.
        capacity_warmup_steps: training forwards over which capacities fall from 1 to their value along a cosine.
        causal_method: what makes expert-choice decidable without the future: `aux_loss` (the router is trained to
            separate at 0.5), `aux_router` (a second router is trained to imitate it), or `none` (calibration only).
            Threshold-choice is decidable as it is; `aux_loss` keeps its scores off the threshold, `none` does not.
        router_aux_loss_coef: weight of the auxiliary loss.
        router_z_loss_coef: weight of the router z-loss; 0 is off.
        balancing: `loss`, `loss_free` (a bias moved by the training loop) or `none`; token-choice only.
        balancing_loss_coef: weight of the balancing loss.
        balancing_update_rate: step u of the loss-free bias.
        balancing_warmup_steps: training forwards in which every token takes all recursions; token-choice only.
        threshold_decay: of the moving average, step by step, that threshold-choice's thresholds are; 0 takes the last
            step's boundary score as it is.
        fixed_depths: depths given to positions 0, 1, 2, ... in turn by the `fixed` router.
        router_seed: seed of the `random` router outside training.
        mean_depth: default budget in block applications per token for causal decisions. None: the 0.5 threshold
            (expert-choice), the thresholds of training (threshold-choice) or the plain argmax (token-choice). A number
            needs a calibrated checkpoint.
        num_calibration_points: rows of the calibration table stored with the weights.

    Raises:
        ValueError: an unknown key (naming the nearest), or a value or combination that cannot work.
    """

    model_type = "mor"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "depths", "routing", "losses"]
    attribute_map = {}

    vocab_size: int = 49152
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 32
    num_attention_heads: int = 9
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    mlp_bias: bool = False

    num_recursions: int = 1
    sharing: str = "none"
    kv_cache: str = "recursion"

    router: str = "none"
    router_architecture: str = "linear"
    router_activation: str | None = None
    router_alpha: float | int | None = None
    router_temperature: float | int = 1.0
    gating: str = "weighted"
    capacities: list | tuple | None = None
    capacity_warmup_steps: int = 0
    causal_method: str = "aux_loss"
    router_aux_loss_coef: float | int = 0.001
    router_z_loss_coef: float | int = 0.0
    balancing: str = "loss"
    balancing_loss_coef: float | int = 0.1
    balancing_update_rate: float | int = 0.001
    balancing_warmup_steps: int = 0
    threshold_decay: float | int = 0.5
    fixed_depths: list | tuple | None = None
    router_seed: int = 0
    mean_depth: float | int | None = None
    num_calibration_points: int = 33

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_unknown_keys(type(self), kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.router_activation is None and self.router in ROUTER_ACTIVATIONS:
            self.router_activation = ROUTER_ACTIVATIONS[self.router][0]
        if self.router_alpha is None:
            self.router_alpha = 1.0 if self.router_activation == "softmax" else 0.1
        if self.capacities is None and self.router in WITH_CAPACITIES:
            self.capacities = linear_capacities(self.num_recursions)
        if self.capacities is not None:
            self.capacities = [float(c) for c in self.capacities]
        if self.fixed_depths is not None:
            self.fixed_depths = [int(d) for d in self.fixed_depths]
        elif self.router == "gate":
            self.fixed_depths = [self.num_recursions]
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        _check_dimensions(self)
        for name, choices in (
            ("sharing", SHARINGS),
            ("kv_cache", KV_POLICIES),
            ("router", ROUTERS),
            ("router_architecture", ROUTER_ARCHITECTURES),
            ("gating", GATINGS),
            ("causal_method", CAUSAL_METHODS),
            ("balancing", BALANCINGS),
            ("router_activation", ROUTER_ACTIVATIONS.get(self.router, (None, self.router_activation))),
        ):
            _check_choice(name, getattr(self, name), choices)
        plan = self.depth_plan
        if self.router != "none" and plan.is_sequence:
            raise ValueError(
                f"router={self.router!r} needs whole-block recursions, sharing='cycle' or 'middle_cycle'; "
                f"got sharing={self.sharing!r}"
            )
        _check_capacities(self)
        _check_thresholds(self)
        _check_fixed_depths(self)
        if self.mean_depth is not None and not 1 <= self.mean_depth <= self.num_recursions:
            raise ValueError(
                f"mean_depth={self.mean_depth} must lie between 1 and num_recursions={self.num_recursions}"
            )

    @property
    def depth_plan(self) -> DepthPlan:
        """Which weights, recursion and KV slot each layer application uses."""
        return _depth_plan(self.num_hidden_layers, self.num_recursions, self.sharing)

    @property
    def router_loss_weights(self) -> dict[str, float]:
        """Weights of the unweighted router losses, by name. The auxiliary router learns from its own loss alone, on
        detached inputs, so its weight only scales its gradient."""
        return {
            "sampling": float(self.router_aux_loss_coef),
            "aux_router": 1.0,
            "router_z": float(self.router_z_loss_coef),
            "balancing": float(self.balancing_loss_coef),
        }


def _refuse_unknown_keys(config_class: type, kwargs: dict[str, Any]) -> None:
    known = {f.name for f in fields(config_class)} | _HUGGING_FACE_KEYS
    known |= set(GenerationConfig._get_default_generation_params())
    for key in kwargs:
        if key in known or key.startswith("_"):
            continue
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        raise ValueError(f"unknown configuration key {key!r}; did you mean {nearest[0]!r}?")


@functools.cache
def _depth_plan(num_layers: int, num_recursions: int, sharing: str) -> DepthPlan:
    """One plan, whose steps are worked out once, for all who ask: costs are asked for row by row."""
    return DepthPlan(num_layers=num_layers, num_recursions=num_recursions, sharing=sharing)  # type: ignore[arg-type]


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}")


def _check_dimensions(config: "MorConfig") -> None:
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "head_dim", "max_position_embeddings"):  # fmt: skip
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    assert config.num_key_value_heads is not None and config.head_dim is not None
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads={config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        raise ValueError(f"head_dim={config.head_dim} must be even for rotary positions")
    if config.router_temperature <= 0:
        raise ValueError(f"router_temperature={config.router_temperature} must be positive")
    if config.num_calibration_points < 2:
        raise ValueError(f"num_calibration_points={config.num_calibration_points} must be at least 2")


def _check_capacities(config: "MorConfig") -> None:
    if config.capacities is None:
        return
    capacities = list(config.capacities)
    if len(capacities) != config.num_recursions:
        raise ValueError(f"capacities={capacities} needs one entry per recursion: {config.num_recursions}")
    if any(not 0 < c <= 1 for c in capacities):
        raise ValueError(f"capacities={capacities} must lie in (0, 1]")
    if any(later > earlier for earlier, later in pairwise(capacities)):
        raise ValueError(f"capacities={capacities} must not rise: a token that stopped cannot come back")


def _check_thresholds(config: "MorConfig") -> None:
    if not 0 <= config.threshold_decay < 1:
        raise ValueError(f"threshold_decay={config.threshold_decay} must lie in [0, 1)")
    if config.router == "threshold_choice" and config.causal_method == "aux_router":
        raise ValueError(
            "causal_method='aux_router' has nothing to imitate: router='threshold_choice' decides in training as it "
            "does in decoding; use 'aux_loss' or 'none'"
        )


def _check_fixed_depths(config: "MorConfig") -> None:
    if config.router == "fixed" and not config.fixed_depths:
        raise ValueError("router='fixed' needs fixed_depths, for instance [1, 2, 3]")
    for depth in config.fixed_depths or ():
        if not 1 <= depth <= config.num_recursions:
            raise ValueError(
                f"fixed_depths={config.fixed_depths}: depth {depth} must lie between 1 and {config.num_recursions}"
            )


__all__ = ["MorConfig"]
