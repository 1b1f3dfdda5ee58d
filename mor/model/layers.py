"""Llama's decoder layer, written so that one layer can be applied at several recursions.

Legend: B rows, K active tokens, D hidden size, H query heads, G key/value heads, E head size, F feed-forward size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .attention import AttentionScope, attend, rotate
from .configuration_mor import MorConfig


class RotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions (arXiv 2104.09864), with transformers' long-context variants."""

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: MorConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = str((config.rope_parameters or {}).get("rope_type", "default"))
        init = (
            self.compute_default_rope_parameters if self.rope_type == "default" else ROPE_INIT_FUNCTIONS[self.rope_type]
        )
        inv_freq, self.attention_scaling = init(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: MorConfig, **_: object) -> tuple[Tensor, float]:
        """Inverse frequencies theta^(-2i/E), i = 0..E/2-1, and attention scaling 1."""
        assert config.rope_parameters is not None and config.head_dim is not None
        base = float(config.rope_parameters.get("rope_theta") or 10000.0)
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / base**exponent, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x_BTD: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin (B, T, E) at integer positions (B, T), in the dtype of `x`."""
        angle_BTE = position_ids[..., None].float() * self.inv_freq.float().to(x_BTD.device)
        angle_BTE = torch.cat((angle_BTE, angle_BTE), dim=-1)
        cos, sin = angle_BTE.cos() * self.attention_scaling, angle_BTE.sin() * self.attention_scaling
        return cos.to(x_BTD.dtype), sin.to(x_BTD.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention whose keys and values may come from another recursion."""

    def __init__(self, config: MorConfig) -> None:
        super().__init__()
        assert config.head_dim is not None and config.num_key_value_heads is not None
        self.head_dim = config.head_dim
        self.dropout = float(config.attention_dropout)
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)

    def _heads(self, x_BKX: Tensor) -> Tensor:
        return x_BKX.unflatten(-1, (-1, self.head_dim))

    def queries(self, x_BKD: Tensor, cos_BKE: Tensor, sin_BKE: Tensor) -> Tensor:
        """(B, K, H, E), with rotary positions."""
        return rotate(self._heads(self.q_proj(x_BKD)), cos_BKE, sin_BKE)

    def keys_values(self, x_BKD: Tensor, cos_BKE: Tensor, sin_BKE: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, G, E) each, keys with rotary positions."""
        return rotate(self._heads(self.k_proj(x_BKD)), cos_BKE, sin_BKE), self._heads(self.v_proj(x_BKD))

    def output(self, out_BKHE: Tensor) -> Tensor:
        """Heads joined and projected back to (B, K, D)."""
        return self.o_proj(out_BKHE.flatten(2))


class FeedForward(nn.Module):
    """Gated feed-forward down(act(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, config: MorConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act: Callable[[Tensor], Tensor] = ACT2FN[config.hidden_act]

    def forward(self, x_BKD: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x_BKD)) * self.up_proj(x_BKD))


class MorDecoderLayer(nn.Module):
    """Pre-norm decoder layer: x + attention(norm(x)), then x + feed_forward(norm(x)).

    What stands before and after attention is plain tensor arithmetic, whatever the router and the KV policy: training
    compiles these methods and leaves the choice of keys and values between them to Python. They give and take heads
    behind tokens, in the order of memory: so do the attention kernels' gradients, which then need no copy.
    """

    def __init__(self, config: MorConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def before_attention(self, x_BKD: Tensor, cos_BKE: Tensor, sin_BKE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, K, H, E), keys and values (B, K, G, E)."""
        x_BKD = self.input_layernorm(x_BKD)
        return self.self_attn.queries(x_BKD, cos_BKE, sin_BKE), *self.self_attn.keys_values(x_BKD, cos_BKE, sin_BKE)

    def queries_alone(self, x_BKD: Tensor, cos_BKE: Tensor, sin_BKE: Tensor) -> Tensor:
        """Queries (B, K, H, E) of a recursion that uses another's keys and values."""
        return self.self_attn.queries(self.input_layernorm(x_BKD), cos_BKE, sin_BKE)

    def after_attention(self, x_BKD: Tensor, out_BKHE: Tensor) -> Tensor:
        """The layer's output from its input and the heads' outputs."""
        x_BKD = x_BKD + self.self_attn.output(out_BKHE)
        return x_BKD + self.mlp(self.post_attention_layernorm(x_BKD))

    def forward(self, x_BKD: Tensor, scope: AttentionScope, layer: int) -> Tensor:
        """Apply the layer to the K active tokens, which see what `scope` lets them. `layer`: the layer application."""
        rotary = scope.cos_BKE, scope.sin_BKE
        if scope.keys_values.projects:
            query_BKHE, *own = self.before_attention(x_BKD, *rotary)
            key_BGLE, value_BGLE = scope.keys_values(layer, (own[0].transpose(1, 2), own[1].transpose(1, 2)))
        else:
            query_BKHE = self.queries_alone(x_BKD, *rotary)
            key_BGLE, value_BGLE = scope.keys_values(layer, None)
        query_BHKE = query_BKHE.transpose(1, 2)
        dropout = self.self_attn.dropout if self.training else 0.0
        out_BHKE = attend(query_BHKE, key_BGLE, value_BGLE, scope, dropout)
        return self.after_attention(x_BKD, out_BHKE.transpose(1, 2))
