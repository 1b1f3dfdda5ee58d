"""The palette tells depths apart, with colour vision and without."""

from __future__ import annotations

import itertools

import pytest

from mor.show import palette
from mor.show.palette import arm_color, contrast, depth_swatches, lightness, readable_ink

THEMES: tuple[palette.Theme, ...] = ("light", "dark")

# Linear RGB as a viewer without the long, the medium or the short cones sees it (Machado et al., 2009, severity 1).
DEFICIENCIES = {
    "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritan": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


def seen_by(color: str, matrix: tuple[tuple[float, float, float], ...]) -> str:
    return palette._encode(palette._apply(matrix, palette._linear(color)))


def distance(first: str, second: str) -> float:
    return sum((a - b) ** 2 for a, b in zip(palette._to_oklab(first), palette._to_oklab(second))) ** 0.5


def test_contrast_of_known_pairs() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.478, abs=1e-3)
    assert contrast("#ff0000", "#ff0000") == 1


def test_oklab_of_known_colors() -> None:
    assert palette._to_oklab("#ffffff") == pytest.approx((1, 0, 0), abs=1e-4)
    assert palette._to_oklab("#ff0000") == pytest.approx((0.62796, 0.22486, 0.12585), abs=1e-4)
    assert palette._from_oklab(palette._to_oklab("#3a7bd5")) == "#3a7bd5"


def test_ink_is_the_readable_one() -> None:
    assert readable_ink("#ffffff") == "#000000"
    assert readable_ink("#000000") == "#ffffff"


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("num_depths", range(1, 9))
def test_every_token_can_be_read(theme: palette.Theme, num_depths: int) -> None:
    swatches = depth_swatches(num_depths, theme)
    assert len(swatches) == num_depths
    assert all(contrast(swatch.fill, swatch.ink) >= 4.5 for swatch in swatches)


@pytest.mark.parametrize("num_depths", range(2, 9))
def test_lightness_alone_orders_the_depths(num_depths: int) -> None:
    light = [lightness(swatch.fill) for swatch in depth_swatches(num_depths, "light")]
    dark = [lightness(swatch.fill) for swatch in depth_swatches(num_depths, "dark")]
    assert light == sorted(light, reverse=True)
    assert dark == sorted(dark)


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("num_depths", [2, 3, 4])
@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_neighbours_differ_for_every_viewer(theme: palette.Theme, num_depths: int, deficiency: str) -> None:
    fills = [seen_by(swatch.fill, DEFICIENCIES[deficiency]) for swatch in depth_swatches(num_depths, theme)]
    assert min(distance(a, b) for a, b in itertools.pairwise(fills)) > 0.08


def test_the_deepest_is_always_the_strongest() -> None:
    assert {depth_swatches(n)[-1].fill for n in range(2, 7)} == {palette.DEPTH_ANCHORS["light"][-1]}


def test_no_depths_is_an_error() -> None:
    with pytest.raises(ValueError, match="num_depths=0"):
        depth_swatches(0)


def test_arm_colors_repeat() -> None:
    assert arm_color(0) == arm_color(len(palette.ARM_COLORS["light"]))
    assert len({arm_color(i, "dark") for i in range(4)}) == 4


@pytest.mark.parametrize(("theme", "card"), [("light", "#ffffff"), ("dark", "#181c22")])
def test_arm_colors_are_seen_on_the_page(theme: palette.Theme, card: str) -> None:
    assert min(contrast(color, card) for color in palette.ARM_COLORS[theme]) > 4.5
    assert len(set(palette.ARM_COLORS[theme])) == 8
