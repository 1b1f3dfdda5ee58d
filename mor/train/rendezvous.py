"""Where processes that torchrun starts again find each other, and not the traces of those before them.

torchrun's own store outlives its workers: addresses that a lost process left there are still in it after a restart, and
nothing that torchrun tells the new ones is both new and the same on all machines. So the first rank draws a number
and gives it to each of the others that asks now.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

SECONDS = 600.0
_PAUSE = 0.02


def agent_store(rank: int, size: int) -> Store | None:
    """A part of torchrun's store that no earlier process has written to; None where torchrun keeps no store.

    Raises DistStoreError, or TimeoutError, when not all ranks come within `SECONDS`.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, world_size=size, is_master=False, timeout=timedelta(seconds=SECONDS))
    return PrefixStore(f"mor/life/{agree_on_life(store, rank, size)}", store)


def agree_on_life(store: Store, rank: int, size: int) -> int:
    """A number that all of `size` ranks share and none before them had."""
    if rank == 0:
        life = store.add("mor/lives", 1)
        _answer(store, life, set(range(1, size)))
        return life
    question = uuid.uuid4().hex
    store.set(f"mor/question/{rank}", question)
    life = int(store.get(f"mor/answer/{question}"))
    store.set(f"mor/heard/{life}/{rank}", "")
    return life


def _answer(store: Store, life: int, waiting: set[int]) -> None:
    """Answer each rank until it has heard. The question found first may be one that an earlier process left."""
    end = time.monotonic() + SECONDS
    while waiting:
        for rank in waiting:
            if store.check([f"mor/question/{rank}"]):
                store.set(f"mor/answer/{store.get(f'mor/question/{rank}').decode()}", str(life))
        waiting = {rank for rank in waiting if not store.check([f"mor/heard/{life}/{rank}"])}
        if time.monotonic() > end:
            raise TimeoutError(f"ranks {sorted(waiting)} did not come within {SECONDS:.0f} s")
        time.sleep(_PAUSE)
