"""Every request ends with the output it would have alone, and every page comes back."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import HealthCheck, given, settings

from mor.engine.block_pool import BlockPool
from mor.engine.limits import Limits
from mor.engine.request import FinishReason, Request, SegmentResult
from mor.engine.scheduler import QueueFull, Scheduler
from tests.engine.scenarios import Scenario, crowd, scenarios
from tests.engine.simulation import SimulatedModel, Simulation, request, small_shape

RANDOM = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LIMITS = Limits(max_requests=4, max_visit_tokens=16, prefill_chunk=8, max_length=32)


def simulation(num_pages: int = 100, *, limits: Limits = LIMITS, granularity: int | None = None) -> Simulation:
    model = SimulatedModel(shape=small_shape(), least=1)
    return Simulation(model=model, limits=limits, num_pages=num_pages, granularity=granularity)


def assert_ended_well(scenario: Scenario, played: Simulation, requests: list[Request]) -> None:
    """Outputs are those of solo runs (a beginning of them, if aborted); nothing is held but by the prefix cache."""
    for found in requests:
        output, reason = scenario.model.solo_output(found, scenario.limits)
        assert found.state == "finished" and found.finish_reason in (reason, "abort")
        assert found.output == (output[: len(found.output)] if found.finish_reason == "abort" else output)
        assert found.depths == scenario.model.depths(found.tokens, found.params.budget)[: len(found.depths)]
        scores = scenario.model.scores(found)
        assert found.scores == (scores[: len(found.scores)] if found.finish_reason == "abort" else scores)
    assert (played.scheduler.num_running, played.scheduler.num_waiting) == (0, 0)
    played.check()
    if played.cache is not None:
        played.cache.clear()
    assert played.pool.num_free == played.num_pages


def most_visits(found: Request, limits: Limits, num_recursions: int) -> int:
    """Visits after which the oldest request must have ended: it is never preempted, each of its segments waits at most
    until those in flight have left twice, and its prompt and output may have to be computed anew once."""
    chunks = -(-limits.max_length // limits.prefill_chunk)
    return (2 * chunks + found.params.max_tokens + 2) * (3 * num_recursions + 1)


@RANDOM
@given(scenarios())
def test_everything_ends_as_it_would_alone(scenario: Scenario) -> None:
    played, requests = scenario.play()
    assert_ended_well(scenario, played, requests)


@RANDOM
@given(scenarios())
def test_the_same_calls_give_the_same_plans(scenario: Scenario) -> None:
    assert scenario.play(check=False)[0].visits == scenario.play(check=False)[0].visits


@RANDOM
@given(scenarios())
def test_requests_are_admitted_in_order_and_wait_for_a_bounded_time(scenario: Scenario) -> None:
    played, requests = scenario.play(check=False)
    order = [int(name[1:]) for name in played.admissions]
    assert order == sorted(order)
    since = {f"r{i}": arrival.at for i, arrival in enumerate(sorted(scenario.arrivals, key=lambda a: a.at))}
    oldest_from = 0
    for found in requests:
        oldest_from = max(oldest_from, since[found.id])
        bound = most_visits(found, scenario.limits, scenario.model.shape.num_recursions)
        assert played.finished_at[found.id] <= oldest_from + bound
        oldest_from = max(oldest_from, played.finished_at[found.id])


@pytest.mark.parametrize("granularity", [None, 4])
def test_hundreds_of_requests_on_a_pool_too_small_for_them(granularity: int | None) -> None:
    scenario = crowd(1, num_requests=300, shape=small_shape(), granularity=granularity)
    played, requests = scenario.play(check=False)
    assert_ended_well(scenario, played, requests)
    assert sum(found.num_preemptions for found in requests) > 20
    assert sum(found.finish_reason == "abort" for found in requests) > 20
    assert (sum(found.cached_tokens for found in requests) > 300) == (granularity is not None)


@pytest.mark.parametrize("granularity", [None, 4])
def test_room_to_grow_spares_preemptions(granularity: int | None) -> None:
    scenario = crowd(1, num_requests=300, shape=small_shape(), granularity=granularity)
    limits, counts = scenario.limits, dict[int, int]()
    for room in (0, 4, 48):
        scenario = dataclasses.replace(scenario, limits=dataclasses.replace(limits, room_to_grow=room))
        played, requests = scenario.play(check=False)
        assert_ended_well(scenario, played, requests)
        counts[room] = sum(found.num_preemptions for found in requests)
    assert counts[4] < counts[0] / 2 and counts[48] == 0  # no request has more tokens than that


@pytest.mark.slow
def test_ten_thousand_requests() -> None:
    scenario = crowd(2, num_requests=10_000, shape=small_shape(), granularity=4)
    played, requests = scenario.play(check=False)
    assert_ended_well(scenario, played, requests)


def test_a_lone_request_takes_one_recursion_per_visit() -> None:
    played = simulation()
    played.add(request("a", range(1, 11), max_tokens=1))
    played.run()
    starts = [visit[0][1:] for visit in played.visits]
    assert starts[0] == (0, 8, 0) and (8, 2, 0) in starts
    assert all(after[2] == before[2] + 1 or after[2] == 0 for before, after in itertools.pairwise(starts))


def test_decodes_enter_before_chunks_and_a_chunk_waits_for_room() -> None:
    played = simulation(limits=dataclasses.replace(LIMITS, max_visit_tokens=8))
    played.add(request("a", [1], max_tokens=9, ignore_eos=True))
    played.step()
    played.add(request("b", range(1, 9), max_tokens=1))
    played.add(request("c", range(2, 10), max_tokens=1))
    while not any(name == "b" for visit in played.visits for name, *_ in visit):
        plan = played.step()
    assert plan.num_tokens == 9 and [s.request.id for s in plan.segments] == ["a", "b"]
    played.run()
    together = [{name for name, *_ in visit} for visit in played.visits]
    assert not any({"b", "c"} <= names for names in together)


def test_a_stream_of_short_prompts_does_not_hold_up_a_long_one() -> None:
    played = simulation(limits=dataclasses.replace(LIMITS, max_visit_tokens=8, max_requests=9))
    played.add(request("long", [*range(1, 25), *range(6)], max_tokens=1))
    for number in range(200):
        played.add(request(f"short{number}", [number % 6 + 1, number % 5], max_tokens=1))
    while "long" not in played.finished_at:
        played.step()
    present = [i for i, visit in enumerate(played.visits) if any(name == "long" for name, *_ in visit)]
    num_recursions = played.model.shape.num_recursions
    assert max(after - before for before, after in itertools.pairwise(present)) <= num_recursions
    assert played.scheduler.num_waiting > 100
    played.run()


@RANDOM
@given(scenarios())
def test_prompts_never_preempt_each_other(scenario: Scenario) -> None:
    """Admission counts the pages that all known tokens may need, so only outputs that grow can run into lack."""
    arrivals = tuple(dataclasses.replace(arrival, max_tokens=1) for arrival in scenario.arrivals)
    _, requests = dataclasses.replace(scenario, arrivals=arrivals).play(check=False)
    assert not any(found.num_preemptions for found in requests)


@pytest.mark.parametrize(("reason", "size"), [("abort", 8), ("error", 8), ("stop", 12)])
def test_what_a_broken_off_request_generated_is_not_remembered(reason: FinishReason, size: int) -> None:
    played = simulation(granularity=4)
    found = request("a", range(1, 9), max_tokens=20, ignore_eos=True)
    played.add(found)
    while found.num_computed < 14:
        played.step()
    played.scheduler.finish(found, reason)
    assert played.cache is not None
    assert max(node.num_tokens for node in played.cache.nodes()) == size
    played.cache.clear()
    assert played.pool.num_free == played.num_pages


def test_an_abort_in_flight_frees_everything_at_once() -> None:
    played = simulation()
    played.add(request("a", range(1, 9), max_tokens=5))
    plan = played.scheduler.plan()
    assert played.pool.num_free < played.num_pages
    assert played.scheduler.abort("a") and not played.scheduler.abort("a")
    assert played.pool.num_free == played.num_pages and played.scheduler.num_running == 0
    late = SegmentResult(added=(8, 0, 0, 8), active=0, depths=(1,) * 8)
    assert not played.scheduler.complete(plan.segments[0], late)
    assert played.pool.num_free == played.num_pages


def test_a_failed_request_leaves_nothing_and_disturbs_no_other() -> None:
    played = simulation(granularity=4)
    bad, good = request("bad", range(1, 9)), request("good", range(2, 12), max_tokens=4, ignore_eos=True)
    played.add(bad)
    played.add(good)
    played.step()
    played.scheduler.finish(bad, "error")
    played._harvest()
    played.check()
    played.run()
    assert good.output == played.model.solo_output(good, LIMITS)[0] and bad.finish_reason == "error"


def test_pages_of_recursions_that_were_not_reached_are_given_back() -> None:
    model = SimulatedModel(shape=small_shape(size=1), least=1)
    played = Simulation(model=model, limits=LIMITS, num_pages=200, granularity=None)
    found = request("a", [3, 1, 4, 1, 5, 2], max_tokens=9, ignore_eos=True)
    played.add(found)
    held: list[tuple[int, ...]] = []
    while played.live:
        played.step()
        if found.segment is None and found.state == "running":
            held.append(tuple(map(len, found.pages)))
            assert list(held[-1]) == model.shape.lengths(found.depths)
    assert held and held[-1][0] > held[-1][1] > held[-1][2]


@pytest.mark.parametrize("granularity", [None, 2])
def test_preemption_takes_the_youngest_and_keeps_its_output(granularity: int | None) -> None:
    played = simulation(num_pages=28, granularity=granularity)
    requests = [request(name, [i + 1] * 6, max_tokens=14, ignore_eos=True) for i, name in enumerate("abc")]
    for found in requests:
        played.add(found)
    preempted: list[tuple[str, int]] = []
    while played.live:
        preempted += [(found.id, len(found.output)) for found in played.step().preempted]
        played.check()
    assert preempted and not any(name == "a" for name, _ in preempted) and any(size for _, size in preempted)
    assert all(found.output == played.model.solo_output(found, LIMITS)[0] for found in requests)


def test_a_preempted_request_finds_what_it_computed_but_does_not_count_it_as_cached() -> None:
    played = simulation(num_pages=22, granularity=2)
    requests = [request(name, [i + 1] * 9, max_tokens=12, ignore_eos=True) for i, name in enumerate("ab")]
    for found in requests:
        played.add(found)
    while not played.step().preempted:
        pass
    known = len(played.visits)
    played.run()
    again = [start for visit in played.visits[known:] for name, start, *_ in visit if name == "b"]
    assert again[0] > 0 and requests[1].num_preemptions == 1
    assert [found.cached_tokens for found in requests] == [0, 0]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (request("a", []), "request 'a' has an empty prompt"),
        (request("a", range(32)), "prompt of 32 tokens; max_length=32 leaves room for at most 31"),
        (request("a", [1], max_tokens=20), "may need 20 pages .* num_pages=18; lower max_tokens to 16"),
        (request("a", [1] * 30), "may need 32 pages .* shorten the prompt"),
        (request("live", [1]), "request 'live' is already being generated"),
    ],
)
def test_what_can_never_run_is_refused_with_the_limit(found: Request, message: str) -> None:
    played = simulation(num_pages=18)
    played.add(request("live", [1], max_tokens=3))
    with pytest.raises(ValueError, match=message):
        played.scheduler.add(found)
    assert (played.scheduler.num_waiting, played.scheduler.num_running) == (1, 0)
    played.run()


def test_the_largest_request_that_is_not_refused_runs() -> None:
    played = simulation(num_pages=16)
    largest = request("a", [1], max_tokens=16, ignore_eos=True)
    played.add(largest)
    played.run()
    assert len(largest.output) == 16


def test_a_full_queue_pushes_back() -> None:
    played = simulation(limits=dataclasses.replace(LIMITS, max_waiting=2))
    played.add(request("a", [1], max_tokens=1))
    played.add(request("b", [1], max_tokens=1))
    with pytest.raises(QueueFull, match="'c' refused: max_waiting=2"):
        played.add(request("c", [1]))
    played.step()
    played.add(request("c", [1], max_tokens=1))
    played.run()


@pytest.mark.parametrize("name", ["max_requests", "max_visit_tokens", "prefill_chunk", "max_waiting", "max_length"])
def test_limits_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0 must be at least"):
        dataclasses.replace(LIMITS, **{name: 0})


def test_a_result_that_cannot_be_is_ours_to_fix() -> None:
    scheduler = Scheduler(shape=small_shape(), limits=LIMITS, pool=BlockPool(40))
    scheduler.add(request("a", [1, 2, 3]))
    (segment,) = scheduler.plan().segments
    with pytest.raises(AssertionError, match="exceed its"):
        scheduler.complete(segment, SegmentResult(added=(9, 0, 0, 3), active=0, depths=(1, 1, 1)))
