"""The tokens of a request and their text, in whichever way and order they are read."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from mor.data.tokenizer import byte_tokenizer
from mor.engine.detokenizer import Detokenizer
from mor.engine.outputs import TokenLog

BYTES = byte_tokenizer()
RUNS = st.lists(st.text(st.sampled_from("abé€"), max_size=6).map(str.encode), min_size=1, max_size=6)


def log_of(runs: list[bytes], *, stop: tuple[str, ...] = (), hide_last: bool = False) -> TokenLog:
    """A request that got these tokens and ended."""
    log = TokenLog(partial(Detokenizer, BYTES, stop))
    for run in runs:
        log.add(list(run), [1] * len(run))
    log.end(hide_last=hide_last)
    return log


def ends_of(runs: list[bytes]) -> list[tuple[int, int]]:
    """Where each run begins and ends."""
    sizes = [sum(map(len, runs[:count])) for count in range(len(runs) + 1)]
    return list(pairwise(sizes))


@given(RUNS, st.booleans(), st.sampled_from([(), ("b",)]))
def test_text_is_that_of_the_tokens(runs: list[bytes], hide_last: bool, stop: tuple[str, ...]) -> None:
    by_token = log_of(runs, stop=stop, hide_last=hide_last)
    expected = "".join(token.text for token in by_token.tokens(0, len(by_token)))
    in_runs = log_of(runs, stop=stop, hide_last=hide_last)
    assert "".join(in_runs.text(*ends) for ends in ends_of(runs)) == expected
    whole = log_of(runs, stop=stop, hide_last=hide_last)
    assert whole.text(0, len(whole)) == expected


def test_tokens_read_after_their_text_have_their_own() -> None:
    log = log_of([b"abc", b"de"])
    assert log.text(0, 3) == "abc"
    assert [token.text for token in log.tokens(0, 5)] == list("abcde")
    assert log.text(3, 5) == "de" and log.text(1, 4) == "bcd"


def test_text_that_was_held_back_comes_with_an_end_that_brings_no_token() -> None:
    log = TokenLog(partial(Detokenizer, BYTES))
    log.add(list("é".encode())[:1], [1])
    assert log.text(0, 1) == ""
    log.end(hide_last=False)
    assert log.text(1, 1) == "\ufffd"
