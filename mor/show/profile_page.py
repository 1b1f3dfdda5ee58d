"""What a trained model does on a text, as one self-contained page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from mor.evaluate.depth_profile import DepthProfile
from mor.evaluate.kv_similarity import KvSimilarity
from mor.evaluate.recursion_scaling import ScalingPoint
from mor.evaluate.routing_report import RoutingReport
from mor.files import write_text
from mor.show.figures import score_chart
from mor.show.numbers import percent
from mor.show.page import both_widths, html_page, section
from mor.show.profile_figures import kinds_chart, matrix_chart, place_map, scaling_chart


@dataclass(frozen=True, kw_only=True)
class Profile:
    """`model`, `data`: their names. `similarity`: None where keys and values are shared. `scaling`: empty where the
    number of recursions cannot be set."""

    model: str
    data: str
    num_depths: int
    depths: DepthProfile
    routing: RoutingReport
    similarity: KvSimilarity | None
    scaling: tuple[ScalingPoint, ...]


def write_profile_page(profile: Profile, path: str | Path) -> Path:
    """Write the page and return its path."""
    write_text(Path(path), render_profile_page(profile))
    return Path(path)


def render_profile_page(profile: Profile) -> str:
    """The page as HTML; figures without points are left out."""
    head = f"<h1>{escape(profile.model)}</h1><p>on {escape(profile.data)}, causal decisions throughout</p>"
    body = head + _kinds(profile) + _scores(profile) + _places(profile) + _similarity(profile) + _scaling(profile)
    return html_page(f"{profile.model}: what it does", body, num_depths=profile.num_depths, has_tokens=False)


def _kinds(profile: Profile) -> str:
    note = "Shares of depths 1, 2, ... and the mean depth, deepest kind first. Function words are told by list."
    return _figure("Depth by kind of token", note, lambda width: kinds_chart(
        profile.depths.by_kind, title="depth by kind of token", width=width
    ))  # fmt: skip


def _scores(profile: Profile) -> str:
    recursions = profile.routing.recursions
    if not recursions:
        return ""
    note = "How the router scores the tokens that reach each recursion; dashed: the threshold to go on."
    bins, thresholds = [r.bins for r in recursions], [r.threshold for r in recursions]
    return _figure(
        "Router scores", note, lambda width: score_chart(bins, thresholds, title="router scores", width=width)
    )


def _places(profile: Profile) -> str:
    dead = ", ".join(f"recursion {n}: {percent(share)}" for n, share in enumerate(profile.depths.dead, start=1))
    note = f"The fuller, the more of the tokens there take the recursion. Places that no row's token takes: {dead}."
    return _figure("Depth by place in the row", note, lambda width: place_map(
        profile.depths.by_place, profile.depths.place_width, title="depth by place", width=width
    ))  # fmt: skip


def _similarity(profile: Profile) -> str:
    if profile.similarity is None:
        return ""
    note = "Mean cosine of a token's keys (first) and values (second) at two recursions; 1: sharing loses nothing."
    pair = (profile.similarity.keys, profile.similarity.values)
    charts = "".join(matrix_chart(m, title=f"similarity of {n}") for m, n in zip(pair, ("keys", "values"), strict=True))
    return section("Keys and values across recursions", note, charts)


def _scaling(profile: Profile) -> str:
    if not profile.scaling:
        return ""
    points = [(float(point.recursions), point.nll) for point in profile.scaling]
    trained = max(point.recursions for point in profile.scaling if point.is_trained)
    note = "NLL when every token takes the same number of recursions; the router decides nothing here."
    return _figure("Test-time scaling", note, lambda width: scaling_chart(
        points, trained, title="NLL by recursions", width=width
    ))  # fmt: skip


def _figure(heading: str, note: str, draw: Callable[[int], str]) -> str:
    return section(heading, note, both_widths(draw))
