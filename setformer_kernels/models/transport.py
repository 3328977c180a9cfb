"""SeT attention between heads that someone else projects: what stands where a model had softmax(qkᵀ/√d) v."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional as SF
from ..nn import SeTAttention
from ..nn.reference_set import ReferenceSet
from ..nn.shards import whole_only

# What SeTAttention takes beyond nn.MultiheadAttention, with its defaults; how many key heads there are, keys say.
OWN_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(SeTAttention).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name != "num_kv_heads"
}

NEVER = -1e4  # an additive mask of a key that takes no part: e to that is 0 in every dtype


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

    @property
    def converges(self) -> bool:
        """Whether transport is anything but num_iters iterations."""
        return self._converges()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, attn_mask: Tensor | None = None,
        is_causal: bool = False, dropout_p: float = 0.0, run: Callable[[Tensor, Tensor, Any], Any] | None = None,
    ) -> Any:  # fmt: skip
        """key_mask [B, S] or [B, H, S]: bool (True = take part) or float (added to log masses).  attn_mask: broadcasts
        to [B, H, L, S], likewise, and takes the path that is not linear.

        run: what to do with q, k, v instead, by this module's other methods: within a call of the module, before which
        hooks bring its parameters where they are wanted (offloaded models, shards)."""
        if run is not None:
            return run(q, k, v)
        past = k.shape[2] - q.shape[2]
        if is_causal and attn_mask is None and past > 0 and self.num_iters <= 1:
            # a scan of all keys, with queries of nothing in front, is linear; a mask is not
            q = F.pad(q, (0, 0, past, 0))
            return self.forward(q, k, v, key_mask, None, True, dropout_p)[:, :, past:]
        return SF.set_attention(
            q, k, self._map_values(v), self.references, **self._transport_options(),
            **self._mask_options(q, k, key_mask, attn_mask), causal=is_causal,
            dropout_p=dropout_p if self.training else 0.0,
        )  # fmt: skip

    def packed(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None,
        is_causal: bool = False, dropout_p: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """q [H, Tq, D], k [Hk, Tk, D], v [Hk, Tk, E] of sequences one after another, as `SF.set_attention_varlen` takes
        them but for the order of dimensions -> [H, Tq, E]."""
        whole_only(self.cp_context, cu_seqlens_q=True)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            v = self._map_values(v[None])[0]
            o = SF.set_attention_varlen(
                q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), self.references, cu_seqlens_q,
                cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, causal=is_causal, **self._transport_options(),
                dropout_p=dropout_p if self.training else 0.0,
            )  # fmt: skip
            return o.transpose(0, 1)

        return self(q, k, v, run=run)

    def streamed(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, key_mask: Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """o [B, H, L, E] of causal attention that goes on from a state [B, Hk, M, 2E + 3] (`SF.set_causal`), and the
        state after; a single token without gradients may be written into the state that was given."""
        whole_only(self.cp_context, state=True)
        mask = self._mask_options(q, k, key_mask, None)["key_mask"]

        def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            v, options = self._map_values(v), self._transport_options()
            if state is not None and q.shape[2] == 1 and not (torch.is_grad_enabled() or state.requires_grad):
                token = None if mask is None else mask[..., 0]
                o = SF.set_step(
                    state, q[:, :, 0], k[:, :, 0], v[:, :, 0], self.references, key_mask=token, **options
                )  # fmt: skip
                return o.unsqueeze(2), state
            o, after = SF.set_causal(
                q, k, v, self.references, initial_state=state, output_final_state=True, key_mask=mask,
                dropout_p=dropout_p if self.training else 0.0, **options,
            )  # fmt: skip
            assert after is not None
            return o, after

        return self(q, k, v, key_mask, run=run)

    def weights(
        self, q: Tensor, k: Tensor, key_mask: Tensor | None = None, attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:  # fmt: skip
        """What forward reads v with, without dropout: [B, H, L, S]."""
        whole_only(self.cp_context, weights=True)
        masks = self._mask_options(q, k, key_mask, attn_mask)

        def run(q: Tensor, k: Tensor, _: None) -> Tensor:
            return SF.set_attention_weights(
                q, k, self.references, **self._transport_options(), **masks, causal=is_causal
            )  # fmt: skip

        return self(q, k, None, run=run)

    @staticmethod
    def _mask_options(q: Tensor, k: Tensor, key_mask: Tensor | None, attn_mask: Tensor | None) -> dict[str, Any]:
        if attn_mask is not None:
            attn_mask = _log_mass(attn_mask)
        if attn_mask is not None and attn_mask.dim() == 4:
            attn_mask = attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        if key_mask is not None:
            key_mask = _log_mass(key_mask).expand(q.shape[0], *key_mask.shape[1:])
        return {"attn_mask": attn_mask, "key_mask": key_mask}

    def initialize_references(self, key: Tensor, value: Tensor, key_mask: Tensor | None = None) -> None:
        """Places the references (and landmarks) by k-means on keys (and values) [B, H, S, D]; key_mask: forward's."""
        padding = None
        if key_mask is not None:
            mask = _log_mass(key_mask)
            absent = mask == -torch.inf if mask.is_floating_point() else ~mask
            padding = absent.all(1) if absent.dim() == 3 else absent
            padding = padding.expand(key.shape[0], -1)
        self._place_references(key, value, padding, None, num_iters=20, init="k-means++", generator=None)


def _log_mass(mask: Tensor) -> Tensor:
    """mask, bool or numbers that are added to logits, with −∞ where models write −10⁴ or less for it."""
    return mask.masked_fill(mask <= NEVER, -torch.inf) if mask.is_floating_point() else mask.bool()
