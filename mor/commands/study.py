"""Run studies: declared grids of training runs, of which those that are done are skipped.

mor study                                    lists them
mor study twins controls --data shards --held-out val-shards --out studies
mor study all --data shards --jobs 12 --minutes 9    in 12 processes, on all GPUs in turn; the same command goes on

Tables and figures of all that is done are then in OUT/report; `mor results OUT` writes them again.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mor.study.grid import Study, StudyRun
    from mor.study.runner import StudyOutcome


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="names of studies, or all but smoke: all; without one, lists them"
    )
    parser.add_argument("--data", metavar="DIR", help="token shards to train on")
    parser.add_argument("--held-out", metavar="DIR", help="token shards to measure on (validation split of --data)")
    parser.add_argument("--out", metavar="DIR", default="studies", help="folder of all studies (studies)")
    parser.add_argument("--arms", type=lambda text: text.split(","), default=[], metavar="A,A,...", help="only these")
    parser.add_argument("--seeds", type=_numbers, default=[], metavar="S,S,...", help="only these")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes that train at a time, on all GPUs in turn")
    parser.add_argument("--minutes", type=float, metavar="M", help="stop after so long, to go on later")
    parser.add_argument("--plan", action="store_true", help="print the runs and what they cost, and run nothing")


def run(arguments: argparse.Namespace) -> int:
    if not arguments.names:
        _list()
        return 0
    studies = _chosen(arguments)
    if arguments.plan:
        _plan(studies)
        return 0
    outcome = _train(studies, arguments)
    _write_report(Path(arguments.out))
    return _tell(outcome)


def _chosen(arguments: argparse.Namespace) -> list[Study]:
    from mor.study.grid import only
    from mor.study.studies import names, study

    vocabulary = _vocabulary(arguments)
    found = [study(name, vocabulary) for name in names(arguments.names)]
    return [only(each, arms=arguments.arms, seeds=arguments.seeds) for each in found]


def _train(studies: list[Study], arguments: argparse.Namespace) -> StudyOutcome:
    from mor.study.places import Places
    from mor.study.pool import run_in_parallel
    from mor.study.runner import run_studies

    if arguments.data is None:
        raise ValueError(f"study {studies[0].name!r} needs token shards: give --data DIR (`mor data build` makes them)")
    places = Places(out=Path(arguments.out), data=arguments.data, held_out=arguments.held_out)
    tell = functools.partial(print, flush=True)
    if arguments.jobs is None and arguments.minutes is None:
        return run_studies(studies, places, tell=tell)
    seconds = None if arguments.minutes is None else 60 * arguments.minutes
    jobs = 1 if arguments.jobs is None else arguments.jobs
    return run_in_parallel(studies, places, jobs=jobs, seconds=seconds, tell=tell)


def _tell(outcome: StudyOutcome) -> int:
    print(f"{outcome.ran} runs done now, {outcome.skipped} before")
    if outcome.failed:
        print(f"{len(outcome.failed)} runs failed: {', '.join(outcome.failed)}")
    if outcome.interrupted:
        print("stopped; go on with the same command")
        return 130
    return 1 if outcome.failed else 0


def _write_report(out: Path) -> None:
    from mor.study.report import write_report
    from mor.study.stored import read_place

    found = read_place(out)
    if any(findings.results for findings in found.values()):
        print(f"tables: {write_report(found, out / 'report')}")


def _vocabulary(arguments: argparse.Namespace) -> int:
    """Of the data, or else of what is there."""
    from mor.data.manifest import read_manifest
    from mor.study.results import found_vocabulary

    if arguments.data is not None:
        return read_manifest(arguments.data).vocabulary_size
    return found_vocabulary(Path(arguments.out))


def _list() -> None:
    from mor.study.studies import STUDIES

    for name, function in STUDIES.items():
        found = function(8192)
        print(f"{name:<10} {len(found.runs):>3} runs  {found.question}")


def _plan(studies: list[Study]) -> None:
    from mor.study.grid import distinct

    cells, runs = sum(len(study.runs) for study in studies), distinct(studies)
    flops = sum(_plan_run(run) for run in runs)
    tokens = sum(run.tokens for run in runs)
    print(f"{len(runs)} runs for {cells} cells, {tokens / 1e6:.0f}M tokens, {flops:.2e} training FLOPs")


def _plan_run(run: StudyRun) -> float:
    """Print what a run costs; its training FLOPs."""
    from mor.model.configuration_mor import MorConfig
    from mor.model.cost import count_parameters, training_flops

    config, training = MorConfig(**run.options.model), run.options.training
    spent = training_flops(config, run.tokens, sequence_length=training.sequence_length)
    size = count_parameters(config).unique_non_embedding / 1e6
    print(f"{run.name:<44} {size:6.2f}M  {training.steps:>6} steps  {run.tokens / 1e6:8.1f}M tokens  {spent:.2e} FLOPs")
    return spent


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 0,1,2") from None
