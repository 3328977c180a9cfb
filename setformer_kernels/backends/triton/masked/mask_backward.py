"""The gradient of a float mask: each tile of it by one program, to which heads that share it add in their order."""

from __future__ import annotations

import triton
import triton.language as tl

from ..device.head import head_of
from ..device.primitives import INF, again, finite_or_zero
from ..device.rows import load_rows, rows_of
from ..host.launch import kernel
from .masses import log_masses, mask_at, mask_of, some
from .terms import (
    belongs,
    forces,
    last_forces,
    load_do,
    load_factors,
    load_potentials,
    load_sums,
    plan_terms_of,
    value_products,
)
from .walks import key_tile


@triton.jit
def shares_mask(number, H, mask_head, B, G):
    """Whether head `number` has the mask `mask_head`, of B × G of batch elements and heads, 1 where they share."""
    b = tl.where(B > 1, number // H, 0)
    h = tl.where(G > 1, number % H, 0)
    return b * G + h == mask_head


@triton.jit
def mask_tile(program, blocks, splits, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """(mask head, first query, first key) of a program's tile."""
    return program // blocks, program % blocks // splits * ROWS, program % splits * KEYS


@triton.jit
def step_forces(
    x, keys, tile, products, work, back, head, at, iterations, t, start, top, L,
    LAST: tl.constexpr, FIRST: tl.constexpr, LOGS: tl.constexpr, UNIT: tl.constexpr, sizes, cut,
):  # fmt: skip
    """df^t [BL, BS]."""
    ROWS: tl.constexpr = top.shape[0]
    v = x if FIRST else load_potentials(keys, work, head, at, iterations, t, start, L, ROWS, LOGS, sizes)
    p, u = plan_terms_of(x, tile, v, top, head.lam_a, FIRST, LOGS, UNIT, cut)
    c, d_c = load_sums(keys, work, back, at, iterations, t, start, L, ROWS, LOGS, sizes)
    if LAST:
        y = load_factors(keys, back.weights, at, 1, 1, start, L, ROWS, LOGS, sizes)
        a, d_f = last_forces(tile, u, c, d_c, y, products, LOGS, cut)
    else:
        d_f = forces(tile, u, c, d_c, LOGS, cut)
    return d_f


@kernel
def masked_mask_backward_kernel(
    value, stride_vb, stride_vh, stride_vn,  # [B, H, S, E], strides in units of cut.STEP
    mask, stride_mb, stride_mh, stride_ml, stride_ms,  # [B or 1, H or 1, L, S] log masses
    d_o, stride_ob, stride_oh, stride_on,  # [B, H, L, E], as the values
    d_mask, stride_gb, stride_gh, stride_gl, stride_gs,  # [B or 1, H or 1, L, S]
    references, keys, work, back,  # References, Keys, Work, Back
    H, L, S, B, G, blocks, splits, first_head, chunks, iterations,
    way, rule, sizes, cut,
):  # fmt: skip
    """Adds Σ_t df^t of a tile of one of the B · G masks, of the `chunks` heads at hand that share it, in their order;
    `splits` tiles along the keys, `blocks` of a mask."""
    ROWS: tl.constexpr = way.ROWS
    KEYS: tl.constexpr = way.KEYS
    BLOCK: tl.constexpr = way.BLOCK
    MORE: tl.constexpr = way.MORE
    LOGS: tl.constexpr = way.LOGS
    CAUSAL: tl.constexpr = way.CAUSAL
    UNIT: tl.constexpr = way.UNIT
    FAR: tl.constexpr = cut.PRECISION == "bf16x3"
    mask_head, row, column = mask_tile(tl.program_id(0), blocks, splits, ROWS, KEYS)
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, KEYS)
    given = mask_of(mask, mask_head // G, mask_head % G, stride_mb, stride_mh, stride_ml, stride_ms)
    zero = tl.zeros([KEYS], tl.float32)
    x = log_masses(given, zero, rows, columns, L, S, CAUSAL)
    if some(x):
        total = tl.zeros([ROWS, KEYS], tl.float32)
        # What is invariant in the loop stays there: held through it, it spills.
        for n in tl.range(0, chunks, disable_licm=True):
            # In 32 bits, as a division of 64 is a function with registers of its own.
            number = first_head + n
            if not LOGS:  # products want all registers: no address is carried from head to head
                number = again(number)
                if FAR:
                    mask_head, row, column = mask_tile(again(tl.program_id(0)), blocks, splits, ROWS, KEYS)
                    rows, columns = row + again(tl.arange(0, ROWS)), column + again(tl.arange(0, KEYS))
                else:
                    rows = again(rows)
                    if sizes.MP > 64:
                        columns = again(columns)
            b, h = number // H, number % H
            at = (number - first_head).to(tl.int64)
            mine = shares_mask(number, H, mask_head, B, G)
            if mine & belongs(work, at, row, L, BLOCK, LOGS):
                values = rows_of(value, b, h, stride_vb, stride_vh, stride_vn, S, cut.STEP)
                gradients = rows_of(d_o, b, h, stride_ob, stride_oh, stride_on, L, cut.STEP)
                head = head_of(references, h, sizes, cut)
                weight = tl.load(keys.weight + at * S + columns, mask=columns < S, other=-INF)
                first = tl.load(keys.first + at * S + columns, mask=columns < S, other=-INF)
                tile = key_tile(keys, at * S + column, S - column, KEYS, LOGS, sizes)
                top = tl.load(work.tops + at * L + rows, mask=rows < L, other=-INF)
                x_first, x_later = x + first[None, :], x + weight[None, :]
                if MORE:  # the iteration that needs values comes last, so that less is held through the others
                    total += step_forces(
                        x_first, keys, tile, x, work, back, head, at, iterations, 1, row, top, L,
                        False, True, LOGS, UNIT, sizes, cut,
                    )  # fmt: skip
                if not LOGS:
                    excess = tl.load(back.excess + at * L + rows, mask=rows < L, other=0.0)
                    total -= excess[:, None] * tl.exp2(x_first - finite_or_zero(top)[:, None])
                for t in range(2, iterations):
                    total += step_forces(
                        x_later, keys, tile, x, work, back, head, at, iterations, t, row, top, L,
                        False, False, LOGS, UNIT, sizes, cut,
                    )  # fmt: skip
                v = load_rows(values, columns, weight > -INF, tl.arange(0, sizes.EP), sizes.E)
                products = value_products(load_do(gradients, rows, top > -INF, sizes), v, LOGS, cut)
                total += step_forces(
                    x_later if MORE else x_first, keys, tile, products,
                    work, back, head, at, iterations, iterations, row, top, L,
                    True, not MORE, LOGS, UNIT, sizes, cut,
                )  # fmt: skip
        # Where the tile lies is found anew: held through the loop since the mask was read, it spills.
        mask_head, row, column = mask_tile(again(tl.program_id(0)), blocks, splits, ROWS, KEYS)
        rows, columns = row + again(tl.arange(0, ROWS)), column + again(tl.arange(0, KEYS))
        out = mask_of(d_mask, mask_head // G, mask_head % G, stride_gb, stride_gh, stride_gl, stride_gs)
        place, inside = mask_at(out, rows, columns), (rows < L)[:, None] & (columns < S)[None, :]
        tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)
