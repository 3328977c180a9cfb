"""Masks of transformers' models whose rows are told, not written out: what keeps padding and causality linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

# What may be asked of a mask without writing it out.
METADATA = {
    *(vars(torch._C.TensorBase)[name].__get__ for name in (
        "shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_cuda", "is_nested",
    )),
    Tensor.dim, Tensor.size, Tensor.is_floating_point,
}  # fmt: skip


class CausalMask(Tensor):
    """A bool mask [B, 1, L, S], True where query i sees key s: s ≤ i + S − L, and keys[b, s].

    Any operation on it takes `dense()` in its place, so that code which knows nothing of it goes on as before; one that
    writes into it ends `intact`, and with it the short form.
    """

    keys: Tensor | None  # [B, S] bool
    intact: bool
    _make: Callable[[], Tensor]
    _dense: Tensor | None

    @staticmethod
    def of(shape: tuple[int, ...], device: Any, keys: Tensor | None, make: Callable[[], Tensor]) -> CausalMask:
        """make: what writes out the whole."""
        mask = torch.empty((), dtype=torch.bool, device=device).expand(shape).as_subclass(CausalMask)
        mask.keys, mask.intact, mask._make, mask._dense = keys, True, make, None
        return mask

    def dense(self) -> Tensor:
        if self._dense is None:
            self._dense = self._make()
        return self._dense

    def _moved(self, *args: Any, **kwargs: Any) -> CausalMask | None:
        """On another device, as models that lie on several bring it there; None if it is to be of numbers."""
        probe = torch.empty((), dtype=torch.bool, device=self.device).to(*args, **kwargs)
        if probe.dtype != torch.bool:
            return None
        keys = None if self.keys is None else self.keys.to(probe.device)
        return CausalMask.of(self.shape, probe.device, keys, lambda: self.dense().to(probe.device))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        if func is Tensor.to and args[0].intact and (moved := args[0]._moved(*args[1:], **kwargs)) is not None:
            return moved
        name = func.__name__
        writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if writes and isinstance(args[0], cls):
            args[0].intact = False
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs))
        return func(*args, **kwargs)


def set_attention_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: Any = 0,
    mask_function: Callable[..., Any] = causal_mask_function, attention_mask: Tensor | None = None,
    local_size: int | None = None, allow_is_causal_skip: bool = True, use_vmap: bool = False,
    device: Any = "cpu", **kwargs: Any,
) -> Tensor | None:  # fmt: skip
    """The mask that a model makes of its padding [B, S] for all layers, in its shortest form.

    Queries that all see the same keys: [B, 1, L, S] of one row, repeated without memory, or None where nothing is
    masked.  A causal mask, with padding or without: a `CausalMask`, of the one row of a query that sees all, too.
    Else, and where it is compiled: a row a query.
    """
    whole = local_size is None or (isinstance(kv_length, int) and kv_length < local_size)
    all_see = mask_function is bidirectional_mask_function
    last_sees = q_length == 1 and mask_function is causal_mask_function
    if (all_see or last_sees) and not use_vmap and whole:
        if attention_mask is None and all_see:
            return None
        at_the_end = isinstance(q_offset, int) and isinstance(kv_length, int) and q_offset + 1 >= kv_offset + kv_length
        if isinstance(kv_length, int) and (all_see or at_the_end):
            keys = prepare_padding_mask(attention_mask, kv_length, kv_offset)
            if keys is None:
                return None
            columns = _columns(keys, kv_length, kv_offset, q_length)
            if all_see or not _is_here():
                return columns
            return CausalMask.of((batch_size, 1, 1, kv_length), device, columns[:, 0, 0], lambda: columns)
    plain: dict[str, Any] = {
        "batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
        "kv_offset": kv_offset, "mask_function": mask_function, "attention_mask": attention_mask,
        "allow_is_causal_skip": False, "use_vmap": use_vmap, "device": device,
    }  # fmt: skip
    causal = mask_function is causal_mask_function or (allow_is_causal_skip and not use_vmap and whole)
    if not causal or use_vmap or not _ends_together(q_length, kv_length, q_offset, kv_offset):
        return sdpa_mask(**plain)
    keys = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    keys = None if keys is None else _columns(keys, kv_length, kv_offset, 1)[:, 0, 0]
    return CausalMask.of((batch_size, 1, q_length, kv_length), device, keys, lambda: sdpa_mask(**plain))


def _columns(keys: Tensor, kv_length: int, kv_offset: int, q_length: int) -> Tensor:
    """keys [B, ...] as the bool mask [B, 1, L, S] of the keys from kv_offset on, one row for all queries."""
    keys = keys[:, kv_offset : kv_offset + kv_length].bool()
    return keys[:, None, None].expand(-1, 1, q_length, -1)


def _ends_together(q_length: Any, kv_length: Any, q_offset: Any, kv_offset: Any) -> bool:
    """Whether the last query is that of the last key, which is known here and now."""
    numbers = all(isinstance(n, int) for n in (q_length, kv_length, q_offset, kv_offset))
    return numbers and _is_here() and q_offset + q_length == kv_offset + kv_length


def _is_here() -> bool:
    """Whether masks may be more than tensors: nobody traces what is done with them."""
    return not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def as_options(mask: Tensor | None, length: int, s: int, causal: bool) -> dict[str, Any]:
    """A mask that reaches attention of `length` queries and s keys, as arguments of `SetTransport`; causal: whether
    None is."""
    if mask is None:
        return {"is_causal": causal and length > 1}
    if isinstance(mask, CausalMask):
        if mask.intact and mask.shape[2:] == (length, s):
            return {"is_causal": length > 1, "key_mask": mask.keys}
        mask = mask.dense()
    if mask.dim() == 2:
        return {"key_mask": mask != 0}
    if mask.dim() == 4 and (mask.shape[2] == 1 or mask.stride(2) == 0):
        rows = mask[:, :, 0]
        return {"key_mask": rows[:, 0] if mask.shape[1] == 1 else rows}
    return {"attn_mask": mask}
