"""Runs by name: each recipe is a function that returns the options of one training run.

Step counts follow from FLOP budgets through `mor.model.cost`, never from a second table: twins of one family spend the
same forward FLOPs, whatever their layers and depths. The families are the paper's four sizes (arXiv 2507.10524, Tables
3, 6, 7 and 9) and the demo.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from mor.model.configuration_mor import MorConfig
from mor.model.cost import complete_flops, count_parameters, forward_flops, paper_flops, steps_for_budget
from mor.train.options import DataOptions, OptimizerOptions, RunOptions, ScheduleOptions, TrainingOptions

Kind = Literal["vanilla", "recursive", "mor"]
Recipe = Callable[[], RunOptions]

SEQUENCE_LENGTH = 2048
ROWS_PER_STEP = 1024
SMALLEST_BUDGET = 2e18  # of the paper's isoFLOP study; 5% of its steps are the warm-up of every run of a model
WARMUP_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class Size:
    """A base model of the paper (Table 6) and the forward FLOPs of its main runs, by the paper's rule.

    `recursive_layers`: layer applications of its recursive models, by number of recursions; layers are added where the
    recursions do not divide the base model's, and paid for with fewer steps.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    recursive_layers: dict[int, int]
    budget: float
    micro_batch_size: int

    @property
    def dimensions(self) -> dict[str, int]:
        """Of the vanilla model, as arguments of `MorConfig`; the vocabulary is that of the data."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_key_value_heads,
        }


def _vanilla_budget(size: Size, steps: int) -> float:
    """Forward FLOPs of `steps` steps of the vanilla model."""
    config = MorConfig(**_paper_model(size, "vanilla", 1))
    return forward_flops(config, steps * ROWS_PER_STEP * SEQUENCE_LENGTH, sequence_length=SEQUENCE_LENGTH)


def paper_sizes() -> dict[str, Size]:
    """The paper's four sizes. 360M: the budget of 9,438 vanilla steps, 16.5e18; 1.7B: 68.5e18 (Table 7)."""
    medium = Size(
        hidden_size=960,
        intermediate_size=2560,
        num_layers=32,
        num_heads=15,
        num_key_value_heads=5,
        recursive_layers={2: 32, 3: 32, 4: 34},
        budget=16.5e18,
        micro_batch_size=16,
    )
    return {
        "135m": Size(
            hidden_size=576,
            intermediate_size=1536,
            num_layers=30,
            num_heads=9,
            num_key_value_heads=3,
            recursive_layers={3: 32},
            budget=16.5e18,
            micro_batch_size=32,
        ),
        "360m": replace(medium, budget=_vanilla_budget(medium, 9438)),
        "730m": Size(
            hidden_size=1536,
            intermediate_size=4096,
            num_layers=26,
            num_heads=24,
            num_key_value_heads=8,
            recursive_layers={3: 26},
            budget=16.5e18,
            micro_batch_size=8,
        ),
        "1.7b": Size(
            hidden_size=2048,
            intermediate_size=8192,
            num_layers=24,
            num_heads=32,
            num_key_value_heads=32,
            recursive_layers={2: 24, 3: 26},
            budget=68.5e18,
            micro_batch_size=4,
        ),
    }


def paper_run(
    size_name: str,
    kind: Kind,
    *,
    num_recursions: int = 1,
    router: str = "expert_choice",
    kv_cache: str = "recursion",
) -> RunOptions:
    """A run of the paper at its FLOP budget: 2.1M tokens per step, trapezoid schedule, peak learning rate 3e-3.

    That learning rate is published for 360M only; the other sizes take it over. The authors' own step counts at 360M
    (their configuration files) are met exactly but for one run, which differs by one step.
    """
    size = paper_sizes()[size_name]
    model = _paper_model(size, kind, num_recursions, router=router, kv_cache=kv_cache)
    return RunOptions(
        output=f"runs/{_paper_name(size_name, kind, num_recursions, router, kv_cache)}",
        model=model,
        optimizer=OptimizerOptions(learning_rate=3e-3),
        schedule=ScheduleOptions(kind="trapezoid", warmup_steps=_warmup_steps(size, kind)),
        training=TrainingOptions(
            steps=_paper_steps(model, size.budget),
            micro_batch_size=size.micro_batch_size,
            gradient_accumulation_steps=ROWS_PER_STEP // size.micro_batch_size,
            sequence_length=SEQUENCE_LENGTH,
            evaluation_interval=500,
            evaluation_tokens=500 * SEQUENCE_LENGTH,
            checkpoint_interval=500,
        ),
    )


