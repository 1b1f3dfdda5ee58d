"""`MorModel`: from tokens to hidden states.

Legend: B rows, S columns of the input (padding included), T tokens of a row (padding removed), D hidden size.

Padding is taken out at the entrance and put back at the exit, so nothing inside ever computes on it or counts it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .cache import MorCache
from .cache_name import CACHE_NAME, CACHE_NAMES, IS_RENAMED, CachedOutput, given_cache
from .configuration_mor import MorConfig
from .decision import DecisionRule
from .forward_pass import ForwardPass
from .layers import MorDecoderLayer, RotaryEmbedding
from .recursion import Recursion
from .routing import RecursionTrace, Router
from .token_set import TokenSet


@dataclass
class MorModelOutput(CachedOutput):
    """`last_hidden_state` (B, S, D) after the final norm. `depths` (B, S): block applications per token, 0 for padding.
    `hidden_states`: embeddings, then the stream after each layer, or after each recursion where a router decides; the
    last is normed. `routing`: one trace per recursion. `losses`: unweighted router losses of a training forward."""

    last_hidden_state: Tensor | None = None
    if IS_RENAMED:
        cache: MorCache | None = None
    else:
        past_key_values: MorCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    depths: Tensor | None = None
    routing: tuple[RecursionTrace, ...] | None = None
    losses: dict[str, Tensor] | None = None


class MorPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = MorConfig
    config: MorConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MorDecoderLayer", "Recursion"]
    _skip_keys_device_placement = CACHE_NAMES
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = {
        "calibration_mean_depth",
        "calibration_thresholds",
        "load_bias",
        "load_sum",
        "running_thresholds",
        "threshold_updates",
        "boundary_sum",
    }

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        """Recompute each recursion's activations in backward.

        Raises ValueError for `use_reentrant=True`: shared keys and values would lose their gradient.
        """
        checkpoint = kwargs.get("gradient_checkpointing_func")
        if enable and isinstance(checkpoint, partial) and checkpoint.keywords.get("use_reentrant"):
            raise ValueError("use_reentrant=True would drop the gradient of shared keys and values; use False")
        super()._set_gradient_checkpointing(enable, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Also sets router buffers that a checkpoint does not hold."""
        super()._init_weights(module)
        if isinstance(module, Router):
            for name, value in module.initial_buffers().items():
                init.constant_(getattr(module, name), value)


