"""One pass over the rows of problems of transport from potentials g, for Newton's step and the implicit gradient:

    s_i = LSE_j(ℓ_ij + g_j)   f_i = log a_i − λ_a s_i   R_ij = e^{ℓ_ij + g_j − s_i}   P = diag(e^{f + s}) R
    c_j = LSE_i(ℓ_ij + f_i)   D_j = Σ_i P_ij            A = PᵀR = XᵀX, X = diag(e^{(f + s)/2}) R

A program walks a stretch of one problem's rows, once, and leaves its part of c, D and of a block of A's columns;
`linearised_finish_kernel` adds the parts in a fixed order.  Who makes ℓ says in which unit of base 2 it is: log2 e for
natural logarithms, 1 for those of base 2.

Defined by `reference.converged.system.passed`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..host.launch import Split, kernel, launch
from ..host.tiles import Tile
from .primitives import INF, LN2, LOG2E, column_sum, dot, finite_or_zero, potential

LINEARISED_FINISH = Tile(rows=16, depth=64, warps=8, stages=1)  # of 256 columns 16 rows of A are 16 numbers a thread


class Parts(NamedTuple):
    """What the programs of a pass leave."""

    peak: Tensor  # [G, splits, MP] of Σ e^{ℓ+f} = total·e^peak
    total: Tensor  # [G, splits, MP]
    mass: Tensor  # [G, splits, MP] of D
    gram: Tensor  # [G, splits, MP, MP] of A


class Sums(NamedTuple):
    """The same on the way through a program's rows, of A its own columns."""

    peak: Any
    total: Any
    mass: Any
    gram: Any


@triton.jit
def column_block(x, block, WIDTH: tl.constexpr):
    """Columns block·WIDTH.. of x [BN, MP]."""
    blocks: tl.constexpr = x.shape[1] // WIDTH
    if blocks == 1:
        return x
    else:
        parts = tl.reshape(x, [x.shape[0], blocks, WIDTH])
        return tl.sum(tl.where(tl.arange(0, blocks)[None, :, None] == block, parts, 0.0), 1)


@triton.jit
def without_rows(MP: tl.constexpr, WIDTH: tl.constexpr):
    """The sums of no row."""
    none = tl.zeros([MP], tl.float32)
    return Sums(tl.full([MP], -INF, tl.float32), none, none, tl.zeros([MP, WIDTH], tl.float32))


@triton.jit
def add_rows(sums, l, g, mass, relaxation, block, UNIT: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """(s, f [BN], the sums with these rows) of ℓ [BN, MP], g [MP], log masses [BN]; a row without mass has s = −∞."""
    u = l + g[None, :]
    top = finite_or_zero(tl.max(u, 1))
    p = tl.exp2((u - top[:, None]) * UNIT)
    r = tl.sum(p, 1)
    sent = (mass > -INF) & (r > 0)
    r = tl.where(sent, r, 1.0)
    s = tl.where(sent, top + tl.log2(r) * (1.0 / UNIT), -INF)
    f = potential(mass, relaxation, s)
    half = tl.where(sent, mass + (1.0 - relaxation) * finite_or_zero(s), 0.0) * (0.5 * UNIT)
    root = tl.where(sent, tl.exp2(half), 0.0)
    x = p * (root / r)[:, None]
    h = l + f[:, None]
    peak = tl.maximum(sums.peak, tl.max(h, 0))
    safe = finite_or_zero(peak)
    total = sums.total * tl.exp2((sums.peak - safe) * UNIT) + column_sum(tl.exp2((h - safe[None, :]) * UNIT))
    gram = sums.gram + dot(tl.trans(x), column_block(x, block, WIDTH), PRECISION)
    return s, f, Sums(peak, total, sums.mass + column_sum(x * root[:, None]), gram)


@triton.jit
def store_linearised(parts, at, block, sums, MP: tl.constexpr, WIDTH: tl.constexpr):
    """Those of the at-th stretch of all; c and D by the first of its programs."""
    j = at * MP + tl.arange(0, MP)
    if block == 0:
        tl.store(parts.peak + j, sums.peak)
        tl.store(parts.total + j, sums.total)
        tl.store(parts.mass + j, sums.mass)
    columns = block * WIDTH + tl.arange(0, WIDTH)
    tl.store(parts.gram + j[:, None] * MP + columns[None, :], sums.gram)


@kernel
def linearised_finish_kernel(
    parts, c, mass, gram,  # Parts; [G, M] of D and of c, [G, M, M]
    M, splits,
    UNIT: tl.constexpr, MP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The parts of a problem, added: ROWS of its columns."""
    group = (tl.program_id(0) // (MP // ROWS)).to(tl.int64)
    row, column = tl.program_id(0) % (MP // ROWS) * ROWS + tl.arange(0, ROWS), tl.arange(0, MP)
    first = group * splits * MP + row
    peak = tl.full([ROWS], -INF, tl.float32)
    for split in range(0, splits):
        peak = tl.maximum(peak, tl.load(parts.peak + first + split * MP))
    safe = finite_or_zero(peak)
    total, sent = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    found = tl.zeros([ROWS, MP], tl.float32)
    for split in range(0, splits):
        at = first + split * MP
        fade = tl.exp2((tl.load(parts.peak + at) - safe) * UNIT)
        total += tl.load(parts.total + at) * fade
        sent += tl.load(parts.mass + at)
        found += tl.load(parts.gram + at[:, None] * MP + column[None, :])
    log_sum = tl.where(total > 0, peak * (UNIT / LOG2E) + tl.log2(tl.where(total > 0, total, 1.0)) * LN2, -INF)
    tl.store(c + group * M + row, log_sum, mask=row < M)
    tl.store(mass + group * M + row, sent, mask=row < M)
    inside = (row < M)[:, None] & (column < M)[None, :]
    tl.store(gram + (group * M + row)[:, None] * M + column[None, :], found, mask=inside)


def gram_width(padded: int) -> int:
    """Columns of A [MP, MP] that a program forms: of 128 beside the tiles of 16 bit registers spill on sm_80."""
    return min(padded, 64)


def empty_parts(g: Tensor, padded: int, split: Split) -> Parts:
    """Those of problems with potentials g [G, M]."""
    shape, new = (g.shape[0], split.programs, padded), g.new_empty
    return Parts(new(shape), new(shape), new(shape), new((*shape, padded)))


def finish_linearised(parts: Parts, m: int, unit: float) -> tuple[Tensor, Tensor, Tensor]:
    """c and D [G, M], A [G, M, M]."""
    (groups, splits, padded), new = parts.peak.shape, parts.peak.new_empty
    out = new((groups, m)), new((groups, m)), new((groups, m, m))
    constants = {"UNIT": unit, "MP": padded, "ROWS": LINEARISED_FINISH.rows}
    programs = groups * padded // LINEARISED_FINISH.rows
    launch(linearised_finish_kernel, programs, (parts, *out, m, splits), constants, LINEARISED_FINISH)
    return out
