"""The YAML configuration of the authors' training code, read as a `MorConfig`.

Only what changes the function of the model is taken; training options are passed over. The meaning of each key is that
of the authors' code (github.com/raymin0223/mixture_of_recursions), defaults included.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from mor.convert.initialization import kept_layers
from mor.model.configuration_mor import MorConfig
from mor.model.depth_plan import SHARINGS, Sharing

Layout = Literal["plain", "expert", "token"]

_SMOLLM = {"vocab_size": 49152, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "max_position_embeddings": 2048,
           "rope_theta": 10000.0, "initializer_range": 0.02, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
_SMOLLM2 = _SMOLLM | {"max_position_embeddings": 8192, "rope_theta": 100000.0}
_135M = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3}  # fmt: skip
_360M = {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
         "num_key_value_heads": 5}  # fmt: skip
_1700M = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
          "num_key_value_heads": 32}  # fmt: skip
_TINYLLAMA = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
              "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
              "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "initializer_range": 0.02,
              "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip

# Dimensions of the models that the authors' configurations name, by the last part of the name in lower case.
KNOWN_MODELS: Mapping[str, Mapping[str, Any]] = {
    "smollm": _SMOLLM | _360M,
    "smollm-135m": _SMOLLM | _135M,
    "smollm-360m": _SMOLLM | _360M,
    "smollm-1.7b": _SMOLLM | _1700M,
    "smollm2": _SMOLLM2 | _360M,
    "smollm2-135m": _SMOLLM2 | _135M | {"initializer_range": 1 / 24},
    "smollm2-360m": _SMOLLM2 | _360M,
    "smollm2-1.7b": _SMOLLM2 | _1700M | {"rope_theta": 130000.0},
    "tinyllama": _TINYLLAMA,
    "tinyllama-1.1b-intermediate-step-1431k-3t": _TINYLLAMA,
}

_REQUIRED_DIMENSIONS = ("vocab_size", *_360M)
_OTHER_DIMENSIONS = (
    "head_dim hidden_act max_position_embeddings initializer_range rms_norm_eps tie_word_embeddings rope_theta "
    "rope_scaling attention_bias attention_dropout mlp_bias pad_token_id bos_token_id eos_token_id"
).split()
# Keys of a Llama configuration that do not change the function.
_INERT_DIMENSIONS = (
    "use_cache torch_dtype dtype attn_implementation _attn_implementation pretraining_tp is_llama_config "
    "rope_interleaved architectures model_type transformers_version _name_or_path"
).split()
_SECTIONS = ("model_config", "recursive", "kv_sharing", "relaxation", "mor")
# Sections that only concern training and have a switch of their own.
_TRAINING_SECTIONS = ("evaluation", "wandb", "deepspeed", "profiler")


@dataclass(frozen=True, kw_only=True)
class OfficialOptions:
    """What a configuration of the authors says about its model.

    `layout`: how its state dict names the layers. `warmup_forwards`: training forwards after which capacity and
    balancing warm-ups are over. `unused_router`: whether auxiliary router weights exist that nothing reads.
    """

    config: MorConfig
    layout: Layout
    warmup_forwards: int
    unused_router: bool = False


def read_official_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML configuration and resolve its `${a.b}` references.

    Raises ValueError when the file is missing, is not a YAML mapping, or refers to a key it does not have.
    """
    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path}: expected a mapping of options, found {type(options).__name__}")
    bases = [base for base in options.get("defaults") or () if isinstance(base, str) and base != "_self_"]
    if bases:
        raise ValueError(f"{path}: builds on other files ({', '.join(bases)}); give the composed configuration")
    return _resolved(options, options, ())


