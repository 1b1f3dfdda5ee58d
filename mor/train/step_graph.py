"""Steps as replays of one CUDA graph.

A step of a small model is hundreds of kernels of a few microseconds each, which Python starts more slowly than a GPU
runs them. Captured as a graph the device starts them itself: the host copies the batches to where the graph reads them,
sets the learning rate, and replays. Numbers are those of the step as it is, random ones included.

A graph is one sequence of kernels on fixed addresses. So nothing in a step may depend on the host (the number of a
step, sizes read from the device), and no two steps may differ in a shape.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Protocol

import torch

from mor.data.loader import Batch
from mor.model.configuration_mor import MorConfig
from mor.model.modeling_mor import MorForCausalLM
from mor.train.optim import capturable, keep_learning_rates_on
from mor.train.options import TrainingOptions
from mor.train.pace import known_ceiling
from mor.train.padded_sets import VARYING_ROUTERS, has_padded_sets, should_pad
from mor.train.parallel import micro_batches
from mor.train.ranks import Ranks
from mor.train.state import TrainingState
from mor.train.step import DeviceStep, Run, device_step
from mor.train.window import Window

EAGER_STEPS = 3  # that compile, choose kernels and make the optimizer's state
MEMORY_SHARE = 0.25  # of a device, that a step may take: the graph keeps it, and evaluation needs some beside


class Capture(Protocol):
    """How a program for the device is captured."""

    def has_room(self) -> bool:
        """Whether what was run `aside` left enough memory for a graph that keeps as much."""
        ...

    def aside(self) -> AbstractContextManager[None]:
        """Around what is run as it is before it is captured."""
        ...

    def record(self, program: Callable[[], None]) -> Callable[[], None]:
        """What runs `program` again, with its tensors where they are now. Recording runs nothing on the device."""
        ...


class CudaCapture:
    """CUDA graphs. `share`: of the device's memory, that a graph may keep."""

    def __init__(self, device: torch.device, *, share: float = 1.0) -> None:
        self._device, self._share = device, share
        self._stream = _stream(device)

    def has_room(self) -> bool:
        total = torch.cuda.get_device_properties(self._device).total_memory
        has_room = torch.cuda.max_memory_allocated(self._device) <= self._share * total
        if not has_room:
            torch.cuda.empty_cache()  # torch keeps freed memory by stream: the next step runs on another
        return has_room

    @contextmanager
    def aside(self) -> Iterator[None]:
        """On the stream of the capture, which must not wait for gradients that were placed on another."""
        ours = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(ours)
        with torch.cuda.stream(self._stream):
            yield
        ours.wait_stream(self._stream)

    def record(self, program: Callable[[], None]) -> Callable[[], None]:
        gc.collect()  # a backward graph that is kept alive by a cycle would be waited for
        graph = torch.cuda.CUDAGraph()
        # Other threads go on meanwhile: one puts the next batches into page-locked memory.
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            program()
        return graph.replay


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures of a process, which may train several models: matrix products keep memory by stream."""
    return torch.cuda.Stream(device)


class StepGraph:
    """Takes the first `eager_steps` steps as they are, and then replays one capture of them.

    `tell`: hears when that begins. Batches must all have the shape of the first ones.
    """

    def __init__(
        self, step: DeviceStep, capture: Capture, *, eager_steps: int = EAGER_STEPS, tell: Callable[[str], None]
    ) -> None:
        self._step, self._capture, self._eager_steps, self._tell = step, capture, eager_steps, tell
        self._inputs: list[Batch] = []
        self._measured = Window(step.model.config)
        self._replay: Callable[[], None] | None = None
        keep_learning_rates_on(step.model.device, step.optimizer)

    def __call__(self, batches: Sequence[Batch], window: Window) -> None:
        """Take a step."""
        if self._replay is None and self._is_time():
            self._replay = self._recorded(batches)
        self._eager_steps -= 1
        if self._replay is None:
            with self._capture.aside() if self._eager_steps >= 0 else nullcontext():
                self._step(batches, window)
            return
        self._feed(batches)
        self._replay()
        window.add_copy(self._measured)

    def _is_time(self) -> bool:
        if self._eager_steps != 0:
            return False
        has_room = self._capture.has_room()
        self._tell("steps are replayed as a CUDA graph from now on" if has_room else _without("it would take too much"))
        return has_room

    def _recorded(self, batches: Sequence[Batch]) -> Callable[[], None]:
        self._inputs = [_empty_like(batch, self._step.model.device) for batch in batches]
        self._feed(batches)
        try:
            with capturable(self._step.optimizer):
                return self._capture.record(self._program)
        except RuntimeError as error:
            raise RuntimeError(
                "this step cannot be captured as a CUDA graph; --training.cuda_graph=false trains without"
            ) from error

    def _program(self) -> None:
        self._measured.clear()
        self._step(self._inputs, self._measured)

    def _feed(self, batches: Sequence[Batch]) -> None:
        for ours, batch in zip(self._inputs, batches, strict=True):
            ours.input_ids.copy_(batch.input_ids, non_blocking=True)
            if ours.document_ids is not None:
                assert batch.document_ids is not None
                ours.document_ids.copy_(batch.document_ids, non_blocking=True)


def _empty_like(batch: Batch, device: torch.device) -> Batch:
    documents = batch.document_ids
    return replace(
        batch,
        input_ids=torch.empty_like(batch.input_ids, device=device),
        document_ids=None if documents is None else torch.empty_like(documents, device=device),
    )


def _without(why: str) -> str:
    return f"steps run kernel by kernel, not as a CUDA graph: {why}"


def obstacle(options: TrainingOptions, config: MorConfig, device: torch.device, ranks: Ranks) -> str | None:
    """Why the steps of a run cannot be replayed; None: they can."""
    rope = str((config.rope_parameters or {}).get("rope_type", "default"))
    reasons = {
        f"the device is {device}": device.type != "cuda",
        f"{ranks.size} processes train together": ranks.size > 1,
        "router='fixed' copies its depths from the host": config.router == "fixed",
        f"rope_type={rope!r} reads positions from the device": rope in ("dynamic", "longrope"),
        "gradient_checkpointing keeps states of random generators": options.gradient_checkpointing,
    }
    return next((why for why, is_so in reasons.items() if is_so), None)


def check_cuda_graph(options: TrainingOptions, config: MorConfig, device: torch.device, ranks: Ranks) -> None:
    """ValueError when a graph is asked for and cannot be had."""
    why = obstacle(options, config, device, ranks)
    if options.cuda_graph and why is not None:
        raise ValueError(f"cuda_graph=True is impossible: {why}; leave it unset")


def choose_sets(
    training: TrainingOptions, model: MorForCausalLM, device: torch.device, dtype: torch.dtype, ranks: Ranks
) -> None:
    """Let a router pad its sets where its steps are then to be replayed. To be called before layers are compiled."""
    router = model.model.recursion.router
    if router is not None and obstacle(training, model.config, device, ranks) is None:
        router.pads_sets = should_pad(training, model.config, functools.partial(known_ceiling, device, dtype))


def choose_run(state: TrainingState, tell: Callable[[str], None]) -> Run:
    """How the device is brought to take the steps of a run; `tell` hears why it is not by a graph on CUDA."""
    training, step = state.options.training, device_step(state)
    why = obstacle(training, state.model.config, state.device, state.parallel.ranks)
    if training.cuda_graph is False or state.device.type != "cuda":
        return step
    router = state.model.config.router
    if why is None and router in VARYING_ROUTERS and not has_padded_sets(state.model):
        why = f"with sets of one size, router={router!r} would compute for longer than launching takes"
    if why is not None:
        tell(_without(why))
        return step
    capture = CudaCapture(state.device, share=1.0 if training.cuda_graph else MEMORY_SHARE)
    left = warmup_steps_left(state.model, micro_batches(training, state.parallel.ranks))
    return StepGraph(step, capture, eager_steps=left + EAGER_STEPS, tell=tell)


def warmup_steps_left(model: MorForCausalLM, forwards_per_step: int) -> int:
    """Steps until the router's rule no longer changes from forward to forward."""
    router = model.model.recursion.router
    if router is None:
        return 0
    left = router.warmup_forwards - int(router.training_forwards)
    return max(0, -(-left // forwards_per_step))
