"""How tensors of tokens reach the kernels: rows with unit stride, their strides, and where results are written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ....problem import Operands, empty_in_order

TOKENS = ("query", "key", "value")


Maybe = TypeVar("Maybe", Tensor, Tensor | None)


def unit_rows(t: Maybe) -> Maybe:
    """A token tensor with unit stride along its last dimension; copied only where a caller transposed it."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


class Output(NamedTuple):
    """An output, and where kernels write it: itself if its last dimension is innermost, else a contiguous one."""

    result: Tensor
    rows: Tensor

    def delivered(self) -> Tensor:
        """The output, after the kernels ran."""
        return self.result if self.rows is self.result else self.result.copy_(self.rows)


def rows_like(like: Tensor, width: int) -> Output:
    """An empty output [.., width] in the memory order of the token tensor `like`."""
    result = empty_in_order(like, (*like.shape[:-1], width))
    innermost = result.stride(-1) == 1
    return Output(result, result if innermost else torch.empty_like(result, memory_format=torch.contiguous_format))


def token_gradients(x: Operands, need: Mapping[str, bool]) -> dict[str, Output]:
    """Empty gradients of the token tensors that need one; that of log a [B, H, S] is written by strides."""
    out = {n: rows_like(t, t.shape[-1]) for n in TOKENS if need[n] and (t := getattr(x, n)) is not None}
    if need["log_a"] and x.log_a is not None:
        d_log_a = empty_in_order(x.log_a, x.log_a.shape)
        out["log_a"] = Output(d_log_a, d_log_a)
    return out


def stride_step(*tensors: Tensor | None) -> int:
    """16 where every row of the tensors starts on a multiple of 16 elements, else 1.

    Kernels take strides in this unit and multiply: so the compiler sees wide loads, whatever the lengths.
    """
    for t in tensors:
        if t is not None:
            for stride in t.stride()[:-1]:
                if stride % 16:
                    return 1
    return 16


def strided(t: Tensor | None, step: int = 1, packed: bool = False) -> tuple[Any, ...]:
    """A tensor and its strides of (batch, head, token) in units of `step`, zeros where there is none: one line each.

    Of a packed batch, whose elements begin at any row, the stride of rows stands for theirs.
    """
    if t is None:
        return None, 0, 0, 0
    batch, head, token = t.stride()[:3]
    return t, (token if packed else batch) // step, head // step, token // step


def log2_uniform(length: int) -> float:
    """log2 of a key's mass where none are given."""
    return -math.log2(length) if length else 0.0
