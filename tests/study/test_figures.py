"""Figures from results alone: well-formed, and an arm looks the same in all of them."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from mor.show.palette import arm_color, arm_dash
from mor.study.claims import claims
from mor.study.figures import arm_number, isoflop
from mor.study.results import Findings
from mor.study.studies import STUDIES, study
from tests.study.made_up import everything, findings, nothing

SPACE = "{http://www.w3.org/2000/svg}"


def test_all_figures_are_drawn_and_name_their_series() -> None:
    drawn = {name: svg for claim in claims(everything()) for name, svg in claim.figures.items()}
    assert {"curves-tokens", "curves-flops", "pareto", "isoflop", "dial", "thresholds", "asked", "scaling"} <= set(
        drawn
    )
    for name, svg in drawn.items():
        assert svg is not None, name
        texts = [text.text for text in ElementTree.fromstring(svg).iter(f"{SPACE}text")]
        assert any("mor-3" in str(text) for text in texts), name
        assert "nan" not in svg


def test_without_results_there_are_none() -> None:
    assert not [svg for claim in claims(nothing()) for svg in claim.figures.values() if svg is not None]


@pytest.mark.parametrize("name", STUDIES)
def test_arms_are_told_apart_and_keep_their_looks(name: str) -> None:
    of = study(name, 512)
    if name in ("isoflop", "gaps"):
        return  # drawn by kind and budget, or not at all
    looks = [(arm_color(number), arm_dash(number)) for number in (arm_number(arm, of) for arm in of.arms)]
    assert len(set(looks)) == len(looks)
    if "mor-3" in of.arms:
        assert arm_number("mor-3", of) == 0


def test_colours_of_isoflop_curves_are_kinds_and_dashes_budgets() -> None:
    svg = isoflop(findings(study("isoflop", 512)))
    assert svg is not None
    paths = [p.attrib for p in ElementTree.fromstring(svg).iter(f"{SPACE}path") if "line" in p.attrib["class"]]
    looks = {(path["class"], path.get("stroke-dasharray")) for path in paths}
    assert len(looks) == 9
    assert len({dash for _, dash in looks}) == 3
    assert isoflop(Findings(study=study("isoflop", 512), results=())) is None
