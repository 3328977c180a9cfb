"""The pre-norm block of the models that are compared; which attention it has is the only thing that differs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Attention = Callable[[int, int], nn.MultiheadAttention]  # embed_dim, num_heads, all of them batch_first


class Block(nn.Module):
    """x [B,L,width] -> [B,L,width]: attention, then a two-layer MLP, each behind a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int, attention: Attention) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, **call: Any) -> Tensor:
        """`call`: what the attention gets beside the tokens."""
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False, **call)[0]
        return x + self.mlp(self.norm2(x))
