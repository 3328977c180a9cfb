"""Backward of the iterations under a mask: from d log C^T on, t = T..2, to d log C^{t−1}, by `terms`.

d log V^{t−1} comes from a walk over the keys, and d log C^{t−1} = −λ_b d log V^{t−1}.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..device.head import numbers_of
from ..device.primitives import INF, again, rounded
from ..device.rows import rows_of
from ..host.launch import kernel
from .masses import last_key, mask_of
from .terms import (
    Step,
    add_parts,
    belongs,
    forces,
    last_forces,
    load_divisors,
    load_do,
    load_factors,
    load_numbers,
    load_potentials,
    load_sums,
    plan_terms_of,
    returned,
    tile_at_keys,
    to_potentials,
    value_products,
)
from .walks import potentials, queries_of, step_at


@triton.jit
def potential_walk(
    keys, given, values, do, at, rows, end, top, step, lam, L, S, KEYS, LAST, LOGS, CAUSAL, UNIT, sizes, cut
):
    """(d log V^{t−1} [BL, MP] of an iteration t ≥ 2, by products that over V; Σ_s df^t [BL])."""
    d, total = tl.zeros([rows.shape[0], sizes.MP], tl.float32), tl.zeros([rows.shape[0]], tl.float32)
    for start in tl.range(0, end, KEYS, disable_licm=cut.PRECISION == "bf16x3"):
        x, tile, value = tile_at_keys(keys, given, values, at, rows, start, L, S, KEYS, False, LOGS, CAUSAL, sizes)
        p, u = plan_terms_of(x, tile, step.v, top, lam, False, LOGS, UNIT, cut)
        if LAST:
            products = value_products(do, value, LOGS, cut)
            a, d_f = last_forces(tile, u, step.c, step.d_c, step.y, products, LOGS, cut)
        else:
            d_f = forces(tile, u, step.c, step.d_c, LOGS, cut)
        total += tl.sum(d_f, 1)
        d += to_potentials(tile, step.v, p, returned(p, d_f, lam, LOGS), LOGS, cut)
    return d, total


@triton.jit
def first_excess(keys, work, back, at, iterations, first, L, ROWS: tl.constexpr, sizes):
    """Σ_s df^1 [BL] as the products with dC will see it."""
    c = load_numbers(work.sums, at, iterations, 1, first, L, ROWS, sizes)
    d_c = load_numbers(back.d_sums, at, iterations, 1, first, L, ROWS, sizes)
    if keys.rest is None:
        d_c = rounded(d_c, keys.exp.dtype.element_ty).to(tl.float32)
    return tl.sum(d_c * c, 1)


@triton.jit
def step_back(
    keys, given, values, do, work, back, head, at, first, slot, end, top, iterations, t, L, S,
    ROWS, KEYS, LAST, LOGS, CAUSAL, UNIT, sizes, cut,
):  # fmt: skip
    """From (d log C^t)/N^t, of the LAST iteration beside W/N, to (d log C^{t−1})/N^{t−1}; Σ_s df^t [BL]."""
    rows = first + tl.arange(0, ROWS)
    tl.debug_barrier()  # what some threads have stored, others read
    v = load_potentials(keys, work, head, at, iterations, t, first, L, ROWS, LOGS, sizes)
    c, d_c = load_sums(keys, work, back, at, iterations, t, first, L, ROWS, LOGS, sizes)
    y = load_factors(keys, back.weights, at, 1, 1, first, L, ROWS, LOGS, sizes) if LAST else d_c
    d_v, of_step = potential_walk(
        keys, given, values, do, at * S, rows, end, top, Step(c, d_c, y, v), head.lam_a, L, S,
        KEYS, LAST, LOGS, CAUSAL, UNIT, sizes, cut,
    )  # fmt: skip
    # Found and read anew, that nothing is held beside the walk; d log V by way of memory: the rest then has one layout.
    first = again(first)
    inside = (first + tl.arange(0, ROWS) < L)[:, None]
    place = step_at(back.d_sums, at, iterations, t - 1, first, L, ROWS, sizes)
    tl.store(place, d_v, mask=inside)
    tl.debug_barrier()
    d_v = tl.load(place, mask=inside, other=0.0)
    c = load_numbers(work.sums, at, iterations, t - 1, first, L, ROWS, sizes)
    d_v = d_v if LOGS else d_v * potentials(c, head, LOGS, sizes)
    n = load_divisors(work, c, at, iterations, t - 1, first, L, ROWS, LOGS, sizes)
    tl.store(place, -head.lam_b * d_v / n, mask=inside)
    add_parts(back, slot, d_v, c, top > -INF, LOGS, sizes)
    return of_step


@kernel
def masked_steps_backward_kernel(
    value, stride_vb, stride_vh, stride_vn,  # [B, H, S, E], strides in units of cut.STEP
    mask, stride_mb, stride_mh, stride_ml, stride_ms,  # [B or 1, H or 1, L, S] uint8 or log masses, or None
    d_o, stride_ob, stride_oh, stride_on,  # [B, H, L, E], as the values
    references, keys, work, back,  # References, Keys, Work, Back
    H, L, S, blocks, first_head, iterations, first_slot, slots,
    way, sizes, cut,
):  # fmt: skip
    """t = T..2 of the queries of one block, which `masked_queries_backward_kernel` has left d log C^T of."""
    ROWS: tl.constexpr = way.ROWS
    KEYS: tl.constexpr = way.KEYS
    BLOCK: tl.constexpr = way.BLOCK
    LOGS: tl.constexpr = way.LOGS
    CAUSAL: tl.constexpr = way.CAUSAL
    UNIT: tl.constexpr = way.UNIT
    at, block, rows = queries_of(tl.program_id(0), blocks, ROWS)
    number = at + first_head
    b, h = number // H, number % H
    first = block * ROWS
    if belongs(work, at, first, L, BLOCK, LOGS):
        values = rows_of(value, b, h, stride_vb, stride_vh, stride_vn, S, cut.STEP)
        gradients = rows_of(d_o, b, h, stride_ob, stride_oh, stride_on, L, cut.STEP)
        given = mask_of(mask, b, h, stride_mb, stride_mh, stride_ml, stride_ms) if mask is not None else None
        head = numbers_of(references, h, sizes)
        end = last_key(tl.minimum(L, (block + 1) * ROWS) - 1, L, S, CAUSAL)
        top = tl.load(work.tops + at * L + rows, mask=rows < L, other=-INF)
        do = load_do(gradients, rows, top > -INF, sizes)
        slot = at * slots + first_slot + block
        excess = step_back(
            keys, given, values, do, work, back, head, at, first, slot, end, top, iterations, iterations, L, S,
            ROWS, KEYS, True, LOGS, CAUSAL, UNIT, sizes, cut,
        )  # fmt: skip
        for back_t in range(1, iterations - 1):
            excess += step_back(
                keys, given, values, do, work, back, head, at, first, slot, end, top, iterations,
                iterations - back_t, L, S, ROWS, KEYS, False, LOGS, CAUSAL, UNIT, sizes, cut,
            )  # fmt: skip
        if back.excess is not None and not LOGS:
            tl.debug_barrier()
            excess += first_excess(keys, work, back, at, iterations, first, L, ROWS, sizes)
            total = tl.load(work.totals + at * L + rows, mask=top > -INF, other=1.0)
            tl.store(back.excess + at * L + rows, tl.where(top > -INF, excess / total, 0.0), mask=rows < L)
