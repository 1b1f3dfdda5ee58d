"""Tiny models that tests build: random weights large enough for routers and attention to matter."""

import torch

from mor.model.configuration_mor import MorConfig
from mor.model.modeling_mor import MorForCausalLM

VOCABULARY = 64


def tiny_config(**changes) -> MorConfig:
    """Eight layer applications of a 32-wide model; with a sharing, three recursions (middle) or two (cycle)."""
    settings = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        eos_token_id=0,
        pad_token_id=0,
    )
    settings.update(changes)
    if settings.get("router", "none") != "none" or "sharing" in settings:
        settings.setdefault("sharing", "middle_cycle")
        recursions = {"none": 1, "cycle": 2, "sequence": 2}.get(settings["sharing"], 3)
        settings.setdefault("num_recursions", recursions)
    if settings.get("router") == "fixed":
        settings.setdefault("fixed_depths", [1, settings["num_recursions"], 2])
    return MorConfig(**settings)


def tiny_model(seed: int = 0, **changes) -> MorForCausalLM:
    """A model of `tiny_config`, in evaluation mode; threshold-choice as if training had moved its thresholds."""
    torch.manual_seed(seed)
    model = MorForCausalLM(tiny_config(**changes)).eval()
    if model.config.router == "threshold_choice":
        router = model.model.recursion.router
        router.running_thresholds.copy_(torch.linspace(0.15, -0.15, model.config.num_recursions))
        router.threshold_updates.fill_(1)
    return model


def random_ids(batch: int, size: int, seed: int = 0) -> torch.Tensor:
    """Token ids (batch, size), never the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, size), generator=generator)


def left_padding(*pads: int, size: int) -> torch.Tensor:
    """Attention mask with `pads[row]` padding columns on the left of each row."""
    return (torch.arange(size)[None] >= torch.tensor(pads)[:, None]).long()


ROUTERS = ("none", "expert_choice", "threshold_choice", "token_choice", "random", "fixed", "gate")
BUDGET_ROUTERS = ("expert_choice", "threshold_choice", "token_choice", "random")
KV_CACHES = ("recursion", "shared", "hybrid")
SHARINGS = ("none", "cycle", "middle_cycle", "sequence", "middle_sequence")


def architectures() -> list[dict[str, str]]:
    """Every router x KV policy x sharing that makes sense."""
    return [
        dict(router=router, kv_cache=kv_cache, sharing=sharing)
        for router in ROUTERS
        for kv_cache in KV_CACHES
        for sharing in SHARINGS
        if (router == "none" or sharing in ("cycle", "middle_cycle")) and (sharing != "none" or kv_cache == "recursion")
    ]


def label(architecture: dict[str, str]) -> str:
    """A test id for an architecture."""
    return "-".join(architecture.values())
