"""What the engine says of one HTTP request, between the engine and the client that reads it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from mor.serve.errors import ApiError, slow_reader
from mor.serve.messages import News


@dataclass(frozen=True, kw_only=True)
class Piece:
    """News of the choice number `choice` of a request."""

    choice: int
    news: News


class Stream:
    """News of all choices of a request: `feed` and `fail` on the engine's side, `accepted` and `next` on the reader's.

    It holds at most `max_unread` tokens for each choice, alternatives counted as tokens and a prompt's scores not. A
    client that leaves more than that unread is too slow and loses its request, so that it costs neither memory nor the
    others' time. `closed` is called once, when nothing more is wanted.
    """

    def __init__(self, num_choices: int, *, max_unread: int, closed: Callable[[Stream], None]) -> None:
        self.num_choices = num_choices
        self._max_unread, self._closed = max_unread * num_choices, closed
        self._unread: list[Piece] = []
        self._num_unread = 0
        self._open = set(range(num_choices))
        self._error: ApiError | None = None
        self._news = asyncio.Event()
        self._accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._is_closed = False

    @property
    def is_done(self) -> bool:
        """Whether nothing more will be fed."""
        return not self._open or self._error is not None

    def accept(self) -> None:
        """The engine has queued the whole request."""
        if not self._accepted.done():
            self._accepted.set_result(None)

    def feed(self, piece: Piece) -> None:
        """News, in order for each choice."""
        if self._is_closed or self._error is not None:
            return
        self._num_unread += len(piece.news.depths) + sum(len(token.top_logprobs) for token in piece.news.tokens)
        if self._num_unread > self._max_unread:
            self.fail(slow_reader(self._max_unread))
            return
        self._unread.append(piece)
        if piece.news.finished:
            self._open.discard(piece.choice)
        self._news.set()

    def fail(self, error: ApiError) -> None:
        """The request ends here, with an error; what was not read is dropped."""
        if self.is_done:
            return
        self._error = error
        self._unread.clear()
        self._num_unread = 0
        self.accept()
        self._news.set()
        self.close()

    async def accepted(self) -> None:
        """Wait until the engine has queued the request. Raises ApiError if it will not."""
        await self._accepted
        if self._error is not None:
            raise self._error

    async def next(self) -> list[Piece]:
        """All that is new, waiting for something; empty at the end. Raises ApiError when the request failed."""
        while not self._unread:
            if self._error is not None:
                raise self._error
            if not self._open or self._is_closed:
                return []
            self._news.clear()
            await self._news.wait()
        unread, self._unread, self._num_unread = self._unread, [], 0
        return unread

    def close(self) -> None:
        """The reader wants no more. What the engine still does for it is aborted."""
        if self._is_closed:
            return
        self._is_closed = True
        self._news.set()
        self._closed(self)
