"""Backward of the queries under a mask: from do to dS and d log C^T.

    D_ij = Σ_s U_is Ex_sj X_is/C_ij = ⟨do_i, z_ij⟩,   dS = W (D − Σ_j W D),   d log C^T = −W D − λ_b dS

`steps_backward` goes on from there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..device.head import head_of, numbers_of
from ..device.logits import token_logits
from ..device.places import places_of
from ..device.primitives import INF
from ..device.rows import rows_of
from ..device.softmax import keep_mask, read_gradient
from ..host.launch import kernel
from .masses import last_key, mask_of
from .terms import (
    add_parts,
    belongs,
    column_weights,
    load_divisors,
    load_do,
    load_numbers,
    plan_terms_of,
    tile_at_keys,
    value_products,
)
from .walks import held, like, log_columns, multiply, potentials, queries_of, step_at


@triton.jit
def pooled_means(
    keys, given, values, do, at, rows, end, top, c, v, lam, L, S, KEYS, FIRST, LOGS, CAUSAL, UNIT, sizes, cut
):
    """D [BL, MP] times N, from C^T and, of more iterations than the FIRST, V^{T−1}."""
    d = tl.zeros([rows.shape[0], sizes.MP], tl.float32)
    if not FIRST:
        v = held(keys, v, LOGS)
    for start in tl.range(0, end, KEYS, disable_licm=cut.PRECISION == "bf16x3"):
        x, tile, value = tile_at_keys(keys, given, values, at, rows, start, L, S, KEYS, FIRST, LOGS, CAUSAL, sizes)
        p, u = plan_terms_of(x, tile, v, top, lam, FIRST, LOGS, UNIT, cut)
        products = value_products(do, value, LOGS, cut)
        if LOGS:
            d += tl.sum(column_weights(tile, u, c) * products[:, :, None], 1)
        else:
            d += multiply(like(tile, u * products, cut), tile, cut)
    return d


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
        values = rows_of(value, b, h, stride_vb, stride_vh, stride_vn, S, cut.STEP)
        gradients = rows_of(d_o, b, h, stride_ob, stride_oh, stride_on, L, cut.STEP)
        given = mask_of(mask, b, h, stride_mb, stride_mh, stride_ml, stride_ms) if mask is not None else None
        numbers = numbers_of(references, h, sizes)
        j = tl.arange(0, sizes.MP)
        end = last_key(tl.minimum(L, (block + 1) * ROWS) - 1, L, S, CAUSAL)
        top = tl.load(work.tops + at * L + rows, mask=rows < L, other=-INF)
        seen = top > -INF
        do = load_do(gradients, rows, seen, sizes)
        c = load_numbers(work.sums, at, iterations, iterations, first, L, ROWS, sizes)
        n = load_divisors(work, c, at, iterations, iterations, first, L, ROWS, LOGS, sizes)
        v = c
        if MORE:
            before = load_numbers(work.sums, at, iterations, iterations - 1, first, L, ROWS, sizes)
            v = potentials(before, numbers, LOGS, sizes)
        d = pooled_means(
            keys, given, values, do, at * S, rows, end, top, c, v, numbers.lam_a, L, S,
            KEYS, not MORE, LOGS, CAUSAL, UNIT, sizes, cut,
        )  # fmt: skip
        d = d / n
        queries = rows_of(query, b, h, stride_qb, stride_qh, stride_qn, L, cut.STEP)
        places = places_of(position, references, b, h, stride_pb, stride_ph, stride_pn, sizes) if sizes.P > 0 else None
        head = head_of(references, h, sizes, cut)
        l, kappa, cosine, inverse, x = token_logits(queries, rows, seen, places, head, rule.DOT, sizes, cut)
        u = l + tl.load(head.log_b + j)[None, :]
        if rule.UPDATE_ROWS:
            u -= head.lam_b * log_columns(c, LOGS)
        w = tl.exp2(u - tl.max(u, 1)[:, None])
        keep = keep_mask(dropout, number, L, rows, threshold, sizes)
        w, d_s = read_gradient(w, d, keep, dropout, sizes)
        d_s, w = tl.where(seen[:, None], d_s, 0.0), tl.where(seen[:, None], w, 0.0)
        inside = (rows < L)[:, None]
        tl.store(step_at(back.weights, at, 1, 1, first, L, ROWS, sizes), w / n, mask=inside)
        tl.store(step_at(back.d_logits, at, 1, 1, first, L, ROWS, sizes), d_s, mask=inside)
        d_c = -w * d - head.lam_b * d_s if rule.UPDATE_ROWS else -w * d
        tl.store(step_at(back.d_sums, at, iterations, iterations, first, L, ROWS, sizes), d_c / n, mask=inside)
        slot = at * slots + first_slot + block
        add_parts(back, slot, d_s, c, seen, LOGS, sizes)
        if back.excess is not None:
            tl.store(back.excess + at * L + rows, tl.zeros([ROWS], tl.float32), mask=rows < L)
