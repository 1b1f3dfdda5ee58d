"""Where a study finds its data and keeps its runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mor.data.manifest import read_manifest
from mor.files import locked
from mor.study.grid import StudyRun
from mor.train.options import RunOptions

RUNS = "runs"
RESULT = "result.json"
LOCK = ".lock"


@dataclass(frozen=True, kw_only=True)
class Places:
    """`out`: the folder of studies; runs lie in its folder `runs`. `data`: token shards to train on. `held_out`: token
    shards that finished models are measured on; None: the validation split of `data`."""

    out: Path
    data: str
    held_out: str | None = None

    def options(self, run: StudyRun) -> RunOptions:
        """The options of a run, with its folder and its data. ValueError when the data's vocabulary is another."""
        vocabulary = read_manifest(self.data).vocabulary_size
        if run.options.model["vocab_size"] != vocabulary:
            raise ValueError(
                f"run {run.name} is for {run.options.model['vocab_size']} tokens, {self.data} has {vocabulary}"
            )
        where = dataclasses.replace(run.options.data, path=self.data)
        return dataclasses.replace(run.options, output=str(self.out / RUNS / run.key), data=where)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep the folder for this process. ValueError when another runs studies there."""
        self.out.mkdir(parents=True, exist_ok=True)
        with locked(self.out / LOCK) as is_ours:
            if not is_ours:
                raise ValueError(f"{self.out} is in use by another `mor study`; wait for it, or choose another --out")
            yield

    def result(self, run: StudyRun) -> Path:
        """The file that a finished run leaves."""
        return self.out / RUNS / run.key / RESULT
