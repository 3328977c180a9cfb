"""What both directions share: how a problem is cut, its masses and rates, and sums in natural units."""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..device.primitives import INF, LN2, LOG2E, finite_or_zero
from ..host.launch import Device, Split, split_tokens
from ..host.tiles import INTERPRETER, MIN_BLOCK, Tile, padded

# Numbers of ℓ in one program: 32 registers a thread of eight warps for ℓ, as many for its exponentials and more for
# addresses.  Twice as many spill, and a problem is not shared by programs.
RESIDENT = 8192


STREAM = 4096  # numbers of a tile that streams: 16 registers a thread of eight warps


WIDEST = 256  # columns of such a tile


COLUMNS = Tile(rows=16, depth=64, warps=4, stages=1)  # partial sums of [16 splits, 64 columns] at a time


class Cut(NamedTuple):
    """The tile of a resident program: [problems, rows, columns]."""

    problems: int
    rows: int
    columns: int

    @property
    def tile(self) -> Tile:
        """16 registers a thread for each array of the tile's size, up to eight warps."""
        warps = min(8, self.problems * self.rows * self.columns // 512)
        return Tile(rows=self.rows, depth=self.columns, warps=warps, stages=1)


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
    split = split_tokens(n, t.rows, groups, device.multiprocessors) if m <= columns else Split(t.rows, -(-n // t.rows))
    return t, split


def mass_strides(log_kernel: Tensor, log_a: Tensor | None, log_b: Tensor | None) -> tuple[int, ...]:
    """Strides of ℓ [G, N, ·], log a [G, N] and log b [G, M]."""
    masses = [(0, 0) if t is None else t.stride() for t in (log_a, log_b)]
    return (*log_kernel.stride()[:2], *masses[0], *masses[1])


def uniform(n: int, m: int) -> tuple[float, float]:
    """The log masses where none are given."""
    return -math.log(n), -math.log(m)


def unit_columns(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def unit_stride(t: Tensor | None) -> Tensor | None:
    """λ [G] with unit stride."""
    return t if t is None or t.stride(0) == 1 else t.contiguous()


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
    log_kernel, log_a, log_b, lam_a, lam_b, stride_lg, stride_ln, stride_ag, stride_an, stride_bg, stride_bm,
    uniform_a, uniform_b, rate_a, rate_b, G, N, M, PB: tl.constexpr, NP: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    """(problem [PB,1,1], row [1,NP,1], column [1,1,MP], ℓ [PB,NP,MP], log a [PB,NP,1], log b [PB,1,MP], λ_a, λ_b)."""
    group = (tl.program_id(0).to(tl.int64) * PB + tl.arange(0, PB))[:, None, None]
    i, j = tl.arange(0, NP)[None, :, None], tl.arange(0, MP)[None, None, :]
    live = group < G
    at = group * stride_lg + i.to(tl.int64) * stride_ln + j
    l = tl.load(log_kernel + at, mask=live & (i < N) & (j < M), other=-INF)
    a = mass(log_a, group * stride_ag + i * stride_an, live & (i < N), uniform_a)
    b = mass(log_b, group * stride_bg + j * stride_bm, live & (j < M), uniform_b)
    return group, i, j, l, a, b, rate(lam_a, rate_a, group, live), rate(lam_b, rate_b, group, live)


@triton.jit
def load_tile(log_kernel, rows, live, stride, columns, M):
    """ℓ [BN, BM], −∞ outside."""
    at = log_kernel + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(at, mask=live[:, None] & (columns < M)[None, :], other=-INF)
