"""The colours of recursion depths and of compared models: one palette for the terminal and for pages.

Depth is an ordered quantity, so its colours run from quiet to strong: blue, teal, gold, orange, raspberry, with
lightness falling on a light page and rising on a dark one. Lightness alone tells the depths apart, which is what keeps
the palette readable without colour vision. The ramp is interpolated in OKLab (Ottosson, 2020), where equal steps look
equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Theme = Literal["light", "dark"]
Triple = tuple[float, float, float]

DEPTH_ANCHORS: dict[Theme, tuple[str, ...]] = {
    "light": ("#dceaf7", "#abdcc3", "#efb73a", "#de6f3a", "#a51d60"),
    "dark": ("#24394e", "#245c58", "#a67c1b", "#e3823f", "#ff9abf"),
}
ARM_COLORS: dict[Theme, tuple[str, ...]] = {
    "light": ("#5b4bd6", "#5f6772", "#0b7f66", "#a0522d", "#c2255c", "#1971c2", "#7a6a00", "#111827"),
    "dark": ("#a79cff", "#a9b1bd", "#3fc6a4", "#e0a07a", "#ff8fb1", "#6db8ff", "#d4c04a", "#f1f3f5"),
}
ARM_DASHES: tuple[str, ...] = ("", "7 4", "2 4", "10 3 2 3")


@dataclass(frozen=True, kw_only=True)
class Swatch:
    """A background (`fill`) and the text colour (`ink`) that reads on it, both #rrggbb."""

    fill: str
    ink: str


def depth_swatches(num_depths: int, theme: Theme = "light") -> tuple[Swatch, ...]:
    """Colours of depths 1..`num_depths`, evenly spaced on the ramp; the deepest is always the strongest.

    Raises ValueError when `num_depths` is below 1.
    """
    if num_depths < 1:
        raise ValueError(f"num_depths={num_depths} must be at least 1")
    anchors = [_to_oklab(color) for color in DEPTH_ANCHORS[theme]]
    fills = [_from_oklab(_interpolate(anchors, i / max(1, num_depths - 1))) for i in range(num_depths)]
    return tuple(Swatch(fill=fill, ink=readable_ink(fill)) for fill in fills)


def arm_color(index: int, theme: Theme = "light") -> str:
    """Line colour of the compared model number `index`; colours repeat after eight."""
    return ARM_COLORS[theme][index % len(ARM_COLORS[theme])]


def arm_dash(index: int) -> str:
    """Its dashes as SVG writes them; four kinds, shifted when colours repeat, so that 32 models can be told apart."""
    return ARM_DASHES[(index + index // len(ARM_COLORS["light"])) % len(ARM_DASHES)]


def arm_class(index: int) -> str:
    """The class of its marks in a page, which the style sheet colours."""
    return f"arm-{index % len(ARM_COLORS['light'])}"


def readable_ink(fill: str) -> str:
    """Black or white, whichever has the higher contrast on `fill` (never below 4.5:1)."""
    return max(("#000000", "#ffffff"), key=lambda ink: contrast(ink, fill))


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.2, section 1.4.3)."""
    low, high = sorted((_luminance(first), _luminance(second)))
    return (high + 0.05) / (low + 0.05)


def lightness(color: str) -> float:
    """Perceived lightness of a colour, 0 (black) to 1 (white): OKLab's L."""
    return _to_oklab(color)[0]


def _luminance(color: str) -> float:
    red, green, blue = _linear(color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _linear(color: str) -> Triple:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return red, green, blue


def _encode(linear: Triple) -> str:
    clipped = [min(1.0, max(0.0, c)) for c in linear]
    channels = [12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in clipped]
    return "#" + "".join(f"{round(255 * c):02x}" for c in channels)


def _apply(matrix: Sequence[Triple], vector: Triple) -> Triple:
    first, second, third = (sum(m * v for m, v in zip(row, vector, strict=True)) for row in matrix)
    return first, second, third


_RGB_TO_LMS = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
_LMS_TO_LAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)
_LAB_TO_LMS = (
    (1.0, 0.3963377774, 0.2158037573),
    (1.0, -0.1055613458, -0.0638541728),
    (1.0, -0.0894841775, -1.2914855480),
)
_LMS_TO_RGB = (
    (4.0767416621, -3.3077115913, 0.2309699292),
    (-1.2684380046, 2.6097574011, -0.3413193965),
    (-0.0041960863, -0.7034186147, 1.7076147010),
)


def _to_oklab(color: str) -> Triple:
    long, medium, short = (c ** (1 / 3) for c in _apply(_RGB_TO_LMS, _linear(color)))
    return _apply(_LMS_TO_LAB, (long, medium, short))


def _from_oklab(lab: Triple) -> str:
    long, medium, short = (c**3 for c in _apply(_LAB_TO_LMS, lab))
    return _encode(_apply(_LMS_TO_RGB, (long, medium, short)))


def _interpolate(anchors: Sequence[Triple], position: float) -> Triple:
    place = position * (len(anchors) - 1)
    lower = min(int(place), len(anchors) - 2)
    share = place - lower
    first, second, third = (
        (1 - share) * a + share * b for a, b in zip(anchors[lower], anchors[lower + 1], strict=True)
    )
    return first, second, third
