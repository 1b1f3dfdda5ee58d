"""The studies known by name: each a function from the size of the data's vocabulary to its grid.

Models have 2 + 12 layer applications, so that 2, 3 and 4 recursions divide them; sizes are non-embedding parameters of
the vanilla model. FLOP budgets are those of the vanilla model, by the complete rule, in which the head counts.
"""

from __future__ import annotations

import difflib
from typing import Any

from mor.model.configuration_mor import MorConfig
from mor.model.cost import complete_flops, forward_flops
from mor.study.grid import Budget, Model, Recipe, Study, StudyFunction, grid

SEEDS = (0, 1, 2)
WIDTHS = {"2m": 128, "6m": 192, "11m": 256, "25m": 384}
LAYERS = 14
VANILLA_STEPS = 3000


def vanilla(width: int, vocabulary: int, *, layers: int = LAYERS) -> Model:
    """A Llama of `layers` layers with heads of 32."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": width * 8 // 3 // 32 * 32,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "num_key_value_heads": max(1, width // 64),
        "max_position_embeddings": 512,
    }


def recursive(width: int, vocabulary: int, recursions: int, sharing: str = "middle_cycle") -> Model:
    """Its recursive twin: every token takes all recursions."""
    return vanilla(width, vocabulary) | {"num_recursions": recursions, "sharing": sharing}


def mor(width: int, vocabulary: int, recursions: int = 3, **options: Any) -> Model:
    """Its MoR twin, expert-choice unless told otherwise."""
    return recursive(width, vocabulary, recursions) | {"router": "expert_choice"} | options


def flops_of_vanilla(width: int, vocabulary: int, recipe: Recipe, steps: int = VANILLA_STEPS) -> float:
    """Forward FLOPs of `steps` vanilla steps."""
    tokens = steps * recipe.rows * recipe.sequence_length
    config = MorConfig(**vanilla(width, vocabulary))
    return forward_flops(config, tokens, sequence_length=recipe.sequence_length, rule=complete_flops)


def _twins(width: int, vocabulary: int) -> dict[str, Model]:
    arms = {"vanilla": vanilla(width, vocabulary)}
    arms |= {f"recursive-{r}": recursive(width, vocabulary, r) for r in (2, 3)}
    return arms | {f"mor-{r}": mor(width, vocabulary, r) for r in (2, 3, 4)}


def twins(vocabulary: int) -> Study:
    """Equal tokens and equal FLOPs."""
    recipe, width = Recipe(), WIDTHS["11m"]
    budgets = [
        Budget(name="equal-tokens", steps=VANILLA_STEPS),
        Budget(name="equal-flops", flops=flops_of_vanilla(width, vocabulary, recipe)),
    ]
    return Study(
        name="twins",
        question="Is MoR better than its vanilla and recursive twins at equal tokens, and at equal FLOPs?",
        runs=grid(_twins(width, vocabulary), seeds=SEEDS, budgets=budgets, recipe=recipe),
        baseline="vanilla",
        mean_depths=(1.0, 1.5, 2.0),
    )


def controls(vocabulary: int) -> Study:
    """What the router itself is worth. The vanilla model of equal unique parameters has 2 + 4 layers."""
    width = WIDTHS["11m"]
    arms = {
        "mor-3": mor(width, vocabulary),
        "random": mor(width, vocabulary, router="random"),
        "gate": mor(width, vocabulary, router="gate"),
        "recursive-3": recursive(width, vocabulary, 3),
        "vanilla-equal-parameters": vanilla(width, vocabulary, layers=6),
    }
    return _equal_flops("controls", "Does the learnt router matter, or would less do as well?", arms, vocabulary)


def routers(vocabulary: int) -> Study:
    """Expert-choice, threshold-choice and token-choice, and how each is trained."""
    width = WIDTHS["11m"]
    token: Model = {"router": "token_choice", "router_activation": "softmax"}
    arms = {
        "mor-3": mor(width, vocabulary),
        "auxiliary-router": mor(width, vocabulary, causal_method="aux_router"),
        "threshold": mor(width, vocabulary, router="threshold_choice"),
        "token-balancing-loss": mor(width, vocabulary, **token, balancing="loss", balancing_loss_coef=0.1),
        "token-loss-free": mor(width, vocabulary, **token, balancing="loss_free"),
    }
    return _equal_flops("routers", "Which router, trained how?", arms, vocabulary)


def caches(vocabulary: int) -> Study:
    """Keys and values of each recursion, of the first, or both, for both routers."""
    width = WIDTHS["11m"]
    token: Model = {"router": "token_choice", "router_activation": "softmax"}
    arms = {"mor-3": mor(width, vocabulary)}
    arms |= {f"expert-{kv}": mor(width, vocabulary, kv_cache=kv) for kv in ("shared", "hybrid")}
    arms |= {f"token-{kv}": mor(width, vocabulary, **token, kv_cache=kv) for kv in ("recursion", "shared", "hybrid")}
    return _equal_flops("caches", "What does sharing keys and values cost?", arms, vocabulary)


def sharings(vocabulary: int) -> Study:
    """The four ways to share layers."""
    width = WIDTHS["11m"]
    arms = {"vanilla": vanilla(width, vocabulary)}
    for sharing in ("middle_cycle", "cycle", "middle_sequence", "sequence"):
        recursions = 3 if sharing.startswith("middle") else 2
        arms[sharing.replace("_", "-")] = recursive(width, vocabulary, recursions, sharing)
    return _equal_flops("sharings", "Which layers should be shared?", arms, vocabulary, baseline="vanilla")


def isoflop(vocabulary: int) -> Study:
    """Three sizes at three budgets, and where the best size of each budget lies."""
    recipe, runs = Recipe(), []
    middle = flops_of_vanilla(WIDTHS["6m"], vocabulary, recipe)
    budgets = [Budget(name=f"{factor:g}x", flops=factor * middle) for factor in (0.5, 1, 2)]
    for size in ("2m", "6m", "11m"):
        arms = {f"{kind}-{size}": model for kind, model in _pair(WIDTHS[size], vocabulary).items()}
        runs += grid(arms, seeds=(0,), budgets=budgets, recipe=recipe)
    return Study(
        name="isoflop",
        question="How large should a model be for a given number of FLOPs?",
        runs=tuple(runs),
        baseline="vanilla-6m",
    )


def smoke(vocabulary: int) -> Study:
    """Two arms, two seeds, minutes on a CPU: to see a study work."""
    recipe = Recipe(
        sequence_length=64, rows=4, evaluations=2, calibration_tokens=2048, evaluation_tokens=2048, device="cpu"
    )
    return Study(
        name="smoke",
        question="Does a study work from the first run to the last figure?",
        runs=grid(_pair(64, vocabulary), seeds=(0, 1), budgets=[Budget(name="tiny", steps=12)], recipe=recipe),
        baseline="vanilla",
        mean_depths=(1.5, 2.5),
        evaluation_tokens=4096,
    )


def _pair(width: int, vocabulary: int) -> dict[str, Model]:
    return {"vanilla": vanilla(width, vocabulary), "mor-3": mor(width, vocabulary)}


def _equal_flops(
    name: str, question: str, arms: dict[str, Model], vocabulary: int, *, baseline: str = "mor-3"
) -> Study:
    recipe = Recipe()
    budget = Budget(name="equal-flops", flops=flops_of_vanilla(WIDTHS["11m"], vocabulary, recipe))
    runs = grid(arms, seeds=SEEDS, budgets=[budget], recipe=recipe)
    return Study(name=name, question=question, runs=runs, baseline=baseline)


STUDIES: dict[str, StudyFunction] = {
    function.__name__: function for function in (twins, controls, routers, caches, sharings, isoflop, smoke)
}


def study(name: str, vocabulary: int) -> Study:
    """The study `name` on data of so many tokens. ValueError naming the nearest for an unknown name."""
    if name not in STUDIES:
        nearest = difflib.get_close_matches(name, STUDIES, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown study {name!r}; did you mean {nearest!r}? Known: {', '.join(STUDIES)}")
    return STUDIES[name](vocabulary)
