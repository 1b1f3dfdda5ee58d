"""Requests to measure with: prompts, how much each generates, and when they come."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Prompts as token ids, and the tokens that each generates."""

    prompts: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def num_tokens(self) -> int:
        """Tokens generated in all."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return max(len(prompt) + length for prompt, length in zip(self.prompts, self.lengths, strict=True))

    @property
    def mean(self) -> float:
        """Tokens of a request on average, prompt and output."""
        return (self.num_tokens + sum(map(len, self.prompts))) / len(self)

    def shortened(self, tokens: int) -> Workload:
        """The same requests, none of which generates more than `tokens`."""
        return Workload(prompts=self.prompts, lengths=tuple(min(tokens, length) for length in self.lengths))

    def first(self, number: int) -> Workload:
        """Its first requests."""
        return Workload(prompts=self.prompts[:number], lengths=self.lengths[:number])

    def at_least(self, number: int) -> Workload:
        """Its requests over and over until there are `number`, or as they are if there are more."""
        times = max(1, -(-number // len(self)))
        again = Workload(prompts=self.prompts * times, lengths=self.lengths * times)
        return again.first(max(number, len(self)))

    def staggered(self, number: int) -> Workload:
        """As if its first `number` requests, which begin together, were at different places of their outputs: the first
        generates 1/number of its own, the next 2/number. A queue that has long been served looks like this; one that
        begins anew fills its pool in waves."""
        parts = (min(1.0, (place + 1) / number) for place in range(len(self)))
        lengths = tuple(max(1, round(part * length)) for part, length in zip(parts, self.lengths, strict=True))
        return Workload(prompts=self.prompts, lengths=lengths)


def random_workload(
    *, num_requests: int, vocab_size: int, prompt_tokens: int, mean: float, deviation: float, seed: int = 0
) -> Workload:
    """Random prompts of `prompt_tokens` tokens, to be continued by Normal(mean, deviation) tokens."""
    draw = random.Random(seed)
    lengths = tuple(normal_length(draw, mean, deviation) for _ in range(num_requests))
    prompts = tuple(tuple(draw.randrange(vocab_size) for _ in range(prompt_tokens)) for _ in range(num_requests))
    return Workload(prompts=prompts, lengths=lengths)


def text_workload(
    rows: Sequence[Sequence[int]],
    *,
    num_requests: int,
    prompt_tokens: int,
    mean: float,
    deviation: float,
    seed: int = 0,
) -> Workload:
    """As `random_workload`, with prompts from the beginnings of `rows`, used again in turn if they are too few."""
    draw = random.Random(seed)
    lengths = tuple(normal_length(draw, mean, deviation) for _ in range(num_requests))
    prompts = tuple(tuple(rows[number % len(rows)][:prompt_tokens]) for number in range(num_requests))
    return Workload(prompts=prompts, lengths=lengths)


def normal_length(draw: random.Random, mean: float, deviation: float) -> int:
    """A whole number from Normal(mean, deviation), drawn again until it lies in 1 .. 2 mean - 1."""
    while True:
        length = round(draw.gauss(mean, deviation))
        if 1 <= length <= max(1, 2 * mean - 1):
            return length


def poisson_arrivals(number: int, rate: float, seed: int = 0) -> list[float]:
    """Times in seconds at which `number` requests come, at `rate` requests per second on average."""
    draw, now, times = random.Random(seed), 0.0, []
    for _ in range(number):
        now += draw.expovariate(rate)
        times.append(now)
    return times
