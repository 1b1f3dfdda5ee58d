"""The routers by name."""

from __future__ import annotations

from .configuration_mor import MorConfig
from .expert_choice import ExpertChoiceRouter, FixedRouter, RandomRouter
from .routing import Router
from .threshold_choice import ThresholdChoiceRouter
from .token_choice import TokenChoiceRouter

_ROUTERS: dict[str, type[Router]] = {
    "expert_choice": ExpertChoiceRouter,
    "threshold_choice": ThresholdChoiceRouter,
    "token_choice": TokenChoiceRouter,
    "random": RandomRouter,
    "fixed": FixedRouter,
    "gate": FixedRouter,
}


def build_router(config: MorConfig) -> Router | None:
    """The router that a configuration names; None for `router="none"`."""
    return None if config.router == "none" else _ROUTERS[config.router](config)
