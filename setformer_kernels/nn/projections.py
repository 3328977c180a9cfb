"""The projections of nn.MultiheadAttention, of whose heads keys and values may have fewer than queries."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contract import AttentionInputError, check_dtype
from .writing import Init

# How nn.MultiheadAttention draws its parameters, in its order.
PROJECTIONS: dict[str, Init] = {
    "in_proj_weight": nn.init.xavier_uniform_,
    "q_proj_weight": nn.init.xavier_uniform_,
    "k_proj_weight": nn.init.xavier_uniform_,
    "v_proj_weight": nn.init.xavier_uniform_,
    "in_proj_bias": nn.init.zeros_,
    "bias_k": nn.init.xavier_normal_,
    "bias_v": nn.init.xavier_normal_,
}
OUT_PROJ: dict[str, Init] = {
    "weight": partial(nn.init.kaiming_uniform_, a=math.sqrt(5.0)),
    "bias": nn.init.zeros_,
}
NAMES = ("query", "key", "value")


def split_heads(x: Tensor, num_heads: int, batch_first: bool) -> Tensor:
    """[B, N, H·D] (batch_first) or [N, B, H·D] -> a view [B, H, N, D]."""
    x = x.view(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)
    return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)


def merge_heads(x: Tensor, batch_first: bool) -> Tensor:
    """[B, H, N, D] -> [B, N, H·D] (batch_first) or [N, B, H·D]."""
    return (x.transpose(1, 2) if batch_first else x.permute(2, 0, 1, 3)).flatten(-2)


class Projections(nn.MultiheadAttention):
    """nn.MultiheadAttention with num_kv_heads Hk heads of keys and values.

    Where these are fewer than num_heads H: in_proj_weight [(H + 2·Hk)·D, embed_dim], or k_proj_weight [Hk·D, kdim] and
    v_proj_weight [Hk·D, vdim]; in_proj_bias [(H + 2·Hk)·D]; bias_k, bias_v [1, 1, Hk·D].
    """

    num_kv_heads: int | None = None  # None in modules pickled before it was an argument: as many as num_heads

    @property
    def key_heads(self) -> int:
        """Hk."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def _narrow_keys(self, num_kv_heads: int) -> None:
        """Replaces the parameters of nn.MultiheadAttention by those of fewer key heads, yet to be drawn."""
        self.num_kv_heads = num_kv_heads
        if num_kv_heads == self.num_heads:
            return
        width, packed = num_kv_heads * self.head_dim, self.embed_dim + 2 * num_kv_heads * self.head_dim
        rows = {"in_proj_weight": packed, "k_proj_weight": width, "v_proj_weight": width, "in_proj_bias": packed}
        shapes = {name: (n, *old.shape[1:]) for name, n in rows.items() if (old := getattr(self, name)) is not None}
        shapes |= {name: (1, 1, width) for name in ("bias_k", "bias_v") if getattr(self, name) is not None}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(getattr(self, name).new_empty(shape)))

    def _sizes(self, x: Tensor, batched: bool) -> tuple[int, int]:
        """Batch size and length of x in the layout of forward's arguments."""
        if not batched:
            return 1, x.shape[0]
        return (x.shape[0], x.shape[1]) if self.batch_first else (x.shape[1], x.shape[0])

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q [B, H, L, D], k, v [B, Hk, S, D] as views, by as few matmuls as there are distinct tensors in a row
        (self-attention: one)."""
        if self._qkv_same_embed_dim and key is query and value is key:
            return self._heads(query, 0, 3)
        inputs = (query, key, value)
        cuts = [0, *(i for i in (1, 2) if not self._qkv_same_embed_dim or inputs[i] is not inputs[i - 1]), 3]
        projected: list[Tensor] = []
        for first, last in itertools.pairwise(cuts):
            projected += self._heads(inputs[first], first, last)
        return projected

    def _project_keys(self, key: Tensor, value: Tensor) -> list[Tensor]:
        """k, v [B, Hk, S, D], by one matmul where they are one tensor."""
        if self._qkv_same_embed_dim and value is key:
            return self._heads(key, 1, 3)
        return [*self._heads(key, 1, 2), *self._heads(value, 2, 3)]

    def _projection(self, x: Tensor, first: int, last: int) -> Tensor:
        """x through the projections first..last-1 of (q, k, v); parameters are read here, at every call, because tools
        replace them (peft, prune, parametrize)."""
        weight: Tensor = self.in_proj_weight
        bias: Tensor | None = self.in_proj_bias
        if last - first < 3:
            wide, narrow = self.num_heads * self.head_dim, self.key_heads * self.head_dim
            ends = (0, wide, wide + narrow, wide + 2 * narrow)
            rows = slice(ends[first], ends[last])
            bias = None if bias is None else bias[rows]
            own = None if self._qkv_same_embed_dim else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            weight = weight[rows] if own is None else own[first]
        check_dtype(NAMES[first], x, weight)
        if bias is not None and bias.dtype != weight.dtype:
            bias = bias.to(weight.dtype)
        return F.linear(x, weight, bias)

    def _heads(self, x: Tensor, first: int, last: int) -> list[Tensor]:
        """Tokens in any layout through the projections first..last-1 -> a view [B, heads, N, D] of each."""
        keys = self.key_heads
        heads = (self.num_heads, keys, keys)[first:last]
        projected = self._projection(x, first, last)
        parts = projected.view(*x.shape[:-1], sum(heads), self.head_dim).split_with_sizes(heads, -2)
        if x.dim() == 2:
            return [one.transpose(0, 1).unsqueeze(0) for one in parts]
        if self.batch_first:
            return [one.transpose(1, 2) for one in parts]
        return [one.permute(1, 2, 0, 3) for one in parts]

    def _append_slots(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """k, v [B, Hk, S, D] with the rows of add_bias_kv, then of add_zero_attn, appended; and how many these are."""
        bias_k, bias_v = self.bias_k, self.bias_v
        if (bias_k is None) != (bias_v is None):
            raise AttentionInputError("bias_k and bias_v go together: one of them is set and the other is None")
        if bias_k is None and not self.add_zero_attn:
            return k, v, 0
        keys, values = [k], [v]
        if bias_k is not None and bias_v is not None:
            for rows, bias in ((keys, bias_k), (values, bias_v)):
                rows.append(bias.view(self.key_heads, 1, -1).to(k.dtype).expand(k.shape[0], -1, -1, -1))
        if self.add_zero_attn:
            for rows in (keys, values):
                rows.append(k.new_zeros(()).expand(*k.shape[:2], 1, k.shape[-1]))
        return torch.cat(keys, -2), torch.cat(values, -2), len(keys) - 1

    def _dropout_options(self, device: torch.device) -> dict[str, Any]:
        """One seed for output and weights, so that they share the dropout mask; drawn only where dropout acts."""
        p = self.dropout if self.training else 0.0
        seed = torch.randint(2**63 - 1, (), device=device) if p > 0.0 else None
        return {"dropout_p": p, "seed": seed}
