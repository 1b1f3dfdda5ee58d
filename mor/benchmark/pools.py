"""Pools of pages to compare models in: how much memory there is for keys and values.

"A pool that holds exactly 32 vanilla sequences" can be read in two ways, and both are offered:

- `32seq`: 32 sequences of the vanilla model at the longest request, every page reserved before it is needed. A program
  with a fixed batch of 32 has to set as much aside.
- `32mean`: 32 sequences of the vanilla model at the mean length of the requests, prompt and output. So much do 32
  requests hold when they are done; of Normal(256, 64) tokens it is a little more than half of the former.

Pages here are taken when they are needed, and a request that runs holds E[L^2] / 2 E[L] tokens on average, which is 136
of Normal(256, 64): so vanilla itself runs more than 32 at a time in either, about 1.9 times as many in a `32mean`
before requests are preempted. Each model is measured at its own best number, and vanilla gains from paging as MoR does.
"""

from __future__ import annotations

import re

from mor.benchmark.arms import Arm
from mor.benchmark.serving import pages_for, pages_in, vanilla_bytes
from mor.benchmark.workload import Workload


def parse_pool(text: str) -> tuple[float, str]:
    """`fit`, `2GiB`, `32seq` or `32mean` as a number and its unit. Raises ValueError for anything else."""
    if text == "fit":
        return 0.0, "fit"
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(GiB|seq|mean)", text)
    if match is None or not float(match[1]) > 0 or (match[2] != "GiB" and not float(match[1]).is_integer()):
        raise ValueError(
            f"pool {text!r} is neither fit, nor a size like 2GiB, nor a number of sequences like 32seq or 32mean"
        )
    return float(match[1]), match[2]


def pool_pages(pool: str, arm: Arm, workload: Workload, concurrency: int | None) -> int:
    """Pages of an arm in a pool. `fit` holds `concurrency` sequences at their longest."""
    amount, unit = parse_pool(pool)
    if unit == "fit":
        assert concurrency is not None
        return pages_for(arm, concurrency, workload.longest)
    if unit == "GiB":
        return pages_in(amount * 2**30, arm)
    length = workload.longest if unit == "seq" else round(workload.mean)
    return pages_in(vanilla_bytes(arm, round(amount), length), arm)
