"""One small pre-norm encoder; which attention its blocks have is the only thing that differs between two runs.

All attentions have the parameters of `nn.MultiheadAttention` (SeT has its references beside them), and all models of a
seed start from the same values of these.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.implementations import elu_attention
from benchmarks.tasks.encoder import Attention, Block
from setformer_kernels import SeTAttention
from setformer_kernels.nn.projections import merge_heads, split_heads


class Mixing(nn.MultiheadAttention):
    """Self-attention by a function of q, k, v [B,H,L,D] and of which keys take part [B,L] (None: all of them)."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__(embed_dim, num_heads, batch_first=True)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None) -> Tensor:
        raise NotImplementedError

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """The call of nn.MultiheadAttention where key and value are the query [B,L,embed_dim]; no weights."""
        packed = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        q, k, v = (split_heads(x, self.num_heads, True) for x in packed.chunk(3, -1))
        heads = self.mix(q, k, v, None if key_padding_mask is None else ~key_padding_mask)
        return self.out_proj(merge_heads(heads, True)), None


class Softmax(Mixing):
    """What nn.MultiheadAttention computes."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, None if present is None else present[:, None, None])


class Elu(Mixing):
    """Linear attention with the elu + 1 feature map."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None) -> Tensor:
        return elu_attention(q, k, v, None if present is None else present[:, None])


class Alone(Mixing):
    """No attention: every token sees its own value only.  What a task can be solved to without any mixing."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None) -> Tensor:
        return v


class Started(SeTAttention):
    """SeT attention whose iterations begin where those of the last training step ended, in the mean over its batch."""

    start: Tensor | None = None  # [Hk,M]

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, **given: Any
    ) -> tuple[Tensor, None]:
        """As SeTAttention's, without weights."""
        start = None if self.start is None else self.start.expand(query.shape[0], -1, -1)
        memory = self.memory(
            key, value, key_padding_mask, key_position=given.get("key_position"), initial_potential=start
        )
        if self.training:
            self.start = memory.g.detach().mean(0)
        return super().forward(query, memory=memory, query_position=given.get("query_position"))


class Encoder(nn.Module):
    """Embed tokens, add sinusoids of their positions, run the blocks, then a head per token or on the tokens' mean."""

    def __init__(
        self, embed: nn.Module, head: nn.Module, position: Tensor, attention: Attention, *, width: int, heads: int,
        depth: int, pooled: bool, pad: int | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed, self.head, self.pooled, self.pad = embed, head, pooled, pad
        self.blocks = nn.ModuleList(Block(width, heads, attention) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("position", position)  # [L,P] in [0,1]
        self.register_buffer("waves", sinusoids(position, width))  # [L,width]

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [rows, classes]: a row is a sequence, or whatever the head makes of the tokens [B,L,width]."""
        absent = None
        if self.pad is not None:
            tokens = tokens[:, : int((tokens != self.pad).sum(1).max())]
            absent = tokens == self.pad  # [B,L]
        x = self.embed(tokens)
        L = x.shape[1]
        x = x + self.waves[:L]
        for block in self.blocks:
            x = block(x, key_padding_mask=absent, **coordinates(block.attention, self.position[:L]))
        x = self.norm(x)
        if self.pooled:
            kept = torch.ones_like(x[..., :1]) if absent is None else (~absent).unsqueeze(-1).to(x.dtype)
            x = (x * kept).sum(1) / kept.sum(1)
        return self.head(x)


def coordinates(attention: nn.Module, position: Tensor) -> dict[str, Tensor]:
    """The positions [L,P] as arguments of an attention whose logits have a position term; none for all others."""
    wanted = isinstance(attention, SeTAttention) and attention.position_dim > 0
    return {"query_position": position, "key_position": position} if wanted else {}


def sinusoids(position: Tensor, width: int) -> Tensor:
    """Sines and cosines [L,width] of positions [L,P] in [0,1], wavelengths from two steps to twice the whole."""
    L, P = position.shape
    steps = round(L ** (1 / P))
    octaves = torch.linspace(0.0, math.log2(steps), width // (2 * P))
    angles = position.unsqueeze(-1) * (math.pi * 2**octaves)  # [L,P,width/2P]
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(1)