def _paper_steps(model: dict[str, Any], budget: float) -> int:
    tokens = ROWS_PER_STEP * SEQUENCE_LENGTH
    return steps_for_budget(MorConfig(**model), budget, tokens_per_step=tokens, sequence_length=SEQUENCE_LENGTH)


def _warmup_steps(size: Size, kind: Kind) -> int:
    """5% of the steps that the smallest budget buys the vanilla model, or three recursions of MoR for MoR runs."""
    model = _paper_model(size, kind, 3) if kind == "mor" else _paper_model(size, "vanilla", 1)
    return round(WARMUP_SHARE * _paper_steps(model, SMALLEST_BUDGET))


def _paper_model(
    size: Size, kind: Kind, num_recursions: int, *, router: str = "expert_choice", kv_cache: str = "recursion"
) -> dict[str, Any]:
    layers = size.num_layers if kind == "vanilla" else size.recursive_layers[num_recursions]
    changes = {"num_hidden_layers": layers, "max_position_embeddings": SEQUENCE_LENGTH}
    model: dict[str, Any] = size.dimensions | changes
    if kind != "vanilla":
        model |= {"num_recursions": num_recursions, "sharing": "middle_cycle"}
    if kind == "mor":
        model |= {"router": router, "kv_cache": kv_cache} | _router_options(router)
    return model


def _router_options(router: str) -> dict[str, Any]:
    """The paper's chosen settings (Tables 13 and 14), with linear routers: for expert-choice a sigmoid, alpha 0.1 and
    auxiliary loss 0.001; for token-choice a softmax, balancing loss 0.1 and, as in the authors' files, z-loss 1e-5."""
    if router == "token_choice":
        return {"router_activation": "softmax", "balancing_loss_coef": 0.1, "router_z_loss_coef": 1e-5}
    return {"router_activation": "sigmoid", "router_alpha": 0.1, "router_aux_loss_coef": 0.001}


def _paper_name(size_name: str, kind: Kind, num_recursions: int, router: str, kv_cache: str) -> str:
    parts = [size_name, kind]
    if kind != "vanilla":
        parts.append(str(num_recursions))
    if kind == "mor":
        parts += ["token"] * (router == "token_choice") + [kv_cache] * (kv_cache != "recursion")
    return "-".join(parts)


DEMO_STEPS = 900
DEMO_LENGTH = 256
DEMO_ROWS = 4
DEMO_VOCABULARY = 1024
DEMO_KINDS: tuple[Kind, ...] = ("mor", "vanilla", "recursive")


