"""Results of a throughput measurement as lines of a table and as JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from mor.benchmark.serving import Served
from mor.benchmark.throughput import ENGINE, ArmResult, ratio
from mor.show.numbers import compact

Line = dict[str, Any]


def baseline(result: ArmResult, results: Sequence[ArmResult]) -> ArmResult | None:
    """The vanilla arm to compare with: the one with as many layers, else the first there is."""
    plain = [other for other in results if other.arm.model.config.num_recursions == 1]
    layers = result.arm.model.config.num_hidden_layers
    same = [other for other in plain if other.arm.model.config.num_hidden_layers == layers]
    return next(iter([*same, *plain]), None)


def lines(results: Sequence[ArmResult]) -> list[Line]:
    """One line per arm and system: medians over rounds, and ratios with their least and greatest."""
    return [_line(result, name, baseline(result, results)) for result in results for name in [ENGINE, *_peers(result)]]


def latency_lines(results: Sequence[ArmResult]) -> list[Line]:
    """One line per arm and rate: seconds to the first token and between tokens, median and 99th percentile."""
    return [
        dict(
            arm=result.arm.name,
            requests_per_second=rate,
            tokens_per_second=round(served.tokens_per_second, 1),
            first_token_p50=quantile(served.first_token, 0.5),
            first_token_p99=quantile(served.first_token, 0.99),
            gap_p50=quantile(served.gaps, 0.5),
            gap_p99=quantile(served.gaps, 0.99),
            most_running=served.most_running,
        )
        for result in results
        for rate, served in result.latencies.items()
    ]


def try_lines(results: Sequence[ArmResult]) -> list[Line]:
    """One line per arm and number of sequences tried."""
    return [
        dict(
            arm=result.arm.name,
            pool=result.pool,
            concurrency=number,
            tokens_per_second=round(served.best_rate, 1),
            whole_tokens_per_second=round(served.tokens_per_second, 1),
            mean_depth=None if served.mean_depth is None else round(served.mean_depth, 3),
            rows_per_visit=round(served.rows_per_visit, 1),
            pages=round(served.pages),
            most_pages=served.most_pages,
            pool_pages=result.num_pages,
            preemptions=served.preemptions,
        )
        for result in results
        for number, served in sorted(result.tried.items())
    ]


SPEED = {
    "arm": "arm",
    "system": "system",
    "concurrency": "sequences",
    "tokens_per_second": "tokens/s",
    "rate": "rate",
    "whole_tokens_per_second": "whole run",
    "spread": "spread",
    "tokens_per_cpu_second": "per CPU s",
    "times_vanilla": "x vanilla",
    "times_vanilla_cpu": "(CPU s)",
    "engine_is_times": "engine is x",
    "engine_is_times_cpu": "(CPU s) ",
}
INSIDE = {
    "arm": "arm",
    "asked_depth": "asked",
    "mean_depth": "depth",
    "visits": "visits",
    "rows_per_visit": "rows/visit",
    "pages": "pages",
    "pool_pages": "of",
    "gap_p50": "gap p50 s",
    "gap_p99": "p99 s",
    "kv_bytes": "KV bytes",
    "preemptions": "preempted",
}
TRIES = {
    "arm": "arm",
    "concurrency": "sequences tried",
    "tokens_per_second": "tokens/s",
    "whole_tokens_per_second": "whole run",
    "mean_depth": "depth",
    "rows_per_visit": "rows/visit",
    "pages": "pages",
    "most_pages": "at most",
    "pool_pages": "of",
    "preemptions": "preempted",
}
LATENCY = {
    "arm": "arm",
    "requests_per_second": "requests/s",
    "tokens_per_second": "tokens/s",
    "first_token_p50": "first token p50 s",
    "first_token_p99": "p99 s",
    "gap_p50": "gap p50 s",
    "gap_p99": "p99 s ",
}
QUALITY = {
    "arm": "arm",
    "tokens_per_second": "tokens/s",
    "bits_per_byte": "bits/byte",
    "bits_per_byte_error": "+-",
    "depth_on_text": "depth on text",
    "depth_generated": "depth generated",
}


def table(rows: Sequence[Line], columns: Mapping[str, str]) -> Table:
    """Lines as a table: `columns` maps the keys to show to their headings."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for key, heading in columns.items():
        made.add_column(heading, justify="left" if key in ("arm", "system") else "right", no_wrap=True)
    for row in rows:
        made.add_row(*(_text(row.get(key)) for key in columns))
    return made


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value that `share` of `values` do not exceed; None of nothing."""
    if not values:
        return None
    return round(sorted(values)[max(0, math.ceil(share * len(values)) - 1)], 6)


def _peers(result: ArmResult) -> list[str]:
    return [name for name in result.rounds if name != ENGINE]


def _line(result: ArmResult, system: str, base: ArmResult | None) -> Line:
    rounds, config = result.rounds[system], result.arm.model.config
    speeds = [result.rate(served) for served in rounds]
    line: Line = dict(
        arm=result.arm.name,
        system=system,
        layers=config.num_hidden_layers,
        pool=result.pool,
        requests=result.requests,
        concurrency=1 if system == "generate-1" else result.concurrency,
        rate="steady" if result.is_steady and system == ENGINE else "whole",
        tokens_per_second=round(statistics.median(speeds), 1),
        whole_tokens_per_second=round(statistics.median(served.tokens_per_second for served in rounds), 1),
        spread=round((max(speeds) - min(speeds)) / statistics.median(speeds), 3),
        tokens_per_cpu_second=round(statistics.median(served.tokens_per_cpu_second for served in rounds), 1),
        requests_per_second=round(statistics.median(served.requests / served.seconds for served in rounds), 3),
    )
    if system == ENGINE:
        line |= _engine_columns(result)
        if base is not None and base is not result:
            line |= _ratios("times_vanilla", rounds, base.rounds[ENGINE], result.rate)
    else:
        line |= _ratios("engine_is_times", result.rounds[ENGINE], rounds, lambda served: served.tokens_per_second)
    return line


def _engine_columns(result: ArmResult) -> Line:
    served = result.engine
    steady = [s.steady_tokens_per_second for s in result.rounds[ENGINE] if s.steady_tokens_per_second is not None]
    return dict(
        steady_tokens_per_second=round(statistics.median(steady), 1) if steady else None,
        asked_depth=None if result.arm.mean_depth is None else round(result.arm.mean_depth, 4),
        mean_depth=None if served.mean_depth is None else round(served.mean_depth, 3),
        visits=served.visits,
        rows_per_visit=round(served.rows_per_visit, 1),
        preemptions=served.preemptions,
        most_running=served.most_running,
        gap_p50=quantile(served.gaps, 0.5),
        gap_p99=quantile(served.gaps, 0.99),
        pages=round(served.pages),
        pool_pages=result.num_pages,
        kv_bytes=round(served.kv_bytes),
        most_kv_bytes=served.most_kv_bytes,
        pool_bytes=result.pool_bytes,
    )


def _ratios(key: str, ours: Sequence[Served], theirs: Sequence[Served], rate: Callable[[Served], float]) -> Line:
    """Speed relative to vanilla in the engine, or the engine's relative to a peer."""
    middle, least, most = ratio(ours, theirs, rate)
    cpu = ratio(ours, theirs, lambda served: served.tokens_per_cpu_second)[0]
    return {key: round(middle, 3), f"{key}_range": (round(least, 3), round(most, 3)), f"{key}_cpu": round(cpu, 3)}


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return " to ".join(compact(number) for number in value)
    return value if isinstance(value, str) else compact(value, digits=4)
