"""A run killed at twenty random moments, resumed each time, is the same run."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mor.config import to_dict
from mor.files import TEMPORARY, write_json
from mor.train.checkpoint import list_checkpoints
from mor.train.journal import read_journal
from mor.train.options import RunOptions
from tests.train.test_resume import assert_same_run
from tests.train.tiny_run import tiny_options

STEPS = 80
SECONDS = 60
START_UPS, STEPPING, WRITING = 4, 10, 6


def mor_train(options_file: str, output: str) -> None:
    """`mor train` in a process of its own; what it says is not shown."""
    import torch

    from mor.cli import main

    torch.set_num_threads(1)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    os._exit(main(["train", "--options", options_file, "--resume", "--out", output]))


@dataclass(frozen=True)
class Progress:
    """What a run has written: the last step in metrics.jsonl, the newest checkpoint, and one half-written (0: none)."""

    step: int
    saved: int
    in_work: int

    @property
    def is_between_checkpoints(self) -> bool:
        """Whether steps are lost, and no checkpoint was about to save them."""
        return self.step > self.saved and not self.in_work


def look(output: Path, since: float = 0.0) -> Progress:
    """How far the run is; what has been half-written since before the time `since` is a dead process's."""
    lines, folder = output / "metrics.jsonl", output / "checkpoints"
    steps = [line["step"] for line in read_journal(lines)] if lines.exists() else []
    saved = [int(path.name[5:]) for path in list_checkpoints(folder)]
    in_work = [int(path.name.rpartition("-")[2]) for path in folder.glob(f"{TEMPORARY}step-*") if _age(path) > since]
    return Progress(*(max(values, default=0) for values in (steps, saved, in_work)))


def _age(path: Path) -> float:
    """When `path` was last changed; 0 when it is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


@dataclass(frozen=True)
class Moment:
    """When to kill: `delay` seconds after the run, in the phase `kind`, has come to `step`."""

    kind: str
    step: int
    delay: float

    def has_come(self, progress: Progress) -> bool:
        """Whether only the delay is left to wait."""
        reached = {"start": self.step, "step": progress.step, "write": progress.in_work}
        return reached[self.kind] >= self.step


def draw_moments(moments: random.Random) -> list[Moment]:
    """In the order of the steps they aim at; those of a start-up come whenever it is their turn."""
    kinds = ["start"] * START_UPS + ["step"] * STEPPING + ["write"] * WRITING
    moments.shuffle(kinds)
    steps = sorted(moments.sample(range(1, int(0.75 * STEPS)), len(kinds)))
    longest = {"start": 0.2, "step": 0.02, "write": 0.004}
    return [Moment(kind, step, moments.uniform(0, longest[kind])) for kind, step in zip(kinds, steps)]


def kill_at(moment: Moment, start: Callable[[], multiprocessing.Process], output: Path) -> Progress:
    """Start the run and kill it at `moment`; returns what it has left behind."""
    begun = time.time()
    process = start()
    while process.is_alive() and not moment.has_come(look(output, begun)):
        assert time.time() < begun + SECONDS, f"{moment} did not come: {look(output)}"
        time.sleep(0.002)
    time.sleep(moment.delay)
    process.kill()
    process.join(SECONDS)
    assert process.exitcode == -signal.SIGKILL, f"the run ended with {process.exitcode} before {moment}"
    return look(output, begun)


def run_options(output: Path, shards: Path) -> RunOptions:
    """Checkpoints fall between log lines and into them; dropout draws random numbers in every step."""
    return tiny_options(
        output,
        shards,
        model={"attention_dropout": 0.1},
        steps=STEPS,
        log_interval=2,
        checkpoint_interval=3,
        evaluation_interval=40,
    )


def starter(options: RunOptions, options_file: Path) -> Callable[[], multiprocessing.Process]:
    """A function that starts or resumes the run, in a fork of a process that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.worker"])
    write_json(options_file, to_dict(options))

    def start() -> multiprocessing.Process:
        process = context.Process(target=mor_train, args=(str(options_file), options.output))
        process.start()
        return process  # type: ignore[return-value]

    return start


def finish(process: multiprocessing.Process) -> None:
    """Let a run come to its end."""
    process.join(SECONDS)
    assert process.exitcode == 0


def test_a_run_killed_twenty_times_and_resumed_is_the_uninterrupted_run(tmp_path, shards):
    """Killed while it starts, between steps and while it writes a checkpoint: curve and weights are bit-equal."""
    seed = random.SystemRandom().randrange(2**32)
    print("seed of the moments:", seed)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(starter(run_options(whole, shards), tmp_path / "whole.json")())
    start = starter(run_options(cut, shards), tmp_path / "cut.json")
    moments = draw_moments(random.Random(seed))
    left = [look(cut)] + [kill_at(moment, start, cut) for moment in moments]
    finish(start())
    assert_same_run(whole, cut)
    assert_spread(moments, left)


def assert_spread(moments: list[Moment], left: list[Progress]) -> None:
    """The kills struck in every phase and at many steps. `left`: what was there before the first, and after each."""
    kills = list(zip((moment.kind for moment in moments), left[:-1], left[1:], strict=True))
    print(*kills, sep="\n")
    assert len(kills) == START_UPS + STEPPING + WRITING == 20
    assert len({after.step for _, _, after in kills}) >= 10
    assert any(kind == "start" and after.step <= before.step and not after.in_work for kind, before, after in kills)
    assert any(kind == "step" and after.is_between_checkpoints for kind, _, after in kills)
    assert any(kind == "write" and after.in_work > after.saved for kind, _, after in kills)
