"""What a source of documents is, and streams of documents that can be left and entered again at any place."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

# Where a stream stands after the document it gave last: JSON, to be handed to the same source only.
Position = dict[str, Any]


class DocumentStream(Protocol):
    """Documents one at a time, as they are asked for."""

    def __iter__(self) -> Iterator[str]: ...

    def __next__(self) -> str: ...

    def position(self) -> Position | None:
        """Where to go on after the document given last; None when the source can only be read from its beginning."""
        ...

    def share(self) -> float | None:
        """About which part of the source has been given, from 0 to 1; None when its size is not known."""
        ...


class Source(Protocol):
    """Documents in a fixed order, and a description by which to tell whether two sources give the same ones."""

    def describe(self) -> dict[str, Any]:
        """JSON-able facts that change when the documents do."""
        ...

    def documents(self, position: Position | None = None) -> DocumentStream:
        """The documents, all of them or those after `position`."""
        ...


class CountedStream:
    """Documents of which every pass gives the same ones: going on means to pass over those given before."""

    def __init__(self, texts: Iterable[str], position: Position | None = None) -> None:
        self._texts = iter(texts)
        self._given = 0 if position is None else int(position["documents"])
        for _ in itertools.islice(self._texts, self._given):
            pass

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        text = next(self._texts)
        self._given += 1
        return text

    def position(self) -> Position | None:
        return {"documents": self._given}

    def share(self) -> float | None:
        return None


class UnknownStream(CountedStream):
    """Documents of unknown origin, which can be read once and only from the beginning."""

    def position(self) -> Position | None:
        return None


class GivenDocuments:
    """Documents in memory or from anywhere else, described by the caller, or not at all, as a source to read once."""

    def __init__(self, texts: Iterable[str], description: dict[str, Any] | None) -> None:
        self._texts = texts
        self._description = description

    def describe(self) -> dict[str, Any] | None:
        return self._description

    def documents(self, position: Position | None = None) -> DocumentStream:
        assert position is None
        return UnknownStream(self._texts)