def official_options(options: Mapping[str, Any], *, dimensions: Mapping[str, Any] | None = None) -> OfficialOptions:
    """Translate a configuration of the authors' code.

    `dimensions`: those of the base model (as in a Llama configuration) where the YAML's `model_config` does not
    override them; default: those of the model that the YAML names.

    Raises ValueError for a key that is unknown (naming the nearest), for options that no `MorConfig` can express
    (relaxation, layers dropped under KV sharing, ...), and for values that cannot work.
    """
    _refuse_unknown_sections(options)
    base = _base_model(options, dimensions)
    recursive = _Section(options, "recursive", "enable num_recursion sharing ln_share initialization base_depth")
    sharing_kv = _Section(options, "kv_sharing", "enable update_cache num_recursion sharing base_depth")
    mor = _Section(options, "mor", "enable type capacity rand_router router_type z_loss z_coeff temp expert token")
    relaxation = options.get("relaxation") or {}
    if relaxation.get("enable"):
        raise ValueError(
            f"relaxation.method={relaxation.get('method')!r}: relaxed (per-recursion) weights are not supported"
        )
    for section in (sharing_kv, mor):
        if section.on and not recursive.on:
            raise ValueError(f"{section.name}.enable=true needs recursive.enable=true")
    shape = _recursion(base, recursive, sharing_kv)
    if not mor.on:
        kv_cache = "shared" if sharing_kv.on else "recursion"
        return OfficialOptions(config=MorConfig(**base | shape, kv_cache=kv_cache), layout="plain", warmup_forwards=0)
    if shape["num_recursions"] == 1:
        raise ValueError("mor.enable=true with recursive.num_recursion=1: routing needs at least two recursions")
    kind = mor.choice("type", ("expert", "token"))
    router, warmup = (_expert if kind == "expert" else _token)(options, mor)
    config = MorConfig(**base | shape | router, kv_cache=_kv_cache(sharing_kv, kind, shape["sharing"]))
    unused = config.router == "random" and (options["mor"].get("expert") or {}).get("sampling") == "aux_router"
    return OfficialOptions(config=config, layout=kind, warmup_forwards=warmup, unused_router=unused)


class _Section:
    """A part of the configuration whose keys are all known."""

    def __init__(self, parent: Mapping[str, Any], name: str, known: str, *, path: str | None = None) -> None:
        self.name = path or name
        self.values = parent.get(name) or {}
        if not isinstance(self.values, Mapping):
            raise ValueError(f"{self.name}={self.values!r} must be a mapping")
        for key in self.values:
            if key not in known.split():
                raise ValueError(f"unknown key {self.name}.{key}; did you mean {_nearest(key, known.split())!r}?")

    @property
    def on(self) -> bool:
        return self.flag("enable")

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def flag(self, key: str) -> bool:
        value = self.get(key, False)
        if not isinstance(value, bool):
            raise ValueError(f"{self.name}.{key}={value!r} must be true or false")
        return value

    def number(self, key: str, default: float) -> float:
        return _number(self.get(key, default), f"{self.name}.{key}")

    def integer(self, key: str, default: int) -> int:
        value = self.number(key, default)
        if value != int(value):
            raise ValueError(f"{self.name}.{key}={value!r} must be a whole number")
        return int(value)

    def choice(self, key: str, choices: tuple[Any, ...], default: Any = None) -> Any:
        """One of `choices`; an absent key takes `default`, which must be among them when the key may be absent."""
        value = self.values.get(key, default)
        if value not in choices:
            raise ValueError(f"{self.name}.{key}={value!r}: choose one of {', '.join(map(repr, choices))}")
        return value


def _recursion(base: dict[str, Any], recursive: _Section, sharing_kv: _Section) -> dict[str, Any]:
    """Layers, recursions and sharing; layers that the authors' code drops are gone."""
    layers = base["num_hidden_layers"]
    if not recursive.on:
        return {"num_hidden_layers": layers, "num_recursions": 1, "sharing": "none"}
    num_recursions = recursive.integer("num_recursion", 1)
    if num_recursions == 1:
        return {"num_hidden_layers": recursive.integer("base_depth", layers), "num_recursions": 1, "sharing": "none"}
    sharing: Sharing = recursive.choice("sharing", SHARINGS[1:])
    kept = len(kept_layers(layers, num_recursions=num_recursions, sharing=sharing))
    if kept != layers and sharing_kv.on:
        raise ValueError(
            f"kv_sharing with {layers} layers and recursive.num_recursion={num_recursions}: the authors' code drops "
            f"{layers - kept} of them and then shares keys and values between the wrong layers; no configuration here "
            "expresses that"
        )
    return {"num_hidden_layers": kept, "num_recursions": num_recursions, "sharing": sharing}


