"""What a study is: arms x seeds x budgets, written out as training runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mor.model.configuration_mor import MorConfig
from mor.model.cost import complete_flops, steps_for_budget
from mor.train.options import DataOptions, OptimizerOptions, RunOptions, TrainingOptions

Model = dict[str, Any]
UNPLACED = "studies"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What each run of a study may spend: `steps` for all alike, or forward FLOPs by the complete rule, which buy each
    arm steps of its own. Raises ValueError unless exactly one is given."""

    name: str
    steps: int | None = None
    flops: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.flops is None):
            raise ValueError(f"budget {self.name!r} has steps={self.steps} and flops={self.flops}; give one of them")


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One cell of the grid. `options.output` and `options.data.path` are set when it runs."""

    arm: str
    budget: str
    seed: int
    options: RunOptions

    @property
    def name(self) -> str:
        """The folder of the run in the study's."""
        return f"{self.arm}--{self.budget}--seed-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question and the runs that answer it.

    `baseline`: the arm that others are compared with, seed by seed. `mean_depths`: budgets at which finished models
    with a router are also evaluated. `evaluation_tokens`: held-out tokens for that. Raises ValueError for a baseline
    that is no arm, and for two runs of one name.
    """

    name: str
    question: str
    runs: tuple[StudyRun, ...]
    baseline: str
    mean_depths: tuple[float, ...] = ()
    evaluation_tokens: int = 262144

    def __post_init__(self) -> None:
        if self.baseline not in self.arms:
            raise ValueError(f"baseline {self.baseline!r} is no arm of {self.name!r}: {', '.join(self.arms)}")
        names = [run.name for run in self.runs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"study {self.name!r} has two runs named {twice[0]!r}")

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms in the order of their declaration."""
        return tuple(dict.fromkeys(run.arm for run in self.runs))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all runs of a grid share but their model: rows, lengths, rates. `learning_rate` is the peak."""

    sequence_length: int = 512
    rows: int = 32
    learning_rate: float = 3e-3
    evaluations: int = 10
    calibration_tokens: int = 131072
    evaluation_tokens: int = 65536
    device: str = "auto"

    def options(self, model: Model, steps: int, seed: int) -> RunOptions:
        """A run of `steps` steps."""
        return RunOptions(
            output=UNPLACED,
            model=model,
            data=DataOptions(),
            optimizer=OptimizerOptions(learning_rate=self.learning_rate),
            training=TrainingOptions(
                seed=seed,
                steps=steps,
                micro_batch_size=self.rows,
                sequence_length=self.sequence_length,
                log_interval=max(1, steps // 200),
                evaluation_interval=max(1, -(-steps // self.evaluations)),
                evaluation_tokens=self.evaluation_tokens,
                calibration_tokens=self.calibration_tokens,
                checkpoint_interval=max(1, steps // 4),
                keep_checkpoints=1,
                device=self.device,
            ),
        )

    def steps(self, model: Model, budget: Budget) -> int:
        """The steps that `budget` buys a model. Raises ValueError for less than half a step."""
        if budget.steps is not None:
            return budget.steps
        assert budget.flops is not None
        return steps_for_budget(
            MorConfig(**model),
            budget.flops,
            tokens_per_step=self.rows * self.sequence_length,
            sequence_length=self.sequence_length,
            rule=complete_flops,
        )


def grid(
    arms: Mapping[str, Model], *, seeds: Sequence[int], budgets: Sequence[Budget], recipe: Recipe
) -> tuple[StudyRun, ...]:
    """Every arm at every budget with every seed; the first seed of all arms comes first, so that an interrupted study
    has something to compare."""
    return tuple(
        StudyRun(
            arm=arm, budget=budget.name, seed=seed, options=recipe.options(model, recipe.steps(model, budget), seed)
        )
        for seed in seeds
        for budget in budgets
        for arm, model in arms.items()
    )


def only(study: Study, *, arms: Sequence[str] = (), seeds: Sequence[int] = ()) -> Study:
    """The study without other arms and seeds; the baseline stays. ValueError for an arm or seed it does not have."""
    known = {"arm": set(study.arms), "seed": {run.seed for run in study.runs}}
    wanted: dict[str, Sequence[object]] = {"arm": arms, "seed": seeds}
    for kind, values in wanted.items():
        if wrong := [value for value in values if value not in known[kind]]:
            there = ", ".join(str(value) for value in sorted(known[kind], key=str))
            raise ValueError(f"study {study.name!r} has no {kind} {wrong[0]!r}; it has {there}")
    kept = tuple(
        run
        for run in study.runs
        if (not arms or run.arm in (*arms, study.baseline)) and (not seeds or run.seed in seeds)
    )
    return dataclasses.replace(study, runs=kept)


StudyFunction = Callable[[int], Study]
"""From the size of the vocabulary, which is the data's, to a study."""
