"""The validation split: which documents are kept apart, decided by nothing but their text."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["train", "validation"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A text, its length in UTF-8 bytes, and the number in [0, 1) that its sha256 spells."""

    text: str
    utf8_bytes: int
    share: float


def make_document(text: str) -> Document:
    """Raises ValueError for text that UTF-8 cannot hold."""
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the document that begins {text[:40]!r} is not valid Unicode: {error}") from error
    digest = hashlib.sha256(encoded).digest()
    return Document(text=text, utf8_bytes=len(encoded), share=int.from_bytes(digest[:8], "big") / 2**64)


class HashSplit:
    """Deals documents out: to validation when their hash falls below `validation_fraction`, else to train.

    The choice depends on no other document, and equal texts stay together. Only when that would leave a split empty
    does the text nearest to the border change sides; it is held back for that, so one document is kept in memory. A
    fraction of 0 gives no validation split. Raises ValueError for a fraction outside [0, 1).
    """

    def __init__(self, validation_fraction: float) -> None:
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"validation_fraction={validation_fraction} must be at least 0 and below 1")
        self.validation_fraction = validation_fraction
        self._held: list[Document] = []
        self._filled: set[Split] = set()

    def deal(self, documents: Iterable[Document]) -> Iterator[tuple[Split, Document]]:
        """Each document with its split. Raises ValueError when there are no two distinct documents to part."""
        for document in documents:
            yield from self.add(document)
        yield from self.finish()

    def add(self, document: Document) -> list[tuple[Split, Document]]:
        """The documents that can be dealt now that `document` is known, with their splits."""
        released = self._release(document)
        self._filled.update(side for side, _ in released)
        return released

    def finish(self) -> list[tuple[Split, Document]]:
        """The documents held back to the end. ValueError when there were no two distinct documents to part."""
        if self._held and not self._filled:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} needs two distinct documents, but the corpus has one; "
                "give more, or validation_fraction=0 for no validation split"
            )
        return [
            ("train" if self._side(document) == "validation" else "validation", document) for document in self._held
        ]

    def state_dict(self) -> dict[str, Any]:
        """What is held back and which splits are filled, as JSON."""
        text = self._held[0].text if self._held else None
        return {"held": text, "copies": len(self._held), "filled": sorted(self._filled)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as the one from which `state` was taken."""
        self._held = [make_document(state["held"])] * state["copies"] if state["copies"] else []
        self._filled = set(state["filled"])

    def _side(self, document: Document) -> Split:
        return "validation" if document.share < self.validation_fraction else "train"

    def _release(self, document: Document) -> list[tuple[Split, Document]]:
        """What can be dealt now that `document` is known."""
        side = self._side(document)
        if self.validation_fraction == 0 or len(self._filled) == 2:
            return [(side, document)]
        if not self._held:
            self._held = [document]
            return []
        nearest = self._held[0]
        if document.share == nearest.share:
            self._held.append(nearest)
            return []
        released: list[tuple[Split, Document]] = [(self._side(nearest), copy) for copy in self._held]
        if side != self._side(nearest):
            self._held = []
            return [*released, (side, document)]
        if (document.share < nearest.share) == (side == "train"):
            self._held = [document]
            return released
        return [(side, document)]
