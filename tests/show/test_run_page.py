"""The page of runs holds all curves by every axis, escapes every text and needs nothing from outside."""

from __future__ import annotations

import re
from pathlib import Path

from mor.show.palette import arm_class, arm_dash
from mor.show.run_page import render_run_page, write_run_page
from mor.show.runs import read_runs
from tests.show.examples import evaluation_line, training_line, write_run
from tests.show.test_report import Page

LINES = (training_line(50), evaluation_line(50), training_line(100, loss=1.0), evaluation_line(100, nll=2.0))


def test_three_axes_of_three_charts_for_two_widths(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "a", *LINES), write_run(tmp_path / "b", *LINES[:2])])
    page = Page(render_run_page(runs))
    text = " ".join(" ".join(page.text).split())
    for expected in ("2 runs. Not at the last step yet: b.", "by tokens", "by FLOPs", "by minutes", "training FLOPs"):
        assert expected in text
    assert len(page.of_class("figure")) == 3 * 3 * 2
    assert [len(page.of_class(f"panel-{index}")) for index in range(4)] == [1, 1, 1, 0]
    inputs = [attributes for tag, attributes in page.elements if tag == "input"]
    assert [("checked" in attributes) for attributes in inputs] == [True, False, False]
    labels = [attributes["for"] for tag, attributes in page.elements if tag == "label"]
    assert labels == [attributes["id"] for attributes in inputs]
    assert "What differs" not in text


def test_a_run_without_lines_makes_a_page_without_curves(tmp_path: Path) -> None:
    html = render_run_page(read_runs([write_run(tmp_path / "begun")]))
    assert "The run begun. Not at the last step yet: begun." in html
    assert Page(html).of_class("figure") == []


def test_it_is_escaped_and_needs_nothing_from_outside(tmp_path: Path) -> None:
    nasty = "<script>alert(1)<!--'\"&"
    runs = read_runs(
        [write_run(tmp_path / nasty, *LINES), write_run(tmp_path / "b", *LINES, options={"training": {"steps": 9}})]
    )
    html = render_run_page(runs)
    page = Page(html)
    names = [tag for tag, _ in page.elements]
    assert not {"script", "link", "img", "iframe", "form"} & set(names)
    assert nasty in "".join(page.text)
    assert not re.search(r"https?:|@import|url\(", html)


def test_writing_makes_the_folder(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "a", *LINES)])
    path = tmp_path / "new" / "runs.html"
    assert write_run_page(runs, path) == path
    assert path.read_text() == render_run_page(runs)


def test_many_runs_keep_looks_of_their_own() -> None:
    looks = {(arm_class(index), arm_dash(index)) for index in range(32)}
    assert len(looks) == 32
