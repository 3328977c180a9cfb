"""The kernels of the causal scan's backward pass on one chunk; `backward` has the formulas.

W, d log C and dS of a chunk's queries, then dω and dv of its keys, with what later chunks' queries leave in between.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..device.gradients import sum_at
from ..device.head import head_of
from ..device.logits import token_logits
from ..device.places import places_of
from ..device.primitives import INF, LN2, again, dot, finite_or_zero, rounded, tokens_by
from ..device.rows import load_rows, rows_of, store_rows
from ..device.softmax import keep_mask, read_gradient
from ..host.groups import Dropout
from ..host.launch import kernel
from ..host.tiles import INTERPRETED
from .chunk import (
    before_ratio,
    chunk_keys,
    chunk_of,
    crossings,
    key_gradient,
    lower,
    place,
    pooled_products,
    query_weights,
    state_at,
    tile_at,
)

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def first_key(live, before, seed):
    """Which queries [BC] see one key, the first: z_ij = v for all j, and so dS and their part of dω vanish exactly.

    Leaving ⟨do_i, v_s⟩ out leaves its rounding errors out.  Dropout weighs the j differently.
    """
    if seed is not None:
        return live != live
    else:
        seen = tl.cumsum(live.to(tl.int32), 0)
        return tl.where(tl.max(before, 0) == -INF, seen, 0) == 1


@triton.jit
def pair_products(gradients, values, rows, asked, known, seed, sizes, cut):
    """⟨do_i, v_s⟩ [BC, BC] lower triangular; 0 for the queries that are alone with the first key."""
    alone = first_key(known.live, known.before, seed)
    d = tl.zeros([cut.ROWS, cut.ROWS], tl.float32)
    for first in tl.static_range(0, sizes.EP, cut.VDEPTH):
        columns = first + tl.arange(0, cut.VDEPTH)
        do = load_rows(gradients, rows, asked, columns, sizes.E)
        d += dot(do, tl.trans(load_rows(values, rows, known.live, columns, sizes.E)), cut.PRECISION)
    return tl.where(alone[:, None], 0.0, lower(d))


@triton.jit
def mean_products(gradients, means, at, rows, asked, sizes, cut):
    """⟨do_i, z⁰_j⟩ [BC, MP]."""
    p = tl.zeros([cut.ROWS, sizes.MP], tl.float32)
    for first in tl.static_range(0, sizes.EP, cut.VDEPTH):
        columns = first + tl.arange(0, cut.VDEPTH)
        do = load_rows(gradients, rows, asked, columns, sizes.E)
        z = rounded(tl.load(state_at(means, at, columns, sizes)), do.dtype)
        p += tokens_by(do, tl.trans(z), cut.PRECISION, cut.ACROSS)
    return p


class Work(NamedTuple):
    """The workspaces of a part, a slot for each of its chunks."""

    log_c: Tensor  # [heads, chunks, MP] as in States
    rest: Tensor | None
    log_end: Tensor | None
    rest_end: Tensor | None
    kept: Tensor | None
    means: Tensor  # [heads, chunks, MP, EP]
    weights: Tensor  # [heads, chunks, BC, MP] W
    d_sums: Tensor  # [heads, chunks, BC, MP] d log C
    d_logits: Tensor  # [heads, chunks, BC, MP] dS, then dω
    later_o: Tensor  # [heads, chunks, MP, EP] what the chunk's queries leave, then in its place G
    own_c: Tensor  # [heads, chunks, MP] what they leave of d log C
    later_c: Tensor  # [heads, chunks, MP] η
    crossing: Tensor | None  # [heads, chunks, BC] what each key gives to later chunks, then `crossings` with it
    incoming: Tensor | None  # [heads, chunks, BC] what each query gets from earlier chunks; both where gates need them
    sums: Tensor | None  # [heads, chunks, SUMS] as in Partials


@triton.jit
def store_between_chunks(work, at, known, w, d_c, gained, from_means, GAINED: tl.constexpr, sizes, cut):
    """Stores what a chunk's queries leave of d log C and get from earlier chunks; how much of these each has left."""
    fade = before_ratio(known, finite_or_zero(known.log_c))
    tl.store(work.own_c + at * sizes.MP + tl.arange(0, sizes.MP), tl.sum(d_c * fade, 0))
    if work.incoming is not None:
        incoming = -w * gained if GAINED else w * from_means + d_c
        tl.store(work.incoming + at * cut.ROWS + tl.arange(0, cut.ROWS), tl.sum(incoming * fade, 1))
    return fade


