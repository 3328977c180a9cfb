"""Attention under a mask that depends on the query.

    Ex = e^{ℓ−m};  U = n, V = b;  T times  P = V Exᵀ, U = n P^{−λ_a}, C = U Ex, V = b C^{−λ_b}
    W = softmax_j(ℓ_q + log V),   A = U ⊙ ((W/C) Exᵀ),   o = A v

A program holds V [BL, M] of a block of queries, and walks the tiles of keys T times, and once more for A.  The first
row sums are a factor a key; the others need a product, made again in the last walk.  Masses count from each query's
largest: a factor of a query's n or V cancels.  Where a sum leaves the range of products (`walks.settled`, `later_walk`)
the block is left to the log domain, whose programs find that out for themselves: nothing is decided on the host.

Defined by `reference.attention.masked`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....problem import Operands, Options
from ..device.head import head_of
from ..device.logits import token_logits
from ..device.places import places_of
from ..device.primitives import INF, again, finite_or_zero
from ..device.rows import load_rows, rows_of, store_rows
from ..device.softmax import kept_weights
from ..host.launch import kernel, launch
from ..host.rows import rows_like, stride_step, strided
from .arguments import Arguments, arguments, pieces
from .keys import form_keys, seen_keys
from .masses import last_key, log_masses, mask_of, some
from .walks import (
    LEAST_ROW,
    Keys,
    add_columns,
    by_values,
    held,
    key_tile,
    log_columns,
    masses,
    pooled,
    potentials,
    queries_of,
    row_sums,
    settled,
    step_at,
)


class Work(NamedTuple):
    """What the blocks of queries leave."""

    out_of_range: Tensor | None  # [heads, blocks] int32, whether the log domain has them; None where none can be
    sums: Tensor | None  # [heads, T, L, MP] C^t, in logs log2 C^t, for the backward pass
    divisors: Tensor | None  # [heads, T, L, MP] N^t of logs, see `walks.settled`; N^t of products is C^t
    tops: Tensor | None  # [heads, L] the largest log2 mass of each query; −∞ where it sees nothing
    totals: Tensor | None  # [heads, L] Σ_s of the masses of the first iteration, which count from that


@triton.jit
def _first_tile(c, peak, total, top, x, tile, LOGS: tl.constexpr, cut):
    """A tile of the first walk, whose masses count from the largest so far."""
    new = tl.maximum(top, tl.max(x, 1))
    safe = finite_or_zero(new)
    u = masses(x, x, safe, 1.0, LOGS, True, True)
    if not LOGS:
        fade = tl.exp2(top - safe)
        c *= fade[:, None]
        total = total * fade + tl.sum(u, 1)
    c, peak = add_columns(c, peak, tile, u, LOGS, cut)
    return c, peak, total, new


@triton.jit
def first_walk(
    keys, given, at, rows, end, L, S, KEYS: tl.constexpr, LOGS: tl.constexpr, CAUSAL: tl.constexpr, sizes, cut
):
    """(C^1 and N [BL, MP], each query's largest log mass, the sum of masses from there [BL], whether products hold)."""
    BL: tl.constexpr = rows.shape[0]
    top, total = tl.full([BL], -INF, tl.float32), tl.zeros([BL], tl.float32)
    c, peak = tl.zeros([BL, sizes.MP], tl.float32), tl.full([BL, sizes.MP], -INF, tl.float32)
    for start in range(0, end, KEYS):
        columns = start + tl.arange(0, KEYS)
        first = tl.load(keys.first + at + columns, mask=columns < S, other=-INF)
        x = log_masses(given, first, rows, columns, L, S, CAUSAL)
        if given is None:
            tile = key_tile(keys, at + start, S - start, KEYS, LOGS, sizes)
            c, peak, total, top = _first_tile(c, peak, total, top, x, tile, LOGS, cut)
        else:
            if some(x):
                tile = key_tile(keys, at + start, S - start, KEYS, LOGS, sizes)
                c, peak, total, top = _first_tile(c, peak, total, top, x, tile, LOGS, cut)
    c, n, fits = settled(c, peak, top > -INF, LOGS, sizes)
    return c, n, top, total, fits


@triton.jit
def _later_tile(c, peak, least, top, x, v, lam, tile, LOGS: tl.constexpr, UNIT: tl.constexpr, cut):
    """A tile of a later walk."""
    p = row_sums(tile, v, LOGS, cut)
    c, peak = add_columns(c, peak, tile, masses(x, p, top, lam, LOGS, False, UNIT), LOGS, cut)
    return c, peak, tl.minimum(least, tl.min(tl.where(x > -INF, p, INF), 1))


@triton.jit
def later_walk(
    keys, given, at, rows, end, top, seen, v, lam, L, S,
    KEYS: tl.constexpr, LOGS: tl.constexpr, CAUSAL: tl.constexpr, UNIT: tl.constexpr, sizes, cut,
):  # fmt: skip
    """(C^t and N [BL, MP] of t ≥ 2 from V^{t−1}, whether products hold)."""
    BL: tl.constexpr = rows.shape[0]
    v = held(keys, v, LOGS)
    least = tl.full([BL], INF, tl.float32)
    c, peak = tl.zeros([BL, sizes.MP], tl.float32), tl.full([BL, sizes.MP], -INF, tl.float32)
    for start in range(0, end, KEYS):
        columns = start + tl.arange(0, KEYS)
        weight = tl.load(keys.weight + at + columns, mask=columns < S, other=-INF)
        x = log_masses(given, weight, rows, columns, L, S, CAUSAL)
        if given is None:
            tile = key_tile(keys, at + start, S - start, KEYS, LOGS, sizes)
            c, peak, least = _later_tile(c, peak, least, top, x, v, lam, tile, LOGS, UNIT, cut)
        else:
            if some(x):
                tile = key_tile(keys, at + start, S - start, KEYS, LOGS, sizes)
                c, peak, least = _later_tile(c, peak, least, top, x, v, lam, tile, LOGS, UNIT, cut)
    c, n, fits = settled(c, peak, seen, LOGS, sizes)
    return c, n, fits & (tl.min(least, 0) >= LEAST_ROW)


@triton.jit
def plan_tile(keys, given, at, rows, start, top, v, lam, KEYS, MORE, L, S, LOGS, CAUSAL, UNIT, sizes, cut):
    """(log masses, e^{ℓ−m} or ℓ − m, P, U) of a tile in the last iteration; of MORE than one from V^{T−1}."""
    columns = start + tl.arange(0, KEYS)
    weights = keys.weight if MORE else keys.first
    weight = tl.load(weights + at + columns, mask=columns < S, other=-INF)
    x = log_masses(given, weight, rows, columns, L, S, CAUSAL)
    tile = key_tile(keys, at + start, S - start, KEYS, LOGS, sizes)
    p = row_sums(tile, v, LOGS, cut) if MORE else x
    return x, tile, p, masses(x, p, finite_or_zero(top), lam, LOGS, not MORE, UNIT)


@triton.jit
def read_walk(
    keys, given, values, at, rows, end, top, v, lam, c, y, L, S,
    KEYS: tl.constexpr, MORE: tl.constexpr, LOGS: tl.constexpr, CAUSAL: tl.constexpr, UNIT: tl.constexpr, sizes, cut,
):  # fmt: skip
    """o [BL, EP] from V^{T−1}, C^T and W/N."""
    o = tl.zeros([rows.shape[0], sizes.EP], tl.float32)
    e = tl.arange(0, sizes.EP)
    y = held(keys, y, LOGS)
    v = held(keys, v, LOGS) if MORE else y
    for start in range(0, end, KEYS):
        columns = start + tl.arange(0, KEYS)
        live = tl.load(keys.weight + at + columns, mask=columns < S, other=-INF) > -INF
        x, tile, p, u = plan_tile(
            keys, given, at, rows, start, top, v, lam, KEYS, MORE, L, S, LOGS, CAUSAL, UNIT, sizes, cut
        )
        a = pooled(tile, u, c, y, LOGS, cut)
        o += by_values(a, load_rows(values, columns, live, e, sizes.E), tile, LOGS, cut)
    return o


@triton.jit
def read_weights(
    queries, places, rows, seen, c, head, dropout, number, L, threshold, UPDATE_ROWS, LOGS, rule, sizes, cut
):
    """(W [BL, MP] after dropout: its numerators, what normalises them [BL])."""
    l, kappa, cosine, inverse, x = token_logits(queries, rows, seen, places, head, rule.DOT, sizes, cut)
    u = l + tl.load(head.log_b + tl.arange(0, sizes.MP))[None, :]
    if UPDATE_ROWS:
        u -= head.lam_b * log_columns(c, LOGS)
    w = tl.exp2(u - tl.max(u, 1)[:, None])
    return kept_weights(w, dropout, number, L, rows, threshold, sizes)


@kernel
def masked_kernel(
    query, stride_qb, stride_qh, stride_qn,  # [B, H, L, D], strides in units of cut.STEP
    value, stride_vb, stride_vh, stride_vn,  # [B, H, S, E], likewise
    position, stride_pb, stride_ph, stride_pn,  # [B, H, L, P] or None
    mask, stride_mb, stride_mh, stride_ml, stride_ms,  # [B or 1, H or 1, L, S] uint8 or log masses, or None
    output, stride_ob, stride_oh, stride_on,  # [B, H, L, E] as the queries, or None: the sums alone
    references, keys, dropout, work,  # References, Keys, Dropout, Work
    H, L, S, blocks, first_head, iterations, threshold,
    way, rule, sizes, cut,
):  # fmt: skip
    """ROWS queries of one head; LOGS: only those of blocks of BLOCK queries that are out of range of products."""
    ROWS: tl.constexpr = way.ROWS
    KEYS: tl.constexpr = way.KEYS
    BLOCK: tl.constexpr = way.BLOCK
    MORE: tl.constexpr = way.MORE
    LOGS: tl.constexpr = way.LOGS
    CAUSAL: tl.constexpr = way.CAUSAL
    UNIT: tl.constexpr = way.UNIT
    FAR: tl.constexpr = cut.PRECISION == "bf16x3"
    at, block, rows = queries_of(tl.program_id(0), blocks, ROWS)
    number = at + first_head
    b, h = number // H, number % H
    end = last_key(tl.minimum(L, (block + 1) * ROWS) - 1, L, S, CAUSAL)
    if LOGS:
        flag = work.out_of_range + at * ((L + BLOCK - 1) // BLOCK) + block * ROWS // BLOCK
        end = tl.where(tl.load(flag) != 0, end, -1)
    if end >= 0:
        given = mask_of(mask, b, h, stride_mb, stride_mh, stride_ml, stride_ms) if mask is not None else None
        head = head_of(references, h, sizes, cut)
        keys_at = at * S
        c, divisor, top, total, fits = first_walk(keys, given, keys_at, rows, end, L, S, KEYS, LOGS, CAUSAL, sizes, cut)
        seen = top > -INF
        v = c
        for t in range(1, iterations + 1):
            if work.sums is not None:
                out = step_at(work.sums, at, iterations, t, block * ROWS, L, ROWS, sizes)
                tl.store(out, c, mask=(rows < L)[:, None])
                if LOGS:
                    out = step_at(work.divisors, at, iterations, t, block * ROWS, L, ROWS, sizes)
                    tl.store(out, divisor, mask=(rows < L)[:, None])
            if MORE:
                if t < iterations:
                    v = potentials(c, head, LOGS, sizes)
                    c, divisor, held = later_walk(
                        keys, given, keys_at, rows, end, finite_or_zero(top), seen, v, head.lam_a, L, S,
                        KEYS, LOGS, CAUSAL, UNIT, sizes, cut,
                    )  # fmt: skip
                    fits &= held
        # Found anew: beside factors twice as wide, and of 64 dims, registers for where these go are not left.
        if FAR or sizes.EP <= 64:
            at, block, rows = queries_of(again(tl.program_id(0)), blocks, ROWS)
            number = at + first_head
            b, h = number // H, number % H
            keys_at, head = at * S, head_of(references, h, sizes, cut)
        if work.tops is not None:
            tl.store(work.tops + at * L + rows, top, mask=rows < L)
            tl.store(work.totals + at * L + rows, total, mask=rows < L)
        if not LOGS and work.out_of_range is not None:
            tl.store(work.out_of_range + at * blocks + block, 1 - fits.to(tl.int32))
        if output is not None:
            queries = rows_of(query, b, h, stride_qb, stride_qh, stride_qn, L, cut.STEP)
            values = rows_of(value, b, h, stride_vb, stride_vh, stride_vn, S, cut.STEP)
            places = places_of(position, references, b, h, stride_pb, stride_ph, stride_pn, sizes) if sizes.P else None
            outputs = rows_of(output, b, h, stride_ob, stride_oh, stride_on, L, cut.STEP)
            w, normaliser = read_weights(
                queries, places, rows, seen, c, head, dropout, number, L, threshold, rule.UPDATE_ROWS, LOGS, rule,
                sizes, cut,
            )  # fmt: skip
            y = w * normaliser[:, None] / divisor
            o = read_walk(
                keys, given, values, keys_at, rows, end, top, v, head.lam_a, c, y, L, S,
                KEYS, MORE, LOGS, CAUSAL, UNIT, sizes, cut,
            )  # fmt: skip
            store_rows(outputs, rows, rows < L, tl.arange(0, sizes.EP), sizes.E, o)


def sums(call: Arguments, keys: Keys, first_head: int, work: Work, output: Tensor | None) -> None:
    """Launches the blocks of queries of some heads: `work`, and o where there is an output."""
    x, (h, l, s), steps = call.x, call.lengths, max(call.opt.num_iters, 1)
    heads, step = keys.weight.shape[0], stride_step(x.query, x.value, output)
    tokens = (*strided(x.query, step), *strided(x.value, step), *strided(x.query_position), *call.mask.strided)
    for way in call.ways("masked", x.query, x.value, output):
        n = pieces(l, way.rows)
        args = (*tokens, *strided(output, step), call.prepared, keys, call.dropout, work)
        args = (*args, h, l, s, n, first_head, steps, call.threshold)
        launch(masked_kernel, heads * n, args, way.constants, way.tile)


def masked(x: Operands, mask: Tensor | None, opt: Options, causal: bool) -> Tensor:
    """o [B, H, L, E] in the dtype and memory order of the queries; mask [B or 1, H or 1, L, S]."""
    assert x.query is not None
    output = rows_like(x.query, x.value.shape[-1])
    call = arguments(x, mask, opt, causal)
    keys = form_keys(call, seen_keys(call), 0, call.heads)
    sums(call, keys, 0, Work(flags(call, call.heads), None, None, None, None), output.rows)
    return output.delivered()


def flags(call: Arguments, heads: int) -> Tensor | None:
    """Room for `Work.out_of_range`."""
    if call.always:
        return None
    n = pieces(call.lengths[1], call.tile("masked").rows)
    return torch.empty((heads, n), dtype=torch.int32, device=call.x.key.device)
