"""Numbers as people read them: 3.9M parameters, 1.2 PFLOP, 512 B, 4 min 05 s."""

from __future__ import annotations

import math

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def compact(value: float, *, digits: int = 3) -> str:
    """`value` with `digits` significant digits and a decimal prefix: 3_900_000 -> `3.9M`, 0.25 -> `0.25`.

    Powers of 10^9 are written G, as in GFLOP; see `count` for the words B and T of token counts.
    """
    if not math.isfinite(value):
        return "–"
    for factor, prefix in _PREFIXES:
        if abs(value) >= factor * (1 - 0.5 * 10**-digits):
            return _significant(value / factor, digits) + prefix
    return _significant(value, digits)


def count(value: float, *, digits: int = 3) -> str:
    """A count of parameters or tokens: as `compact`, with B for 10^9 and T for 10^12, as the field writes them."""
    return compact(value, digits=digits).replace("G", "B")


def duration(seconds: float) -> str:
    """A time span: `8.2 s`, `47 s`, `4 min 05 s`, `2 h 10 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def percent(share: float) -> str:
    """A share of 1 in per cent: whole from 10 % on, one decimal below, `<0.1%` for traces."""
    if 0 < share < 0.0005:
        return "<0.1%"
    return f"{100 * share:.0f}%" if share >= 0.0995 or share == 0 else f"{100 * share:.1f}%"


def ticks(low: float, high: float, *, target: int = 5) -> list[float]:
    """Round tick values inside [low, high], about `target` of them, at steps of 1, 2, 2.5 or 5 times a power of ten."""
    if high <= low:
        return [low]
    raw = (high - low) / target
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _significant(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)) + 1e-12))
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
