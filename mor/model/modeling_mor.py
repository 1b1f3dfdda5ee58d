"""The Hugging Face face of the model: `MorForCausalLM`, registered with the Auto classes.

Legend: B rows, S columns of the input (padding included), D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig, GenerationMixin

from .backbone import MorModel, MorPreTrainedModel
from .cache import MorCache
from .cache_name import CACHE_NAME, IS_RENAMED, CachedOutput, given_cache
from .configuration_mor import MorConfig
from .decision import DecisionRule
from .lm_loss import LmLoss, lm_loss_of_logits
from .routing import RecursionTrace


@dataclass
class MorCausalLMOutput(CachedOutput):
    """As `MorModelOutput`, with `logits` (B, S, V) and, given labels, `loss`: the language-modelling loss plus the
    weighted router losses; `losses["lm"]` is the former alone."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    if IS_RENAMED:
        cache: MorCache | None = None
    else:
        past_key_values: MorCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    depths: Tensor | None = None
    routing: tuple[RecursionTrace, ...] | None = None
    losses: dict[str, Tensor] | None = None


class MorForCausalLM(MorPreTrainedModel, GenerationMixin):
    """A MoR, recursive or vanilla language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MorConfig) -> None:
        super().__init__(config)
        self.model = MorModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MorCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        decision: str | DecisionRule | None = None,
        mean_depth: float | Tensor | None = None,
        document_ids: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        lm_loss: LmLoss | None = None,
        cache: MorCache | None = None,
        **kwargs: Any,
    ) -> MorCausalLMOutput | tuple[Any, ...]:
        """Logits, depths and, given labels, the loss.

        Args:
            input_ids: (B, S) token ids, or `inputs_embeds` (B, S, D).
            attention_mask: (B, S), or (B, past + S) with a cache; 0 marks padding, anywhere in a row.
            position_ids: (B, S) rotary positions; default: columns, counted on from the cache.
            past_key_values: a `MorCache`, or `cache`: the same by the name that transformers uses from 5.24 on.
            labels: (B, S) token ids to predict, shifted inside; -100 is ignored.
            decision: `causal` (default outside training) or `top_k`, which looks into the future.
            mean_depth: budget in block applications per token, a number or (B,); needs a calibrated model.
            document_ids: (B, S) integers; attention stays inside a run of equal ones.
            num_items_in_batch: labels in the whole optimizer step. The loss is then a sum over it, and router losses
                are weighted by this forward's share of the labels, so that micro-batches add up.
            lm_loss: computes the loss of `labels` from hidden states; the logits are then not made, and None.

        Raises:
            ValueError: shapes, tokens or decisions that cannot be served, naming the value.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=given_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            decision=decision,
            mean_depth=mean_depth,
            document_ids=document_ids,
            **kwargs,
        )
        if labels is not None and lm_loss is not None:
            logits_BSV = None
        else:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits_BSV = self.lm_head(output.last_hidden_state[:, keep])
        loss, losses = None, output.losses
        if labels is not None:
            lm = self._lm_loss(output.last_hidden_state, logits_BSV, labels, lm_loss, num_items_in_batch)
            loss, losses = self._total_loss(lm, labels, losses, num_items_in_batch)
        result = MorCausalLMOutput(
            loss=loss,
            logits=logits_BSV,
            **{CACHE_NAME: output.cache},
            hidden_states=output.hidden_states,
            depths=output.depths,
            routing=output.routing,
            losses=losses,
        )
        return result.to_tuple() if return_dict is False or self.config.return_dict is False else result

    def _lm_loss(
        self,
        hidden_BSD: Tensor,
        logits_BSV: Tensor | None,
        labels: Tensor,
        lm_loss: LmLoss | None,
        num_items: int | Tensor | None,
    ) -> Tensor:
        """The mean of the token losses, or their sum over `num_items`."""
        target_BS = F.pad(labels, (0, 1), value=-100)[:, 1:].to(hidden_BSD.device)
        if logits_BSV is not None:
            total = lm_loss_of_logits(logits_BSV, target_BS)
        else:
            assert lm_loss is not None
            total = lm_loss(hidden_BSD, self.lm_head.weight, target_BS)
        return total / ((target_BS != -100).sum() if num_items is None else num_items)

    def _total_loss(
        self, lm: Tensor, labels: Tensor, router_losses: dict[str, Tensor], num_items: int | Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The language-modelling loss plus the weighted router losses, and the parts."""
        share = 1.0 if num_items is None else (labels != -100).sum() / num_items
        weights = self.config.router_loss_weights
        loss = lm + sum(share * weights[name] * value for name, value in router_losses.items())
        return loss, {"lm": lm, **router_losses}

    def update_router_bias(self) -> None:
        """Call after each optimizer step: moves a loss-free balancing bias, or running thresholds."""
        if self.model.recursion.router is not None:
            self.model.recursion.router.update_bias()

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={implementation!r} cannot hold keys and values per recursion; leave it unset"
            )
        if model_kwargs.get(CACHE_NAME) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = MorCache(self.config)


AutoConfig.register(MorConfig.model_type, MorConfig, exist_ok=True)
AutoModel.register(MorConfig, MorModel, exist_ok=True)
AutoModelForCausalLM.register(MorConfig, MorForCausalLM, exist_ok=True)

__all__ = ["MorForCausalLM", "MorModel", "MorPreTrainedModel"]