@kernel
def causal_queries_backward_kernel(
    query, stride_qb, stride_qh, stride_qn,  # [B, H, L, D], strides in units of cut.STEP
    key, stride_kb, stride_kh, stride_kn,  # [B, H, L, D], likewise
    value, stride_vb, stride_vh, stride_vn,  # [B, H, L, E], likewise
    log_a, stride_ab, stride_ah, stride_an,  # [B, H, L] or None
    query_position, stride_sb, stride_sh, stride_sn,  # [B, H, L, P] or None
    key_position, stride_pb, stride_ph, stride_pn,  # [B, H, L, P] or None
    d_o, stride_ob, stride_oh, stride_on,  # [B, H, L, E], as the queries
    references, scalars, work,  # References, Scalars, Work
    H, L, chunks, first_head, first_chunk, threshold,
    rule, sizes, cut,
):  # fmt: skip
    """One chunk's W, d log C and dS, its part of dλ_b, and its terms of G and η."""
    token: tl.constexpr = value.dtype.element_ty
    FACTOR: tl.constexpr = tl.float32 if token == tl.float16 else token
    at, number, slot = place(chunks, first_head, first_chunk)
    b, h, length, chunk = chunk_of(scalars, number, slot, H, L)
    if scalars.lengths is not None:
        if length == 0:
            return
    queries = rows_of(query, b, h, stride_qb, stride_qh, stride_qn, length, cut.STEP)
    keys = rows_of(key, b, h, stride_kb, stride_kh, stride_kn, length, cut.STEP)
    values = rows_of(value, b, h, stride_vb, stride_vh, stride_vn, length, cut.STEP)
    gradients = rows_of(d_o, b, h, stride_ob, stride_oh, stride_on, length, cut.STEP)
    masses = rows_of(log_a, b, h, stride_ab, stride_ah, stride_an, length, 1) if log_a is not None else None
    asking = (
        places_of(query_position, references, b, h, stride_sb, stride_sh, stride_sn, sizes) if sizes.P > 0 else None
    )
    places = places_of(key_position, references, b, h, stride_pb, stride_ph, stride_pn, sizes) if sizes.P > 0 else None
    head = head_of(references, h, sizes, cut)
    rows, asked, log_b, known = chunk_keys(
        keys, masses, places, head, work.log_c, work.rest, at, number, chunk, slot, L, scalars, rule, sizes, cut
    )
    d = pair_products(gradients, values, rows, asked, known, scalars.seed, sizes, cut)
    from_means = mean_products(gradients, work.means, at, rows, asked, sizes, cut)
    # Without λ_b dS beside it, what a query gets from earlier chunks is −w(p − ⟨do_i, z⁰⟩) alone.
    GAINED: tl.constexpr = work.incoming is not None and not rule.UPDATE_ROWS
    p, gained = pooled_products(d, from_means, known, FACTOR, GAINED, cut)
    stream = scalars
    if scalars.lengths is not None:  # a segment of a packed batch has a seed of its own
        if scalars.seed is not None:
            stream = Dropout(scalars.seed + slot, scalars.keep_scale)
    keep = keep_mask(stream, number.to(tl.int64), length, rows, threshold, sizes)  # early: held as bits, it takes less
    l, kappa, cosine, inverse, first_columns = token_logits(queries, rows, asked, asking, head, rule.DOT, sizes, cut)
    w = query_weights(l, log_b, known.log_c, head.lam_b, rule.UPDATE_ROWS)
    w, d_s = read_gradient(w, p, keep, scalars, sizes)
    d_c = -w * p - head.lam_b * d_s if rule.UPDATE_ROWS else -w * p
    tl.store(tile_at(work.d_sums, at, cut.ROWS, sizes), d_c)
    # On Blackwell the sums come before the other stores, or 8 bytes spill (Triton 3.9); elsewhere 16 to 24 then do.
    EARLY: tl.constexpr = False if _INTERPRETED else tl.target_info.cuda_capability_geq(10)
    if EARLY:
        fade = store_between_chunks(work, at, known, w, d_c, gained, from_means, GAINED, sizes, cut)
    tl.store(tile_at(work.d_logits, at, cut.ROWS, sizes), d_s)
    tl.store(tile_at(work.weights, at, cut.ROWS, sizes), w)  # last, as w is held anyway: first of all it spills
    if not EARLY:
        fade = store_between_chunks(work, at, known, w, d_c, gained, from_means, GAINED, sizes, cut)
    faded = tl.trans(rounded(w * fade, token))
    for first in tl.static_range(0, sizes.EP, cut.VDEPTH):
        e = first + tl.arange(0, cut.VDEPTH)
        do = load_rows(gradients, again(rows), asked, e, sizes.E)
        tl.store(state_at(work.later_o, at, e, sizes), dot(faded, do, cut.PRECISION))
    if work.sums is not None:
        # log C anew: in dS's layout since it was formed, it is 500 bytes of spilled registers beside 128 references.
        d_lam = tl.sum(d_s * again(finite_or_zero(known.log_c))) * LN2 if rule.UPDATE_ROWS else 0.0
        tl.store(sum_at(work.sums, at, "reference_relaxation"), d_lam)


