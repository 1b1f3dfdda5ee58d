"""Small engines, random work for them, and what the model itself says of the outcome."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mor.data.tokenizer import byte_tokenizer
from mor.engine.engine import Engine
from mor.engine.kv_store import PageLayout
from mor.engine.options import EngineOptions
from mor.engine.outputs import RequestOutput, TokenOutput
from mor.engine.params import SamplingParams
from mor.model.modeling_mor import MorForCausalLM
from tests.tiny import VOCABULARY

TOKENIZER = byte_tokenizer()
MOST_STEPS = 20_000


def engine_of(model: MorForCausalLM, **options: Any) -> Engine:
    """An engine with a small pool of small pages, which is filled to the brim."""
    settings = {"page_entries": 4, "num_pages": 400, "native": False, "tokens_to_grow": 0, **options}
    return Engine(model, TOKENIZER, EngineOptions(**settings))


def greedy(max_tokens: int, **params: Any) -> SamplingParams:
    """The most probable tokens, `max_tokens` of them, with their log-probabilities."""
    settings = {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, "logprobs": 0, **params}
    return SamplingParams(**settings)


def random_tokens(draw: random.Random, count: int) -> tuple[int, ...]:
    return tuple(draw.randrange(1, VOCABULARY) for _ in range(count))


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request that is added before step `at`, and aborted before step `abort_at`."""

    name: str
    prompt: tuple[int, ...]
    params: SamplingParams
    at: int = 0
    abort_at: int | None = None


@dataclass(kw_only=True)
class Story:
    """What the engine streamed of one request."""

    job: Job
    tokens: list[TokenOutput] = field(default_factory=list[TokenOutput])
    text: str = ""
    last: RequestOutput | None = None

    @property
    def ids(self) -> list[int]:
        return [token.token for token in self.tokens]

    def hear(self, output: RequestOutput) -> None:
        assert self.last is None or not self.last.finished, f"{output.id} spoke after its end"
        assert output.text == "".join(token.text for token in output.tokens)
        self.tokens += output.tokens
        self.text += output.text
        self.last = output


def play(engine: Engine, jobs: Sequence[Job]) -> dict[str, Story]:
    """Run the jobs to their ends and check that nothing is left behind."""
    stories = {job.name: Story(job=job) for job in jobs}
    ahead = sorted(jobs, key=lambda job: job.at)
    step, aborted, aborts = 0, set[str](), dict[int, list[str]]()
    for job in jobs:
        if job.abort_at is not None:
            aborts.setdefault(job.abort_at, []).append(job.name)
    while ahead or engine.has_unfinished:
        assert step < MOST_STEPS + 100 * len(jobs), "the requests do not end"
        while ahead and ahead[0].at <= step:
            job = ahead.pop(0)
            engine.add_request(job.name, job.prompt, job.params)
        aborted |= {name for name in aborts.get(step, ()) if engine.abort(name)}
        for output in engine.step():
            assert output.id not in aborted
            stories[output.id].hear(output)
        step += 1
    for name, story in stories.items():
        assert name in aborted or (story.last is not None and story.last.finished), f"{name} did not end"
    check_all_free(engine)
    return stories


def drain(engine: Engine) -> list[RequestOutput]:
    """Step until nothing is live."""
    outputs: list[RequestOutput] = []
    for _ in range(MOST_STEPS):
        if not engine.has_unfinished:
            return outputs
        outputs += engine.step()
    raise AssertionError("the requests do not end")


def check_all_free(engine: Engine) -> None:
    """No request holds anything; pages that are not free hold prefixes."""
    assert not engine.has_unfinished and not engine.scheduler.num_running and not engine.scheduler.num_waiting
    engine.step()  # what was copied for the last visit is let go
    if engine.prefixes is not None:
        engine.prefixes.clear()
    assert engine.pool.num_free == engine.pool.num_pages


def check_against_forward(model: MorForCausalLM, stories: Iterable[Story]) -> None:
    """Every token is the most probable one after its prefix in the full forward, with its depth and log-probability."""
    told = [story for story in stories if story.tokens]
    for budgeted in (False, True):
        group = [story for story in told if (story.job.params.mean_depth is not None) == budgeted]
        if not group:
            continue
        rows = [[*story.job.prompt, *story.ids] for story in group]
        ids, mask = _padded(rows, left=False)
        depths = [story.job.params.mean_depth or 0.0 for story in group]
        with torch.no_grad():
            full = model(ids, attention_mask=mask, mean_depth=torch.tensor(depths) if budgeted else None)
        for row, story in enumerate(group):
            start, stop = len(story.job.prompt) - 1, len(rows[row]) - 1
            check_tokens(story.tokens, full.logits[row, start:stop], full.depths[row, start:stop])


def check_tokens(tokens: Sequence[TokenOutput], logits: torch.Tensor, depths: torch.Tensor) -> None:
    """Greedy tokens with their depths and log-probabilities, given the model's at the positions that predict them."""
    assert [token.token for token in tokens] == logits.argmax(-1).tolist()
    assert [token.depth for token in tokens] == depths.tolist()
    expected = logits.log_softmax(-1).max(-1).values
    torch.testing.assert_close(torch.tensor([token.logprob for token in tokens]), expected, atol=1e-4, rtol=0)


def check_against_generate(model: MorForCausalLM, stories: Sequence[Story], mean_depth: float | None = None) -> None:
    """The tokens are those of `model.generate` on all prompts at once."""
    ids, mask = _padded([story.job.prompt for story in stories], left=True)
    most = max(len(story.tokens) for story in stories)
    budget = {} if mean_depth is None else {"mean_depth": mean_depth}
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **budget,
    )
    for row, story in enumerate(stories):
        assert story.ids == output[row, ids.shape[1] :][: len(story.tokens)].tolist(), story.job.name


def _padded(rows: Sequence[Sequence[int]], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of rows of any lengths."""
    size = max(map(len, rows))
    ids = [[*[0] * (size - len(row)), *row] if left else [*row, *[0] * (size - len(row))] for row in rows]
    real = [[0] * (size - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(real if left else [row[::-1] for row in real])


def tight_pool(engine_options: dict[str, Any], model: MorForCausalLM, jobs: Sequence[Job], spare: int) -> int:
    """Pages that hold the largest job alone and `spare` more."""
    shape = PageLayout.of(model.config, engine_options["page_entries"]).shape
    return spare + max(shape.worst_pages(len(job.prompt) + job.params.max_tokens) for job in jobs)
