import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.train.tiny_run import make_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards that all tests of training share."""
    return make_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], None]]:
    """Sets a limit on file sizes in bytes: to a program, writing past it is what a full disk is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)
