"""What both directions share: how a problem is cut, its masses and rates, and sums in natural units."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ....problem import Sinkhorn
from ..device.primitives import INF, LN2, LOG2E, finite_or_zero
from ..device.rows import wide
from ..host.launch import Device, Split, split_tokens
from ..host.rows import unit_rows
from ..host.tiles import INTERPRETER, MIN_BLOCK, Tile, padded

# Numbers of ℓ in one program: 32 registers a thread of eight warps for ℓ, as many for its exponentials and more for
# addresses.  Twice as many spill, and a problem is not shared by programs.
RESIDENT = 8192


STREAM = 4096  # numbers of a tile that streams: 16 registers a thread of eight warps


WIDEST = 256  # columns of such a tile


COLUMNS = Tile(rows=16, depth=64, warps=4, stages=1)  # partial sums of [16 splits, 64 columns] at a time


class Cut(NamedTuple):
    """The tile of a resident program."""

    PB: int  # problems
    NP: int  # rows of each
    MP: int  # columns

    @property
    def tile(self) -> Tile:
        """16 registers a thread for each array of the tile's size, up to eight warps."""
        warps = min(8, self.PB * self.NP * self.MP // 512)
        return Tile(rows=self.NP, depth=self.MP, warps=warps, stages=1)


def resident(n: int, m: int, limit: int = RESIDENT) -> Cut | None:
    """How a problem of n rows and m columns lies in registers, None if it does not; sizes enter as powers of two."""
    rows, columns = padded(n), padded(m)
    if rows * columns > limit:
        return None
    return Cut(max(1, limit // 2 // (rows * columns)), rows, columns)  # several small problems share a program


def stream(n: int, m: int, groups: int, device: Device, numbers: int = STREAM) -> tuple[Tile, Split]:
    """The tile of a streaming program, and the rows each takes: one tile's where the columns need several."""
    columns = min(WIDEST, padded(m))
    rows = INTERPRETER.rows if device.family == "interpreter" else numbers // columns
    # Rows of the widest tile lie in few warps: with eight, the smaller tile of the backward pass spills.
    t = Tile(rows=rows, depth=columns, warps=4 if rows < MIN_BLOCK else 8, stages=1)
    split = split_tokens(n, t, groups, device.multiprocessors) if m <= columns else Split(t.rows, -(-n // t.rows))
    return t, split


class Numbers(NamedTuple):
    """Numbers that no kernel is compiled for."""

    uniform_a: float  # log masses where none are given
    uniform_b: float
    rate_a: float  # λ where none are given
    rate_b: float
    tol: float  # negative: none


def numbers(x: Sinkhorn) -> Numbers:
    """Those of one call."""
    (n, m), (rate_a, rate_b) = x.log_kernel.shape[1:], x.scalars
    tol = -1.0 if x.tol is None else float(x.tol)
    return Numbers(-math.log(n), -math.log(m), float(rate_a), float(rate_b), tol)


def unit(x: Sinkhorn) -> Sinkhorn:
    """With unit stride along the columns of ℓ and in λ [G]."""
    l, lam_a, lam_b = unit_rows(x.log_kernel), unit_rows(x.lam_a), unit_rows(x.lam_b)
    if l is x.log_kernel and lam_a is x.lam_a and lam_b is x.lam_b:
        return x
    return x._replace(log_kernel=l, lam_a=lam_a, lam_b=lam_b)


def spanned(t: Tensor | None) -> tuple[Any, ...]:
    """A tensor and its first two strides, zeros where there is none: one line of a signature."""
    return (None, 0, 0) if t is None else (t, *t.stride()[:2])


def given(x: Sinkhorn) -> tuple[Any, ...]:
    """The arguments that the kernels on ℓ begin with."""
    return *spanned(x.log_kernel), *spanned(x.log_a), *spanned(x.log_b), x.lam_a, x.lam_b, numbers(x)


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def natural_log_sum(peak, total):
    """log of total·e^peak, −∞ where the total is 0."""
    return tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1.0)) * LN2, -INF)


@triton.jit
def peak_and_total(x, AXIS: tl.constexpr):
    """(peak, Σ e^{x − peak}) over an axis of x [PB, NP, MP]."""
    peak = tl.max(x, AXIS, keep_dims=True)
    return peak, tl.sum(exp(x - finite_or_zero(peak)), AXIS, keep_dims=True)


@triton.jit
def add_exponentials(peak, total, x, AXIS: tl.constexpr):
    """(peak, total) of total·e^peak + Σ e^x along an axis of x [I, J]."""
    new = tl.maximum(peak, tl.max(x, AXIS))
    safe = finite_or_zero(new)
    terms = exp(x - (safe[None, :] if AXIS == 0 else safe[:, None]))
    return new, total * exp(peak - safe) + tl.sum(terms, AXIS)


@triton.jit
def mass(tensor, index, mask, uniform):
    """Log masses at `index`, −∞ outside the mask; the uniform one where none are given."""
    if tensor is None:
        return tl.where(mask, uniform, -INF) + index.to(tl.float32) * 0.0
    else:
        return tl.load(tensor + index, mask=mask, other=-INF)


@triton.jit
def rate(tensor, scalar, group, mask):
    """A relaxation given per problem or as a number."""
    if tensor is None:
        return group.to(tl.float32) * 0.0 + scalar
    else:
        return tl.load(tensor + group, mask=mask, other=1.0)


@triton.jit
def load_problems(
    log_kernel, stride_lg, stride_ln, log_a, stride_ag, stride_an, log_b, stride_bg, stride_bm, lam_a, lam_b,
    numbers, G, N, M, PB: tl.constexpr, NP: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    """(problem [PB,1,1], row [1,NP,1], column [1,1,MP], ℓ [PB,NP,MP], log a [PB,NP,1], log b [PB,1,MP], λ_a, λ_b)."""
    group = (tl.program_id(0).to(tl.int64) * PB + tl.arange(0, PB))[:, None, None]
    i, j = tl.arange(0, NP)[None, :, None], tl.arange(0, MP)[None, None, :]
    live = group < G
    at = group * wide(stride_lg) + i * wide(stride_ln) + j
    l = tl.load(log_kernel + at, mask=live & (i < N) & (j < M), other=-INF)
    a = mass(log_a, group * wide(stride_ag) + i * wide(stride_an), live & (i < N), numbers.uniform_a)
    b = mass(log_b, group * wide(stride_bg) + j * wide(stride_bm), live & (j < M), numbers.uniform_b)
    return group, i, j, l, a, b, rate(lam_a, numbers.rate_a, group, live), rate(lam_b, numbers.rate_b, group, live)


@triton.jit
def load_tile(log_kernel, rows, live, stride, columns, M):
    """ℓ [BN, BM], −∞ outside."""
    at = log_kernel + rows[:, None] * wide(stride) + columns[None, :]
    return tl.load(at, mask=live[:, None] & (columns < M)[None, :], other=-INF)
