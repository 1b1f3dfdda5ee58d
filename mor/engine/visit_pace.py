"""How many visits make a batch: as few as hide the host's work.

While the device makes one batch, the host reads the one before and queues the next. With too few visits in a batch the
device waits for the host. With too many, tokens come in large pieces, a request that has ended keeps its slot until two
batches later, and pages are reserved for visits that are far ahead.
"""

from __future__ import annotations

import math

MARGIN = 2.0
"""A batch is to take so many times the host's work."""

WAITLESS = 0.05
"""Of a batch's time: a host that waits less for it may as well have come late, and learns nothing of its length."""

FORGETTING = 0.05
"""A batch after which the host's longest work counts for so much less: it varies with prompts, and with who ends."""


class VisitPace:
    """`visits`: of the next batch, between `least` and `most`; of the first one `first`, or else `most`."""

    def __init__(self, most: int, least: int = 1, *, first: int | None = None) -> None:
        visits = most if first is None else first
        if not 1 <= least <= visits <= most:
            raise ValueError(
                f"batches of at least {least} and at most {most} visits, the first one of {visits}; "
                "at least 1, and no more than most"
            )
        self.visits, self.most = visits, most
        self._least = least
        self._longest = 0.0
        self._visit: float | None = None

    def saw(self, visits: int, *, worked: float, waited: float) -> None:
        """A batch of so many visits ended, `worked + waited` seconds after the one before: so long the host had work
        that could not wait, and so long it waited or did what could."""
        took = worked + waited
        self._longest = max(worked, (1 - FORGETTING) * self._longest)
        if waited <= WAITLESS * took:
            wanted = 2 * self.visits
        else:
            each = took / visits
            self._visit = each if self._visit is None else 0.8 * self._visit + 0.2 * each
            wanted = math.ceil(MARGIN * self._longest / self._visit)
        if wanted < self.visits:
            wanted = self.visits - 1  # visits that are too few cost more than those that are too many
        self.visits = max(self._least, min(self.most, wanted))
