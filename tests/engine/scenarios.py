"""Random workloads for the simulated engine: shapes, limits, pools barely large enough, arrivals and aborts."""

from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import strategies as st

from mor.engine.cache_shape import CacheShape
from mor.engine.limits import Limits
from mor.engine.request import Request
from tests.engine.simulation import SimulatedModel, Simulation, request


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A request that is added before visit `at`, and aborted before visit `abort_at` if that comes first."""

    at: int
    prompt: tuple[int, ...]
    max_tokens: int
    max_recursions: int | None = None
    ignore_eos: bool = False
    prompt_logprobs: int | None = None
    abort_at: int | None = None

    def request(self, name: str) -> Request:
        return request(
            name,
            self.prompt,
            max_tokens=self.max_tokens,
            max_recursions=self.max_recursions,
            ignore_eos=self.ignore_eos,
            prompt_logprobs=self.prompt_logprobs,
        )


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """`spare_pages`: pages beyond what the largest request may need alone."""

    model: SimulatedModel
    limits: Limits
    arrivals: tuple[Arrival, ...]
    spare_pages: int
    granularity: int | None

    def simulation(self) -> Simulation:
        needed = max(
            self.model.shape.worst_pages(
                len(a.prompt) + max(1, min(a.max_tokens, self.limits.max_length - len(a.prompt))) - 1
            )
            for a in self.arrivals
        )
        return Simulation(
            model=self.model,
            limits=self.limits,
            num_pages=max(1, needed) + self.spare_pages,
            granularity=self.granularity,
        )

    def play(self, *, check: bool = True) -> tuple[Simulation, list[Request]]:
        """Run everything to its end; returns the simulation and the requests in order of arrival."""
        simulation, requests = self.simulation(), list[Request]()
        ahead = sorted(self.arrivals, key=lambda a: a.at)
        aborts: list[tuple[int, str]] = []
        while ahead or simulation.live:
            now = len(simulation.visits)
            while ahead and ahead[0].at <= now:
                arrival = ahead.pop(0)
                requests.append(arrival.request(f"r{len(requests)}"))
                simulation.add(requests[-1])
                if arrival.abort_at is not None:
                    aborts.append((arrival.abort_at, requests[-1].id))
            for when, name in aborts:
                if when == now:
                    simulation.abort(name)
            simulation.step()
            if check:
                simulation.check()
            assert now < 300 * (len(self.arrivals) + 1), "the requests do not end"
        return simulation, requests


def shapes() -> st.SearchStrategy[CacheShape]:
    """All kinds: own, shared and hybrid keys and values, with and without unshared layers, all recursions at once."""

    def build(num_recursions: int, kind: str, outer: bool, sizes: list[int]) -> CacheShape:
        count = num_recursions + outer
        first_serves_all = kind in ("shared", "hybrid")
        everything = [kind == "at_once" or (r == 0 and first_serves_all) for r in range(num_recursions)]
        written = [kind != "shared" or r == 0 for r in range(num_recursions)]
        return CacheShape(
            num_recursions=num_recursions,
            tokens_per_page=tuple(sizes[:count]),
            holds_all=(*everything, True)[:count],
            written=(*written, True)[:count],
            one_visit=kind == "at_once",
        )

    kinds = st.sampled_from(["own", "own", "shared", "hybrid", "at_once"])
    return st.builds(
        build, st.integers(1, 4), kinds, st.booleans(), st.lists(st.integers(1, 5), min_size=5, max_size=5)
    )


@st.composite
def scenarios(draw: st.DrawFn, *, most_requests: int = 14) -> Scenario:
    limits = Limits(
        max_requests=draw(st.integers(1, 6)),
        max_visit_tokens=draw(st.integers(1, 16)),
        prefill_chunk=draw(st.integers(1, 9)),
        max_length=draw(st.integers(12, 40)),
    )
    prompts = [tuple(draw(st.lists(st.integers(0, 6), min_size=1, max_size=limits.max_length - 1))) for _ in range(3)]
    lengths = st.integers(1, limits.max_length - 1)
    arrival = st.builds(
        lambda asked, **settings: Arrival(max_tokens=asked[0], prompt_logprobs=asked[1], **settings),
        st.one_of(st.tuples(st.integers(1, 20), st.sampled_from([None, 0])), st.just((0, 0))),
        at=st.integers(0, 40),
        prompt=st.one_of(
            st.builds(lambda p, n: p[:n], st.sampled_from(prompts), lengths),
            st.builds(lambda p, n: (*p[:n], 6)[: limits.max_length - 1], st.sampled_from(prompts), lengths),
        ),
        max_recursions=st.sampled_from([None, None, 1, 2]),
        ignore_eos=st.booleans(),
        abort_at=st.one_of(st.none(), st.none(), st.integers(0, 60)),
    )
    return Scenario(
        model=SimulatedModel(shape=draw(shapes()), least=draw(st.integers(0, 1))),
        limits=limits,
        arrivals=tuple(draw(st.lists(arrival, min_size=1, max_size=most_requests))),
        spare_pages=draw(st.integers(0, 12)),
        granularity=draw(st.sampled_from([None, 1, 3, 4, 8])),
    )


def crowd(seed: int, *, num_requests: int, shape: CacheShape, granularity: int | None) -> Scenario:
    """Hundreds of requests on a pool that holds a few, many of them with a common beginning."""
    draw = random.Random(seed)
    limits = Limits(max_requests=12, max_visit_tokens=24, prefill_chunk=8, max_length=48)
    stems = [tuple(draw.randrange(7) for _ in range(24)) for _ in range(4)]

    def arrival() -> Arrival:
        at, stem = draw.randrange(num_requests), draw.choice(stems)
        prompt = stem[: draw.randrange(1, 17)] + tuple(draw.randrange(7) for _ in range(draw.randrange(4)))
        return Arrival(
            at=at,
            prompt=prompt,
            max_tokens=draw.randrange(1, 29),
            max_recursions=draw.choice([None, None, 2]),
            ignore_eos=draw.random() < 0.7,
            prompt_logprobs=draw.choice([None, None, None, 0]),
            abort_at=at + draw.randrange(60) if draw.random() < 0.15 else None,
        )

    return Scenario(
        model=SimulatedModel(shape=shape),
        limits=limits,
        arrivals=tuple(arrival() for _ in range(num_requests)),
        spare_pages=12,
        granularity=granularity,
    )
