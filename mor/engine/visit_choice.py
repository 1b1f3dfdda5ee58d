"""Which of the visits that were captured serves one that is wanted.

A visit of more slots, more turns, longer sequences, or with limits on the draw does all that a smaller one does, in a
little more time. So a few large ones serve everybody from the start, and the exact ones are captured when nobody waits.
"""

from __future__ import annotations

from collections import Counter

from mor.engine.slot_program import VisitShape

HASTE, PATIENCE = 32, 300
"""How often an exact visit is wanted in vain until it is captured though requests wait: where nothing was prepared, and
where visits were. Capturing takes as long as some hundred visits."""


class VisitChoice:
    """Remembers what is captured and what is wanted. `patience`: see `HASTE`."""

    def __init__(self) -> None:
        self.captured = set[VisitShape]()
        self.patience = HASTE
        self._wanted = Counter[VisitShape]()

    def choose(self, wanted: VisitShape) -> VisitShape:
        """The captured visit that costs least among those that serve; the wanted one itself if there is none, or if it
        was wanted often."""
        if wanted in self.captured:
            return wanted
        self._wanted[wanted] += 1
        serving = [shape for shape in self.captured if serves(shape, wanted)]
        if not serving or self._wanted[wanted] > self.patience:
            return wanted
        return min(serving, key=lambda shape: (shape.slots, shape.turns, shape.limited, shape.longest))

    def missing(self) -> VisitShape | None:
        """What was wanted most and is not captured."""
        for shape in self.captured & self._wanted.keys():
            del self._wanted[shape]
        return max(self._wanted, key=lambda shape: self._wanted[shape], default=None)


def serves(large: VisitShape, small: VisitShape) -> bool:
    """Whether one visit does all that another does. One of the block alone is of its own kind: in lockstep nobody may
    turn in it."""
    return (
        large.slots >= small.slots
        and large.turns >= small.turns
        and bool(large.turns) == bool(small.turns)
        and large.longest >= small.longest
        and large.limited >= small.limited
    )
