"""How several processes train one model: each with a copy of it (DDP), or each with a part of every weight (FSDP2).

All see the rows of one global stream, their gradients are summed, and every loss is divided by the targets of the whole
step, so that the result does not depend on how many there are.

FSDP2 gathers *units*. Here a unit is what is used at one time: the shared block is one, gathered once for all its
recursions in the forward pass and once more in the backward pass; each unshared layer is one, and each layer of a
vanilla model; the router is one, kept in float32 whatever the block is gathered in; embedding, final norm and head are
the root's, so that a tied embedding is one parameter and losses may use the head's weight without calling it.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, cast

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from mor.model.configuration_mor import MorConfig
from mor.model.cost import count_parameters
from mor.model.modeling_mor import MorCausalLMOutput, MorForCausalLM
from mor.train.options import TrainingOptions
from mor.train.ranks import Ranks

BYTES_PER_PARAMETER = 16  # float32 weight, gradient and two moments
REPLICA_SHARE = 0.25  # of a device's memory, that copies of all this may take before they are spread


class Parallel(Protocol):
    """How the ranks of a run share a model.

    `is_sharded`: whether each holds a part of the weights only. `gathered_dtype`: in which they meet the activations;
    other than float32, every forward needs autocast.
    """

    ranks: Ranks
    is_sharded: bool
    gathered_dtype: torch.dtype

    def place(self, model: MorForCausalLM, device: torch.device) -> None:
        """Bring `model` to the device, as this rank keeps it. Before its optimizer is made."""
        ...

    def forward(self, model: MorForCausalLM, **inputs: Any) -> MorCausalLMOutput:
        """A training forward of the placed model."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the sum of all ranks' losses."""
        ...

    def accumulating(self, *, is_last: bool) -> AbstractContextManager[object]:
        """Around forward and backward of a micro-batch; `is_last`: of the step."""
        ...

    def evaluating(self, model: MorForCausalLM) -> AbstractContextManager[object]:
        """Around evaluation, where parts of the model may be called by themselves."""
        ...


class OneProcess:
    """No one to share with."""

    is_sharded = False
    gathered_dtype = torch.float32

    def __init__(self) -> None:
        self.ranks = Ranks()

    def place(self, model: MorForCausalLM, device: torch.device) -> None:
        nn.Module.to(model, device)

    def forward(self, model: MorForCausalLM, **inputs: Any) -> MorCausalLMOutput:
        return model(**inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def accumulating(self, *, is_last: bool) -> AbstractContextManager[object]:
        return nullcontext()

    def evaluating(self, model: MorForCausalLM) -> AbstractContextManager[object]:
        return nullcontext()


class _LossOnly(nn.Module):
    """Shows DDP the loss alone: it takes whatever else it sees for a way to a gradient."""

    def __init__(self, model: MorForCausalLM) -> None:
        super().__init__()
        self.model = model
        self.output: MorCausalLMOutput | None = None

    def forward(self, **inputs: Any) -> Tensor:
        self.output = self.model(**inputs)
        assert self.output is not None and self.output.loss is not None
        return self.output.loss

    def take(self, loss: Tensor) -> MorCausalLMOutput:
        """The output of the last forward, with the loss that DDP gave back."""
        output, self.output = self.output, None
        assert output is not None
        output.loss = loss
        return output


class Replicas:
    """DDP: every rank holds the whole model; gradients are averaged while the backward pass runs."""

    is_sharded = False
    gathered_dtype = torch.float32

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._ddp: DistributedDataParallel | None = None

    def place(self, model: MorForCausalLM, device: torch.device) -> None:
        nn.Module.to(model, device)
        _count_all_forwards(model, self.ranks)
        # Layers are compiled one by one: there is no large graph to cut where DDP's buckets end.
        torch._dynamo.config.optimize_ddp = False
        with warnings.catch_warnings():
            # The name that newer versions warn at is the only one that older ones have.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self._ddp = DistributedDataParallel(
                _LossOnly(model),
                device_ids=[device.index] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=_may_leave_parameters_unused(model.config),
            )

    def forward(self, model: MorForCausalLM, **inputs: Any) -> MorCausalLMOutput:
        assert self._ddp is not None
        return cast(_LossOnly, self._ddp.module).take(self._ddp(**inputs))

    def backward(self, loss: Tensor) -> None:
        (loss * self.ranks.size).backward()  # DDP takes the mean

    def accumulating(self, *, is_last: bool) -> AbstractContextManager[object]:
        assert self._ddp is not None
        return nullcontext() if is_last else self._ddp.no_sync()

    def evaluating(self, model: MorForCausalLM) -> AbstractContextManager[object]:
        return nullcontext()


