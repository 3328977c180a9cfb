"""What every attention kernel reads of the references and hyperparameters, brought once into the form it is used in.

Padded to [H, MP, DP] (a few kilobytes), normalised, in the tokens' dtype: kernels then read references without masks,
and the hyperparameters are one row of numbers however they were given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import HYPER, Operands, Options, empty_in_order
from .config import Tile, padded
from .launch import launch
from .primitives import INF, LOG2E, inverse_norm, rounded

TOKENS = ("query", "key", "value")
ROWS = 16  # references per program: a few thousand numbers in all, so any tile does
TILE = Tile(rows=ROWS, depth=0, warps=4, stages=1)


class Prepared(NamedTuple):
    """The references of one call, in the form the kernels use."""

    y: Tensor  # [H, MP, DP] ŷ (rbf) or y (dot) in the tokens' dtype, zero where padded
    inverse_norm: Tensor  # [H, MP] 1/‖y‖, 0 where ‖y‖ ≤ 1e-12
    log_b: Tensor  # [H, MP] log2 b, −∞ where padded
    parameters: Tensor  # [H, 8] β·log2 e, log2 e/ε, λ_a, λ_b, τ²·log2 e; then β, ε, τ
    position: Tensor | None  # [H, M, P] contiguous


@triton.jit
def _value(tensor, scalar, h):
    """A hyperparameter given as a tensor [H] or as a number."""
    if tensor is None:
        return scalar
    else:
        return tl.load(tensor + h)


@triton.jit
def prepare_kernel(
    references, log_b, bandwidth, epsilon, key_relaxation, reference_relaxation, position_scale,
    y, inverse_norms, log_b_out, parameters,
    scalar_bandwidth, scalar_epsilon, scalar_key_relaxation, scalar_reference_relaxation, scalar_position_scale,
    stride_h, stride_m, stride_bh, stride_bm,
    M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = MP // ROWS
    h = tl.program_id(0) // blocks
    j = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    inside = (j < M)[:, None] & (d < D)[None, :]
    raw = tl.load(references + h * stride_h + j[:, None] * stride_m + d[None, :], mask=inside, other=0.0)  # [ROWS, DP]
    inverse = inverse_norm(tl.sum(raw * raw, 1))
    scaled = raw if DOT else raw * inverse[:, None]
    tl.store(y + (h * MP + j)[:, None] * DP + d[None, :], rounded(scaled, y.dtype.element_ty))
    tl.store(inverse_norms + h * MP + j, inverse)
    if log_b is None:
        mass = tl.where(j < M, -tl.log2(M + 0.0), -INF)
    else:
        mass = tl.load(log_b + h * stride_bh + j * stride_bm, mask=j < M, other=-INF) * LOG2E
    tl.store(log_b_out + h * MP + j, mass)
    beta = _value(bandwidth, scalar_bandwidth, h)
    eps = _value(epsilon, scalar_epsilon, h)
    tau = _value(position_scale, scalar_position_scale, h)
    row = parameters + h * 8
    tl.store(row, beta * LOG2E)
    tl.store(row + 1, (1.0 / eps) * LOG2E)
    tl.store(row + 2, _value(key_relaxation, scalar_key_relaxation, h))
    tl.store(row + 3, _value(reference_relaxation, scalar_reference_relaxation, h))
    tl.store(row + 4, tau * tau * LOG2E)
    tl.store(row + 5, beta)
    tl.store(row + 6, eps)
    tl.store(row + 7, tau)


def prepare(x: Operands, opt: Options) -> Prepared:
    """Launches the preparation of one call's references."""
    h, m, d = x.references.shape
    mp, dp = padded(m), padded(d)
    references = x.references if x.references.stride(-1) == 1 else x.references.contiguous()
    new = x.references.new_empty
    out = Prepared(
        new((h, mp, dp), dtype=x.key.dtype),
        new((h, mp)),
        new((h, mp)),
        new((h, 8)),
        None if x.reference_position is None else x.reference_position.contiguous(),
    )
    hypers = [_unit(getattr(x, name)) for name in HYPER]
    strides = (references.stride(0), references.stride(1), *((0, 0) if x.log_b is None else x.log_b.stride()))
    args: tuple[Any, ...] = (references, x.log_b, *hypers, *out[:4], *map(float, opt.scalars), *strides)
    constants = {"M": m, "MP": mp, "D": d, "DP": dp, "DOT": opt.kernel == "dot", "ROWS": ROWS}
    launch(prepare_kernel, h * mp // ROWS, args, constants, TILE)
    return out


def _unit(t: Tensor | None) -> Tensor | None:
    """A hyperparameter [H] with unit stride."""
    return t if t is None or t.stride(0) == 1 else t.contiguous()


def unit_rows(t: Tensor) -> Tensor:
    """A token tensor with unit stride along its last dimension; copied only where a caller transposed it."""
    return t if t.stride(-1) == 1 else t.contiguous()


class Rows(NamedTuple):
    """An output, and where kernels write it: itself if its last dimension is innermost, else a contiguous one."""

    result: Tensor
    rows: Tensor

    def delivered(self) -> Tensor:
        """The output, after the kernels ran."""
        return self.result if self.rows is self.result else self.result.copy_(self.rows)


def rows_like(like: Tensor, width: int) -> Rows:
    """An empty output [.., width] in the memory order of the token tensor `like`."""
    result = empty_in_order(like, (*like.shape[:-1], width))
    innermost = result.stride(-1) == 1
    return Rows(result, result if innermost else torch.empty_like(result, memory_format=torch.contiguous_format))


def token_gradients(x: Operands, need: Mapping[str, bool]) -> dict[str, Rows]:
    """Empty gradients of the token tensors that need one; that of log a [B, H, S] is written by strides."""
    out = {n: rows_like(t, t.shape[-1]) for n in TOKENS if need[n] and (t := getattr(x, n)) is not None}
    if need["log_a"] and x.log_a is not None:
        d_log_a = empty_in_order(x.log_a, x.log_a.shape)
        out["log_a"] = Rows(d_log_a, d_log_a)
    return out


def stride_step(*tensors: Tensor | None) -> int:
    """16 where every row of the tensors starts on a multiple of 16 elements, else 1.

    Kernels take strides in this unit and multiply: so the compiler sees wide loads, whatever the lengths.
    """
    return 16 if all(s % 16 == 0 for t in tensors if t is not None for s in t.stride()[:-1]) else 1


def strides(t: Tensor | None, step: int = 1) -> tuple[int, ...]:
    """The strides of (batch, head, token) in units of `step`, zeros where there is no tensor."""
    return (0, 0, 0) if t is None else tuple(s // step for s in t.stride()[:3])
