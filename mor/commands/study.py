"""Run a study: a declared grid of training runs, of which those that are done are skipped.

mor study                                    lists them
mor study twins --data shards --out studies/twins
mor study twins --out studies/twins --report   only writes the table and figures again, from stored results
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="name of a study; without one, lists them")
    parser.add_argument("--data", metavar="DIR", help="token shards to train and evaluate on")
    parser.add_argument("--out", metavar="DIR", help="folder of the study (default: studies/NAME)")
    parser.add_argument("--arms", type=lambda text: text.split(","), default=[], metavar="A,A,...", help="only these")
    parser.add_argument("--seeds", type=_numbers, default=[], metavar="S,S,...", help="only these")
    parser.add_argument("--plan", action="store_true", help="print the runs and what they cost, and run nothing")
    parser.add_argument("--report", action="store_true", help="only write table and figures, from stored results")


def run(arguments: argparse.Namespace) -> int:
    from mor.study.grid import only
    from mor.study.report import write_report
    from mor.study.studies import study

    if arguments.name is None:
        _list()
        return 0
    out = Path(arguments.out or f"studies/{arguments.name}")
    chosen = only(study(arguments.name, _vocabulary(arguments)), arms=arguments.arms, seeds=arguments.seeds)
    if arguments.plan:
        _plan(chosen.runs)
        return 0
    if not arguments.report:
        from mor.study.runner import run_study

        if arguments.data is None:
            raise ValueError(
                f"study {arguments.name!r} needs token shards: give --data DIR (`mor data build` makes them)"
            )
        outcome = run_study(chosen, out, arguments.data)
        if outcome.interrupted:
            print(f"stopped; go on with the same command. {outcome.skipped + outcome.ran} runs are done")
            return 130
        print(f"{outcome.ran} runs done now, {outcome.skipped} before")
    print(f"table: {write_report(chosen, out)}")
    return 0


def _vocabulary(arguments: argparse.Namespace) -> int:
    """Of the data; names and seeds of runs do not depend on it, so a report needs none."""
    from mor.data.manifest import read_manifest

    return 8192 if arguments.data is None else read_manifest(arguments.data).vocabulary_size


def _list() -> None:
    from mor.study.studies import STUDIES

    for name, function in STUDIES.items():
        found = function(8192)
        print(f"{name:<10} {len(found.runs):>3} runs  {found.question}")


def _plan(runs: tuple[object, ...]) -> None:
    from mor.model.configuration_mor import MorConfig
    from mor.model.cost import count_parameters, training_flops
    from mor.study.grid import StudyRun

    total = 0.0
    for run in runs:
        assert isinstance(run, StudyRun)
        config, training = MorConfig(**run.options.model), run.options.training
        tokens = training.steps * training.tokens_per_step
        spent = training_flops(config, tokens, sequence_length=training.sequence_length)
        total += spent
        size = count_parameters(config).unique_non_embedding / 1e6
        print(f"{run.name:<44} {size:6.2f}M  {training.steps:>6} steps  {tokens / 1e6:8.1f}M tokens  {spent:.2e} FLOPs")
    print(f"{len(runs)} runs, {total:.2e} training FLOPs")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 0,1,2") from None
