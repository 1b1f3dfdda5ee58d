"""How sources are written: `PLACE?option=value&option=value`, and `SOURCE=WEIGHT` where several are mixed."""

import math
import re
from urllib.parse import parse_qsl

_OPEN_OPTION = re.compile(r"[?&][^=&?]*$")


def split_options(address: str, allowed: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """The place and the options of `address`. ValueError for an option that is unknown, empty or given twice."""
    place, _, query = address.partition("?")
    options: dict[str, str] = {}
    for part in query.split("&") if query else ():
        pairs = parse_qsl(part)
        name, value = pairs[0] if len(pairs) == 1 else (part, "")
        if name not in allowed or not value or name in options:
            possible = ", ".join(f"{name}=..." for name in allowed)
            raise ValueError(f"{address}: bad option {part!r}; after '?' there may be {possible}, joined by '&'")
        options[name] = value
    return place, options


def split_weight(word: str) -> tuple[str, float | None]:
    """`hf://a/b?split=train=0.7` as its source and its weight; None where no weight is given.

    ValueError for a weight that is not a positive number.
    """
    source, equals, number = word.rpartition("=")
    if not equals or _OPEN_OPTION.search(source):
        return word, None
    try:
        weight = float(number)
    except ValueError:
        return word, None
    if not (0 < weight < math.inf):
        raise ValueError(f"{word}: the weight {number} must be a positive number")
    return source, weight
