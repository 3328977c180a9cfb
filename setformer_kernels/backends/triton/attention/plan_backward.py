"""What the passes over the keys share in the transport's backward: merged gradients and the plan of every iteration.

With p = e^{ℓ+g^{t−1}−m} the numerators of the row update and r = Σ_j p: R^t = p/r, and Q^t_sj = e^{ℓ+f^t−c^t} is

    narrow (see plan.py):  e^{ℓ+f+g−k} · e^{k−g−c},  k = (1 − λ_a) max g,  the first from p        else:  e^{ℓ+f−c} · 1

In both the first factor is computed as the forward did, so that its errors cancel against those of c^t.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ....problem import Operands, Options
from ..device.gradients import sum_slots
from ..device.head import head_parameters, load_references_t
from ..device.plan import potentials_narrow, range_known, row_factor, row_update
from ..device.primitives import INF, LOG2E, finite_or_zero, rounded, tokens_by
from ..device.rows import few_keys, load_rows, rows_of, segment_of
from ..host.groups import Segments, rule_of, sizes_of
from ..host.launch import kernel, launch
from ..host.rows import log2_uniform, strided
from ..host.tiles import Tile
from ..parameters.gradients import Partials
from ..parameters.prepare import References

COLUMNS = tl.constexpr(3)  # vectors [MP] of an iteration: those of `Column`
FACTORS = tl.constexpr(2)  # and numbers: the others of `Column`
TILE = Tile(rows=16, depth=256, warps=4, stages=1)  # a [16 splits, 256] tile is 32 numbers a thread


class State(NamedTuple):
    """What the passes over the keys share; everything exponential in base 2."""

    d_z: Tensor  # [BH, MP, EP] in the dtype of the values
    offset: Tensor  # [BH, MP] ⟨dz_j, z_j⟩ − dc^T_j
    use_values: Tensor  # [BH] 1, or 0 where one key takes part: its weight is 1, whatever its value
    d_g: Tensor  # [BH, max(T, 1), MP] dg^t
    columns: Tensor  # [BH, max(T, 1), COLUMNS, MP]
    factors: Tensor  # [BH, max(T, 1), FACTORS]
    c: Tensor  # [B, H, max(T, 1), M] of the forward pass
    d_c: Tensor | None  # likewise, what arrives there
    first_d_g: Tensor | None  # [BH, splits, MP] parts of dg^1, once the last of these passes comes
    first_splits: float  # how many these are: a float, as Triton specialises on integers in a group
    uniform: float  # log2 of a key's mass where none is given
    first: Tensor | None  # and the following: the keys' Segments
    length: Tensor | None
    uniforms: Tensor | None


class Cotangents(NamedTuple):
    """What arrives at the transport: from the queries part_z and the slots of dg^T, or (pooling) dz and dc."""

    part_z: Tensor | None  # [BH, splits, MP, EP]
    splits: int
    d_z: Tensor | None  # [B, H, M, E] float32, contiguous
    d_c: Tensor | None  # [B, H, max(T, 1), M] contiguous


class Column(NamedTuple):
    """What one iteration needs of its columns."""

    g: Any  # [MP] g^{t−1} − top
    c: Any  # [MP] c^t, ∞ where nothing is sent
    second: Any  # [MP] the second factor of Q^t
    top: Any  # max g where narrow, else 0
    narrow: Any


@triton.jit
def _store_columns(log_b, beta, scale, lam_a, lam_b, state, at, t, rule, sizes):
    """The columns and factors of iteration t of one head, `at` counting iterations of all heads."""
    M: tl.constexpr = sizes.M
    j = tl.arange(0, sizes.MP)
    c_t = tl.load(state.c + at * M + j, mask=j < M, other=-INF) * LOG2E
    g = tl.load(log_b + j)
    if rule.UPDATE_ROWS:
        before = tl.load(state.c + (at - 1) * M + j, mask=j < tl.where(t > 1, M, 0), other=0.0)
        g -= lam_b * finite_or_zero(before) * LOG2E
    reached = c_t > -INF
    c_t = tl.where(reached, c_t, 0.0)
    top = tl.max(g, 0)
    if rule.UPDATE_ROWS and rule.RANGE == "always":
        narrow = top == top
    elif rule.UPDATE_ROWS and rule.RANGE == "device":
        narrow = potentials_narrow(g, beta, scale, M)
    else:
        narrow = top != top
    top = tl.where(narrow, top, 0.0)
    sent = reached & (g > -INF)
    second = tl.where(narrow, (1.0 - lam_a) * top - tl.where(sent, g, 0.0) - c_t, 0.0)
    out = state.columns + at * (COLUMNS * sizes.MP) + j
    tl.store(out, g - top)
    tl.store(out + sizes.MP, tl.where(reached, c_t, INF))
    tl.store(out + 2 * sizes.MP, tl.where(reached, tl.exp2(second), 0.0))
    tl.store(state.factors + at * FACTORS, top)
    tl.store(state.factors + at * FACTORS + 1, narrow.to(tl.float32))


@triton.jit
def _store_rows(
    part_z, part_g, d_z, z, masses, lam_b, state, bh, first, S, splits, slots, iterations, rule, sizes, ROWS
):
    """ROWS rows of dz and dg^T with their offsets, of one head."""
    MP: tl.constexpr = sizes.MP
    EP: tl.constexpr = sizes.EP
    rows = first + tl.arange(0, ROWS)
    flat = first * EP + tl.arange(0, ROWS * EP)
    row, e = flat // EP, flat % EP
    inside = (row < sizes.M) & (e < sizes.E)
    use = tl.where(few_keys(masses, S), 0.0, 1.0)
    if part_z is None:
        total = tl.load(d_z + (bh * sizes.M + row) * sizes.E + e, mask=inside, other=0.0)
        g_rows = tl.zeros([ROWS], tl.float32)
    else:
        total = sum_slots(part_z, bh, 0, 1, splits, splits, MP * EP, flat, inside)
        g_rows = sum_slots(part_g, bh, 0, 1, slots, splits, MP, rows, rows < sizes.M)
    operand = rounded(total, state.d_z.dtype.element_ty)
    tl.store(state.d_z + bh * (MP * EP) + flat, operand)
    pooled = tl.load(z + (bh * sizes.M + row) * sizes.E + e, mask=inside, other=0.0)
    # With dz as the products with v see it: what is subtracted there is the mean of those products.
    mean = tl.sum(tl.reshape(pooled * operand.to(tl.float32), [ROWS, EP]), 1)
    d_c_rows = -lam_b * g_rows if rule.UPDATE_ROWS else g_rows * 0.0
    at = bh * iterations + iterations - 1
    if state.d_c is not None:
        d_c_rows += tl.load(state.d_c + at * sizes.M + rows, mask=rows < sizes.M, other=0.0)
    tl.store(state.offset + bh * MP + rows, mean * use - d_c_rows)
    tl.store(state.d_g + at * MP + rows, g_rows)
    tl.store(state.use_values + bh, use)


@kernel
def transport_state_backward_kernel(
    log_a, stride_ab, stride_ah, stride_an,  # [B, H, S] or None
    references, state,  # References, State
    part_z, part_g,  # [BH, splits, MP, EP] and [BH, slots, MP] of the queries, or None
    d_z, z,  # [B, H, M, E], the first where part_z is None
    H, S, splits, slots, iterations,
    rule, sizes, ROWS: tl.constexpr,
):  # fmt: skip
    """One iteration's columns, or ROWS rows of dz and dg^T with their offsets, of one head."""
    blocks: tl.constexpr = sizes.MP // ROWS
    tasks = blocks + iterations
    bh = (tl.program_id(0) // tasks).to(tl.int64)
    task = tl.program_id(0) % tasks
    b, h = bh // H, bh % H
    beta, scale, lam_a, lam_b, tau = head_parameters(references.parameters, h)
    if task >= blocks:
        t = task - blocks + 1
        at, log_b = bh * iterations + t - 1, references.log_b + h * sizes.MP
        _store_columns(log_b, beta, scale, lam_a, lam_b, state, at, t, rule, sizes)
    else:
        b, S = segment_of(state, b, S)
        masses = rows_of(log_a, b, h, stride_ab, stride_ah, stride_an, S, 1) if log_a is not None else None
        _store_rows(
            part_z, part_g, d_z, z, masses, lam_b, state, bh, task * ROWS, S, splits, slots, iterations, rule, sizes,
            ROWS,
        )  # fmt: skip


@triton.jit
def count_of(number):
    """A count that a group holds as a float, which the interpreter hands on as Python's."""
    return tl.sum((tl.zeros([1], tl.float32) + number).to(tl.int32), 0)


@triton.jit
def load_columns(state, at, sizes):
    """The columns of one iteration."""
    column = state.columns + at * (COLUMNS * sizes.MP) + tl.arange(0, sizes.MP)
    factor = state.factors + at * FACTORS
    second, narrow = tl.load(column + 2 * sizes.MP), tl.load(factor + 1) > 0
    return Column(tl.load(column), tl.load(column + sizes.MP), second, tl.load(factor), narrow)


@triton.jit
def column_gradient(d_g, state, at, lam_b, sizes):
    """dc^t [MP] = −λ_b dg^t, and what the gradient of an output adds."""
    d = -lam_b * d_g
    if state.d_c is not None:
        j = tl.arange(0, sizes.MP)
        d += tl.load(state.d_c + at * sizes.M + j, mask=j < sizes.M, other=0.0)
    return d


@triton.jit
def _narrow_terms(kappa, scale, l, mass, lam_a, column, P: tl.constexpr):
    """As `plan_terms` where ℓ + g never exceeds top and never falls far below it; g less top."""
    if P > 0:
        p = tl.exp2(l + column.g[None, :])
    else:  # as one multiply-add from κ: then neither ℓ nor κ/ε is kept beside κ from one iteration to the next
        zero = tl.zeros_like(kappa)
        p = tl.exp2(tl.fma(kappa, scale + zero, (column.g - scale)[None, :] + zero))
    r = tl.sum(p, 1)
    log_r = tl.log2(r)
    return p, r, column.top + log_r, p * row_factor(r, mass, lam_a)[:, None]


@triton.jit
def _log_domain_terms(l, mass, lam_a, column):
    """As `plan_terms` whatever the range."""
    p, m, r, f = row_update(l, column.g, mass, lam_a)
    return p, r, m + tl.log2(r), tl.exp2((l + f[:, None]) - column.c[None, :])


@triton.jit
def plan_terms(kappa, l, mass, head, column, rule, sizes):
    """(p [BS, MP], Σ_j p, LSE_j(ℓ + g) in base 2 [BS], the first factor of Q [BS, MP]) of one iteration.

    Without a row update only the last means anything.
    """
    if not rule.UPDATE_ROWS:
        p, r, lse, first = l, mass, mass, tl.exp2((l + mass[:, None]) - column.c[None, :])
    elif rule.RANGE == "always":
        p, r, lse, first = _narrow_terms(kappa, head.scale, l, mass, head.lam_a, column, sizes.P)
    elif rule.RANGE == "device":
        if column.narrow:
            p, r, lse, first = _narrow_terms(kappa, head.scale, l, mass, head.lam_a, column, sizes.P)
        else:
            p, r, lse, first = _log_domain_terms(l, mass, head.lam_a, column)
    else:
        p, r, lse, first = _log_domain_terms(l, mass, head.lam_a, column)
    return p, r, lse, first


@triton.jit
def key_value_products(values, rows, live, d_z, first_t, sizes, cut):
    """⟨v_s, dz_j⟩ [BS, MP]; first_t: the first VDEPTH columns of dz, transposed."""
    columns = tl.arange(0, cut.VDEPTH)
    v = load_rows(values, rows, live, columns, sizes.E)
    product = tokens_by(v, first_t, cut.PRECISION, cut.ACROSS)
    if sizes.EP > cut.VDEPTH:
        for start in range(cut.VDEPTH, sizes.EP, cut.VDEPTH):
            v = load_rows(values, rows, live, start + columns, sizes.E)
            d_z_t = load_references_t(d_z, start, sizes.MP, sizes.EP, cut.VDEPTH)
            product += tokens_by(v, d_z_t, cut.PRECISION, cut.ACROSS)
    return product


@triton.jit
def pooling_weights(first, second, live, use):
    """W^k [BS, MP] from the factors of Q^T; 1 for a key that takes part alone."""
    return first * (second * use)[None, :] + tl.where(live, 1.0 - use, 0.0)[:, None]


def merged_state(
    x: Operands, opt: Options, prepared: References, state: tuple[Tensor, Tensor], given: Cotangents, parts: Partials,
    keys_at: Segments,
) -> State:  # fmt: skip
    """dz in the values' dtype, its offsets, dg^T and the columns of every iteration."""
    (z, c), sizes = state, sizes_of(x)
    b, h, iterations, _ = c.shape
    heads, mp, new = b * h, sizes.MP, x.references.new_empty
    out = State(
        new((heads, mp, sizes.EP), dtype=x.value.dtype),
        new((heads, mp)),
        new((heads,)),
        new((heads, iterations, mp)),
        new((heads, iterations, COLUMNS.value, mp)),
        new((heads, iterations, FACTORS.value)),
        *(c, given.d_c, None, 0.0, log2_uniform(x.key.shape[2]), *keys_at),
    )
    rows = max(1, TILE.depth // sizes.EP)
    tensors = (
        *strided(x.log_a, packed=keys_at.first is not None),
        prepared,
        out,
        given.part_z,
        parts.log_b,
        given.d_z,
        z,
    )
    counts = (h, x.key.shape[2], given.splits, parts.log_b.shape[1], iterations)
    constants = {"rule": rule_of(opt, range_known(x, opt)).compiled, "sizes": sizes.compiled, "ROWS": rows}
    launch(transport_state_backward_kernel, heads * (mp // rows + iterations), (*tensors, *counts), constants, TILE)
    return out