@kernel
def causal_keys_backward_kernel(
    key, stride_kb, stride_kh, stride_kn,  # [B, H, L, D], strides in units of cut.STEP
    value, stride_vb, stride_vh, stride_vn,  # [B, H, L, E], likewise
    log_a, stride_ab, stride_ah, stride_an,  # [B, H, L] or None
    position, stride_pb, stride_ph, stride_pn,  # [B, H, L, P] or None
    d_o, stride_ob, stride_oh, stride_on,  # [B, H, L, E], as the keys
    d_value, stride_db, stride_dh, stride_dn,  # [B, H, L, E] or None
    references, scalars, work,  # References, Scalars, Work
    H, L, chunks, first_head, first_chunk,
    rule, sizes, cut,
):  # fmt: skip
    """One chunk's dω (d_logits) and dv."""
    token: tl.constexpr = value.dtype.element_ty
    FACTOR: tl.constexpr = tl.float32 if token == tl.float16 else token
    at, number, slot = place(chunks, first_head, first_chunk)
    number = number.to(tl.int64)  # divided in 32 bits, 24 more bytes of registers spill (sm_80, float32, D 128)
    b, h, length, chunk = chunk_of(scalars, number, slot, H, L)
    if scalars.lengths is not None:
        if length == 0:
            return
    keys = rows_of(key, b, h, stride_kb, stride_kh, stride_kn, length, cut.STEP)
    values = rows_of(value, b, h, stride_vb, stride_vh, stride_vn, length, cut.STEP)
    gradients = rows_of(d_o, b, h, stride_ob, stride_oh, stride_on, length, cut.STEP)
    d_values = rows_of(d_value, b, h, stride_db, stride_dh, stride_dn, length, 1) if d_value is not None else None
    masses = rows_of(log_a, b, h, stride_ab, stride_ah, stride_an, length, 1) if log_a is not None else None
    places = places_of(position, references, b, h, stride_pb, stride_ph, stride_pn, sizes) if sizes.P > 0 else None
    head = head_of(references, h, sizes, cut)
    rows, asked, log_b, known = chunk_keys(
        keys, masses, places, head, work.log_c, work.rest, at, number, chunk, slot, L, scalars, rule, sizes, cut
    )
    j = tl.arange(0, sizes.MP)
    d = pair_products(gradients, values, rows, asked, known, scalars.seed, sizes, cut)
    w, d_c = tile_at(work.weights, at, cut.ROWS, sizes), tile_at(work.d_sums, at, cut.ROWS, sizes)
    a, d_omega = key_gradient(w, d_c, d, known, FACTOR, cut)
    if sizes.MP > 64:  # the slot anew: where W lies is not held for what follows, which spills (Triton 3.6, 3.9)
        at = again(tl.program_id(0)).to(tl.int64)
    end = tl.load(work.log_end + at * sizes.MP + j)
    carried = tl.exp2(known.omega + known.to_end[:, None] - finite_or_zero(end)[None, :])
    if work.rest_end is not None:
        carried /= tl.load(work.rest_end + at * sizes.MP + j)[None, :]
    from_later = tl.zeros_like(known.omega) + tl.load(work.later_c + at * sizes.MP + j)[None, :]
    to_values, carried_operand = tl.trans(rounded(a, token)), rounded(carried, token)
    for first in tl.static_range(0, sizes.EP, cut.VDEPTH):
        e = first + tl.arange(0, cut.VDEPTH)
        do = load_rows(gradients, rows, asked, e, sizes.E)
        v = load_rows(values, rows, known.live, e, sizes.E)
        exact = tl.load(state_at(work.later_o, at, e, sizes))
        later = rounded(exact, token)
        from_later += tokens_by(v, tl.trans(later), cut.PRECISION, cut.ACROSS)
        if work.crossing is not None and token != tl.float32:  # gates sum over all keys, where ⟨G, v⟩ and η cancel
            rest = rounded(exact - later.to(tl.float32), token)
            from_later += tokens_by(v, tl.trans(rest), cut.PRECISION, cut.ACROSS)
        if d_value is not None:
            dv = dot(to_values, do, cut.PRECISION) + dot(carried_operand, later, cut.PRECISION)
            store_rows(d_values, rows, asked, e, sizes.E, dv)
    tl.store(tile_at(work.d_logits, at, cut.ROWS, sizes), d_omega + carried * from_later)
    if work.crossing is not None:
        tl.store(work.crossing + at * cut.ROWS + tl.arange(0, cut.ROWS), tl.sum(carried * from_later, 1))


