"""Figures of a model's depths, keys and scaling, and the page that holds them."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mor.evaluate.depth_profile import depth_profile
from mor.evaluate.kv_similarity import kv_similarity
from mor.evaluate.recursion_scaling import recursion_scaling
from mor.evaluate.routing_report import routing_report
from mor.show.profile_figures import kinds_chart, matrix_chart, place_map, scaling_chart
from mor.show.profile_page import Profile, write_profile_page
from tests.evaluate.models import model, rows
from tests.evaluate.test_profile import HALVES


def widths(figure: str, kind: str) -> list[float]:
    return [float(w) for w in re.findall(rf'class="mark {kind}"[^>]*? width="([\d.]+)"', figure)]


def test_bars_are_shares_and_the_deepest_kind_is_first() -> None:
    figure = kinds_chart({"shallow": (0, 3, 1), "deep & <dark>": (0, 1, 3)}, title="t", width=640)
    assert figure.index("deep &amp; &lt;dark&gt;") < figure.index("shallow")
    ones, twos = widths(figure, "depth-1"), widths(figure, "depth-2")
    assert ones[1] == pytest.approx(3 * twos[1], rel=0.01)
    assert ones[0] + twos[0] == pytest.approx(ones[1] + twos[1], rel=0.01)
    assert ">1.75</text>" in figure and ">1.25</text>" in figure
    with pytest.raises(ValueError, match="'t' has no tokens"):
        kinds_chart({"none": (0, 0)}, title="t")


def test_dead_places_are_crossed_out() -> None:
    figure = place_map([(1.0, 0.5), (1.0, 0.0), (1.0, 0.25)], 4, title="t")
    assert figure.count('class="threshold"') == 1
    assert [float(o) for o in re.findall(r'depth-2"[^>]*fill-opacity="([\d.]+)"', figure)] == [0.5, 0.0, 0.25]
    assert "tokens 5 to 8: 0% take recursion 2" in figure
    with pytest.raises(ValueError, match="'t' has no places"):
        place_map([], 1, title="t")


def test_a_matrix_shows_numbers_and_dashes() -> None:
    figure = matrix_chart([(1.0, -0.5), (math.nan, 1.0)], title="t")
    assert re.findall(r">([^<]*)</text>", figure) == ["recursion 1", "1.00", "-0.50", "recursion 2", "–", "1.00"]
    assert re.findall(r'fill-opacity="([\d.]+)"', figure) == ["1.00", "0.00", "0.00", "1.00"]


def test_beyond_training_is_a_line_of_its_own() -> None:
    points = [(1.0, 4.0), (2.0, 3.0), (3.0, 3.5)]
    assert 'class="line arm-1"' in scaling_chart(points, 2, title="t")
    assert 'class="line arm-1"' not in scaling_chart(points[:2], 2, title="t")


class Sections(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.headings, self._open = list[str](), False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._open = tag == "h2"

    def handle_data(self, data: str) -> None:
        if self._open and data.strip():
            self.headings.append(data)
            self._open = False


@pytest.mark.parametrize(
    ("router", "missing"),
    [("expert_choice", set()), ("none", {"Router scores"}), ("token_choice", {"Test-time scaling"})],
)
def test_the_page_has_what_the_model_has(router: str, missing: set[str], tmp_path: Path) -> None:
    built, text = model(router), rows(4, 16)
    profile = Profile(
        model="a <model>",
        data="a text",
        num_depths=3,
        depths=depth_profile(built, [text], HALVES, ("even", "odd")),
        routing=routing_report(built, [text]),
        similarity=kv_similarity(built, text),
        scaling=() if router == "token_choice" else tuple(recursion_scaling(built, [text])),
    )
    page = write_profile_page(profile, tmp_path / "p.html").read_text()
    parser = Sections()
    parser.feed(page)
    everything = {
        "Depth by kind of token",
        "Router scores",
        "Depth by place in the row",
        "Keys and values across recursions",
        "Test-time scaling",
    }
    assert set(parser.headings) == everything - missing
    assert "a &lt;model&gt;" in page and "a <model>" not in page
    assert "http" not in re.sub(r"http://www.w3.org/\S+", "", page), "it needs nothing from outside"
