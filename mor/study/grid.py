"""What a study is: arms x seeds x budgets, written out as training runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mor.config import to_dict
from mor.model.configuration_mor import MorConfig
from mor.model.cost import complete_flops, steps_for_budget
from mor.train.options import DataOptions, OptimizerOptions, RunOptions, TrainingOptions
from mor.train.run_folder import MAY_CHANGE, flat_options

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
class Measurement:
    """What finished models are measured on and at.

    `tokens`: held-out tokens. `dial_tokens`: about how many of them for quality at other budgets and by number of
    recursions. `dial_step`: those budgets lie at these distances from 1 to R, and 0.05 from both ends. `beyond`:
    recursions more than were trained, for models without a router.
    """

    tokens: int = 262144
    dial_tokens: int = 131072
    dial_step: float = 0.25
    beyond: int = 3

    def mean_depths(self, num_recursions: int) -> list[float]:
        """The budgets between 1 and R."""
        steps = round((num_recursions - 1) / self.dial_step)
        even = [1 + i * self.dial_step for i in range(steps + 1)]
        return sorted({*even, 1.05, num_recursions - 0.05} if num_recursions > 1 else {1.0})


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One cell of the grid. `options.output` and `options.data.path` are set when it runs."""

    arm: str
    budget: str
    seed: int
    options: RunOptions
    measurement: Measurement = Measurement()

    @property
    def name(self) -> str:
        """The cell in words."""
        return f"{self.arm}--{self.budget}--seed-{self.seed}"

    @property
    def key(self) -> str:
        """The folder of the run: kind, size, steps, seed, and a hash of all that decides the result. Cells of one key,
        of one study or of several, are one run, trained once."""
        model, training = self.options.model, self.options.training
        options = {k: v for k, v in flat_options(to_dict(self.options)).items() if k not in MAY_CHANGE}
        text = json.dumps([options, dataclasses.asdict(self.measurement)], sort_keys=True)
        router, recursions = model.get("router", "none"), model.get("num_recursions", 1)
        kind = "vanilla" if recursions == 1 else f"{'recursive' if router == 'none' else router}-{recursions}"
        shape = f"{model.get('hidden_size')}x{model.get('num_hidden_layers')}"
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{kind}-{shape}-{training.steps}-seed-{training.seed}-{digest}".replace("_", "-")

    @property
    def shape(self) -> tuple[Model, int, int]:
        """Model, rows and row length: runs that agree in it run the same compiled code."""
        training = self.options.training
        return self.options.model, training.micro_batch_size, training.sequence_length

    @property
    def tokens(self) -> int:
        """Training tokens."""
        return self.options.training.steps * self.options.training.tokens_per_step


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question and the runs that answer it.

    `baseline`: the arm that others are compared with, seed by seed. `is_headline`: its second seed comes before the
    first of others, when several studies run together. Raises ValueError for a baseline that is no arm, and for two
    runs of one name.
    """

    name: str
    question: str
    runs: tuple[StudyRun, ...]
    baseline: str
    is_headline: bool = False

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


def distinct(studies: Sequence[Study]) -> list[StudyRun]:
    """The runs of all studies, each once, in the order in which they are worth having: seed by seed, of headline
    studies the first two seeds first."""
    ranked = [(max(0, run.seed - study.is_headline), run) for study in studies for run in study.runs]
    found: dict[str, StudyRun] = {}
    for _, run in sorted(ranked, key=lambda pair: pair[0]):
        found.setdefault(run.key, run)
    return list(found.values())


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all runs of a grid share but their model: rows, lengths, rates. `learning_rate` is the peak."""

    sequence_length: int = 512
    rows: int = 32
    learning_rate: float = 3e-3
    evaluations: int = 5
    calibration_tokens: int = 65536
    evaluation_tokens: int = 32768
    measurement: Measurement = Measurement()
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
                checkpoint_interval=0,
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
            arm=arm,
            budget=budget.name,
            seed=seed,
            options=recipe.options(model, recipe.steps(model, budget), seed),
            measurement=recipe.measurement,
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