class MorModel(MorPreTrainedModel):
    """Embedding, unshared first layers, the recursions, unshared last layers, final norm."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(self, config: MorConfig) -> None:
        super().__init__(config)
        self.plan = config.depth_plan
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.first_layers = nn.ModuleList(MorDecoderLayer(config) for _ in range(self.plan.num_outer))
        self.recursion = Recursion(config)
        self.last_layers = nn.ModuleList(MorDecoderLayer(config) for _ in range(self.plan.num_outer))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MorCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        decision: str | DecisionRule | None = None,
        mean_depth: float | Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: MorCache | None = None,
        **kwargs: Any,
    ) -> MorModelOutput:
        """Run the model; see `MorForCausalLM.forward` for the arguments."""
        _refuse_unsupported(kwargs)
        x_BSD = self._embed(input_ids, inputs_embeds)
        cache = self._cache(given_cache(past_key_values, cache), use_cache)
        rule = self._rule(decision, mean_depth, cache)
        if document_ids is not None and cache is not None:
            raise ValueError("document_ids is for training and scoring whole rows; it cannot be combined with a cache")
        member_BS = _real_columns(attention_mask, x_BSD, 0 if cache is None else cache.num_columns)
        columns = TokenSet() if member_BS is None else TokenSet.from_mask(member_BS)
        current = self._begin(x_BSD, columns, position_ids, cache, document_ids)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output = self._run(columns.gather(x_BSD), current, rule, bool(output_hidden_states))
        if cache is not None:
            cache.advance(member_BS, *x_BSD.shape[:2])
        return self._scatter(output, columns, x_BSD.shape[1], cache)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is not None:
            return inputs_embeds
        assert input_ids is not None
        if not torch.compiler.is_compiling() and input_ids.device.type == "cpu" and input_ids.numel():
            low, high = int(input_ids.min()), int(input_ids.max())
            if low < 0 or high >= self.config.vocab_size:
                token, last = low if low < 0 else high, self.config.vocab_size - 1
                raise ValueError(f"input_ids: token {token} is outside the vocabulary 0..{last}")
        x_BSD = self.embed_tokens(input_ids)
        device = x_BSD.device.type
        # Under autocast the residual stream has its dtype: in float32 it would double the memory of every layer.
        return x_BSD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x_BSD

    def _cache(self, given: MorCache | None, use_cache: bool | None) -> MorCache | None:
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if given is None and use_cache and not self.training:
            return MorCache(self.config)
        return given

    def _rule(
        self, decision: str | DecisionRule | None, mean_depth: float | Tensor | None, cache: MorCache | None
    ) -> DecisionRule | None:
        router = self.recursion.router
        if router is None:
            if decision not in (None, "causal") or mean_depth is not None:
                asked = f"decision={decision!r}" if mean_depth is None else f"mean_depth={mean_depth}"
                raise ValueError(f"{asked} needs a router; this model's is 'none': every token takes every recursion")
            return None
        starts = cache is None or not cache.num_columns
        if decision is None and self.training and mean_depth is None and starts:
            return router.trained_rule()
        rule = router.rule(decision or "causal", mean_depth)
        if not starts and not rule.is_causal:
            raise ValueError("decision='top_k' looks into the future, so it cannot decode with a cache; use 'causal'")
        return rule

    def _begin(
        self,
        x_BSD: Tensor,
        columns: TokenSet,
        position_ids: Tensor | None,
        cache: MorCache | None,
        document_ids: Tensor | None,
    ) -> ForwardPass:
        batch, num_columns = x_BSD.shape[:2]
        if position_ids is None:
            start = 0 if cache is None else cache.num_columns
            position_ids = torch.arange(start, start + num_columns, device=x_BSD.device).unsqueeze(0)
        rotary = tuple(columns.gather(t) for t in self.rotary_emb(x_BSD, position_ids=position_ids))
        size = num_columns if columns.index_BK is None else columns.index_BK.shape[1]
        number_BT = torch.arange(size, device=x_BSD.device).expand(batch, size)
        if cache is not None and cache.num_tokens:
            number_BT = number_BT + torch.tensor(cache.num_tokens, device=x_BSD.device)[:, None]
        return ForwardPass(
            plan=self.plan,
            policy=self.config.kv_cache,  # type: ignore[arg-type]
            rotary=rotary,  # type: ignore[arg-type]
            tokens=TokenSet(valid_BK=columns.valid_BK),
            number_BT=number_BT,
            column_BT=columns.index_BK,
            cache=cache,
            document_BT=None if document_ids is None else columns.gather(document_ids),
        )

    def _run(self, x_BTD: Tensor, current: ForwardPass, rule: DecisionRule | None, collect: bool) -> MorModelOutput:
        hidden = [x_BTD]
        outer = current.scope(None, current.tokens) if self.plan.num_outer else None
        for layer_index, layer in enumerate(self.first_layers):
            x_BTD = self._outer(layer, x_BTD, outer, layer_index)
            hidden.append(x_BTD)
        recursed = self.recursion(x_BTD, current, rule, collect_hidden=collect)
        hidden.extend(recursed.hidden)
        x_BTD = recursed.x_BTD
        for layer_index, layer in enumerate(self.last_layers, self.plan.num_layers - self.plan.num_outer):
            x_BTD = self._outer(layer, x_BTD, outer, layer_index)
            hidden.append(x_BTD)
        x_BTD = self.normed(x_BTD)
        return MorModelOutput(
            last_hidden_state=x_BTD,
            hidden_states=(*hidden[:-1], x_BTD) if collect else None,
            depths=recursed.depth_BT,
            routing=tuple(recursed.traces),
            losses=recursed.losses,
        )

    def normed(self, x_BTD: Tensor) -> Tensor:
        """The final norm, in the dtype of the residual stream (autocast would make it float32)."""
        return self.norm(x_BTD).to(x_BTD.dtype)

    def _outer(self, layer: nn.Module, x_BTD: Tensor, scope: Any, layer_index: int) -> Tensor:
        run = partial(layer, scope=scope, layer=layer_index)
        if self.gradient_checkpointing and self.training:
            run = partial(self._gradient_checkpointing_func, run)
        return scope.on_rows(x_BTD, run)

    def _scatter(
        self, output: MorModelOutput, columns: TokenSet, num_columns: int, cache: MorCache | None
    ) -> MorModelOutput:
        setattr(output, CACHE_NAME, cache)
        if columns.index_BK is None:
            return output
        assert output.last_hidden_state is not None and output.depths is not None
        output.last_hidden_state = columns.spread(output.last_hidden_state, num_columns)
        output.depths = columns.spread(output.depths, num_columns)
        if output.hidden_states is not None:
            output.hidden_states = tuple(columns.spread(t, num_columns) for t in output.hidden_states)
        return output


def _real_columns(attention_mask: Tensor | None, x_BSD: Tensor, past: int) -> Tensor | None:
    """(B, S) true at real tokens, or None if all are. Raises ValueError for a mask of another shape."""
    if attention_mask is None:
        return None
    batch, num_columns = x_BSD.shape[:2]
    if attention_mask.shape != (batch, past + num_columns):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected {(batch, past + num_columns)}: "
            f"rows x (columns in the cache + new columns)"
        )
    member_BS = attention_mask[:, past:].to(x_BSD.device).bool()
    return None if bool(member_BS.all()) else member_BS


def _refuse_unsupported(kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions=True is not supported: attention runs in fused kernels over routed subsets")
    unknown = [
        key for key, value in kwargs.items() if value is not None and key not in ("output_attentions", "cache_position")
    ]
    if unknown:
        raise ValueError(f"forward does not take {', '.join(sorted(unknown))}")
