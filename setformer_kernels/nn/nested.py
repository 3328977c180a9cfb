"""NestedTensor in and out: nn.TransformerEncoder hands one to its layers in eval, in place of a padding mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .contract import AttentionInputError


def lengths_of(x: Tensor) -> list[int]:
    """The lengths of the sequences of a nested x [N, *, E]."""
    return [sequence.shape[0] for sequence in x.unbind()]


def packs(*tensors: Any) -> bool:
    """Whether the rows of these [N, *, C] are their sequences one after another, of one number: no need to pad them."""
    cut = (x.layout == torch.jagged and x.dim() == 3 and x._ragged_idx == 1 and x.lengths() is None for x in tensors)
    return all(cut) and tensors[0].size(0) > 0 and all(x.size(0) == tensors[0].size(0) for x in tensors)


def same_lengths(a: Any, b: Any) -> bool:
    """Whether two that `packs` cuts agree: mostly because they share their offsets, which nobody has to read then."""
    return a is b or a.offsets() is b.offsets() or torch.equal(a.offsets(), b.offsets())


def tokens_first(x: Tensor) -> Tensor:
    """Projected rows [1, H, T, D] -> a view [T, H, D]."""
    return x.squeeze(0).transpose(0, 1)


def from_rows(rows: Tensor, x: Any) -> Tensor:
    """Rows [T, C] as sequences of the lengths of x, to which they can be added."""
    return torch.nested.nested_tensor_from_jagged(rows, offsets=x.offsets())


def pad(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Nested [N, *, E] -> (padded [N, S, E], key padding mask [N, S], True = padding); S = 0 where all are empty."""
    sequences = list(x.unbind()) if x.dim() == 3 else []
    widths = sorted({sequence.shape[1] for sequence in sequences})
    if len(widths) != 1:
        raise AttentionInputError(
            f"NestedTensor: {name} must hold at least one sequence [length, width] (length 0 is one), all of one width,"
            f" got a {x.dim()}-D NestedTensor of {x.size(0)}" + (f" with widths {widths}" if widths else "")
        )
    # torch.nested.to_padded_tensor refuses a batch whose sequences are all empty
    padded = pad_sequence(sequences, batch_first=True)
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) >= lengths[:, None]


def pad_position(name: str, position: Tensor | None) -> Tensor | None:
    """Token positions, nested ones [N, *, P] padded to [N, S, P]; what padding holds is not read."""
    return pad(name, position)[0] if position is not None and position.is_nested else position


def nest_like(padded: Tensor, x: Tensor) -> Tensor:
    """Padded [N, L, E] -> nested with the lengths and layout of x."""
    if x.layout == torch.jagged:
        return _jagged_like(padded, x)
    return torch.nested.as_nested_tensor(
        [row[:length] for row, length in zip(padded.unbind(), lengths_of(x), strict=True)]
    )


def _jagged_like(padded: Tensor, x: Any) -> Tensor:
    """Sharing the offsets (and, where x has gaps between its sequences, the lengths) lets the result be added to x."""
    offsets, lengths = x.offsets(), x.lengths()
    row = torch.arange(padded.shape[1], device=padded.device)
    there = row < (offsets.diff() if lengths is None else lengths)[:, None]  # [N, L]
    place = (offsets[:-1, None] + row)[there]
    values = padded.new_zeros(x.values().shape[0], padded.shape[2]).index_copy(0, place, padded[there])
    return torch.nested.nested_tensor_from_jagged(values, offsets=offsets, lengths=lengths)


def pad_all(
    tensors: dict[str, Tensor], masks: dict[str, Tensor | None], batch_first: bool
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """(tensors padded, key_padding_mask) of a nested call, whose last two are keys and values (a single one is both);
    one tensor given thrice stays one tensor."""
    nested = tuple(x.is_nested for x in tensors.values())
    if not all(nested):
        raise AttentionInputError(
            f"NestedTensor: {', '.join(tensors)} must all be nested or none of them, got nested={nested}"
        )
    if not batch_first:
        raise AttentionInputError("NestedTensor needs batch_first=True, got batch_first=False")
    if any(mask is not None for mask in masks.values()):
        raise AttentionInputError(f"NestedTensor carries its own padding: {' and '.join(masks)} must be None")
    padded: dict[int, tuple[Tensor, Tensor]] = {}
    for name, x in tensors.items():
        if id(x) not in padded:
            padded[id(x)] = pad(name, x)
    *_, (value_name, value) = items = list(tensors.items())
    key_name, key = items[max(len(items) - 2, 0)]
    if lengths_of(key) != lengths_of(value):
        raise AttentionInputError(
            f"NestedTensor: {key_name} lengths {lengths_of(key)} do not match {value_name} lengths {lengths_of(value)}"
        )
    return [padded[id(x)][0] for x in tensors.values()], padded[id(key)][1]
