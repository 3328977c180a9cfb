"""The rule of timm's `Attention` (ViT and kin), and what it becomes."""

from __future__ import annotations

from types import NoneType
from typing import Any, ClassVar

from torch import Tensor, nn

from ...nn.doors import FloatInPython
from ...nn.heads import COLUMNS, ROWS, SHARED
from ..transport import SetTransport
from .report import Refusal
from .weights import like


class SeTTimmAttention(FloatInPython):
    """timm's `Attention` with its own projections, norms, gate and dropout; between them, SeT attention.

    Not built: an `Attention` with a `set_transport` becomes one.
    """

    num_heads: int
    head_dim: int
    set_transport: SetTransport
    qkv: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Dropout
    norm: nn.Module
    gate: nn.Module | None
    proj: nn.Module
    proj_drop: nn.Module
    of_heads: ClassVar[dict[str, int]] = {
        "qkv": 3, "q_norm": SHARED, "k_norm": SHARED, "set_transport": ROWS, "proj": COLUMNS,
    }  # fmt: skip

    def whole_heads(self) -> str:
        """Why heads cannot be taken apart; empty if they can."""
        across = [
            name for name in ("norm", "gate") if not isinstance(getattr(self, name, None), (NoneType, nn.Identity))
        ]
        return f"its {across[0]} acts across heads" if across else ""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x [B, N, C] -> [B, N, C]; attn_mask as `F.scaled_dot_product_attention` takes it."""
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        heads = self.set_transport(q, k, v, None, attn_mask, is_causal, self.attn_drop.p)
        y = heads.transpose(1, 2).flatten(2)
        if hasattr(self, "norm"):  # norm and gate came with later releases of timm
            y = self.norm(y)
        if getattr(self, "gate", None) is not None:
            assert self.gate is not None
            y = y * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(y))


TIMM_PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}


def from_timm(old: nn.Module, own: dict[str, Any]) -> None:
    if unknown := {name for name, _ in old.named_children()} - TIMM_PARTS:
        raise Refusal(f"timm's Attention has parts unknown here: {', '.join(sorted(unknown))}")
    assert isinstance(old.num_heads, int)
    assert isinstance(old.head_dim, int)
    old.set_transport = SetTransport(old.num_heads, old.head_dim, like(old), own).train(old.training)
    old.__class__ = SeTTimmAttention