def _kv_cache(sharing_kv: _Section, kind: str, sharing: str) -> str:
    if not sharing_kv.on:
        return "recursion"
    if kind != "expert" or not sharing_kv.flag("update_cache"):
        return "shared"
    if sharing != "middle_cycle":
        raise ValueError(f"kv_sharing.update_cache=true needs recursive.sharing='middle_cycle', not {sharing!r}")
    return "hybrid"


def _common_router(mor: _Section) -> dict[str, Any]:
    architecture = mor.choice("router_type", ("linear", "mlp", "wide_mlp"))
    return {
        # The authors' wide_mlp has the same code, and so the same width, as their mlp.
        "router_architecture": "linear" if architecture == "linear" else "mlp",
        "router_temperature": mor.number("temp", 1.0),
        "router_z_loss_coef": mor.number("z_coeff", 0.0) if mor.flag("z_loss") else 0.0,
    }


def _expert(options: Mapping[str, Any], mor: _Section) -> tuple[dict[str, Any], int]:
    """`MorConfig` keys of an expert-choice section, and the length of its warm-up in training forwards."""
    known = "cap_warmup_step router_func alpha sampling include_first coeff gating"
    expert = _Section(mor.values, "expert", known, path="mor.expert")
    accumulation = _accumulation(options)
    warmup = expert.integer("cap_warmup_step", _warmup_steps(options) * accumulation)
    keys = {
        "capacities": _capacities(mor.get("capacity")),
        "capacity_warmup_steps": warmup,
        "router_alpha": expert.number("alpha", 0.1),
        "gating": expert.choice("gating", ("weighted", "additive"), "weighted"),
    }
    if mor.flag("rand_router"):
        return keys | {"router": "random", "causal_method": "none"}, warmup
    if "router_func" not in expert.values:
        raise ValueError("mor.expert.router_func is missing; write null for no activation")
    activation = expert.choice("router_func", ("sigmoid", "tanh", None))
    sampling = expert.choice("sampling", ("aux_loss", "aux_router", None), None)
    return keys | _common_router(mor) | {
        "router": "expert_choice",
        "router_activation": activation or "identity",
        "causal_method": sampling or "none",
        "router_aux_loss_coef": expert.number("coeff", 0.001),
    }, warmup  # fmt: skip


def _token(options: Mapping[str, Any], mor: _Section) -> tuple[dict[str, Any], int]:
    """`MorConfig` keys of a token-choice section, and the length of its warm-up in training forwards."""
    known = "bal_warmup_step router_func alpha balancing coeff u gating"
    token = _Section(mor.values, "token", known, path="mor.token")
    if mor.flag("rand_router"):
        raise ValueError("mor.rand_router=true with mor.type='token': a random depth per token is not supported")
    activation = token.choice("router_func", ("softmax", "sigmoid", None), None) or "softmax"
    warmup = token.integer("bal_warmup_step", 0) * _accumulation(options)
    return _common_router(mor) | {
        "router": "token_choice",
        "router_activation": activation,
        "router_alpha": token.number("alpha", 1.0 if activation == "softmax" else 0.1),
        "gating": token.choice("gating", ("weighted", "additive"), "weighted"),
        "balancing": token.choice("balancing", ("loss", "loss_free", None), None) or "none",
        "balancing_loss_coef": token.number("coeff", 0.1),
        "balancing_update_rate": token.number("u", 0.001),
        "balancing_warmup_steps": warmup,
    }, warmup  # fmt: skip


def _capacities(value: Any) -> list[float] | None:
    """`mor.capacity`: a comma-separated string, a list, or null for the linear default."""
    if value is None:
        return None
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    return [_number(part, "mor.capacity") for part in parts]


