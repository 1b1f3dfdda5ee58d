"""All work on the device: tokens enter, take one recursion per visit, and leave.

Tokens that entered in the same visit form a cohort: rows of one token each, which the model's own router sees as a
batch. A visit applies the block once to the active rows of all cohorts, whatever recursion each is at.

Legend: N rows of a cohort, M rows of a visit, D hidden size, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from mor.engine.budgets import Budgets
from mor.engine.kv_store import KvStore, PageLayout, lay_over
from mor.engine.layers import Layers, Pages
from mor.engine.native.few_rows import Seen
from mor.engine.paged_attention import Booleans, Integers, PagedScope, Span
from mor.engine.prompt_scores import score_rows
from mor.engine.request import Segment, SegmentResult, TokenScore
from mor.engine.sending import sent
from mor.model.modeling_mor import MorForCausalLM
from mor.model.routing import Choice, Route, RoutingInput, Visit
from mor.model.token_set import TokenSet


@dataclass(kw_only=True)
class Cohort:
    """Segments that entered together; their tokens are rows, one after another.

    On the host: `numbers`, each row's among the tokens of its request; `limits`, the most recursions that it may take;
    `active`, whether it takes the next one; `depths`, how many it has taken. On the device: `active_N`, the same as
    `active`; `stream_ND`, the residual stream; `x_ND`, the input of the next recursion.
    """

    segments: list[Segment]
    numbers: Integers
    limits: Integers
    active: Booleans
    depths: Integers
    active_N: Tensor
    stream_ND: Tensor
    x_ND: Tensor
    route: Route | None = None
    choice: Choice | None = None
    recursion: int = 0

    def slices(self) -> Iterable[tuple[Segment, slice]]:
        """Each segment's rows."""
        start = 0
        for segment in self.segments:
            yield segment, slice(start, start + segment.count)
            start += segment.count


@dataclass(kw_only=True)
class _Batch:
    """Rows of a visit; see `layers.Rows`."""

    scope: PagedScope
    rotary: tuple[Tensor, Tensor]
    page_N: Tensor | None
    place_N: Tensor

    @property
    def seen(self) -> Seen | None:
        return self.scope.seen

    def attend(self, query_NHE: Tensor, pages: Pages) -> Tensor:
        """What each row sees."""
        return self.scope.attend(query_NHE, pages)


@dataclass(kw_only=True)
class _Work:
    """Rows of one segment in a visit: their numbers among its request's tokens, and the recursion they take (None: the
    unshared layers)."""

    segment: Segment
    numbers: Integers
    recursion: int | None


