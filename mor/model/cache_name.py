"""What transformers calls the cache of a model: `cache` from 5.24 on, `past_key_values` before.

Models take either name, and outputs have both, whatever version is there.
"""

from __future__ import annotations

from transformers.utils.generic import ModelOutput

from .cache import MorCache

IS_RENAMED = hasattr(ModelOutput, "past_key_values")
CACHE_NAMES = ["cache", "past_key_values"]
CACHE_NAME = CACHE_NAMES[0] if IS_RENAMED else CACHE_NAMES[1]


class CachedOutput(ModelOutput):
    """An output with a cache, under the name of this version; transformers adds the other one where it is old."""

    if not IS_RENAMED:

        @property
        def cache(self) -> MorCache | None:
            """See `past_key_values`."""
            return self.past_key_values  # type: ignore[attr-defined,no-any-return]


def given_cache(past_key_values: MorCache | None, cache: MorCache | None) -> MorCache | None:
    """The cache that a caller gave, under either name. Raises ValueError for both, and for one of another kind."""
    if past_key_values is not None and cache is not None:
        raise ValueError("cache and past_key_values are the same; give one of them")
    found = past_key_values if cache is None else cache
    if found is not None and not isinstance(found, MorCache):
        name = "past_key_values" if cache is None else "cache"
        raise ValueError(f"{name} must be a MorCache, got {type(found).__name__}")
    return found
