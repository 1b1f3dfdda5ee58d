"""What `mor evaluate --tasks` does: the built-in tasks on given text, and others through lm-evaluation-harness."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mor.engine import Engine
    from mor.evaluate.backends import Backend, Pair
    from mor.evaluate.suite import SuiteScore
    from mor.model.configuration_mor import MorConfig


class EngineBackend:
    """A `Backend` that lets the engine score its rows as prompts, and generate."""

    def __init__(self, engine: Engine, config: MorConfig, *, end_of_text: int, mean_depth: float | None = None) -> None:
        self._engine, self._depth, self._end = engine, mean_depth, end_of_text
        self.max_length = config.max_position_embeddings

    def loglikelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        from mor.engine import SamplingParams
        from mor.evaluate.backends import fit

        rows = [fit(pair, self.max_length) for pair in pairs]
        params = SamplingParams(max_tokens=0, prompt_logprobs=1, mean_depth=self._depth)
        answers: list[tuple[float, bool]] = []
        for (ids, count), output in zip(rows, self._engine.generate([ids for ids, _ in rows], params), strict=True):
            if output.error is not None:
                raise RuntimeError(f"a row of {len(ids)} tokens could not be scored: {output.error}")
            scores = (output.prompt_scores or ())[-count:]
            best = [score.top[0][0] for score in scores]
            answers.append((sum(score.logprob for score in scores), best == ids[-count:]))
        return answers

    def write(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        from mor.engine import SamplingParams

        kept = list(prompt)[-(self.max_length - max_tokens) :]
        params = SamplingParams(max_tokens=max_tokens, temperature=0, mean_depth=self._depth)
        (output,) = self._engine.generate([kept], params)
        return [token.token for token in output.tokens if token.token != self._end]


def make_backend(
    name: str, model: Any, tokenizer: Any, *, batch_size: int, mean_depth: float | None, end_of_text: int
) -> Backend:
    """The backend called `model` or `engine`."""
    if name == "engine":
        from mor.engine import Engine

        return EngineBackend(Engine(model, tokenizer), model.config, end_of_text=end_of_text, mean_depth=mean_depth)
    from mor.evaluate.backends import ModelBackend

    return ModelBackend(model, end_of_text=end_of_text, batch_size=batch_size, mean_depth=mean_depth)


def run_tasks(
    names: Sequence[str],
    backend: Backend,
    tokenizer: Any,
    *,
    data: Sequence[str],
    task_folder: str | None,
    limit: int | None,
) -> tuple[list[SuiteScore], dict[str, dict[str, float]]]:
    """Scores of the built-in tasks, made from the text at `data`, and the harness's metrics of all others.

    Raises ValueError for built-in tasks without text, and what `run_harness` raises.
    """
    from mor.data.sources import open_source
    from mor.evaluate.harness import expand_tasks, run_harness
    from mor.evaluate.suite import TASKS, build_items, score_items

    built_in = [name for name in names if name in TASKS]
    others = expand_tasks([name for name in names if name not in TASKS])
    if built_in and not data:
        raise ValueError(f"the tasks {', '.join(built_in)} are made from text: give it with --data")
    documents = [text for path in data for text in open_source(path).documents()] if built_in else []
    scores = [
        score_items(name, build_items(name, documents, limit=limit or 500), backend, tokenizer) for name in built_in
    ]
    if not others:
        return scores, {}
    return scores, run_harness(backend, tokenizer, others, task_folder=task_folder, limit=limit)


def as_json(scores: Sequence[SuiteScore], metrics: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Both kinds of results by task."""
    return {score.task: dataclasses.asdict(score) for score in scores} | metrics
