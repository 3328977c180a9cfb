"""Backward of the queries under a mask: from do to dS, and to d log C^t of every iteration.

    D_ij = Σ_s U_is Ex_sj X_is/C_ij = ⟨do_i, z_ij⟩,   dS = W (D − Σ_j W D),   d log C^T = −W D − λ_b dS

then downwards, t = T..2, `terms`: d log V^{t−1} from a walk over the keys, d log C^{t−1} = −λ_b d log V^{t−1}.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..device.head import head_of
from ..device.logits import token_logits
from ..device.places import places_of
from ..device.primitives import INF, again, dot, rounded
from ..device.rows import load_rows, rows_of
from ..device.softmax import keep_mask, read_gradient
from ..host.launch import kernel
from .masses import last_key, log_masses, mask_of
from .terms import (
    belongs,
    column_weights,
    forces,
    load_divisors,
    load_do,
    load_numbers,
    plan_terms_of,
    returned,
    to_potentials,
    value_products,
)
from .walks import key_tile, log_columns, pooled, potentials, queries_of, step_at


class Step(NamedTuple):
    """An iteration as the walks over the keys need it."""

    c: Any  # [BL, MP] C^t, in logs log2 C^t
    d_c: Any  # [BL, MP] (d log C)/N
    y: Any  # [BL, MP] W/N
    v: Any  # [BL, MP] V^{t−1}


@triton.jit
def tile_at_keys(keys, given, values, at, rows, start, L, S, KEYS, FIRST, LOGS, CAUSAL, sizes):
    """(log masses [BL, BS], e^{ℓ−m} or ℓ − m [BS, MP], v [BS, EP]) of a tile."""
    columns = start + tl.arange(0, KEYS)
    weights = keys.first if FIRST else keys.weight
    weight = tl.load(weights + at + columns, mask=columns < S, other=-INF)
    x = log_masses(given, weight, rows, columns, L, S, CAUSAL)
    v = load_rows(values, columns, weight > -INF, tl.arange(0, sizes.EP), sizes.E)
    return x, key_tile(keys, at + start, S - start, KEYS, LOGS, sizes), v


@triton.jit
def pooled_means(
    keys, given, values, do, at, rows, end, top, step, lam, L, S, KEYS, FIRST, LOGS, CAUSAL, UNIT, sizes, cut
):
    """D [BL, MP] times N."""
    d = tl.zeros([rows.shape[0], sizes.MP], tl.float32)
    for start in tl.range(0, end, KEYS, disable_licm=cut.PRECISION == "bf16x3"):
        x, tile, value = tile_at_keys(keys, given, values, at, rows, start, L, S, KEYS, FIRST, LOGS, CAUSAL, sizes)
        p, u = plan_terms_of(x, tile, step.v, top, lam, FIRST, LOGS, UNIT, cut)
        products = value_products(do, value, LOGS, cut)
        if LOGS:
            d += tl.sum(column_weights(tile, u, step.c) * products[:, :, None], 1)
        else:
            d += dot(rounded(u * products, tile.dtype), tile, cut.PRECISION)
    return d


@triton.jit
def potential_walk(
    keys, given, values, do, at, rows, end, top, step, lam, L, S, KEYS, LAST, LOGS, CAUSAL, UNIT, sizes, cut
):
    """(d log V^{t−1} [BL, MP] of an iteration t ≥ 2, Σ_s df^t [BL])."""
    d, total = tl.zeros([rows.shape[0], sizes.MP], tl.float32), tl.zeros([rows.shape[0]], tl.float32)
    for start in tl.range(0, end, KEYS, disable_licm=cut.PRECISION == "bf16x3"):
        x, tile, value = tile_at_keys(keys, given, values, at, rows, start, L, S, KEYS, False, LOGS, CAUSAL, sizes)
        p, u = plan_terms_of(x, tile, step.v, top, lam, False, LOGS, UNIT, cut)
        products = value_products(do, value, LOGS, cut) if LAST else u
        d_f = forces(tile, u, step.c, step.d_c, LOGS, cut)
        if LAST:
            d_f += pooled(tile, u, step.c, step.y, LOGS, cut) * products
        total += tl.sum(d_f, 1)
        d += to_potentials(tile, step.v, p, returned(p, d_f, lam, LOGS), LOGS, cut)
    return (d if LOGS else d * step.v), total


@triton.jit
def spread(c, seen, LOGS: tl.constexpr, sizes):
    """log2 C_ij less its largest [BL, MP]: Σ_j d log V_ij = 0, so only that counts."""
    real = (tl.arange(0, sizes.MP) < sizes.M)[None, :]
    logs = log_columns(c, LOGS)
    return tl.where(real & seen[:, None], logs - tl.max(tl.where(real, logs, -INF), 1)[:, None], 0.0)


@kernel
def masked_queries_backward_kernel(
    query, stride_qb, stride_qh, stride_qn,  # [B, H, L, D], strides in units of cut.STEP
    value, stride_vb, stride_vh, stride_vn,  # [B, H, S, E], likewise
    position, stride_pb, stride_ph, stride_pn,  # [B, H, L, P] or None
    mask, stride_mb, stride_mh, stride_ml, stride_ms,  # [B or 1, H or 1, L, S] uint8 or log masses, or None
    d_o, stride_ob, stride_oh, stride_on,  # [B, H, L, E], as the queries
    references, keys, dropout, work, back,  # References, Keys, Dropout, Work, Back
    H, L, S, blocks, first_head, iterations, first_slot, slots, threshold,
    way, rule, sizes, cut,
):  # fmt: skip
    """ROWS queries of one head, of blocks of BLOCK that are in the range of products, or (LOGS) are not."""
    ROWS: tl.constexpr = way.ROWS
    KEYS: tl.constexpr = way.KEYS
    BLOCK: tl.constexpr = way.BLOCK
    MORE: tl.constexpr = way.MORE
    LOGS: tl.constexpr = way.LOGS
    CAUSAL: tl.constexpr = way.CAUSAL
    UNIT: tl.constexpr = way.UNIT
    at, block, rows = queries_of(tl.program_id(0), blocks, ROWS)
    number = at + first_head
    b, h = number // H, number % H
    first = block * ROWS
    if belongs(work, at, first, L, BLOCK, LOGS):
        queries = rows_of(query, b, h, stride_qb, stride_qh, stride_qn, L, cut.STEP)
        values = rows_of(value, b, h, stride_vb, stride_vh, stride_vn, S, cut.STEP)
        gradients = rows_of(d_o, b, h, stride_ob, stride_oh, stride_on, L, cut.STEP)
        places = places_of(position, references, b, h, stride_pb, stride_ph, stride_pn, sizes) if sizes.P > 0 else None
        given = mask_of(mask, b, h, stride_mb, stride_mh, stride_ml, stride_ms) if mask is not None else None
        head = head_of(references, h, sizes, cut)
        j, keys_at, inside = tl.arange(0, sizes.MP), at * S, (rows < L)[:, None]
        end = last_key(tl.minimum(L, (block + 1) * ROWS) - 1, L, S, CAUSAL)
        top = tl.load(work.tops + at * L + rows, mask=rows < L, other=-INF)
        seen = top > -INF
        do = load_do(gradients, rows, seen, sizes)
        c = load_numbers(work.sums, at, iterations, iterations, first, L, ROWS, sizes)
        n = load_divisors(work, c, at, iterations, iterations, first, L, ROWS, LOGS, sizes)
        v = c
        if MORE:
            before = load_numbers(work.sums, at, iterations, iterations - 1, first, L, ROWS, sizes)
            v = potentials(before, head, LOGS, sizes)
        d = pooled_means(
            keys, given, values, do, keys_at, rows, end, top, Step(c, c, c, v), head.lam_a, L, S,
            KEYS, not MORE, LOGS, CAUSAL, UNIT, sizes, cut,
        )  # fmt: skip
        d = d / n
        l, kappa, cosine, inverse, x = token_logits(queries, rows, seen, places, head, rule.DOT, sizes, cut)
        u = l + tl.load(head.log_b + j)[None, :]
        if rule.UPDATE_ROWS:
            u -= head.lam_b * log_columns(c, LOGS)
        w = tl.exp2(u - tl.max(u, 1)[:, None])
        keep = keep_mask(dropout, number, L, rows, threshold, sizes)
        w, d_s = read_gradient(w, d, keep, dropout, sizes)
        d_s, w = tl.where(seen[:, None], d_s, 0.0), tl.where(seen[:, None], w, 0.0)
        tl.store(step_at(back.weights, at, 1, 1, first, L, ROWS, sizes), w / n, mask=inside)
        tl.store(step_at(back.d_logits, at, 1, 1, first, L, ROWS, sizes), d_s, mask=inside)
        d_c = -w * d - head.lam_b * d_s if rule.UPDATE_ROWS else -w * d
        tl.store(step_at(back.d_sums, at, iterations, iterations, first, L, ROWS, sizes), d_c / n, mask=inside)
        d_g = tl.sum(d_s, 0)
        relaxed = tl.sum(d_s * spread(c, seen, LOGS, sizes), 1)
        excess = tl.zeros([ROWS], tl.float32)
        if MORE:
            for back_t in range(0, iterations - 1):
                t = iterations - back_t
                before = load_numbers(work.sums, at, iterations, t - 1, first, L, ROWS, sizes)
                v = potentials(before, head, LOGS, sizes)
                c = load_numbers(work.sums, at, iterations, t, first, L, ROWS, sizes)
                n = load_divisors(work, c, at, iterations, t, first, L, ROWS, LOGS, sizes)
                step = Step(c, d_c / n, w / n, v)
                if t == iterations:
                    d_v, of_step = potential_walk(
                        keys, given, values, do, keys_at, rows, end, top, step, head.lam_a, L, S,
                        KEYS, True, LOGS, CAUSAL, UNIT, sizes, cut,
                    )  # fmt: skip
                else:
                    d_v, of_step = potential_walk(
                        keys, given, values, do, keys_at, rows, end, top, step, head.lam_a, L, S,
                        KEYS, False, LOGS, CAUSAL, UNIT, sizes, cut,
                    )  # fmt: skip
                d_c = -head.lam_b * d_v
                of_before = d_c / load_divisors(work, before, at, iterations, t - 1, first, L, ROWS, LOGS, sizes)
                tl.store(step_at(back.d_sums, at, iterations, t - 1, first, L, ROWS, sizes), of_before, mask=inside)
                d_g += tl.sum(d_v, 0)
                excess += of_step
                relaxed += tl.sum(d_v * spread(before, seen, LOGS, sizes), 1)
        if sizes.P > 0:  # where the sums go, anew: held through the iterations, it spills (Triton 3.9)
            at, block, rows = queries_of(again(tl.program_id(0)), blocks, ROWS)
        if back.excess is not None:
            if MORE and not LOGS:  # what the first iteration adds, as the products with dC will see it
                operand: tl.constexpr = keys.exp.dtype.element_ty
                excess += tl.sum(rounded(d_c / before, operand).to(tl.float32) * before, 1)
                total = tl.load(work.totals + at * L + rows, mask=seen, other=1.0)
                excess = tl.where(seen, excess / total, 0.0)
            else:
                excess = tl.zeros([ROWS], tl.float32)
            tl.store(back.excess + at * L + rows, excess, mask=rows < L)
        slot = at * slots + first_slot + block
        tl.store(back.log_b + slot * sizes.MP + j, d_g)
        tl.store(back.relaxation + slot, tl.sum(relaxed, 0))
