"""Whether a model and a request can decode in slots of the device, and how a request is written into one."""

from __future__ import annotations

from collections.abc import Sequence

from mor.engine.budgets import Budgets, make_room
from mor.engine.kv_store import KvStore, PageLayout
from mor.engine.layers import Layers
from mor.engine.params import Budget, SamplingParams
from mor.engine.request import Request
from mor.engine.row_routing import linear_rows
from mor.engine.sampler import signed
from mor.engine.slot_program import SlotProgram
from mor.engine.slot_routing import SlotRouting, slot_routing, thresholds_of
from mor.engine.slot_rows import RowProgram
from mor.engine.slot_runner import SlotRunner
from mor.engine.slot_state import NUM_STOPS, SlotRow, SlotState
from mor.engine.visit_pace import VisitPace
from mor.model.configuration_mor import MorConfig
from mor.model.modeling_mor import MorForCausalLM

CHANGING_ROTARY = ("dynamic", "longrope")
"""Rotary positions whose frequencies depend on how long a text is."""


def fits_slot(params: SamplingParams) -> bool:
    """Whether the device can choose a request's tokens: what reads the tokens before them, or more than the chosen
    one's log-probability, is left to the host; and who wants none has nothing to do there."""
    plain = params.repetition_penalty == 1 and not params.presence_penalty and not params.frequency_penalty
    return plain and not params.min_tokens and not params.logprobs and params.generates


def routing_of(model: MorForCausalLM, budgets: Budgets, *, saves_rows: bool = False) -> SlotRouting:
    """How slots of this model are routed; `saves_rows`: for the rows that matter, on a CPU. Raises ValueError naming
    what they cannot do."""
    config: MorConfig = model.config
    kind = str((config.rope_parameters or {}).get("rope_type", "default"))
    if kind in CHANGING_ROTARY:
        raise ValueError(f"slots=True needs rotary positions that do not change with the length, not {kind!r}")
    router = model.model.recursion.router
    rule = budgets.rule([(None, None)]) if budgets.has_router else None
    routing = (linear_rows(router) if saves_rows else None) or slot_routing(router, config.depth_plan, rule)
    if routing is None:
        raise ValueError(f"slots=True does not know how router={config.router!r} decides")
    return routing


def _mean_visits(config: MorConfig) -> float:
    """Visits of a token, as far as the configuration tells."""
    if config.router == "none":
        return config.num_recursions
    return config.mean_depth or (1 + config.num_recursions) / 2


class Slots(SlotRunner):
    """The slots of an engine, or of a test."""

    def __init__(
        self,
        model: MorForCausalLM,
        layout: PageLayout,
        store: KvStore,
        budgets: Budgets,
        *,
        num_slots: int,
        pace: VisitPace,
        max_length: int,
        layers: Layers,
        lockstep: bool | None = None,
    ) -> None:
        """Raises ValueError for a model that slots cannot run."""
        routing = routing_of(model, budgets, saves_rows=layers.saves_rows)
        plan = model.config.depth_plan
        like = model.lm_head.weight.detach()
        state = SlotState(
            layout, num_slots, max_length, hidden_size=model.config.hidden_size, most_visits=pace.most, like=like
        )
        kind = RowProgram if layers.saves_rows else SlotProgram
        program = kind(model, layout, store, state, routing, layers, max_length)
        waits_cost = model.config.router == "none" and not layers.saves_rows
        in_lockstep = waits_cost if lockstep is None else lockstep
        period = 1 if plan.is_sequence else plan.num_recursions
        super().__init__(
            program,
            max_length=max_length,
            pace=pace,
            turns_once=period == 1 or in_lockstep or layers.saves_rows,
            period=period if in_lockstep else 1,
            most_per_token=period,
            mean_per_token=_mean_visits(model.config),
        )
        self._budgets, self._num_recursions, self._vocab_size = budgets, plan.num_recursions, model.config.vocab_size
        self._thresholds: dict[Budget, Sequence[float]] = {}

    def row(self, request: Request, slot: int, *, seed: int, ends: frozenset[int]) -> SlotRow:
        """A request as it comes to a slot, with the tokens that end it."""
        params, budget = request.params, request.params.budget
        if budget not in self._thresholds:
            rule = self._budgets.rule([budget]) if self._budgets.has_router else None
            make_room(self._thresholds)
            self._thresholds[budget] = thresholds_of(rule, self._num_recursions)
        return SlotRow(
            slot=slot,
            token=request.output[-1] if request.output else request.prompt[-1],
            number=request.num_known - 1,
            made=len(request.output),
            left=request.most_output - len(request.output),
            limit=self._budgets.limit(budget),
            seed=signed(seed),
            lengths=request.lengths,
            stops=sorted(token for token in ends if token < self._vocab_size)[:NUM_STOPS],
            top_k=params.top_k if params.top_k < self._vocab_size else 0,
            temperature=params.temperature,
            top_p=params.top_p,
            min_p=params.min_p,
            thresholds=self._thresholds[budget],
        )
