"""Other ways to generate the same: `generate` of our model, and transformers' Llama with either of its caches or in its
continuous batches.

`generate` takes a batch of requests and goes on until the longest is done, then takes the next batch; only tokens that
were asked for count.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from mor.benchmark.arms import Arm
from mor.benchmark.serving import Served
from mor.benchmark.workload import Workload

PEERS = ("generate", "generate-1", "llama-dynamic", "llama-static", "llama-batch")


def check_peers(names: tuple[str, ...]) -> None:
    """Raises ValueError for an unknown name."""
    for name in names:
        if name not in PEERS:
            raise ValueError(f"peer {name!r} is unknown; choose from {', '.join(PEERS)}")


def peers_of(arm: Arm, names: tuple[str, ...]) -> list[Peer]:
    """The peers that can run an arm: transformers' Llama is a vanilla model."""
    is_vanilla = arm.model.config.num_recursions == 1
    return [Peer(name, arm) for name in names if is_vanilla or not name.startswith("llama-")]


class Peer:
    """One of them: `generate` (in batches), `generate-1` (request by request), `llama-dynamic`, `llama-static`, and
    `llama-batch`, transformers' `generate_batch` on all requests at once (on a GPU)."""

    def __init__(self, name: str, arm: Arm) -> None:
        self.name, self._arm = name, arm
        self._model: Any = arm.model
        self._options: dict[str, Any] = {} if arm.mean_depth is None else dict(mean_depth=arm.mean_depth)
        if self.is_theirs:
            self._model = _llama(arm)
        if name in ("llama-dynamic", "llama-static"):
            self._options = dict(cache_implementation=name.removeprefix("llama-"))

    @property
    def is_theirs(self) -> bool:
        """Whether the model is transformers' own."""
        return self.name.startswith("llama-")

    @property
    def attention(self) -> str:
        """The attention that transformers chose; known once it has served."""
        return str(self._model.config._attn_implementation)

    def serve(self, workload: Workload, *, batch: int, temperature: float = 1.0) -> Served:
        """Generate for all requests, `batch` at a time."""
        batch = 1 if self.name == "generate-1" else batch
        sampling = dict(do_sample=True, temperature=temperature, top_k=0) if temperature else dict(do_sample=False)
        start, cpu_start = time.perf_counter(), time.process_time()
        if self.name == "llama-batch":
            self._serve_all(workload, sampling)
        else:
            self._serve_batches(workload, batch, sampling)
        if self._arm.model.device.type == "cuda":
            torch.cuda.synchronize()
        return Served(
            seconds=time.perf_counter() - start,
            cpu_seconds=time.process_time() - cpu_start,
            tokens=workload.num_tokens,
            requests=len(workload),
        )

    def _serve_all(self, workload: Workload, sampling: dict[str, Any]) -> None:
        """Every request generates as many tokens as the longest."""
        settings = GenerationConfig(max_new_tokens=max(workload.lengths), eos_token_id=None, pad_token_id=0, **sampling)
        prompts = [list(prompt) for prompt in workload.prompts]
        outputs = self._model.generate_batch(prompts, generation_config=settings)
        made = [len(output.generated_tokens) for output in outputs.values()]
        if made != [max(workload.lengths)] * len(workload):
            raise RuntimeError(f"generate_batch made {sum(made)} tokens for {len(made)} of {len(workload)} requests")

    @torch.inference_mode()
    def _serve_batches(self, workload: Workload, batch: int, sampling: dict[str, Any]) -> None:
        for first in range(0, len(workload), batch):
            prompts = torch.tensor(workload.prompts[first : first + batch], device=self._arm.model.device)
            new = max(workload.lengths[first : first + batch])
            self._model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=new,
                min_new_tokens=new,
                pad_token_id=0,
                **sampling,
                **self._options,
            )


def _llama(arm: Arm) -> LlamaForCausalLM:
    """transformers' Llama with an arm's dimensions and random weights."""
    config = arm.model.config
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "max_position_embeddings tie_word_embeddings rms_norm_eps"
    )
    dimensions = {name: getattr(config, name) for name in names.split()}
    torch.manual_seed(0)
    settings = LlamaConfig(**dimensions, bos_token_id=None, eos_token_id=None)
    model: Any = LlamaForCausalLM(settings).eval()
    return model.to(device=arm.model.device, dtype=arm.model.dtype)
