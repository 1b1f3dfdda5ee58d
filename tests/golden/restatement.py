"""What the authors' code computes, restated slowly: dense attention with masks, one recursion after another.

Works on the authors' options and parameter names alone, so it shares nothing with the package. The golden files check
it; it then stands in for them where there is no file.

Legend: B rows, T tokens, D hidden size, H query heads, G key/value heads, E head size, V vocabulary, N recursions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KeysValues = tuple[Tensor, Tensor]


@dataclass(kw_only=True)
class AuthorsModel:
    """`options`: the authors' configuration. `dimensions`: the base model's. `weights`: state dict with all aliases."""

    options: dict[str, Any]
    dimensions: dict[str, Any]
    weights: dict[str, Tensor]
    training: bool = False
    training_step: int = 1
    out: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        return self.dimensions["num_hidden_layers"]

    @property
    def num_recursions(self) -> int:
        return self.options["recursive"]["num_recursion"] if self.options["recursive"]["enable"] else 1

    @property
    def outer(self) -> int:
        recursive = self.options["recursive"]
        return int(recursive["enable"] and recursive["sharing"].startswith("middle"))

    @property
    def block_size(self) -> int:
        return (self.num_layers - 2 * self.outer) // self.num_recursions

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """All outputs by the golden files' names, of one forward with labels = input_ids."""
        mor = self.options["mor"]
        x = self.weights["model.embed_tokens.weight"][input_ids]
        self.length = input_ids.shape[1]
        self.causal = torch.ones(self.length, self.length, dtype=torch.bool).tril()
        self.out = {"depth": torch.zeros_like(input_ids)}
        if not mor["enable"]:
            x = self.plain(x)
        else:
            if self.outer:
                x = self.layer("model.layers.0", x, self.causal)[0]
            x = self.expert(x) if mor["type"] == "expert" else self.token(x)
            if self.outer:
                after = self.num_recursions + 1 if mor["type"] == "expert" else 2
                x = self.layer(f"model.layers.{after}", x, self.causal)[0]
        x = self.norm(x, "model.norm")
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        self.out["logits"] = x @ head.T
        targets = F.cross_entropy(self.out["logits"][:, :-1].flatten(0, 1), input_ids[:, 1:].flatten(), reduction="sum")
        self.out["loss_lm"] = targets / (input_ids.numel() if self.training else input_ids[:, 1:].numel())
        if self.training:
            self.out["total_loss"] = self.total_loss()
        return self.out

    def total_loss(self) -> Tensor:
        mor, total = self.options["mor"], self.out["loss_lm"]
        if mor["enable"] and mor["type"] == "expert" and mor["expert"]["sampling"] == "aux_loss":
            total = total + mor["expert"]["coeff"] * self.out["sampling_loss"]
        if "balancing_loss" in self.out:
            total = total + mor["token"]["coeff"] * self.out["balancing_loss"]
        if "router_z_loss" in self.out:
            total = total + mor["z_coeff"] * self.out["router_z_loss"]
        return total

    def plain(self, x: Tensor) -> Tensor:
        shared: dict[int, KeysValues] = {}
        for i in range(self.num_layers):
            group = self.group(i)
            keys_values = shared.get(group) if self.options["kv_sharing"]["enable"] else None
            x, own = self.layer(f"model.layers.{i}", x, self.causal, keys_values)
            shared.setdefault(group, own)
        self.out["depth"] = self.out["depth"] + self.num_recursions
        return x

    def group(self, i: int) -> int:
        """Which layers share weights, keys and values."""
        if self.outer and i in (0, self.num_layers - 1):
            return -1 - i
        inner, cyclic = i - self.outer, self.options["recursive"]["sharing"].endswith("cycle")
        return inner % self.block_size if cyclic else inner // self.num_recursions

    def expert(self, x: Tensor) -> Tensor:
        options, alive = self.options["mor"]["expert"], torch.ones(x.shape[:2], dtype=torch.bool)
        first: list[KeysValues] = []
        for r in range(self.num_recursions):
            wrapper = f"model.layers.{self.outer + r}"
            logits = self.score(f"{wrapper}.mor_router", x)[..., 0]
            gate = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}.get(options["router_func"])
            gate = logits if gate is None else options["alpha"] * gate(logits)
            size = max(1, int(self.capacity(r) * self.length))
            order = gate.masked_fill(~alive, -math.inf).topk(size, dim=1).indices
            chosen = torch.zeros_like(alive).scatter(1, order, True)
            self.record_expert(r, wrapper, x, logits, alive, chosen)
            names = [f"{wrapper}.block.{j}" for j in range(self.block_size)]
            y, keys_values = self.block(names, x, chosen, first)
            first = first or keys_values
            delta = y * gate[..., None] if options["gating"] == "weighted" else y
            x = torch.where(chosen[..., None], x + delta, x)
            alive = chosen
            self.out["depth"] = self.out["depth"] + chosen
            self.out[f"hidden/r{r}"] = x
        return x

    def capacity(self, recursion: int) -> float:
        given = self.options["mor"]["capacity"]
        if given is None:
            capacity = (self.num_recursions - recursion) / self.num_recursions
        else:
            capacity = float(given.split(",")[recursion])
        warmup = self.options["mor"]["expert"]["cap_warmup_step"]
        if not (self.training and warmup):
            return capacity
        return capacity + (1 - capacity) * 0.5 * (1 + math.cos(math.pi * min(1.0, self.training_step / warmup)))

    def record_expert(self, r: int, wrapper: str, x: Tensor, logits: Tensor, alive: Tensor, chosen: Tensor) -> None:
        rows = x.shape[0]
        self.out[f"router_logits/r{r}"] = logits[alive].view(rows, -1, 1)
        self.out[f"selected/r{r}"] = chosen.nonzero()[:, 1].view(rows, -1)
        if not self.training:
            return
        mor = self.options["mor"]
        target, scored = chosen[alive].float(), logits[alive]
        if mor["z_loss"]:
            self.add("router_z_loss", scored.square().mean())
        if mor["expert"]["sampling"] == "aux_router":
            scored = self.score(f"{wrapper}.mlp_router", x.detach(), divide=False)[..., 0][alive]
            self.out[f"aux_router_logits/r{r}"] = scored.view(rows, -1, 1)
        if mor["expert"]["sampling"] is not None:
            self.add("sampling_loss", F.binary_cross_entropy_with_logits(scored, target))

    def token(self, x: Tensor) -> Tensor:
        options, wrapper = self.options["mor"]["token"], f"model.layers.{self.outer}"
        logits = self.score(f"{wrapper}.mor_router", x)
        gates = options["alpha"] * (logits.sigmoid() if options["router_func"] == "sigmoid" else logits.softmax(-1))
        bias = self.weights[f"{wrapper}.router_bias"] if options["balancing"] == "loss_free" else 0.0
        depth = (gates + bias).argmax(-1)
        if self.training and self.training_step < options["bal_warmup_step"]:
            depth = torch.full_like(depth, self.num_recursions - 1)
        gate = gates.gather(-1, depth[..., None])
        first: list[KeysValues] = []
        hidden, added = x, torch.zeros_like(x)
        for r in range(self.num_recursions):
            names = [f"{wrapper}.block_list.{r}.{j}" for j in range(self.block_size)]
            y, keys_values = self.block(names, hidden, depth >= r, first)
            first = first or keys_values
            hidden = torch.where((depth >= r)[..., None], y, hidden)
            weighted = hidden * gate if options["gating"] == "weighted" else hidden
            added = torch.where((depth == r)[..., None], weighted, added)
        self.record_token(logits, gates, depth)
        self.out |= {"depth": depth + 1, "gate": gate[..., 0], "router_logits/r0": logits, "hidden/r0": x + added}
        return x + added

    def record_token(self, logits: Tensor, gates: Tensor, depth: Tensor) -> None:
        if not self.training:
            return
        mor = self.options["mor"]
        share = torch.bincount(depth.flatten(), minlength=self.num_recursions) / depth.numel()
        if mor["token"]["balancing"] is not None:
            self.out["balancing_ratio"] = share
        if mor["token"]["balancing"] == "loss":
            self.out["balancing_loss"] = (gates.mean((0, 1)) * self.num_recursions * share).sum()
        if mor["z_loss"]:
            self.add("router_z_loss", logits.logsumexp(-1).square().mean())

    def add(self, name: str, loss: Tensor) -> None:
        self.out[name] = self.out[name] + loss if name in self.out else loss

    def score(self, name: str, x: Tensor, *, divide: bool = True) -> Tensor:
        x = x / self.options["mor"]["temp"] if divide else x
        if self.options["mor"]["router_type"] == "linear":
            return x @ self.weights[f"{name}.router.weight"].T
        return F.gelu(x @ self.weights[f"{name}.router.0.weight"].T) @ self.weights[f"{name}.router.2.weight"].T

    def block(
        self, names: list[str], x: Tensor, chosen: Tensor, first: list[KeysValues]
    ) -> tuple[Tensor, list[KeysValues]]:
        """The block on all tokens, of which only the chosen ones count; the others' keys are hidden or replaced."""
        sharing = self.options["kv_sharing"]
        fresh_only = not sharing["enable"]
        update = self.options["mor"]["type"] == "expert" and sharing.get("update_cache")
        keys_values: list[KeysValues] = []
        for j, name in enumerate(names):
            given = first[j] if first and not fresh_only else None
            mask = self.causal & chosen[:, None, :] if fresh_only else self.causal
            x, own = self.layer(name, x, mask, given, chosen if update else None)
            keys_values.append(own)
        return x, keys_values

    def layer(
        self,
        name: str,
        x: Tensor,
        mask: Tensor,
        given: KeysValues | None = None,
        fresh: Tensor | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """A Llama layer. `mask` (T, T) or (B, T, T). `given` keys and values replace its own, but at `fresh` tokens."""
        h = self.norm(x, f"{name}.input_layernorm")
        query = self.rotated(self.heads(h, f"{name}.self_attn.q_proj"))
        own = (self.rotated(self.heads(h, f"{name}.self_attn.k_proj")), self.heads(h, f"{name}.self_attn.v_proj"))
        key, value = own if given is None else given
        if given is not None and fresh is not None:
            key, value = (torch.where(fresh[:, None, :, None], a, b) for a, b in zip(own, given))
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        mask = mask.expand(x.shape[0], -1, -1)[:, None] | torch.eye(self.length, dtype=torch.bool)
        score = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).masked_fill(~mask, -math.inf)
        attended = (score.softmax(-1) @ value).transpose(1, 2).flatten(2)
        x = x + attended @ self.weights[f"{name}.self_attn.o_proj.weight"].T
        h = self.norm(x, f"{name}.post_attention_layernorm")
        gate, up, down = (self.weights[f"{name}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return x + (F.silu(h @ gate.T) * (h @ up.T)) @ down.T, own

    def norm(self, x: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.dimensions["rms_norm_eps"])
        return x * scale * self.weights[f"{name}.weight"]

    def heads(self, x: Tensor, name: str) -> Tensor:
        size = self.dimensions["hidden_size"] // self.dimensions["num_attention_heads"]
        return (x @ self.weights[f"{name}.weight"].T).unflatten(-1, (-1, size)).transpose(1, 2)

    def rotated(self, x_BHTE: Tensor) -> Tensor:
        half = x_BHTE.shape[-1] // 2
        frequency = self.dimensions["rope_theta"] ** (-torch.arange(half) / half)
        angle = torch.arange(self.length)[:, None] * frequency
        first, second = x_BHTE[..., :half], x_BHTE[..., half:]
        turned = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
        return torch.cat(turned, -1)


def random_weights(options: dict[str, Any], dimensions: dict[str, Any], *, tied: bool) -> dict[str, Tensor]:
    """A checkpoint with every name of a shared tensor, as the authors' code would save it; large enough to matter."""
    model = AuthorsModel(options=options, dimensions=dimensions, weights={})
    width, inner = dimensions["hidden_size"], dimensions["intermediate_size"]
    kv_width = width // dimensions["num_attention_heads"] * dimensions["num_key_value_heads"]
    shapes = {f"self_attn.{p}_proj": (width, width) for p in "qo"} | {
        f"self_attn.{p}_proj": (kv_width, width) for p in "kv"
    }
    shapes |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    shapes |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    weights = {"model.embed_tokens.weight": torch.randn(dimensions["vocab_size"], width)}
    weights["model.norm.weight"] = 1 + 0.2 * torch.randn(width)
    if not tied:
        weights["lm_head.weight"] = 0.3 * torch.randn(dimensions["vocab_size"], width)
    groups: dict[int, dict[str, Tensor]] = {}
    for i in range(model.num_layers):
        if (group := model.group(i) if options["recursive"]["enable"] else i) not in groups:
            groups[group] = {name: _random_tensor(shape) for name, shape in shapes.items()}
        weights |= {f"{layer_name(model, i)}.{name}.weight": tensor for name, tensor in groups[group].items()}
    return weights | _random_routers(model)


def layer_name(model: AuthorsModel, i: int) -> str:
    """What the authors call the i-th application of a layer."""
    mor = model.options["mor"]
    if not mor["enable"]:
        return f"model.layers.{i}"
    if model.outer and i in (0, model.num_layers - 1):
        after = model.num_recursions + 1 if mor["type"] == "expert" else 2
        return f"model.layers.{after if i else 0}"
    r, j = divmod(i - model.outer, model.block_size)
    if mor["type"] == "expert":
        return f"model.layers.{model.outer + r}.block.{j}"
    return f"model.layers.{model.outer}.block_list.{r}.{j}"


def _random_tensor(shape: tuple[int, ...]) -> Tensor:
    return 1 + 0.2 * torch.randn(shape) if len(shape) == 1 else torch.randn(shape) / math.sqrt(shape[1])


def _random_routers(model: AuthorsModel) -> dict[str, Tensor]:
    mor, width = model.options["mor"], model.dimensions["hidden_size"]
    if not mor["enable"]:
        return {}
    is_token = mor["type"] == "token"
    wrappers = [f"model.layers.{model.outer + r}" for r in range(1 if is_token else model.num_recursions)]
    kinds = ["mor_router"] + ["mlp_router"] * (not is_token and mor["expert"]["sampling"] == "aux_router")
    found: dict[str, Tensor] = {}
    for router in (f"{wrapper}.{kind}.router" for wrapper in wrappers for kind in kinds):
        scores = model.num_recursions if is_token else 1
        if mor["router_type"] == "linear":
            found[f"{router}.weight"] = 0.3 * _random_tensor((scores, width))
        else:
            found[f"{router}.0.weight"] = _random_tensor((2 * width, width))
            found[f"{router}.2.weight"] = 0.3 * _random_tensor((scores, 2 * width))
    if is_token and mor["token"]["balancing"] == "loss_free":
        found[f"{wrappers[0]}.router_bias"] = 0.1 * torch.randn(model.num_recursions)
    return found