def _accumulation(options: Mapping[str, Any]) -> int:
    """Gradient accumulation steps; as on one device when only the batch sizes are given."""
    given = options.get("gradient_accumulation_steps")
    if given is not None:
        return int(_number(given, "gradient_accumulation_steps"))
    total, per_device = options.get("total_batch_size"), options.get("per_device_train_batch_size")
    if total is None or per_device is None:
        return 1
    return max(1, round(_number(total, "total_batch_size") / _number(per_device, "per_device_train_batch_size")))


def _warmup_steps(options: Mapping[str, Any]) -> int:
    """Learning-rate warm-up in optimizer steps: 5 % of training when not given."""
    given = options.get("num_warmup_steps")
    if given is not None:
        return int(_number(given, "num_warmup_steps"))
    return int(0.05 * _number(options.get("num_train_steps") or 0, "num_train_steps"))


def _base_model(options: Mapping[str, Any], dimensions: Mapping[str, Any] | None) -> dict[str, Any]:
    """Dimensions of the model before layers are shared, as `MorConfig` keys."""
    known = (*_REQUIRED_DIMENSIONS, *_OTHER_DIMENSIONS, *_INERT_DIMENSIONS)
    override = _Section(options, "model_config", " ".join(known)).values
    base = dict(_named_model(options) if dimensions is None else dimensions) | override
    missing = [key for key in _REQUIRED_DIMENSIONS if base.get(key) is None]
    if missing:
        raise ValueError(
            f"model {_model_name(options)!r} is not known, and model_config lacks {', '.join(missing)}; "
            f"known models: {', '.join(KNOWN_MODELS)}"
        )
    if options.get("max_length") is not None and not options.get("use_pretrained_weights"):
        base["max_position_embeddings"] = int(_number(options["max_length"], "max_length"))
    scaling = base.pop("rope_scaling", None) or {"rope_type": "default"}
    base["rope_parameters"] = {"rope_theta": base.pop("rope_theta", 10000.0)} | dict(scaling)
    for name, values in (("rope_theta", base["rope_parameters"]), ("rms_norm_eps", base), ("initializer_range", base)):
        if name in values:
            values[name] = _number(values[name], name)
    return {key: value for key, value in base.items() if key not in _INERT_DIMENSIONS}


def _model_name(options: Mapping[str, Any]) -> str:
    return str(options.get("model_name_or_path") or options.get("model") or "")


def _named_model(options: Mapping[str, Any]) -> Mapping[str, Any]:
    return KNOWN_MODELS.get(_model_name(options).rstrip("/").rsplit("/", 1)[-1].lower(), {})


def _refuse_unknown_sections(options: Mapping[str, Any]) -> None:
    """A top-level key is a training option unless it is nearly a section's name or switches something on."""
    for key, value in options.items():
        if key in _SECTIONS or key in _TRAINING_SECTIONS:
            continue
        if near := difflib.get_close_matches(str(key), _SECTIONS, n=1, cutoff=0.85):
            raise ValueError(f"unknown section {key!r}; did you mean {near[0]!r}?")
        if isinstance(value, Mapping) and value.get("enable"):
            raise ValueError(f"unknown section {key!r} is enabled; what it does to the model is not known")


def _resolved(value: Any, root: Mapping[str, Any], trail: tuple[str, ...]) -> Any:
    """`value` with every string `${a.b}` replaced by what it refers to."""
    if isinstance(value, dict):
        return {key: _resolved(item, root, trail) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item, root, trail) for item in value]
    if not (isinstance(value, str) and value.startswith("${") and value.endswith("}") and ":" not in value):
        return value
    name = value[2:-1]
    if name in trail:
        raise ValueError(f"{value} refers to itself")
    found: Any = root
    for part in name.split("."):
        if not isinstance(found, dict) or part not in found:
            raise ValueError(f"{value} refers to a key that the configuration does not have")
        found = found[part]
    return _resolved(found, root, (*trail, name))


def _number(value: Any, name: str) -> float:
    """YAML 1.1 reads 1e-5 as a string, so strings are accepted."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    raise ValueError(f"{name}={value!r} must be a number")


def _nearest(key: Any, known: Collection[str]) -> str:
    return difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
