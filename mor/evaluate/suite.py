"""Small multiple-choice tasks made from held-out text, which need no download and move even for small models.

- `cloze`: the last word of a sentence among four words of the text that are about as frequent and as long.
- `next_sentence`: the sentence that follows among four, three of them from other documents.
- `agreement`: the verb that agrees with its subject, of a pair such as is/are; the words before it decide. In running
  text some sentences allow both, so that 100% cannot be reached.

The items depend on the documents and the seed alone.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mor.evaluate.backends import Backend

SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
WORD = re.compile(r"[a-z]{3,}")
PLAIN = re.compile(r"[A-Z][a-z,;:'\- A-Z]{30,300}[.!?]")
VERB_PAIRS = (("is", "are"), ("was", "were"), ("has", "have"), ("does", "do"))
NUM_CHOICES = 4


@dataclass(frozen=True, kw_only=True)
class Item:
    """A question: which of `choices` follows `context`? `answer` is the index of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, kw_only=True)
class SuiteScore:
    """A task's result. `accuracy`: the most probable choice is right; `accuracy_by_bytes`: that of the highest
    log-probability per UTF-8 byte. `chance`: what guessing gives. Standard error over items."""

    task: str
    items: int
    accuracy: float
    accuracy_error: float
    accuracy_by_bytes: float
    chance: float


def build_items(task: str, documents: Sequence[str], *, limit: int = 500, seed: int = 0) -> list[Item]:
    """At most `limit` items of a task of `TASKS`, from sentences of plain prose.

    Raises ValueError for an unknown task, and for documents that hold none.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r} is not built in; choose from {', '.join(TASKS)}")
    generator = random.Random(f"{task} {seed}")
    prose = [_sentences(document) for document in documents]
    items = TASKS[task](prose, generator)
    if not items:
        raise ValueError(f"task {task!r}: the text has no suitable sentences; give longer English prose")
    generator.shuffle(items)
    return items[:limit]


def score_items(task: str, items: Sequence[Item], backend: Backend, tokenizer: Any) -> SuiteScore:
    """How often the backend prefers the right choice."""
    pairs = [_ids(item.context, choice, tokenizer) for item in items for choice in item.choices]
    logs = iter(value for value, _ in backend.loglikelihoods(pairs))
    right = right_by_bytes = 0
    for item in items:
        found = [next(logs) for _ in item.choices]
        per_byte = [log / len(choice.encode()) for log, choice in zip(found, item.choices, strict=True)]
        right += _best(found) == item.answer
        right_by_bytes += _best(per_byte) == item.answer
    accuracy = right / len(items)
    return SuiteScore(
        task=task,
        items=len(items),
        accuracy=accuracy,
        accuracy_error=math.sqrt(accuracy * (1 - accuracy) / max(1, len(items) - 1)),
        accuracy_by_bytes=right_by_bytes / len(items),
        chance=sum(1 / len(item.choices) for item in items) / len(items),
    )


def _ids(context: str, choice: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Context and choice as tokens of the whole text, split where the context's own tokens end."""
    before = tokenizer(context, add_special_tokens=False)["input_ids"]
    whole = tokenizer(context + choice, add_special_tokens=False)["input_ids"]
    cut = min(len(before), len(whole) - 1)
    return whole[:cut], whole[cut:]


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda n: values[n])


def _sentences(document: str) -> list[str]:
    flat = " ".join(document.split())
    return [sentence for sentence in SENTENCE.split(flat) if PLAIN.fullmatch(sentence)]


def _shuffled(right: str, wrong: Sequence[str], context: str, generator: random.Random) -> Item:
    choices = [right, *wrong]
    generator.shuffle(choices)
    return Item(context=context, choices=tuple(choices), answer=choices.index(right))


def _cloze(prose: list[list[str]], generator: random.Random) -> list[Item]:
    frequency = Counter(word for sentences in prose for sentence in sentences for word in WORD.findall(sentence))
    alike: dict[tuple[int, int], list[str]] = {}
    for word in sorted(frequency):
        alike.setdefault(_likeness(word, frequency), []).append(word)
    items = []
    for sentence in (sentence for sentences in prose for sentence in sentences):
        context, _, last = sentence[:-1].rpartition(" ")
        others = [word for word in alike.get(_likeness(last, frequency), []) if word != last]
        if WORD.fullmatch(last) and len(others) >= NUM_CHOICES - 1:
            wrong = [f" {word}" for word in generator.sample(others, NUM_CHOICES - 1)]
            items.append(_shuffled(f" {last}", wrong, context, generator))
    return items


def _likeness(word: str, frequency: Counter[str]) -> tuple[int, int]:
    """What words must share to be alternatives: the octave of their frequency, and the length up to one."""
    return frequency[word].bit_length(), len(word) // 2


def _next_sentence(prose: list[list[str]], generator: random.Random) -> list[Item]:
    everywhere = list(dict.fromkeys(sentence for sentences in prose for sentence in sentences))
    items = []
    for sentences in prose:
        here = set(sentences)
        elsewhere = [sentence for sentence in everywhere if sentence not in here]
        if len(elsewhere) < NUM_CHOICES - 1:
            continue
        for first, second in pairwise(sentences):
            wrong = [f" {sentence}" for sentence in generator.sample(elsewhere, NUM_CHOICES - 1)]
            items.append(_shuffled(f" {second}", wrong, first, generator))
    return items


def _agreement(prose: list[list[str]], generator: random.Random) -> list[Item]:
    other = {verb: pair[1 - n] for pair in VERB_PAIRS for n, verb in enumerate(pair)}
    items = []
    for sentence in (sentence for sentences in prose for sentence in sentences):
        words = sentence.split(" ")
        places = [n for n, word in enumerate(words) if word in other and n >= 2]
        if places:
            verb = words[places[0]]
            context = " ".join(words[: places[0]])
            items.append(_shuffled(f" {verb}", [f" {other[verb]}"], context, generator))
    return items


TASKS: dict[str, Callable[[list[list[str]], random.Random], list[Item]]] = {
    "cloze": _cloze,
    "next_sentence": _next_sentence,
    "agreement": _agreement,
}
