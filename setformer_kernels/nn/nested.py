"""NestedTensor in and out: nn.TransformerEncoder hands one to its layers in eval, in place of a padding mask."""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import AttentionInputError


def lengths_of(x: Tensor) -> list[int]:
    """The lengths of the sequences of a nested x [N, *, E]."""
    return [sequence.shape[0] for sequence in x.unbind()]


def pad(x: Tensor) -> tuple[Tensor, Tensor]:
    """Nested [N, *, E] -> (padded [N, S, E], key padding mask [N, S], True = padding)."""
    padded = torch.nested.to_padded_tensor(x, 0.0)
    lengths = torch.tensor(lengths_of(x), device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) >= lengths[:, None]


def nest_like(padded: Tensor, x: Tensor) -> Tensor:
    """Padded [N, L, E] -> nested with the lengths and layout of x."""
    rows = [row[:length] for row, length in zip(padded.unbind(), lengths_of(x), strict=True)]
    if x.layout == torch.jagged:
        # sharing the offsets is what lets the result be added to x
        return torch.nested.nested_tensor_from_jagged(torch.cat(rows), offsets=x.offsets())  # type: ignore[attr-defined]
    return torch.nested.as_nested_tensor(rows)


def pad_all(
    query: Tensor, key: Tensor, value: Tensor, batch_first: bool, masked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(query, key, value, key_padding_mask) of a nested call; one tensor given thrice stays one tensor."""
    nested = (query.is_nested, key.is_nested, value.is_nested)
    if not all(nested):
        raise AttentionInputError(
            f"NestedTensor: query, key and value must all be nested or none of them, got nested={nested}"
        )
    if not batch_first:
        raise AttentionInputError("NestedTensor needs batch_first=True, got batch_first=False")
    if masked:
        raise AttentionInputError("NestedTensor carries its own padding: key_padding_mask and attn_mask must be None")
    if lengths_of(key) != lengths_of(value):
        raise AttentionInputError(
            f"NestedTensor: key lengths {lengths_of(key)} do not match value lengths {lengths_of(value)}"
        )
    padded_key, padding = pad(key)
    padded_query = padded_key if query is key else pad(query)[0]
    padded_value = padded_key if value is key else pad(value)[0]
    return padded_query, padded_key, padded_value, padding
