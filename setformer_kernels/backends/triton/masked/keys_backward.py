"""Backward of the keys under a mask: a block of keys walks the blocks of queries that see it, `terms`.

It sums what the keys get of dℓ, dv and the log masses over the queries.  What the first iteration's row sums return is
the same for all queries: `tokens` adds it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..device.head import head_of
from ..device.primitives import INF, again, rounded
from ..device.rows import load_rows, row_starts, rows_of
from ..host.launch import kernel
from .masses import first_query, log_masses, mask_of, some
from .terms import (
    belongs,
    column_terms,
    forces,
    last_forces,
    load_do,
    load_factors,
    load_potentials,
    load_sums,
    log_row_sum,
    plan_terms_of,
    returned,
    to_keys,
    value_products,
    value_terms,
)
from .walks import by_tokens, key_tile, whole


class KeyTerms(NamedTuple):
    """What the keys get from all queries."""

    logits: Any  # [heads, S, MP] of dℓ, but for what the first row sums return
    mass: Any  # [heads, S] Σ_i Σ_t df^t
    first: Any  # [heads, S] Σ_i df^1
    relaxed: Any  # [heads, S] Σ_i Σ_{t>1} df^t log2 P^t


class KeySums(NamedTuple):
    """The same of one block of keys."""

    tile: Any  # [BS, MP] of dEx, in logs of dℓ
    value: Any  # [BS, EP] dv
    mass: Any  # [BS] and the following
    first: Any
    relaxed: Any


@triton.jit
def add_step(
    sums, x, keys, tile, products, do, work, back, head, at, iterations, t, start, top, L,
    LAST: tl.constexpr, FIRST: tl.constexpr, LOGS: tl.constexpr, UNIT: tl.constexpr, sizes, cut,
):  # fmt: skip
    """Adds an iteration of a block of queries."""
    d_tile, d_value, mass, first, relaxed = sums
    ROWS: tl.constexpr = top.shape[0]
    v = x if FIRST else load_potentials(keys, work, head, at, iterations, t, start, L, ROWS, LOGS, sizes)
    p, u = plan_terms_of(x, tile, v, top, head.lam_a, FIRST, LOGS, UNIT, cut)
    c, d_c = load_sums(keys, work, back, at, iterations, t, start, L, ROWS, LOGS, sizes)
    d_tile += column_terms(tile, u, c, d_c, LOGS, cut)  # before the forces, as 8 bytes spill after them
    if LAST:
        y = load_factors(keys, back.weights, at, 1, 1, start, L, ROWS, LOGS, sizes)
        a, d_f = last_forces(tile, u, c, d_c, y, products, LOGS, cut)
        d_tile += value_terms(tile, u, c, y, products, LOGS, cut)
        if LOGS:
            d_value += tl.sum(a[:, :, None] * do.to(tl.float32)[:, None, :], 0)
        else:
            d_value += by_tokens(tl.trans(a), do, tile, cut)
    else:
        d_f = forces(tile, u, c, d_c, LOGS, cut)
    of_keys = tl.sum(d_f, 0)
    mass += of_keys
    if FIRST:
        first += of_keys
    else:
        relaxed += tl.sum(d_f * log_row_sum(p, LOGS), 0)
        d_tile += to_keys(tile, v, p, returned(p, d_f, head.lam_a, LOGS), LOGS, cut)
    return KeySums(d_tile, d_value, mass, first, relaxed)


@triton.jit
def add_block(
    sums, x, values, keys, column, gradients, work, back, head, at, iterations, start, rows, L, S,
    KEYS: tl.constexpr, MORE: tl.constexpr, LOGS: tl.constexpr, UNIT: tl.constexpr, sizes, cut,
):  # fmt: skip
    """Adds all iterations of a block of queries and KEYS keys; x: their log masses without those of the keys.

    The keys are read for every block: a thread cannot hold its shares of them in the layouts of all products.
    """
    columns = column + tl.arange(0, KEYS)
    weight = tl.load(keys.weight + at * S + columns, mask=columns < S, other=-INF)
    first = tl.load(keys.first + at * S + columns, mask=columns < S, other=-INF)
    tile = key_tile(keys, at * S + column, S - column, KEYS, LOGS, sizes)
    top = tl.load(work.tops + at * L + rows, mask=rows < L, other=-INF)
    x_first, x_later = x + first[None, :], x + weight[None, :]
    if MORE:  # the iteration that needs values comes last, so that less is held through the others
        sums = add_step(
            sums, x_first, keys, tile, x, x, work, back, head, at, iterations, 1, start, top, L,
            False, True, LOGS, UNIT, sizes, cut,
        )  # fmt: skip
    for t in range(2, iterations):
        sums = add_step(
            sums, x_later, keys, tile, x, x, work, back, head, at, iterations, t, start, top, L,
            False, False, LOGS, UNIT, sizes, cut,
        )  # fmt: skip
    v = load_rows(values, columns, weight > -INF, tl.arange(0, sizes.EP), sizes.E)
    do = load_do(gradients, rows, top > -INF, sizes)
    products = value_products(do, v, LOGS, cut)
    return add_step(
        sums, x_later if MORE else x_first, keys, tile, products, do,
        work, back, head, at, iterations, iterations, start, top, L,
        True, not MORE, LOGS, UNIT, sizes, cut,
    )  # fmt: skip


@triton.jit
def block_of(program, blocks, first_head, H):
    """(head of those at hand, b, h, block of keys) of a program; divided in 32 bits, as 64 take a function's call."""
    number = first_head + program // blocks
    return (program // blocks).to(tl.int64), number // H, number % H, program % blocks


@kernel
def masked_keys_backward_kernel(
    value, stride_vb, stride_vh, stride_vn,  # [B, H, S, E], strides in units of cut.STEP
    mask, stride_mb, stride_mh, stride_ml, stride_ms,  # [B or 1, H or 1, L, S] uint8 or log masses, or None
    d_o, stride_ob, stride_oh, stride_on,  # [B, H, L, E], as the values
    d_value, stride_db, stride_dh, stride_dn,  # [B, H, S, E], or None
    references, keys, work, back, terms,  # References, Keys, Work, Back, KeyTerms
    H, L, S, blocks, first_head, iterations,
    way, rule, sizes, cut,
):  # fmt: skip
    """KEYS keys of one head and all blocks of queries in the range of products; LOGS: the others, added to those."""
    ROWS: tl.constexpr = way.ROWS
    KEYS: tl.constexpr = way.KEYS
    BLOCK: tl.constexpr = way.BLOCK
    MORE: tl.constexpr = way.MORE
    LOGS: tl.constexpr = way.LOGS
    CAUSAL: tl.constexpr = way.CAUSAL
    UNIT: tl.constexpr = way.UNIT
    FAR: tl.constexpr = cut.PRECISION == "bf16x3" and not LOGS
    at, b, h, block = block_of(tl.program_id(0), blocks, first_head, H)
    columns = block * KEYS + tl.arange(0, KEYS)
    values = rows_of(value, b, h, stride_vb, stride_vh, stride_vn, S, cut.STEP)
    gradients = rows_of(d_o, b, h, stride_ob, stride_oh, stride_on, L, cut.STEP)
    given = mask_of(mask, b, h, stride_mb, stride_mh, stride_ml, stride_ms) if mask is not None else None
    head = head_of(references, h, sizes, cut)
    zero = tl.zeros([KEYS], tl.float32)
    sums = KeySums(tl.zeros([KEYS, sizes.MP], tl.float32), tl.zeros([KEYS, sizes.EP], tl.float32), zero, zero, zero)
    begin = first_query(block * KEYS, L, S, CAUSAL) // ROWS * ROWS
    for start in tl.range(begin, L, ROWS, disable_licm=FAR):
        if FAR:  # factors twice as wide leave no registers to what can be found anew
            at, b, h, block = block_of(again(tl.program_id(0)), blocks, first_head, H)
            columns = block * KEYS + again(tl.arange(0, KEYS))
            values = rows_of(value, b, h, stride_vb, stride_vh, stride_vn, S, cut.STEP)
            gradients = rows_of(d_o, b, h, stride_ob, stride_oh, stride_on, L, cut.STEP)
            if mask is not None:
                given = mask_of(mask, b, h, stride_mb, stride_mh, stride_ml, stride_ms)
        if belongs(work, at, start, L, BLOCK, LOGS):
            rows = start + tl.arange(0, ROWS)
            x = log_masses(given, zero, rows, columns, L, S, CAUSAL)
            if some(x):
                sums = add_block(
                    sums, x, values, keys, block * KEYS, gradients, work, back, head, at, iterations, start, rows, L, S,
                    KEYS, MORE, LOGS, UNIT, sizes, cut,
                )  # fmt: skip
    # Where the sums go is found anew: held through the loop, it spills (D 128, float masks, Triton 3.6 and 3.9).
    at, b, h, block = block_of(again(tl.program_id(0)), blocks, first_head, H)
    columns = block * KEYS + again(tl.arange(0, KEYS))
    j, e, inside = tl.arange(0, sizes.MP), tl.arange(0, sizes.EP), columns < S
    logits = sums.tile
    if not LOGS:
        logits *= whole(key_tile(keys, at * S + block * KEYS, S - block * KEYS, KEYS, LOGS, sizes), cut)
    place = at * S + columns
    at_logits = terms.logits + place[:, None] * sizes.MP + j[None, :]
    d_v, mass, of_first, relaxed = sums.value, sums.mass, sums.first, sums.relaxed
    if d_value is not None:
        out = rows_of(d_value, b, h, stride_db, stride_dh, stride_dn, S, 1)
        at_value = row_starts(out, columns)[:, None] + e[None, :]
        kept = inside[:, None] & (e < sizes.E)[None, :]
        if LOGS:
            d_v += tl.load(at_value, mask=kept, other=0.0).to(tl.float32)
        tl.store(at_value, rounded(d_v, d_value.dtype.element_ty), mask=kept)
    if LOGS:
        logits += tl.load(at_logits, mask=inside[:, None], other=0.0)
        mass += tl.load(terms.mass + place, mask=inside, other=0.0)
        of_first += tl.load(terms.first + place, mask=inside, other=0.0)
        relaxed += tl.load(terms.relaxed + place, mask=inside, other=0.0)
    tl.store(at_logits, logits, mask=inside[:, None])
    tl.store(terms.mass + place, mass, mask=inside)
    tl.store(terms.first + place, of_first, mask=inside)
    tl.store(terms.relaxed + place, relaxed, mask=inside)
