"""One optimizer step: micro-batches forward and backward, clip, update.

Legend: B rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mor.data.loader import Batch
from mor.model.lm_loss import LmLoss
from mor.model.modeling_mor import MorCausalLMOutput, MorForCausalLM
from mor.train.optim import clip_gradients, set_learning_rate
from mor.train.parallel import OneProcess, Parallel, micro_batches, sum_router_measurements
from mor.train.precision import autocast
from mor.train.state import TrainingState
from mor.train.window import Window


def accumulate_gradients(
    model: MorForCausalLM,
    batches: Sequence[Batch],
    *,
    dtype: torch.dtype,
    lm_loss: LmLoss | None = None,
    window: Window | None = None,
    parallel: Parallel | None = None,
) -> dict[str, Tensor]:
    """Add the gradient of the mean loss over all target tokens of the step, however they are cut into micro-batches.

    `batches`: this rank's; the step has as many tokens on every rank. Returns `loss` and its unweighted parts
    `loss/{part}` as 0-d tensors, means over the whole step.
    """
    parallel = OneProcess() if parallel is None else parallel
    targets = sum(_num_targets(batch) for batch in batches) * parallel.ranks.size
    values: dict[str, Tensor] = {}
    for number, batch in enumerate(batches, start=1):
        with parallel.accumulating(is_last=number == len(batches)):
            output = _forward(parallel, model, batch, targets, dtype, lm_loss)
            assert output.loss is not None and output.losses is not None
            parallel.backward(output.loss)
        share = _num_targets(batch) / targets
        parts = {"loss": output.loss}  # this and the language-modelling loss are sums over `targets` already
        parts |= {f"loss/{name}": loss * (1.0 if name == "lm" else share) for name, loss in output.losses.items()}
        for name, value in parts.items():
            values[name] = values[name] + value.detach() if name in values else value.detach()
        if window is not None:
            assert output.depths is not None and output.routing is not None
            window.add_forward(output.depths, output.routing)
    return _sum_over_ranks(values, parallel)


def _sum_over_ranks(values: dict[str, Tensor], parallel: Parallel) -> dict[str, Tensor]:
    if parallel.ranks.size == 1:
        return values
    total = parallel.ranks.sum(torch.stack([value.float() for value in values.values()]))
    return dict(zip(values, total.unbind()))


def _num_targets(batch: Batch) -> int:
    """Tokens to predict: all but the first of each row."""
    return batch.input_ids.shape[0] * (batch.input_ids.shape[1] - 1)


def _forward(
    parallel: Parallel,
    model: MorForCausalLM,
    batch: Batch,
    targets: int,
    dtype: torch.dtype,
    lm_loss: LmLoss | None,
) -> MorCausalLMOutput:
    ids_BT = batch.input_ids.to(model.device, non_blocking=True)
    documents_BT = None if batch.document_ids is None else batch.document_ids.to(model.device, non_blocking=True)
    # The first token is nobody's target: left in, it would count in the share that weighs the router losses.
    labels_BT = F.pad(ids_BT[:, 1:], (1, 0), value=-100)
    with autocast(model.device, dtype):
        return parallel.forward(
            model,
            input_ids=ids_BT,
            labels=labels_BT,
            document_ids=documents_BT,
            num_items_in_batch=targets,
            use_cache=False,
            lm_loss=lm_loss,
        )


Run = Callable[[Sequence[Batch], Window], None]


@dataclass(frozen=True, kw_only=True)
class DeviceStep:
    """All that the device does in an optimizer step, whose measurements go into the window.

    It is told neither the number of the step nor the learning rate, and leaves nothing on the host, so that it can be
    captured once and replayed (`mor.train.step_graph`). `max_gradient_norm`: None clips nothing. `lm_loss`: None: the
    model's own.
    """

    model: MorForCausalLM
    optimizer: torch.optim.Optimizer
    dtype: torch.dtype
    max_gradient_norm: float | None = 1.0
    lm_loss: LmLoss | None = None
    parallel: Parallel = field(default_factory=OneProcess)

    def __call__(self, batches: Sequence[Batch], window: Window) -> None:
        values = accumulate_gradients(
            self.model,
            batches,
            dtype=self.dtype,
            lm_loss=self.lm_loss,
            window=window,
            parallel=self.parallel,
        )
        norms = clip_gradients(self.optimizer, self.max_gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        sum_router_measurements(self.model, self.parallel.ranks)
        self.model.update_router_bias()
        window.add_step(values | norms)


def device_step(state: TrainingState) -> DeviceStep:
    """What the device does in the steps of a run."""
    return DeviceStep(
        model=state.model,
        optimizer=state.optimizer,
        dtype=state.dtype,
        max_gradient_norm=state.options.optimizer.max_gradient_norm,
        lm_loss=state.lm_loss,
        parallel=state.parallel,
    )


def optimizer_step(state: TrainingState, learning_rate: float, run: Run | None = None) -> None:
    """Take the next step of a run at `learning_rate`, and add what it measured to the window.

    `run`: how the device is brought to take it; None: kernel by kernel.
    """
    run = device_step(state) if run is None else run
    state.positions.append(state.loader.state_dict())
    count = micro_batches(state.options.training, state.parallel.ranks)
    batches = [next(state.loader) for _ in range(count)]
    set_learning_rate(state.optimizer, learning_rate)
    run(batches, state.window)
    state.step += 1
    state.tokens += state.options.training.tokens_per_step
    state.epoch = batches[-1].epoch
