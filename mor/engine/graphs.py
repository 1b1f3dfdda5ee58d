"""Visits of the slots as CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mor.engine.slot_program import SlotProgram, VisitShape
from mor.engine.visit_choice import VisitChoice


class Graphs:
    """Visits as CUDA graphs, each captured when it is needed and nothing else that is captured serves; on a CPU, plain
    visits."""

    def __init__(self, program: SlotProgram) -> None:
        self._program = program
        self._graphs: dict[VisitShape, torch.cuda.CUDAGraph] = {}
        self.choice = VisitChoice()

    def visit(self, shape: VisitShape) -> bool:
        """One visit. True if it is known that a request ended in it."""
        if self._program.state.device.type != "cuda":
            return self._program.visit(shape)
        chosen = self.choice.choose(shape)
        self.prepare([chosen])
        self._graphs[chosen].replay()
        return False

    def prepare(self, shapes: Sequence[VisitShape]) -> None:
        """Capture visits of these shapes, if that was not done."""
        if self._program.state.device.type == "cuda":
            for shape in shapes:
                if shape not in self._graphs:
                    self._graphs[shape] = self._captured(shape)
                    self.choice.captured.add(shape)

    def prepare_missing(self) -> bool:
        """Capture the visit that was wanted most and is not there; False if there is none."""
        shape = self.choice.missing()
        if shape is not None:
            self.prepare([shape])
        return shape is not None

    def _captured(self, shape: VisitShape) -> torch.cuda.CUDAGraph:
        """Run the visit once with all slots empty, which compiles what it needs and changes nothing, and capture it."""
        kept = self._program.state.snapshot()
        self._program.state.empty()
        self._program.visit(shape)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool(), capture_error_mode="thread_local"):
            self._program.visit(shape)
        self._program.state.restore(kept)
        return graph

    def _pool(self) -> Any:
        """The memory of all graphs: they never run at the same time."""
        return next(iter(self._graphs.values())).pool() if self._graphs else None
