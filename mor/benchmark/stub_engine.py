"""An engine that makes tokens up at a given pace: what the server costs when the model costs nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from mor.benchmark.arms import arm_config
from mor.benchmark.server_model import text_tokenizer
from mor.engine.engine import Engine
from mor.engine.options import EngineOptions
from mor.engine.outputs import RequestOutput
from mor.model.modeling_mor import MorForCausalLM

VOCABULARY = 49_152


@dataclass(frozen=True, kw_only=True)
class StubSource:
    """`piece`: tokens that each running request gets at a time. `beat`: seconds between two times, at least."""

    piece: int = 8
    beat: float = 0.02
    max_requests: int = 256

    def open(self) -> StubEngine:
        config = arm_config("recursive-3", "tiny")
        config.vocab_size = VOCABULARY
        return StubEngine(MorForCausalLM(config), text_tokenizer(VOCABULARY), self)


class StubEngine(Engine):
    """An engine without visits: a step gives every running request as many tokens as a batch of visits would."""

    def __init__(self, model: Any, tokenizer: Any, source: StubSource) -> None:
        options = EngineOptions(max_requests=source.max_requests, num_pages=2**16, prefix_caching=False)
        super().__init__(model, tokenizer, options)
        self._source, self._next = source, time.perf_counter()

    def step(self) -> list[RequestOutput]:
        """Wait for the next beat; then tokens for the oldest requests, as many as may run."""
        time.sleep(max(0.0, self._next - time.perf_counter()))
        self._next = max(self._next, time.perf_counter() - self._source.beat) + self._source.beat
        outputs = []
        for live in list(self._live.values())[: self._source.max_requests]:
            params, made = live.request.params, len(live.log)
            count = min(self._source.piece, params.max_tokens - made)
            ids = [1 + (97 * (made + number)) % (VOCABULARY - 1) for number in range(count)]
            depths = [1 + token % 3 for token in ids]
            logprobs = [] if params.logprobs is None else [-1.5] * count
            tops = [((1, -1.0),) * (params.logprobs or 0)] * len(logprobs)
            reason = self._hear(live, ids, depths, logprobs, tops)
            if reason is not None:
                self.scheduler.finish(live.request, reason)
            outputs.append(self._tell(live))
        return outputs
