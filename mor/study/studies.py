"""The studies known by name: each a function from the size of the data's vocabulary to its grid.

Models have 2 + 12 layer applications, so that 2, 3 and 4 recursions divide them; sizes are non-embedding parameters of
the vanilla model. FLOP budgets are those of the vanilla model, by the complete rule, in which the head counts. Cells
that come out equal are one run: a recursive model costs what the vanilla one does, so its two budgets are the same.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from mor.model.configuration_mor import MorConfig
from mor.model.cost import complete_flops, forward_flops
from mor.study.grid import Budget, Measurement, Model, Recipe, Study, StudyFunction, StudyRun, grid

SEEDS = (0, 1, 2)
WIDTHS = {"2m": 128, "6m": 192, "11m": 256}
SIZE = "6m"
LAYERS = 14
VANILLA_STEPS = 1000
TOKEN_CHOICE: Model = {"router": "token_choice", "router_activation": "softmax"}


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


def recursive(
    width: int, vocabulary: int, recursions: int, sharing: str = "middle_cycle", *, layers: int = LAYERS
) -> Model:
    """Its recursive twin: every token takes all recursions."""
    return vanilla(width, vocabulary, layers=layers) | {"num_recursions": recursions, "sharing": sharing}


def mor(width: int, vocabulary: int, recursions: int = 3, **options: Any) -> Model:
    """Its MoR twin, expert-choice unless told otherwise."""
    return recursive(width, vocabulary, recursions) | {"router": "expert_choice"} | options


def flops_of_vanilla(width: int, vocabulary: int, recipe: Recipe, steps: int = VANILLA_STEPS) -> float:
    """Forward FLOPs of `steps` vanilla steps."""
    tokens = steps * recipe.rows * recipe.sequence_length
    config = MorConfig(**vanilla(width, vocabulary))
    return forward_flops(config, tokens, sequence_length=recipe.sequence_length, rule=complete_flops)


def twins(vocabulary: int) -> Study:
    """Equal tokens and equal FLOPs."""
    recipe, width = Recipe(), WIDTHS[SIZE]
    arms = {"vanilla": vanilla(width, vocabulary)}
    arms |= {f"recursive-{r}": recursive(width, vocabulary, r) for r in (2, 3)}
    arms |= {f"mor-{r}": mor(width, vocabulary, r) for r in (2, 3, 4)}
    arms["threshold-3"] = mor(width, vocabulary, router="threshold_choice")
    budgets = [
        Budget(name="equal-tokens", steps=VANILLA_STEPS),
        Budget(name="equal-flops", flops=flops_of_vanilla(width, vocabulary, recipe)),
    ]
    return Study(
        name="twins",
        question="Is MoR better than its vanilla and recursive twins at equal tokens, and at equal FLOPs?",
        runs=grid(arms, seeds=SEEDS, budgets=budgets, recipe=recipe),
        baseline="vanilla",
        is_headline=True,
    )


def controls(vocabulary: int) -> Study:
    """What the router itself is worth.

    `early-only`: all tokens take the first two of three recursions, which is MoR-3's mean depth. `vanilla-shallow`: a
    vanilla model of as many unique parameters, 2 + 4 layers.
    """
    width = WIDTHS[SIZE]
    arms = {
        "mor-3": mor(width, vocabulary),
        "random": mor(width, vocabulary, router="random"),
        "gate": mor(width, vocabulary, router="gate"),
        "early-only": recursive(width, vocabulary, 2, layers=2 + 2 * (LAYERS - 2) // 3),
        "recursive-3": recursive(width, vocabulary, 3),
        "vanilla-shallow": vanilla(width, vocabulary, layers=2 + (LAYERS - 2) // 3),
    }
    question = "Does the learnt router matter, or would less do as well?"
    return dataclasses.replace(_equal_flops("controls", question, arms, vocabulary), is_headline=True)


def routers(vocabulary: int) -> Study:
    """Expert-choice, threshold-choice and token-choice, and how each is trained."""
    width = WIDTHS[SIZE]
    arms = {
        "mor-3": mor(width, vocabulary),
        "auxiliary-router": mor(width, vocabulary, causal_method="aux_router"),
        "calibration-only": mor(width, vocabulary, causal_method="none"),
        "threshold-choice": mor(width, vocabulary, router="threshold_choice"),
        "token-balancing-loss": mor(width, vocabulary, **TOKEN_CHOICE, balancing="loss", balancing_loss_coef=0.1),
        "token-loss-free": mor(width, vocabulary, **TOKEN_CHOICE, balancing="loss_free"),
    }
    return _equal_flops("routers", "Which router, trained how?", arms, vocabulary)


def caches(vocabulary: int) -> Study:
    """Keys and values of each recursion, of the first, or both, for both routers."""
    width = WIDTHS[SIZE]
    token = TOKEN_CHOICE | {"balancing": "loss", "balancing_loss_coef": 0.1}
    arms = {"mor-3": mor(width, vocabulary)}
    arms |= {f"expert-{kv}": mor(width, vocabulary, kv_cache=kv) for kv in ("shared", "hybrid")}
    arms["token-recursion"] = mor(width, vocabulary, **token)
    arms |= {f"token-{kv}": mor(width, vocabulary, **token, kv_cache=kv) for kv in ("shared", "hybrid")}
    return _equal_flops("caches", "What does sharing keys and values cost?", arms, vocabulary, seeds=SEEDS[:2])


def sharings(vocabulary: int) -> Study:
    """The four ways to share layers, all with two recursions; the middle ones with three as well."""
    width, budgets = WIDTHS[SIZE], [Budget(name="equal-tokens", steps=VANILLA_STEPS)]
    kinds = {2: ("middle_cycle", "cycle", "middle_sequence", "sequence"), 3: ("middle_cycle", "middle_sequence")}
    arms = {"vanilla": vanilla(width, vocabulary)}
    for recursions, sharings in kinds.items():
        for sharing in sharings:
            arms[f"{sharing.replace('_', '-')}-{recursions}"] = recursive(width, vocabulary, recursions, sharing)
    return Study(
        name="sharings",
        question="Which layers should be shared?",
        runs=grid(arms, seeds=SEEDS[:2], budgets=budgets, recipe=Recipe()),
        baseline="vanilla",
    )


def isoflop(vocabulary: int) -> Study:
    """Three sizes at three budgets, and where the best size of each budget lies."""
    recipe, runs = Recipe(), list[StudyRun]()
    middle = flops_of_vanilla(WIDTHS[SIZE], vocabulary, recipe)
    budgets = [Budget(name=f"{factor:g}x", flops=factor * middle) for factor in (2, 1, 0.5)]
    for budget in budgets:  # the longest first: they end last
        for size, width in WIDTHS.items():
            runs += grid(_by_size(size, width, vocabulary), seeds=SEEDS[:1], budgets=[budget], recipe=recipe)
    return Study(
        name="isoflop",
        question="How large should a model be for a given number of FLOPs?",
        runs=tuple(runs),
        baseline=f"vanilla-{SIZE}",
    )


def gaps(vocabulary: int) -> Study:
    """The causal gap at three sizes."""
    recipe, runs = Recipe(), list[StudyRun]()
    budget = Budget(name="1x", flops=flops_of_vanilla(WIDTHS[SIZE], vocabulary, recipe))
    for size, width in WIDTHS.items():
        arms = {
            f"mor-3-{size}": mor(width, vocabulary),
            f"threshold-3-{size}": mor(width, vocabulary, router="threshold_choice"),
        }
        runs += grid(arms, seeds=SEEDS, budgets=[budget], recipe=recipe)
    return Study(
        name="gaps",
        question="What does deciding causally cost, at three sizes?",
        runs=tuple(runs),
        baseline=f"mor-3-{SIZE}",
    )


def rates(vocabulary: int) -> Study:
    """Whether the comparison hangs on the learning rate."""
    width, runs = WIDTHS[SIZE], list[StudyRun]()
    arms = {"vanilla": vanilla(width, vocabulary), "mor-3": mor(width, vocabulary)}
    for rate in (1.5e-3, 3e-3, 6e-3):
        recipe = Recipe(learning_rate=rate)
        budget = Budget(name=f"rate-{rate:g}", flops=flops_of_vanilla(width, vocabulary, recipe))
        runs += grid(arms, seeds=SEEDS[:1], budgets=[budget], recipe=recipe)
    return Study(
        name="rates",
        question="Is the peak learning rate of 3e-3 right for both?",
        runs=tuple(runs),
        baseline="vanilla",
    )


def smoke(vocabulary: int) -> Study:
    """Two arms, two seeds, minutes on a CPU: to see a study work."""
    recipe = Recipe(
        sequence_length=64,
        rows=4,
        evaluations=2,
        calibration_tokens=2048,
        evaluation_tokens=2048,
        measurement=Measurement(tokens=4096, dial_tokens=2048, dial_step=1, beyond=1),
        device="cpu",
    )
    arms = {"vanilla": vanilla(64, vocabulary), "mor-3": mor(64, vocabulary)}
    return Study(
        name="smoke",
        question="Does a study work from the first run to the last figure?",
        runs=grid(arms, seeds=SEEDS[:2], budgets=[Budget(name="tiny", steps=12)], recipe=recipe),
        baseline="vanilla",
    )


def _by_size(size: str, width: int, vocabulary: int) -> dict[str, Model]:
    return {
        f"vanilla-{size}": vanilla(width, vocabulary),
        f"recursive-3-{size}": recursive(width, vocabulary, 3),
        f"mor-3-{size}": mor(width, vocabulary),
    }


def _equal_flops(
    name: str, question: str, arms: dict[str, Model], vocabulary: int, *, seeds: Sequence[int] = SEEDS
) -> Study:
    """Arms beside MoR-3, at the FLOPs of the vanilla model."""
    recipe = Recipe()
    budget = Budget(name="equal-flops", flops=flops_of_vanilla(WIDTHS[SIZE], vocabulary, recipe))
    runs = grid(arms, seeds=seeds, budgets=[budget], recipe=recipe)
    return Study(name=name, question=question, runs=runs, baseline="mor-3")


STUDIES: dict[str, StudyFunction] = {
    function.__name__: function
    for function in (twins, controls, routers, caches, sharings, isoflop, gaps, rates, smoke)
}


def names(given: Sequence[str]) -> list[str]:
    """The names that were given; `all` stands for every study but the smoke test."""
    every = [name for name in STUDIES if name != "smoke"]
    return list(dict.fromkeys(name for word in given for name in (every if word == "all" else [word])))


def study(name: str, vocabulary: int) -> Study:
    """The study `name` on data of so many tokens. ValueError naming the nearest for an unknown name."""
    if name not in STUDIES:
        nearest = difflib.get_close_matches(name, STUDIES, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown study {name!r}; did you mean {nearest!r}? Known: {', '.join(STUDIES)}")
    return STUDIES[name](vocabulary)
