"""What the passes over the keys share in the transport's backward: merged gradients and the plan of every iteration.

With p = e^{ℓ+g^{t−1}−m} the numerators of the row update and r = Σ_j p: R^t = p/r, and Q^t_sj = e^{ℓ+f^t−c^t} is

    narrow (see plan.py):  e^{ℓ+f+g−k} · e^{k−g−c},  k = (1 − λ_a) max g,  the first from p        else:  e^{ℓ+f−c} · 1

In both the first factor is computed as the forward did, so that its errors cancel against those of c^t.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ....problem import Operands, Options
from ..device.gradients import sum_slots
from ..device.head import head_parameters
from ..device.plan import potentials_narrow, range_known, row_factor, row_update
from ..device.primitives import INF, LOG2E, finite_or_zero, rounded
from ..host.launch import kernel, launch
from ..host.rows import strides
from ..host.tiles import Tile, padded
from ..parameters.gradients import Partials
from ..parameters.prepare import Prepared

COLUMNS = tl.constexpr(
    3
)  # vectors [MP] of an iteration: g^{t−1} − top, c^t (∞ where nothing is sent), Q's second factor
FACTORS = tl.constexpr(2)  # and scalars: top = max g where narrow, else 0; whether narrow
TILE = Tile(rows=16, depth=256, warps=4, stages=1)  # a [16 splits, 256] tile is 32 numbers a thread


class State(NamedTuple):
    """What the passes over the keys share; everything exponential in base 2."""

    d_z: Tensor  # [BH, MP, EP] in the dtype of the values
    offset: Tensor  # [BH, MP] ⟨dz_j, z_j⟩ − dc^T_j
    use_values: Tensor  # [BH] 1, or 0 where one key takes part: its weight is 1, whatever its value
    d_g: Tensor  # [BH, max(T, 1), MP] dg^t
    columns: Tensor  # [BH, max(T, 1), COLUMNS, MP]
    factors: Tensor  # [BH, max(T, 1), FACTORS]


class Cotangents(NamedTuple):
    """What arrives at the transport: from the queries part_z and the slots of dg^T, or (pooling) dz and dc."""

    part_z: Tensor | None  # [BH, splits, MP, EP]
    splits: int
    d_z: Tensor | None  # [B, H, M, E] float32, contiguous
    d_c: Tensor | None  # [B, H, max(T, 1), M] contiguous


@triton.jit
def few_keys(log_a, stride, S):
    """Whether at most one key takes part; reads on only until the second."""
    if log_a is None:
        return S < 2
    else:
        seen = 0
        start = 0
        while (start < S) & (seen < 2):
            rows = start + tl.arange(0, 1024)
            mass = tl.load(log_a + rows.to(tl.int64) * stride, mask=rows < S, other=-INF)
            seen += tl.sum((mass > -INF).to(tl.int32), 0)
            start += 1024
        return seen < 2


@triton.jit
def _store_columns(
    log_b, c, columns, factors, at, h, t, lam_a, lam_b, beta, scale,
    RANGE: tl.constexpr, UPDATE_ROWS: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    """The columns and factors of iteration t of one head, `at` counting iterations of all heads."""
    j = tl.arange(0, MP)
    c_t = tl.load(c + at * M + j, mask=j < M, other=-INF) * LOG2E
    g = tl.load(log_b + h * MP + j)
    if UPDATE_ROWS:
        before = tl.load(c + (at - 1) * M + j, mask=j < tl.where(t > 1, M, 0), other=0.0)
        g -= lam_b * finite_or_zero(before) * LOG2E
    reached = c_t > -INF
    c_t = tl.where(reached, c_t, 0.0)
    top = tl.max(g, 0)
    if UPDATE_ROWS and RANGE == "always":
        narrow = top == top
    elif UPDATE_ROWS and RANGE == "device":
        narrow = potentials_narrow(g, beta, scale, M)
    else:
        narrow = top != top
    top = tl.where(narrow, top, 0.0)
    sent = reached & (g > -INF)
    second = tl.where(narrow, (1.0 - lam_a) * top - tl.where(sent, g, 0.0) - c_t, 0.0)
    out = columns + at * (COLUMNS * MP) + j
    tl.store(out, g - top)
    tl.store(out + MP, tl.where(reached, c_t, INF))
    tl.store(out + 2 * MP, tl.where(reached, tl.exp2(second), 0.0))
    tl.store(factors + at * FACTORS, top)
    tl.store(factors + at * FACTORS + 1, narrow.to(tl.float32))


@kernel
def transport_state_backward_kernel(
    part_z, part_g, d_z, d_c, z, c, log_b, log_a, parameters, d_z_out, offset, use_values, d_g, columns, factors,
    stride_ab, stride_ah, stride_an, H, S, splits, slots, iterations,
    RANGE: tl.constexpr, UPDATE_ROWS: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One iteration's columns, or ROWS rows of dz and dg^T with their offsets, of one head."""
    blocks: tl.constexpr = MP // ROWS
    tasks = blocks + iterations
    bh = (tl.program_id(0) // tasks).to(tl.int64)
    task = tl.program_id(0) % tasks
    b, h = bh // H, bh % H
    beta, scale, lam_a, lam_b, tau = head_parameters(parameters, h)
    if task >= blocks:
        t = task - blocks + 1
        at = bh * iterations + t - 1
        _store_columns(log_b, c, columns, factors, at, h, t, lam_a, lam_b, beta, scale, RANGE, UPDATE_ROWS, M, MP)
    else:
        rows = task * ROWS + tl.arange(0, ROWS)
        flat = task * ROWS * EP + tl.arange(0, ROWS * EP)
        row, e = flat // EP, flat % EP
        inside = (row < M) & (e < E)
        if part_z is None:
            total = tl.load(d_z + (bh * M + row) * E + e, mask=inside, other=0.0)
            g_rows = tl.zeros([ROWS], tl.float32)
        else:
            total = sum_slots(part_z, bh, 0, 1, splits, splits, MP * EP, flat, inside)
            g_rows = sum_slots(part_g, bh, 0, 1, slots, splits, MP, rows, rows < M)
        operand = rounded(total, d_z_out.dtype.element_ty)
        tl.store(d_z_out + bh * (MP * EP) + flat, operand)
        pooled = tl.load(z + (bh * M + row) * E + e, mask=inside, other=0.0)
        # With dz as the products with v see it: what is subtracted there is the mean of those products.
        mean = tl.sum(tl.reshape(pooled * operand.to(tl.float32), [ROWS, EP]), 1)
        if log_a is not None:
            log_a += b * stride_ab + h * stride_ah
        use = tl.where(few_keys(log_a, stride_an, S), 0.0, 1.0)
        d_c_rows = -lam_b * g_rows if UPDATE_ROWS else g_rows * 0.0
        at = bh * iterations + iterations - 1
        if d_c is not None:
            d_c_rows += tl.load(d_c + at * M + rows, mask=rows < M, other=0.0)
        tl.store(offset + bh * MP + rows, mean * use - d_c_rows)
        tl.store(d_g + at * MP + rows, g_rows)
        tl.store(use_values + bh, use)


@triton.jit
def load_columns(columns, factors, at, MP: tl.constexpr):
    """(g − top, c, second factor [MP], top, whether narrow) of one iteration."""
    column = columns + at * (COLUMNS * MP) + tl.arange(0, MP)
    factor = factors + at * FACTORS
    return tl.load(column), tl.load(column + MP), tl.load(column + 2 * MP), tl.load(factor), tl.load(factor + 1) > 0


@triton.jit
def column_gradient(d_g, d_c, at, lam_b, M: tl.constexpr):
    """dc^t [MP] = −λ_b dg^t, and what the gradient of an output adds."""
    d = -lam_b * d_g
    if d_c is not None:
        j = tl.arange(0, d_g.shape[0])
        d += tl.load(d_c + at * M + j, mask=j < M, other=0.0)
    return d


@triton.jit
def _narrow_terms(kappa, scale, l, mass, lam_a, g, top, P: tl.constexpr):
    """As `plan_terms` where ℓ + g never exceeds top and never falls far below it; g less top."""
    if P > 0:
        p = tl.exp2(l + g[None, :])
    else:  # as one multiply-add from κ: then neither ℓ nor κ/ε is kept beside κ from one iteration to the next
        p = tl.exp2(tl.fma(kappa, scale + tl.zeros_like(kappa), (g - scale)[None, :] + tl.zeros_like(kappa)))
    r = tl.sum(p, 1)
    log_r = tl.log2(r)
    return p, r, top + log_r, p * row_factor(r, mass, lam_a)[:, None]


@triton.jit
def _log_domain_terms(l, mass, lam_a, g, c):
    """As `plan_terms` whatever the range."""
    p, m, r, f = row_update(l, g, mass, lam_a)
    return p, r, m + tl.log2(r), tl.exp2((l + f[:, None]) - c[None, :])


@triton.jit
def plan_terms(
    kappa, scale, l, mass, lam_a, g, c, top, narrow, RANGE: tl.constexpr, UPDATE_ROWS: tl.constexpr, P: tl.constexpr
):
    """(p [BS, MP], Σ_j p, LSE_j(ℓ + g) in base 2 [BS], the first factor of Q [BS, MP]) of one iteration.

    Without a row update only the last means anything.
    """
    if not UPDATE_ROWS:
        p, r, lse, first = l, mass, mass, tl.exp2((l + mass[:, None]) - c[None, :])
    elif RANGE == "always":
        p, r, lse, first = _narrow_terms(kappa, scale, l, mass, lam_a, g, top, P)
    elif RANGE == "device":
        if narrow:
            p, r, lse, first = _narrow_terms(kappa, scale, l, mass, lam_a, g, top, P)
        else:
            p, r, lse, first = _log_domain_terms(l, mass, lam_a, g, c)
    else:
        p, r, lse, first = _log_domain_terms(l, mass, lam_a, g, c)
    return p, r, lse, first


@triton.jit
def pooling_weights(first, second, live, use):
    """W^k [BS, MP] from the factors of Q^T; 1 for a key that takes part alone."""
    return first * (second * use)[None, :] + tl.where(live, 1.0 - use, 0.0)[:, None]


def merged_state(
    x: Operands, opt: Options, prepared: Prepared, state: tuple[Tensor, Tensor], given: Cotangents, parts: Partials
) -> State:
    """dz in the values' dtype, its offsets, dg^T and the columns of every iteration."""
    z, c = state
    (b, h, iterations, m), e, (_, mp, _) = c.shape, z.shape[-1], prepared.y.shape
    ep, new = padded(e), x.references.new_empty
    out = State(
        new((b * h, mp, ep), dtype=x.value.dtype),
        new((b * h, mp)),
        new((b * h,)),
        new((b * h, iterations, mp)),
        new((b * h, iterations, COLUMNS.value, mp)),
        new((b * h, iterations, FACTORS.value)),
    )
    rows = max(1, TILE.depth // ep)
    tensors = (given.part_z, parts.log_b, *given[2:], z, c, prepared.log_b, x.log_a, prepared.parameters, *out)
    counts = (*strides(x.log_a), h, x.key.shape[2], given.splits, parts.log_b.shape[1], iterations)
    constants = {
        "RANGE": range_known(x, opt), "UPDATE_ROWS": opt.num_iters > 0, "M": m, "MP": mp, "E": e, "EP": ep,
        "ROWS": rows,
    }  # fmt: skip
    launch(transport_state_backward_kernel, b * h * (mp // rows + iterations), (*tensors, *counts), constants, TILE)
    return out
