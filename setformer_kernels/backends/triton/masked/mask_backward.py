"""The gradient of a float mask: each tile of it by one program, to which heads that share it add in their order."""

from __future__ import annotations

import triton
import triton.language as tl

from ..device.head import head_of
from ..device.primitives import INF, finite_or_zero
from ..device.rows import load_rows, rows_of
from ..host.launch import kernel
from .masses import log_masses, mask_at, mask_of, some
from .terms import belongs, forces, load_do, load_step, plan_terms_of, value_products
from .walks import key_tile


@triton.jit
def shares_mask(number, H, mask_head, B, G):
    """Whether head `number` has the mask `mask_head`, of B × G of batch elements and heads, 1 where they share."""
    b = tl.where(B > 1, number // H, 0)
    h = tl.where(G > 1, number % H, 0)
    return b * G + h == mask_head


@triton.jit
def step_forces(
    x, tile, products, work, back, head, at, iterations, t, start, top, L, LAST, FIRST, LOGS, UNIT, sizes, cut
):
    """df^t [BL, BS]."""
    step = load_step(work, back, head, at, iterations, t, start, L, top.shape[0], FIRST, LOGS, sizes)
    p, u = plan_terms_of(x, tile, step, top, head.lam_a, FIRST, LOGS, UNIT, cut)
    d_f, a = forces(tile, u, step, products, LAST, LOGS, cut)
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
    mask_head = (tl.program_id(0) // blocks).to(tl.int64)
    row, column = tl.program_id(0) % blocks // splits * ROWS, tl.program_id(0) % splits * KEYS
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, KEYS)
    mb, mh = mask_head // G, mask_head % G
    given = mask_of(mask, mb, mh, stride_mb, stride_mh, stride_ml, stride_ms)
    zero = tl.zeros([KEYS], tl.float32)
    x = log_masses(given, zero, rows, columns, L, S, CAUSAL)
    if some(x):
        total = tl.zeros([ROWS, KEYS], tl.float32)
        for n in range(0, chunks):
            at = mask_head * 0 + n
            number = at + first_head
            b, h = number // H, number % H
            mine = shares_mask(number, H, mask_head, B, G)
            if mine & belongs(work, at, row, L, BLOCK, LOGS):
                values = rows_of(value, b, h, stride_vb, stride_vh, stride_vn, S, cut.STEP)
                gradients = rows_of(d_o, b, h, stride_ob, stride_oh, stride_on, L, cut.STEP)
                head = head_of(references, h, sizes, cut)
                weight = tl.load(keys.weight + at * S + columns, mask=columns < S, other=-INF)
                first = tl.load(keys.first + at * S + columns, mask=columns < S, other=-INF)
                tile = key_tile(keys, at * S + column, S - column, KEYS, LOGS, sizes)
                v = load_rows(values, columns, weight > -INF, tl.arange(0, sizes.EP), sizes.E)
                top = tl.load(work.tops + at * L + rows, mask=rows < L, other=-INF)
                do = load_do(gradients, rows, top > -INF, sizes)
                products = value_products(do, v, tile.dtype, LOGS, cut)
                x_first, x_later = x + first[None, :], x + weight[None, :]
                if MORE:
                    total += step_forces(
                        x_later, tile, products, work, back, head, at, iterations, iterations, row, top, L,
                        True, False, LOGS, UNIT, sizes, cut,
                    )  # fmt: skip
                    for step in range(1, iterations - 1):
                        total += step_forces(
                            x_later, tile, products, work, back, head, at, iterations, iterations - step, row, top, L,
                            False, False, LOGS, UNIT, sizes, cut,
                        )  # fmt: skip
                total += step_forces(
                    x_first, tile, products, work, back, head, at, iterations, 1, row, top, L,
                    not MORE, True, LOGS, UNIT, sizes, cut,
                )  # fmt: skip
                if not LOGS:
                    excess = tl.load(back.excess + at * L + rows, mask=rows < L, other=0.0)
                    total -= excess[:, None] * tl.exp2(x_first - finite_or_zero(top)[:, None])
        out = mask_of(d_mask, mb, mh, stride_gb, stride_gh, stride_gl, stride_gs)
        place, inside = mask_at(out, rows, columns), (rows < L)[:, None] & (columns < S)[None, :]
        tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)
