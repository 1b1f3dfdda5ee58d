"""The measurement itself, on tiny models: counts that must be exact, pools, concurrency, and the summary."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from mor.benchmark.arms import Arm, build_arm
from mor.benchmark.peers import PEERS, check_peers
from mor.benchmark.pools import parse_pool, pool_pages
from mor.benchmark.search import Search
from mor.benchmark.serving import Served, make_engine, pages_for, pages_in, serve, vanilla_bytes
from mor.benchmark.summary import LATENCY, SPEED, TRIES, latency_lines, lines, quantile, table, try_lines
from mor.benchmark.throughput import ENGINE, ThroughputOptions, measure, ratio, settle_arms
from mor.benchmark.workload import Workload, random_workload

QUICK = tuple(name for name in PEERS if name != "llama-batch")  # on a CPU it takes a quarter of a minute


@pytest.fixture(scope="module")
def arms() -> list[Arm]:
    return [build_arm(name, "tiny", max_length=64) for name in ("vanilla-3", "mor-3")]


@pytest.fixture(scope="module")
def workload() -> Workload:
    return random_workload(num_requests=5, vocab_size=256, prompt_tokens=3, mean=5, deviation=2)


def test_every_asked_token_is_generated_and_seen(arms: list[Arm], workload: Workload) -> None:
    engine = make_engine(arms[0], concurrency=2, num_pages=pages_for(arms[0], 2, workload.longest))
    served = serve(engine, workload)
    assert served.tokens == workload.num_tokens
    assert served.rows == workload.num_tokens + sum(len(prompt) - 1 for prompt in workload.prompts)
    assert (served.mean_depth, served.most_running, served.preemptions) == (1.0, 2, 0)
    assert len(served.first_token) == len(workload)
    assert 0 < len(served.gaps) <= workload.num_tokens - len(workload)  # slots may tell of several tokens at a time
    assert 0 < served.kv_bytes <= served.most_kv_bytes
    assert engine.pool.num_free == engine.pool.num_pages


def test_visits_are_counted_from_the_start_of_each_measurement(arms: list[Arm], workload: Workload) -> None:
    engine = make_engine(arms[0], concurrency=8, num_pages=pages_for(arms[0], 8, workload.longest))
    counts = {(served.visits, served.rows) for served in (serve(engine, workload), serve(engine, workload))}
    more = 0 if engine.slots is None else 2  # one for the prompts, and one in which slots only turn
    assert counts == {(max(workload.lengths) + more, workload.num_tokens + 2 * len(workload))}


def test_requests_wait_for_their_arrival(arms: list[Arm], workload: Workload) -> None:
    engine = make_engine(arms[0], concurrency=8, num_pages=pages_for(arms[0], 8, workload.longest))
    served = serve(engine, workload.first(2), arrivals=[0.0, 0.4])
    assert served.seconds > 0.4
    assert max(served.first_token) < 0.4  # since it came, not since the beginning


def test_a_pool_in_sequences_holds_that_many_of_the_vanilla_twin(arms: list[Arm]) -> None:
    vanilla, mor = arms
    size = vanilla_bytes(mor, 4, 40)
    assert size == vanilla_bytes(vanilla, 4, 40)
    assert pages_in(size, vanilla) == pages_for(vanilla, 4, 40)
    assert pages_in(size - 1, vanilla) == pages_for(vanilla, 4, 40) - 1


def test_measure_runs_everything_in_each_round(arms: list[Arm], workload: Workload) -> None:
    said: list[str] = []
    options = ThroughputOptions(concurrency=4, rounds=2, rates=(200.0,), peers=QUICK, warmup_tokens=2)
    results = measure(arms, workload, options, report=said.append)
    assert [*results[0].rounds] == [ENGINE, *QUICK]
    assert [*results[1].rounds] == [ENGINE, "generate", "generate-1"]  # Llama is no MoR
    assert all(len(rounds) == 2 for result in results for rounds in result.rounds.values())
    assert [line for line in said if "attention" in line] == [
        f"vanilla-3 {peer}: attention sdpa" for peer in QUICK if peer.startswith("llama-")
    ]
    assert len(said) == 2 + 2 * (5 + 3) + 2
    found = lines(results)
    assert json.loads(json.dumps(found))[0]["arm"] == "vanilla-3"
    engines = {line["arm"]: line for line in found if line["system"] == ENGINE}
    assert "times_vanilla" not in engines["vanilla-3"]
    assert engines["mor-3"]["times_vanilla_range"][0] <= engines["mor-3"]["times_vanilla"]
    assert all(line["engine_is_times"] > 0 for line in found if line["system"] != ENGINE)
    assert table(found, SPEED).row_count == len(found)
    assert [line["requests_per_second"] for line in latency_lines(results)] == [200.0, 200.0]
    assert table(latency_lines(results), LATENCY).row_count == 2


def test_the_best_concurrency_is_what_the_pool_holds_at_most(arms: list[Arm], workload: Workload) -> None:
    said: list[str] = []
    equal = Workload(prompts=workload.prompts * 4, lengths=(workload.longest - 3,) * 20)
    search = Search(arms[0], equal, pages_for(arms[0], 2, workload.longest), 1.0, said.append)
    assert not search.attempt(4) and set(search.tried) == {2}  # only two ran
    assert search.run(1) in (1, 2) and set(search.tried) == {1, 2}
    assert not search._is_new(3)  # more than ran
    assert "preempted" in said[0] and "rows a visit" in said[0] and "pages in use" in said[0]


def test_the_search_is_finer_around_the_best(arms: list[Arm], workload: Workload) -> None:
    speeds = {2: 10.0, 4: 19.0, 5: 22.0, 6: 23.0, 8: 21.0, 16: 11.0, 3: 1.0}
    search = Search(arms[0], workload, 1, 1.0, lambda line: None)

    def attempt(number: int) -> bool:
        near = min(speeds, key=lambda known: abs(known - number))
        search.tried[number] = Served(seconds=1.0, cpu_seconds=1.0, tokens=round(speeds[near] * 100), requests=1)
        return True

    search.attempt = attempt  # type: ignore[method-assign]
    assert search.run(2) == 6
    assert [*search.tried] == [2, 4, 8, 16, 10, 6, 5]


def test_the_headline_of_the_best_concurrency_is_steady(arms: list[Arm], workload: Workload) -> None:
    options = ThroughputOptions(concurrency=None, pool="2mean", first_try=2, rounds=1)
    results = measure(arms, workload, options)
    numbers = {result.concurrency for result in results}
    assert all(numbers <= result.tried.keys() for result in results)
    assert {result.requests for result in results} == {max(5, 8 * max(numbers))}
    said = lines(results)
    assert all(line["rate"] == "steady" and line["pool"] == "2mean" for line in said)
    assert all(line["tokens_per_second"] == pytest.approx(line["steady_tokens_per_second"], 1e-3) for line in said)
    assert {line["pool_pages"] for line in try_lines(results)} == {result.num_pages for result in results}
    assert table(try_lines(results), TRIES).row_count == sum(len(result.tried) for result in results)


def test_two_readings_of_a_pool_in_sequences(arms: list[Arm], workload: Workload) -> None:
    even = Workload(prompts=workload.prompts, lengths=(5, 5, 5, 5, 30))
    assert pool_pages("2seq", arms[0], even, None) == pages_for(arms[0], 2, 33)
    assert pool_pages("2mean", arms[0], even, None) == pages_for(arms[0], 2, 13)
    assert pool_pages("fit", arms[0], even, 3) == pages_for(arms[0], 3, 33)


def test_smaller_pages_waste_less_of_a_pool(arms: list[Arm], workload: Workload) -> None:
    options = ThroughputOptions(concurrency=2, rounds=1, pool="2seq")
    small = [replace(arm, page_entries=4) for arm in arms]
    (vanilla, _), (finer, _) = measure(arms, workload, options), measure(small, workload, options)
    assert finer.page_bytes == vanilla.page_bytes / 4
    assert finer.engine.tokens == vanilla.engine.tokens
    assert finer.engine.kv_bytes < vanilla.engine.kv_bytes


def test_arms_with_a_router_are_settled(arms: list[Arm]) -> None:
    load = random_workload(num_requests=12, vocab_size=256, prompt_tokens=3, mean=30, deviation=2)
    said: list[str] = []
    options = ThroughputOptions(concurrency=4, rounds=1, settle_tokens=1000)
    settled, found = settle_arms(arms, load, options, report=said.append)
    assert [*found] == ["mor-3"] and found["mor-3"].is_close and "mor-3: asked" in said[0]
    result = measure(settled, load, options)[1]
    assert result.engine.mean_depth == pytest.approx(2.0, rel=0.02)
    assert lines([result])[0]["asked_depth"] == pytest.approx(found["mor-3"].asked, abs=1e-4)


@pytest.mark.parametrize("text", ["2", "0GiB", "1.5seq", "0.5mean", "fits", "-1GiB"])
def test_a_wrong_pool_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="neither fit, nor a size like 2GiB"):
        ThroughputOptions(pool=text)


def test_wrong_options_are_refused() -> None:
    assert parse_pool("1.5GiB") == (1.5, "GiB")
    with pytest.raises(ValueError, match="rounds=0 must be at least 1"):
        ThroughputOptions(rounds=0)
    with pytest.raises(ValueError, match="needs a pool to fit"):
        ThroughputOptions(concurrency=None)
    with pytest.raises(ValueError, match="must be positive"):
        ThroughputOptions(rates=(0.0,))
    with pytest.raises(ValueError, match="peer 'vllm' is unknown"):
        check_peers(("vllm",))


def test_ratios_are_of_rounds() -> None:
    rounds: dict[str, list[Any]] = {
        name: [Served(seconds=s, cpu_seconds=1, tokens=12, requests=1) for s in seconds]
        for name, seconds in (("a", (1, 2, 3)), ("b", (2, 2, 12)))
    }
    assert ratio(rounds["a"], rounds["b"], lambda served: served.tokens_per_second) == (2.0, 1.0, 4.0)


def test_quantiles_are_values_that_occurred() -> None:
    values = [float(n) for n in range(1, 101)]
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile([3.0], 0.5), quantile([], 0.5)) == (50, 99, 3, None)
