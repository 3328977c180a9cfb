"""SeT attention between heads that someone else projects: what stands where a model had softmax(qkᵀ/√d) v."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .. import functional as SF
from ..nn import SeTAttention
from ..nn.reference_set import ReferenceSet

# What SeTAttention takes beyond nn.MultiheadAttention, with its defaults; how many key heads there are, keys say.
OWN_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(SeTAttention).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name != "num_kv_heads"
}


class SetTransport(ReferenceSet):
    """q [B, H, L, D], k, v [B, H, S, D] -> [B, H, L, D], with a reference set of its own.

    Args:
        like: a tensor on the device and of the dtype that the references shall have.
        own: arguments of `SeTAttention` beyond those of `nn.MultiheadAttention`.
    """

    def __init__(self, num_heads: int, head_dim: int, like: Tensor, own: dict[str, Any]) -> None:
        super().__init__()
        if unknown := own.keys() - OWN_DEFAULTS.keys():
            raise TypeError(f"unknown arguments of SeT attention: {', '.join(sorted(unknown))}")
        factory = {"device": like.device, "dtype": like.dtype}
        self._add_references(num_heads, head_dim, factory, **{**OWN_DEFAULTS, **own})

    def reset_parameters(self) -> None:
        """Draws the references anew."""
        self._reset_references()

    def extra_repr(self) -> str:
        return self._own_repr()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, attn_mask: Tensor | None = None,
        is_causal: bool = False, dropout_p: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """key_mask [B, S]: nonzero or True where a key is.  attn_mask: broadcasts to [B, H, L, S], bool (True = take
        part) or float (added to log masses), and takes the path that is not linear."""
        return SF.set_attention(
            q, k, self._map_values(v), self.references, **self._transport_options(),
            **self._mask_options(q, k, key_mask, attn_mask), causal=is_causal,
            dropout_p=dropout_p if self.training else 0.0,
        )  # fmt: skip

    def weights(self, q: Tensor, k: Tensor, key_mask: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        """What forward reads v with, without dropout: [B, H, L, S]."""
        return SF.set_attention_weights(
            q, k, self.references, **self._transport_options(), **self._mask_options(q, k, key_mask, attn_mask)
        )

    @staticmethod
    def _mask_options(q: Tensor, k: Tensor, key_mask: Tensor | None, attn_mask: Tensor | None) -> dict[str, Any]:
        if attn_mask is not None and attn_mask.is_floating_point():
            # Models write the lowest finite number for −∞.
            attn_mask = attn_mask.masked_fill(attn_mask <= torch.finfo(attn_mask.dtype).min / 2, -torch.inf)
        if attn_mask is not None and attn_mask.dim() == 4:
            attn_mask = attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        return {"attn_mask": attn_mask, "key_mask": None if key_mask is None else key_mask != 0}

    def initialize_references(self, key: Tensor, value: Tensor, key_mask: Tensor | None = None) -> None:
        """Places the references (and landmarks) by k-means on keys (and values) [B, H, S, D]; key_mask [B, S]."""
        padding = None if key_mask is None else key_mask == 0
        self._place_references(key, value, padding, None, num_iters=20, init="k-means++", generator=None)