class Shards:
    """FSDP2: every rank holds a part of each weight, its gradient and its moments, all in float32.

    `gathered_dtype`: of the weights of the layers while they are used; gradients are summed in float32.
    `reshard_after_forward`: free a unit's weights between its forward and its backward pass. `shard_size`: ranks that
    share one copy (HSDP): weights travel among them alone, and gradients between copies once per step; None: all.
    """

    is_sharded = True

    def __init__(
        self,
        ranks: Ranks,
        *,
        gathered_dtype: torch.dtype = torch.float32,
        reshard_after_forward: bool = True,
        shard_size: int | None = None,
    ) -> None:
        self.ranks = ranks
        self.gathered_dtype = gathered_dtype
        self._reshard = reshard_after_forward
        self._shard_size = ranks.size if shard_size is None else shard_size
        self._model: FSDPModule | None = None

    def place(self, model: MorForCausalLM, device: torch.device) -> None:
        mesh = self._mesh(device)
        _count_all_forwards(model, self.ranks)
        low = None if self.gathered_dtype == torch.float32 else self.gathered_dtype
        # Activations stay as autocast has them: with one process they do.
        layers = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        exact = MixedPrecisionPolicy(cast_forward_inputs=False)
        recursion = model.model.recursion
        if recursion.router is not None and any(True for _ in recursion.router.parameters()):
            fully_shard(recursion.router, mesh=mesh, mp_policy=exact)
        for unit in _layer_units(model):
            fully_shard(unit, mesh=mesh, mp_policy=layers, reshard_after_forward=self._reshard)
        if recursion.plan.num_recursions > 1:
            with _Visible("x_BTD", "losses").around(recursion):
                fully_shard(recursion, mesh=mesh, mp_policy=layers, reshard_after_forward=self._reshard)
        recursion.register_forward_pre_hook(_gather_router)
        with _Visible("loss", "logits").around(model):
            self._model = fully_shard(model, mesh=mesh, mp_policy=exact)

    def _mesh(self, device: torch.device) -> DeviceMesh:
        """Neighbouring ranks share a copy; with several copies they are the first dimension."""
        copies = self.ranks.size // self._shard_size
        if copies == 1:
            return init_device_mesh(device.type, (self.ranks.size,))
        return init_device_mesh(device.type, (copies, self._shard_size), mesh_dim_names=("copy", "shard"))

    def forward(self, model: MorForCausalLM, **inputs: Any) -> MorCausalLMOutput:
        return model(**inputs)

    def backward(self, loss: Tensor) -> None:
        (loss * self.ranks.size).backward()  # FSDP2 takes the mean

    def accumulating(self, *, is_last: bool) -> AbstractContextManager[object]:
        """Every micro-batch is summed at once, so that whole gradients are never kept; the last one over copies too."""
        assert self._model is not None
        self._model.set_requires_all_reduce(is_last)
        return nullcontext()

    @contextmanager
    def evaluating(self, model: MorForCausalLM) -> Any:
        """The root's weights stay gathered meanwhile: calibration calls the inner model alone."""
        cast(FSDPModule, model).unshard()
        try:
            yield
        finally:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()


class _Visible:
    """Shows FSDP only some fields of a module's output.

    FSDP looks for tensors in what a forward returns, to know when its backward begins. It does not look into every
    dataclass in every version of torch, and where it does it finds tensors that no gradient flows through.
    """

    def __init__(self, *names: str) -> None:
        self._names = names
        self._output: Any = None

    @contextmanager
    def around(self, module: nn.Module) -> Any:
        """Hooks before and after those that are registered inside."""
        module.register_forward_hook(self._hide)
        yield
        module.register_forward_hook(self._restore)

    def _hide(self, module: nn.Module, arguments: Any, output: Any) -> dict[str, Any]:
        self._output = output
        return {name: getattr(output, name) for name in self._names}

    def _restore(self, module: nn.Module, arguments: Any, fields: dict[str, Any]) -> Any:
        output, self._output = self._output, None
        for name, value in fields.items():
            setattr(output, name, value)
        return output


