"""Running a study: what is done is skipped, what was interrupted goes on, each finished run leaves a result.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mor.files import write_json
from mor.study.grid import Study, StudyRun, distinct
from mor.study.measure import VERSION, measure_run
from mor.study.places import Places
from mor.study.provenance import data_fingerprint
from mor.train.loop import train
from mor.train.progress import ProgressReporter
from mor.train.run_folder import check_same_options

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class StudyOutcome:
    """How often what happened. `failed`: names of runs that raised. `interrupted`: a signal or the time limit ended the
    study; run it again to go on."""

    skipped: int = 0
    ran: int = 0
    failed: tuple[str, ...] = ()
    interrupted: bool = False


def run_studies(studies: Sequence[Study], places: Places, *, tell: Tell = print) -> StudyOutcome:
    """Run what is missing of `studies` one after the other in this process; the first error ends it.

    Raises:
        ValueError: a folder holds the result of other options or other data, or the data's vocabulary differs from the
            grid's, or another process runs studies in the folder.
    """
    with places.claimed():
        runs = distinct(studies)
        missing = [run for run in runs if not is_done(run, places)]
        outcome = StudyOutcome(skipped=len(runs) - len(missing))
        for number, run in enumerate(missing, start=1):
            tell(f"run {number} of {len(missing)}: {run.name}, {run.options.training.steps} steps")
            if not finish_run(run, places):
                return dataclasses.replace(outcome, interrupted=True)
            outcome = dataclasses.replace(outcome, ran=outcome.ran + 1)
        return outcome


def finish_run(run: StudyRun, places: Places, *, progress: ProgressReporter | None = None, jobs: int = 1) -> bool:
    """Train a run from wherever it is, measure it and write its result; False when it was interrupted."""
    options = places.options(run)
    started = (places.result(run).parent / "options.json").exists()
    if train(options, resume=started, progress=progress).interrupted:
        return False
    write_json(places.result(run), measure_run(run, options, places, jobs=jobs))
    return True


def is_done(run: StudyRun, places: Places) -> bool:
    """Whether the run's folder holds its result. Raises ValueError when it is of other options, other data or
    another version."""
    path, options = places.result(run), places.options(run)
    if not path.is_file():
        return False
    result = json.loads(path.read_text(encoding="utf-8"))
    if result["version"] != VERSION:
        raise ValueError(
            f"{path} is a result of version {result['version']}, which was trained or measured in another way than "
            f"version {VERSION}; choose another --out"
        )
    check_same_options(result["options"], options)
    held_out = places.held_out or places.data
    for name, what, folder in (("data", "training", places.data), ("held_out", "held-out", held_out)):
        found, now = result["provenance"][name], data_fingerprint(folder)
        if found != now:
            raise ValueError(
                f"{path} is a result on other {what} data (manifest {found[:12]}, now {now[:12]}); choose another --out"
            )
    return True