@kernel
def causal_gates_backward_kernel(
    key, stride_kb, stride_kh, stride_kn,  # [B, H, L, D], strides in units of cut.STEP
    value, stride_vb, stride_vh, stride_vn,  # [B, H, L, E], likewise
    log_a, stride_ab, stride_ah, stride_an,  # [B, H, L] or None
    position, stride_pb, stride_ph, stride_pn,  # [B, H, L, P] or None
    d_o, stride_ob, stride_oh, stride_on,  # [B, H, L, E], as the keys
    references, scalars, work,  # References, Scalars, Work
    H, L, chunks, first_head, first_chunk,
    rule, sizes, cut,
):  # fmt: skip
    """One chunk's sums over the pairs of its tokens and over what its keys give to later chunks, for each key between.

    Apart from the keys' kernel, whose registers it would take.
    """
    token: tl.constexpr = value.dtype.element_ty
    FACTOR: tl.constexpr = tl.float32 if token == tl.float16 else token
    at, number, slot = place(chunks, first_head, first_chunk)
    number = number.to(tl.int64)
    b, h, length, chunk = chunk_of(scalars, number, slot, H, L)
    if scalars.lengths is not None:
        if length == 0:
            return
    keys = rows_of(key, b, h, stride_kb, stride_kh, stride_kn, length, cut.STEP)
    values = rows_of(value, b, h, stride_vb, stride_vh, stride_vn, length, cut.STEP)
    gradients = rows_of(d_o, b, h, stride_ob, stride_oh, stride_on, length, cut.STEP)
    masses = rows_of(log_a, b, h, stride_ab, stride_ah, stride_an, length, 1) if log_a is not None else None
    places = places_of(position, references, b, h, stride_pb, stride_ph, stride_pn, sizes) if sizes.P > 0 else None
    head = head_of(references, h, sizes, cut)
    rows, asked, log_b, known = chunk_keys(
        keys, masses, places, head, work.log_c, work.rest, at, number, chunk, slot, L, scalars, rule, sizes, cut
    )
    d = pair_products(gradients, values, rows, asked, known, scalars.seed, sizes, cut)
    w, d_c = tile_at(work.weights, at, cut.ROWS, sizes), tile_at(work.d_sums, at, cut.ROWS, sizes)
    crossing = work.crossing + at * cut.ROWS + tl.arange(0, cut.ROWS)
    tl.store(crossing, crossings(w, d_c, d, known, crossing, FACTOR, cut.PRECISION))