def _gather_router(recursion: nn.Module, arguments: Any) -> None:
    """The router's methods are called, not its forward, so FSDP would not know that its weights are needed."""
    router = recursion.router
    if isinstance(router, FSDPModule):
        router.unshard()


def _layer_units(model: MorForCausalLM) -> list[nn.Module]:
    """The layers that are used once per forward."""
    inner = model.model
    alone = inner.recursion.block if inner.recursion.plan.num_recursions == 1 else []
    return [*inner.first_layers, *alone, *inner.last_layers]


def _may_leave_parameters_unused(config: MorConfig) -> bool:
    """Whether some score heads get no gradient: ungated ones may have no loss, fixed depths may not reach them all."""
    return config.router != "none" and (config.gating == "additive" or config.router == "fixed")


def _count_all_forwards(model: MorForCausalLM, ranks: Ranks) -> None:
    """Let warm-ups, which count training forwards, count those of all ranks."""
    router = model.model.recursion.router
    if router is not None:
        router.rank, router.num_ranks = ranks.rank, ranks.size


def sum_router_measurements(model: MorForCausalLM, ranks: Ranks) -> None:
    """Give every rank what the router measured on all ranks, before its bias or its thresholds are moved by it."""
    router = model.model.recursion.router
    for measured in () if router is None else router.measurements():
        measured.copy_(ranks.sum(measured))


def choose_parallel(
    options: TrainingOptions, ranks: Ranks, config: MorConfig, *, device: torch.device, dtype: torch.dtype
) -> Parallel:
    """The strategy that `options.parallel` names; `auto`: DDP where copies fit easily, else FSDP2.

    Raises ValueError for several processes where there may be one only, and for a `shard_size` that does not fit.
    """
    if ranks.size == 1:
        return OneProcess()
    if options.parallel == "none":
        raise ValueError(f"parallel='none', but there are {ranks.size} processes; use 'auto', 'ddp' or 'fsdp'")
    _check_shard_size(options, ranks)
    name = options.parallel
    if name == "auto":
        name = _fitting(config, device) if options.shard_size is None else "fsdp"
    if name == "ddp":
        return Replicas(ranks)
    low = dtype if options.gather_precision != "float32" else torch.float32
    return Shards(
        ranks,
        gathered_dtype=low,
        reshard_after_forward=options.reshard_after_forward,
        shard_size=options.shard_size,
    )


def _check_shard_size(options: TrainingOptions, ranks: Ranks) -> None:
    if options.shard_size is None:
        return
    if options.parallel == "ddp":
        raise ValueError(f"shard_size={options.shard_size} is for parallel='fsdp'; with 'ddp' nothing is spread")
    if ranks.size % options.shard_size:
        raise ValueError(f"shard_size={options.shard_size} must divide the {ranks.size} processes")


def _fitting(config: MorConfig, device: torch.device) -> str:
    if device.type != "cuda":
        return "ddp"
    memory = torch.cuda.get_device_properties(device).total_memory
    return "ddp" if count_parameters(config).total * BYTES_PER_PARAMETER <= REPLICA_SHARE * memory else "fsdp"


def micro_batches(options: TrainingOptions, ranks: Ranks) -> int:
    """Micro-batches per step on each rank. ValueError when the ranks do not divide those of the recipe."""
    total = options.gradient_accumulation_steps
    if total % ranks.size:
        rows = options.micro_batch_size * total
        fits = f"gradient_accumulation_steps={ranks.size}, micro_batch_size={rows // ranks.size}"
        advice = f"; {fits} is the same step" if rows % ranks.size == 0 else ""
        raise ValueError(
            f"gradient_accumulation_steps={total} cannot be shared by {ranks.size} processes: it must be a multiple "
            f"of {ranks.size}{advice}"
        )
    return total // ranks.size