def demo_run(kind: Kind, *, mor_steps: int = DEMO_STEPS, vocab_size: int = DEMO_VOCABULARY) -> RunOptions:
    """One arm of the demo: 8 layers of width 96, three recursions of a block of two between two unshared layers.

    The MoR arm trains for `mor_steps`; its twins for as many as cost the same FLOPs by the complete rule, in which the
    head counts: in a model this small it weighs. All else is the same for the three.
    """
    config = MorConfig(**_demo_model(kind, vocab_size))
    budget = demo_flops(MorConfig(**_demo_model("mor", vocab_size)), mor_steps)
    steps = steps_for_budget(
        config, budget, tokens_per_step=DEMO_ROWS * DEMO_LENGTH, sequence_length=DEMO_LENGTH, rule=complete_flops
    )
    return RunOptions(
        output=f"runs/demo/{kind}",
        model=_demo_model(kind, vocab_size),
        data=DataOptions(path="runs/demo/data", verify=False),
        optimizer=OptimizerOptions(learning_rate=4e-3),
        schedule=ScheduleOptions(kind="trapezoid", decay_steps=round(0.4 * steps)),
        training=TrainingOptions(
            steps=steps,
            micro_batch_size=DEMO_ROWS,
            sequence_length=DEMO_LENGTH,
            log_interval=max(1, steps // 100),
            evaluation_interval=max(1, -(-steps // 6)),
            evaluation_tokens=8 * DEMO_ROWS * DEMO_LENGTH,
            calibration_tokens=8 * DEMO_ROWS * DEMO_LENGTH,
            checkpoint_interval=0,
            keep_checkpoints=1,
            device="cpu",
        ),
    )


def demo_flops(config: MorConfig, steps: int) -> float:
    """Forward FLOPs of `steps` demo steps of `config`, by the complete rule."""
    tokens = steps * DEMO_ROWS * DEMO_LENGTH
    return forward_flops(config, tokens, sequence_length=DEMO_LENGTH, rule=complete_flops)


def _demo_model(kind: Kind, vocab_size: int) -> dict[str, Any]:
    model: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": DEMO_LENGTH,
        "initializer_range": 0.07,
    }
    if kind != "vanilla":
        model |= {"num_recursions": 3, "sharing": "middle_cycle"}
    if kind == "mor":
        model |= {"router": "expert_choice", "num_calibration_points": 13}
    return model


PROSE_LENGTH = 512
PROSE_ROWS = 32
PROSE_STEPS: dict[str, int] = {"base": 9264, "prose": 2790}


def prose_run(stage: Literal["base", "prose"]) -> RunOptions:
    """A stage of a small model that writes prose: 7.7M parameters, 2 + 12 layer applications of width 288, three
    recursions.

    `base` reads its whole corpus three times, at a learning rate that never falls; `prose` goes on from it and reads
    the prose in it three times.
    """
    steps, is_last = PROSE_STEPS[stage], stage == "prose"
    return RunOptions(
        output=f"runs/8m-{stage}",
        initial_model="runs/8m-base/final" if is_last else None,
        model={
            "hidden_size": 288,
            "intermediate_size": 768,
            "num_hidden_layers": 14,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": PROSE_LENGTH,
            "num_recursions": 3,
            "sharing": "middle_cycle",
            "router": "expert_choice",
        },
        optimizer=OptimizerOptions(learning_rate=3e-3),
        schedule=ScheduleOptions(kind="trapezoid", decay_steps=round(0.5 * steps) if is_last else 0),
        training=TrainingOptions(
            steps=steps,
            micro_batch_size=PROSE_ROWS,
            sequence_length=PROSE_LENGTH,
            log_interval=25,
            evaluation_interval=1000,
            evaluation_tokens=131072,
            calibration_tokens=131072,
            checkpoint_interval=0,
            keep_checkpoints=1,
        ),
    )


def _paper_recipes() -> dict[str, Recipe]:
    recipes: dict[str, Recipe] = {}
    for size, recursions in (("135m", (3,)), ("360m", (2, 3, 4)), ("730m", (3,)), ("1.7b", (2, 3))):
        recipes[f"{size}-vanilla"] = partial(paper_run, size, "vanilla")
        for number in recursions:
            recipes[f"{size}-recursive-{number}"] = partial(paper_run, size, "recursive", num_recursions=number)
            recipes[f"{size}-mor-{number}"] = partial(paper_run, size, "mor", num_recursions=number)
        if size in ("360m", "1.7b"):
            recipes[f"{size}-mor-3-token"] = partial(paper_run, size, "mor", num_recursions=3, router="token_choice")
        if size == "360m":
            recipes["360m-mor-3-shared"] = partial(paper_run, size, "mor", num_recursions=3, kv_cache="shared")
    return recipes


RECIPES: dict[str, Recipe] = {
    "demo": partial(demo_run, "mor"),
    "demo-vanilla": partial(demo_run, "vanilla"),
    "demo-recursive": partial(demo_run, "recursive"),
    "8m-base": partial(prose_run, "base"),
    "8m-prose": partial(prose_run, "prose"),
    **_paper_recipes(),
}


def recipe(name: str) -> RunOptions:
    """The options of the recipe `name`. ValueError naming the nearest for an unknown name."""
    if name not in RECIPES:
        nearest = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown recipe {name!r}; did you mean {nearest!r}? `mor recipes` lists them all")
    return RECIPES[name]()


def is_demo(name: str | None) -> bool:
    """Whether `name` is one of the demo's arms, which train on the embedded corpus unless told otherwise."""
    return name is not None and name.partition("-")[0] == "demo" and name in RECIPES


@dataclass(frozen=True, kw_only=True)
class RecipeSummary:
    """A recipe in numbers. `parameters`: unique, without embeddings. `flops`: forward, over the whole run, by the rule
    that sets its budget: the paper's, or for the demo the complete one."""

    name: str
    num_layers: int
    num_unique_layers: int
    num_recursions: int
    router: str
    parameters: int
    steps: int
    tokens: int
    flops: float


def summaries() -> list[RecipeSummary]:
    """All recipes in numbers."""
    return [_summary(name, build()) for name, build in RECIPES.items()]


def _summary(name: str, options: RunOptions) -> RecipeSummary:
    config, training = MorConfig(**options.model), options.training
    tokens = training.steps * training.tokens_per_step
    rule = complete_flops if is_demo(name) else paper_flops
    return RecipeSummary(
        name=name,
        num_layers=config.num_hidden_layers,
        num_unique_layers=config.depth_plan.num_unique_layers,
        num_recursions=config.num_recursions,
        router=config.router,
        parameters=count_parameters(config).unique_non_embedding,
        steps=training.steps,
        tokens=tokens,
        flops=forward_flops(config, tokens, sequence_length=training.sequence_length, rule=rule),
    )