class Runner:
    """Runs segments of requests on a model. Logits of requests' last tokens wait in `take_logits`."""

    def __init__(self, model: MorForCausalLM, layout: PageLayout, store: KvStore, layers: Layers) -> None:
        self.layout, self.store, self._layers = layout, store, layers
        self._lm_head, self._model = model.lm_head, model.model
        self._plan, self._policy = model.config.depth_plan, model.config.kv_cache
        self.budgets = Budgets(model.model.recursion.router, self._plan)
        self._cohorts: list[Cohort] = []
        self._logits: dict[int, Tensor] = {}

    @property
    def few_rows(self) -> int:
        """Up to how many rows take the kernels for few."""
        return int(self._layers.ops.FEW_ROWS)

    @property
    def _device(self) -> torch.device:
        return self.store.overlay_RXP.device

    @torch.inference_mode()
    def visit(self, segments: Sequence[Segment]) -> list[SegmentResult]:
        """Take every segment one visit further. Segments in flight that are not listed are forgotten."""
        self._forget({id(segment) for segment in segments})
        added = {id(segment): [0] * len(self.layout.shape.tokens_per_page) for segment in segments}
        entering = [segment for segment in segments if not segment.entered]
        if entering:
            self._cohorts.append(self._enter(entering, added))
        ready = [cohort for cohort in self._cohorts if self._running(cohort).any()]
        if ready:
            self._apply_block(ready, added)
        results = {}
        for cohort in self._cohorts:
            for segment, rows in cohort.slices():
                left = int(cohort.active[rows].sum())
                depths = () if left else tuple(cohort.depths[rows].tolist())
                results[id(segment)] = SegmentResult(
                    added=tuple(added.get(id(segment), ())), active=left, depths=depths
                )
        ended = [id(segment) for segment in segments if not results[id(segment)].active]
        for key, scores in self._leave({key: results[key].depths for key in ended}).items():
            results[key] = replace(results[key], scores=scores)
        return [results[id(segment)] for segment in segments]

    def take_logits(self, segment: Segment) -> Tensor | None:
        """Logits (V,) in float32 after the request's last token, if the segment is done and ended with it."""
        return self._logits.pop(id(segment), None)

    def forget(self) -> None:
        """Drop every segment in flight: after a visit that broke off, nobody knows how far each came."""
        self._cohorts, self._logits = [], {}

    def _forget(self, kept: set[int]) -> None:
        for cohort in self._cohorts:
            for segment, rows in cohort.slices():
                if id(segment) not in kept:
                    cohort.active[rows] = False
                    cohort.active_N[rows] = False
        self._cohorts = [c for c in self._cohorts if any(id(segment) in kept for segment in c.segments)]

    def _enter(self, segments: list[Segment], added: dict[int, list[int]]) -> Cohort:
        """Embedding, first layers, and the router's first decision."""
        works, ids = [], []
        for segment in segments:
            stop = segment.start + segment.count
            works.append(_Work(segment=segment, numbers=np.arange(segment.start, stop), recursion=None))
            ids += segment.tokens
        x_ND = self._model.embed_tokens(self._sent(np.array(ids)))
        if self._plan.num_outer:
            x_ND = self._outer_layers(self._model.first_layers, x_ND, works, first=0)
            for segment in segments:
                added[id(segment)][-1] += segment.count
        budgets = [(s.request.params.mean_depth, s.request.params.max_recursions) for s in segments]
        counts = [segment.count for segment in segments]
        numbers = np.concatenate([work.numbers for work in works])
        cohort = Cohort(
            segments=segments,
            numbers=numbers,
            limits=np.repeat([self.budgets.limit(budget) for budget in budgets], counts),
            active=np.ones(len(ids), dtype=np.bool_),
            depths=np.zeros(len(ids), dtype=np.int64),
            active_N=torch.ones(len(ids), dtype=torch.bool, device=self._device),
            stream_ND=x_ND,
            x_ND=x_ND,
        )
        router = self._model.recursion.router
        if router is not None:
            rule = self.budgets.rule(budgets, counts)
            number_N1 = self._sent(numbers)[:, None]
            cohort.route = router.begin(
                RoutingInput(x_BTD=x_ND[:, None], tokens=TokenSet(), number_BT=number_N1, rule=rule)
            )
        self._choose(cohort)
        return cohort

    def _choose(self, cohort: Cohort) -> None:
        """Which rows take the cohort's next recursion. Of a visit's steps this alone waits for the device."""
        chosen = cohort.active & (cohort.recursion < cohort.limits)
        if cohort.recursion == self._plan.num_recursions:
            chosen = np.zeros_like(chosen)
        if cohort.route is None or not chosen.any():
            cohort.active, cohort.active_N = chosen, self._sent(chosen)
            return
        alive = TokenSet(valid_BK=cohort.active_N[:, None])
        cohort.choice = cohort.route.choose(cohort.recursion, cohort.x_ND[:, None], alive)
        picked_N = cohort.choice.chosen.mask(cohort.active_N[:, None].shape, self._device)[:, 0]
        cohort.active_N = self._sent(chosen) & picked_N
        cohort.active = cohort.active_N.cpu().numpy()

    def _running(self, cohort: Cohort) -> Booleans:
        """Rows that go through the block. Where the first recursion's keys and values serve all tokens, all take it, in
        the visit in which they enter."""
        if cohort.recursion == 0 and self._policy != "recursion":
            return np.ones_like(cohort.active)
        return cohort.active

    def _apply_block(self, cohorts: list[Cohort], added: dict[int, list[int]]) -> None:
        masks = [self._running(cohort) for cohort in cohorts]
        rows = [self._sent(np.flatnonzero(mask)) for mask in masks]
        x_MD = torch.cat([cohort.x_ND.index_select(0, row_K) for cohort, row_K in zip(cohorts, rows, strict=True)])
        recursions = range(self._plan.num_recursions) if self._plan.is_sequence else [None]
        batches = {}
        for recursion in recursions:
            works = [w for c, mask in zip(cohorts, masks, strict=True) for w in self._works(c, mask, recursion)]
            for work in works:
                assert work.recursion is not None
                if self.layout.shape.written[work.recursion]:
                    added[id(work.segment)][work.recursion] += len(work.numbers)
            batches[recursion] = self._batch(works, x_MD)
        order = self._block_order()
        x_MD = self._layers(
            [self._model.recursion.block[layer] for layer, _ in order],
            x_MD,
            [batches[recursion] for _, recursion in order],
            [self.store.block_layers[layer] for layer, _ in order],
        )
        for cohort, row_K, y_KD in zip(cohorts, rows, x_MD.split([len(row_K) for row_K in rows]), strict=True):
            self._merge(cohort, row_K, y_KD)

    def _block_order(self) -> list[tuple[int, int | None]]:
        """Layers of the block in a visit, with the recursion each runs at: the rows' own (None) where blocks repeat as
        a whole, every one in turn where layers repeat in place."""
        if not self._plan.is_sequence:
            return [(layer, None) for layer in range(self._plan.block_size)]
        return [(step.block_layer, step.recursion) for step in self._plan.block_steps]  # type: ignore[misc]

    def _works(self, cohort: Cohort, mask: Booleans, recursion: int | None) -> Iterable[_Work]:
        for segment, rows in cohort.slices():
            chosen = cohort.numbers[rows][mask[rows]]
            if len(chosen):
                at = cohort.recursion if recursion is None else recursion
                yield _Work(segment=segment, numbers=chosen, recursion=at)

    def _merge(self, cohort: Cohort, row_K: Tensor, y_KD: Tensor) -> None:
        """Bring the block's output, of these rows, back into the stream, and decide who goes on."""
        y_ND = torch.zeros_like(cohort.x_ND).index_copy_(0, row_K, y_KD)
        active_N1 = cohort.active_N[:, None]
        if cohort.route is None:
            cohort.stream_ND = cohort.x_ND = torch.where(active_N1, y_ND, cohort.x_ND)
        elif cohort.active.any():
            assert cohort.choice is not None
            visit = Visit(
                x_BKD=cohort.x_ND[:, None],
                y_BKD=y_ND[:, None],
                gate_BK=cohort.choice.gate_BK,
                active=TokenSet(valid_BK=active_N1),
            )
            stream, x = cohort.route.merge(cohort.recursion, cohort.stream_ND[:, None], visit)
            cohort.stream_ND, cohort.x_ND = stream[:, 0], x[:, 0]
        taken = self._plan.num_recursions if self._plan.is_sequence else 1
        cohort.depths += taken * cohort.active
        cohort.recursion += taken
        self._choose(cohort)

    def _leave(self, finished: dict[int, tuple[int, ...]]) -> dict[int, tuple[TokenScore, ...]]:
        """Last layers and norm of finished segments, whose tokens have these depths, and logits where a request's last
        known token is among them. Returns what was to be scored."""
        works, streams, depths = list[_Work](), list[Tensor](), list[int]()
        for cohort in self._cohorts:
            for segment, rows in cohort.slices():
                if id(segment) in finished:
                    numbers = np.arange(segment.start, segment.start + segment.count)
                    works.append(_Work(segment=segment, numbers=numbers, recursion=None))
                    streams.append(cohort.stream_ND[rows])
                    depths += finished[id(segment)]
        if not works:
            return {}
        x_ND = torch.cat(streams)
        if self._plan.num_outer:
            x_ND = self._outer_layers(self._model.last_layers, x_ND, works, first=self._plan.num_outer)
        row = -1
        last: list[tuple[int, int]] = []
        for work in works:
            row += work.segment.count
            if work.segment.needs_head:
                last.append((id(work.segment), row))
        if last:
            logits_NV = self._head(x_ND.index_select(0, self._sent(np.array([row for _, row in last]))))
            self._logits |= {key: logits_V for (key, _), logits_V in zip(last, logits_NV, strict=True)}
        return score_rows([work.segment for work in works], depths, x_ND, self._head)

    def _head(self, x_ND: Tensor) -> Tensor:
        return self._layers.logits(self._model.norm, self._lm_head, x_ND).float()

    def _outer_layers(self, layers: nn.ModuleList, x_ND: Tensor, works: list[_Work], *, first: int) -> Tensor:
        batch = self._batch(works, x_ND, is_new=first == 0)  # last layers write where the first layers did
        pages = self.store.outer_layers[first : first + len(layers)]
        return self._layers(layers, x_ND, [batch] * len(layers), pages)

    def _batch(self, works: list[_Work], x_MD: Tensor, *, is_new: bool = True) -> _Batch:
        spans, pages, places = [], [], []
        start, size = 0, self.layout.shape.tokens_per_page[self._sequence(works[0].recursion)]
        for work in works:
            stop = start + len(work.numbers)
            spans.append(self._span(work, start, stop))
            if self._written(work):
                entries, table = self._entries(work), work.segment.request.pages[self._sequence(work.recursion)]
                pages.append(np.asarray(table, dtype=np.int64)[entries // size])
                places.append(entries % size)
            else:
                pages.append(np.full(len(work.numbers), self.store.nobodys))
                places.append(np.zeros_like(work.numbers))
            start = stop
        page_M, place_M = np.concatenate(pages), np.concatenate(places)
        if is_new:
            self.store.clear_pages(page_M[(place_M == 0) & (page_M != self.store.nobodys)])
        number_N, page_N, place_N = map(self._sent, (np.concatenate([w.numbers for w in works]), page_M, place_M))
        if self.layout.num_overlaying and works[0].recursion is not None:
            self._lay_over(works)
        cos_1NE, sin_1NE = self._model.rotary_emb(x_MD[None], position_ids=number_N[None])
        return _Batch(
            scope=PagedScope(spans, size, self.store.overlay_RXP, self._layers.ops.attend_spans),
            rotary=(cos_1NE[0], sin_1NE[0]),
            page_N=page_N if any(map(self._written, works)) else None,
            place_N=place_N,
        )

    def _lay_over(self, works: list[_Work]) -> None:
        """Note which entries of the first recursion the new ones lie over."""
        size, found = self.layout.page_entries, []
        for work in works:
            first = np.asarray(work.segment.request.pages[0], dtype=np.int64)[work.numbers // size]
            recursion = np.full_like(work.numbers, work.recursion)
            found.append((recursion, first, work.numbers % size, self._entries(work)))
        lay_over(self.store.overlay_RXP, *(self._sent(np.concatenate(column)) for column in zip(*found, strict=True)))

    def _sent(self, values: Integers | Booleans) -> Tensor:
        return sent(torch.from_numpy(values), self._device)

    def _sequence(self, recursion: int | None) -> int:
        return self._plan.num_recursions if recursion is None else recursion

    def _written(self, work: _Work) -> bool:
        return self.layout.shape.written[self._sequence(work.recursion)]

    def _entries(self, work: _Work) -> Integers:
        """Which entries of their own sequence the rows become."""
        if work.recursion is None:
            return work.numbers
        have = work.segment.request.lengths[work.recursion]
        return np.arange(have, have + len(work.numbers))

    def _span(self, work: _Work, start: int, stop: int) -> Span:
        request, recursion = work.segment.request, work.recursion
        if not recursion or self._policy == "recursion":
            pages = request.pages[self._sequence(recursion)]
            return Span(start=start, stop=stop, pages=pages, last=self._entries(work))
        read = Span(start=start, stop=stop, pages=request.pages[0], last=work.numbers)
        if self._policy == "shared":
            return read
        return replace(read, recursion=recursion, own_pages=request.pages[recursion])
