"""Several sources as one, in given proportions."""

from collections.abc import Iterator, Sequence
from typing import Any

from mor.data.stream import DocumentStream, Position, Source


class Mixture:
    """The documents of several sources, mixed so that at every place their UTF-8 bytes stand as their weights.

    Nothing is drawn at random: the next document comes from the source that is furthest behind. The mixture ends with
    the source that ends first, so the proportions hold to the end. Raises ValueError for a weight that is not positive.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]) -> None:
        if not sources or len(sources) != len(weights) or min(weights) <= 0:
            raise ValueError(f"weights={list(weights)} must be positive, one for each of {len(sources)} sources")
        self.sources = tuple(sources)
        self.weights = tuple(weight / sum(weights) for weight in weights)

    def describe(self) -> dict[str, Any]:
        """The sources with their weights."""
        parts = [{"weight": w, "source": s.describe()} for s, w in zip(self.sources, self.weights)]
        return {"kind": "mixture", "parts": parts}

    def documents(self, position: Position | None = None) -> DocumentStream:
        """The documents, until one source has no more."""
        return MixtureStream(self, position)


class MixtureStream:
    """The documents of a `Mixture`; a position is that of each source, and the bytes it has given."""

    def __init__(self, mixture: Mixture, position: Position | None) -> None:
        places = position["sources"] if position else [None] * len(mixture.sources)
        self._weights = mixture.weights
        self._streams = [source.documents(place) for source, place in zip(mixture.sources, places)]
        self._bytes: list[int] = list(position["bytes"]) if position else [0] * len(places)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        index = min(range(len(self._streams)), key=lambda i: self._bytes[i] / self._weights[i])
        text = next(self._streams[index])
        self._bytes[index] += len(text.encode(errors="replace"))
        return text

    def position(self) -> Position | None:
        places = [stream.position() for stream in self._streams]
        return None if None in places else {"sources": places, "bytes": list(self._bytes)}

    def share(self) -> float | None:
        """That of the source which will end first, as far as is known."""
        return max((share for stream in self._streams if (share := stream.share()) is not None), default=None)
