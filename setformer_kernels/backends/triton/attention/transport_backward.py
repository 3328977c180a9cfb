"""Backward of the transport, exact for the T iterations that ran: from dz and dg^T to dk, dv and the parameters' parts.

    W^k = Q^T,  dc^t = −λ_b dg^t
    t = T:  C_sj = W^k_sj (⟨v_s, dz_j⟩ − ⟨dz_j, z_j⟩ + dc^T_j)      t < T:  C_sj = Q^t_sj dc^t_j
    df^t_s = Σ_j C_sj,   dℓ += C − λ_a R^t df^t,   dg^{t−1}_j = −λ_a Σ_s R^t_sj df^t_s,   dv_s = Σ_j W^k_sj dz_j

`transport_columns_backward_kernel` is one pass over the keys per t = T..2, for dg^{t−1} alone;
`transport_keys_backward_kernel` then sums all terms of dℓ in a last one, with dg^0, and takes them to dk and the
parameters as `device.gradients` says.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....problem import Operands, Options, replaced
from ..device.gradients import gradient_split, gradient_tile, leave_tile, no_sums, store_tile_sums, sum_slots
from ..device.head import gradient_factor, head_of, load_references, load_references_t
from ..device.logits import token_logits
from ..device.places import places_of
from ..device.plan import range_known
from ..device.primitives import INF, LN2, again, finite_or_zero, rounded, tokens_by
from ..device.rows import key_mass, load_rows, row_starts, rows_of, segment_of, store_rows, uniform_mass
from ..host.groups import Rule, Segments, cut_of, keys_cut_of, rule_of, sizes_of
from ..host.launch import Split, device_of, kernel, launch
from ..host.rows import stride_step, strided, unit_rows
from ..parameters.gradients import Partials
from ..parameters.prepare import References
from .plan_backward import (
    Cotangents,
    State,
    column_gradient,
    count_of,
    key_value_products,
    load_columns,
    merged_state,
    plan_terms,
    pooling_weights,
)
from .settled_columns import settle_columns


@triton.jit
def _store_value_columns(out, rows, inside, weights, d_z, start, sizes, cut):
    """Columns start.. of dv_s = Σ_j W^k_sj dz_j, from those of dz."""
    d_v = tokens_by(rounded(weights, d_z.dtype), d_z, cut.PRECISION, cut.ACROSS)
    store_rows(out, rows, inside, start + tl.arange(0, cut.VDEPTH), sizes.E, d_v)


@triton.jit
def store_values(out, rows, inside, weights, d_z, first_t, block, blocks: tl.constexpr, sizes, cut):
    """Every `blocks`-th VDEPTH columns of dv from `block` on; first_t: the first of dz, transposed."""
    if sizes.EP == cut.VDEPTH:
        if block == 0:
            _store_value_columns(out, rows, inside, weights, tl.trans(first_t), 0, sizes, cut)
    else:
        for chunk in range(block, sizes.EP // cut.VDEPTH, blocks):
            start = chunk * cut.VDEPTH
            d_z_chunk = load_references(d_z, start, sizes.MP, sizes.EP, cut.VDEPTH)
            _store_value_columns(out, rows, inside, weights, d_z_chunk, start, sizes, cut)


@kernel
def transport_columns_backward_kernel(
    key, stride_kb, stride_kh, stride_kn,  # [B, H, S, D], strides in units of cut.STEP
    value, stride_vb, stride_vh, stride_vn,  # [B, H, S, E], likewise
    log_a, stride_ab, stride_ah, stride_an,  # [B, H, S] or None
    position, stride_pb, stride_ph, stride_pn,  # [B, H, S, P] or None
    references, state,  # References, State
    part_in, part_out,  # [BH, splits, MP] parts of dg^t, of dg^{t−1}
    H, S, stretch, splits, iteration, iterations,
    LAST: tl.constexpr, rule, sizes, cut,
):  # fmt: skip
    """Parts of dg^{t−1} of iteration t ≥ 2 (LAST: t = T) over `stretch` keys of one head."""
    MP: tl.constexpr = sizes.MP
    split = tl.program_id(0) % splits
    bh = (tl.program_id(0) // splits).to(tl.int64)
    b, h = bh // H, bh % H
    uniform = uniform_mass(state, b, state.uniform)
    b, S = segment_of(state, b, S)
    j = tl.arange(0, MP)
    keys = rows_of(key, b, h, stride_kb, stride_kh, stride_kn, S, cut.STEP)
    values = rows_of(value, b, h, stride_vb, stride_vh, stride_vn, S, cut.STEP)
    masses = rows_of(log_a, b, h, stride_ab, stride_ah, stride_an, S, 1) if log_a is not None else None
    places = places_of(position, references, b, h, stride_pb, stride_ph, stride_pn, sizes) if sizes.P > 0 else None
    head = head_of(references, h, sizes, cut)
    d_z = state.d_z + bh * MP * sizes.EP
    at = bh * iterations + iteration - 1
    column = load_columns(state, at, sizes)
    second = column.second
    if LAST:
        d_z_t = load_references_t(d_z, 0, MP, sizes.EP, cut.VDEPTH)
        off, use = tl.load(state.offset + bh * MP + j), tl.load(state.use_values + bh)
    else:
        merged = sum_slots(part_in, bh, 0, 1, splits, splits, MP, j, j < MP)
        if split == 0:
            tl.store(state.d_g + at * MP + j, merged)
        second *= column_gradient(merged, state, at, head.lam_b, sizes)
    total = tl.zeros([MP], tl.float32)
    end = tl.minimum(S, (split + 1) * stretch)
    # What is invariant in the loop stays there for products as κ, or they spill on sm_100.
    for start in tl.range(split * stretch, end, cut.ROWS, disable_licm=rule.DOT):
        rows = start + tl.arange(0, cut.ROWS)
        live, mass = key_mass(masses, rows, end, uniform)
        l, kappa, cosine, inverse, x = token_logits(keys, rows, live, places, head, rule.DOT, sizes, cut)
        p, r, lse, first = plan_terms(kappa, l, mass, head, column, rule, sizes)
        if LAST:
            weights = pooling_weights(first, second, live, use)
            v_dz = key_value_products(values, rows, live, d_z, d_z_t, sizes, cut)
            d_f = tl.sum(weights * (v_dz * use - off[None, :]), 1)
        else:
            d_f = tl.sum(first * second[None, :], 1)
        total -= tl.sum(p * (head.lam_a * d_f / r)[:, None], 0)
    # The program anew: held through the loop, it spills (packs, Triton 3.9).
    tl.store(part_out + again(tl.program_id(0)).to(tl.int64) * MP + j, total)


class LogitTerms(NamedTuple):
    """What becomes of the iterations' terms over a tile of keys, and over all of them."""

    d_l: Any  # [BS, MP] dℓ
    sent: Any  # [BS] Σ_t df^t
    relaxed: Any  # [BS] Σ_t df^t (LSE_j(ℓ + g^{t−1}) − center), over the tiles before as well
    d_g_0: Any  # [MP] dg^0, likewise


@triton.jit
def _newest(state, bh, iterations, sizes, cut):
    """dg^1 [MP] from its parts, 0 where there are none."""
    MP: tl.constexpr = sizes.MP
    j = tl.arange(0, MP)
    newest = tl.zeros([MP], tl.float32)
    if state.first_d_g is not None:
        found = count_of(state.first_splits)
        if cut.FRUGAL:
            tl.assume(found > 0)
        newest = sum_slots(state.first_d_g, bh, 0, 1, found, found, MP, j, j < MP)
        if cut.FRUGAL:  # every program of the head writes the same, and reads what it wrote
            tl.store(state.d_g + bh * iterations * MP + j, newest)
            tl.debug_barrier()
    return newest


@triton.jit
def _merged_or_newest(state, newest, at, t, sizes, cut):
    """dg^t [MP]; dg^1 is where it was last left in parts, merged by every program for itself (`newest`)."""
    j = tl.arange(0, sizes.MP)
    if state.first_d_g is None or cut.FRUGAL:
        return tl.load(state.d_g + at * sizes.MP + j)
    else:
        return tl.where(t == 1, newest, tl.load(state.d_g + at * sizes.MP + j, mask=j < tl.where(t > 1, sizes.MP, 0)))


@triton.jit
def earlier_terms(terms, center, kappa, l, mass, newest, head, state, parts, bh, iterations, rule, sizes, cut):
    """Adds the terms of t = T−1..1."""
    d_l, sent, relaxed, d_g_0 = terms
    for step in range(1, iterations):
        t = iterations - step
        at = bh * iterations + t - 1
        column = load_columns(state, at, sizes)
        p, r, lse, first = plan_terms(kappa, l, mass, head, column, rule, sizes)
        d_g_t = _merged_or_newest(state, newest, at, t, sizes, cut)
        term = first * (column.second * column_gradient(d_g_t, state, at, head.lam_b, sizes))[None, :]
        d_f = tl.sum(term, 1)
        sent += d_f
        relaxed += d_f * (lse - center)
        row_term = p * (head.lam_a * d_f / r)[:, None]
        d_l += term - row_term
        if parts.log_b is not None:
            if t == 1:
                d_g_0 -= tl.sum(row_term, 0)
    return LogitTerms(d_l, sent, relaxed, d_g_0)


@triton.jit
def last_terms(relaxed, d_g_0, center, p, r, lse, weights, v_dz, use, head, state, parts, bh, rule, sizes):
    """The term of t = T, with what the tiles before left of `relaxed` and dg^0."""
    j = tl.arange(0, sizes.MP)
    d_l = weights * (v_dz * use - tl.load(state.offset + bh * sizes.MP + j)[None, :])
    sent = tl.sum(d_l, 1)
    if rule.UPDATE_ROWS:
        relaxed += sent * (lse - center)
        row_term = p * (head.lam_a * sent / r)[:, None]
        d_l -= row_term
        if parts.log_b is not None and state.first_d_g is None:
            d_g_0 -= tl.sum(row_term, 0)
    return LogitTerms(d_l, sent, relaxed, d_g_0)


@triton.jit
def relaxation_center(head, state, DOT: tl.constexpr):
    """What is subtracted from LSE_j(ℓ + g): Σ_s df^t_s = 0 unless c has a gradient, so only its spread counts."""
    if state.d_c is not None:
        return 0.0 * head.scale
    else:
        return -head.scale if DOT else head.scale * (tl.exp2(-head.beta) - 1.0)


@triton.jit
def _totals(state, newest, bh, iterations, sizes, cut):
    """(Σ_{0<t<T} dg^t [MP], Σ_{t>0} ⟨dg^t, c^t⟩); unless c has a gradient, Σ_j dg^t_j = 0: only its spread counts."""
    j = tl.arange(0, sizes.MP)
    total = tl.zeros([sizes.MP], tl.float32)
    products = tl.zeros([sizes.MP], tl.float32)
    for t in range(1, iterations + 1):
        at = bh * iterations + t - 1
        d_g_t = _merged_or_newest(state, newest, at, t, sizes, cut)
        c_t = tl.load(state.c + at * sizes.M + j, mask=j < sizes.M, other=-INF)
        top = finite_or_zero(tl.max(c_t, 0)) if state.d_c is None else 0.0
        products += d_g_t * tl.where(c_t > -INF, c_t - top, 0.0)
        total += tl.where(t < iterations, d_g_t, 0.0)
    return total, tl.sum(products)


@triton.jit
def _place(program, splits, blocks):
    """(b·H + h, which of the head's splits, which block of columns) of a program."""
    block = program % blocks
    split = program // blocks % splits
    return (program // (blocks * splits)).to(tl.int64), split, block


@kernel
def transport_keys_backward_kernel(
    key, stride_kb, stride_kh, stride_kn,  # [B, H, S, D], strides in units of cut.STEP
    value, stride_vb, stride_vh, stride_vn,  # [B, H, S, E], likewise
    log_a, stride_ab, stride_ah, stride_an,  # [B, H, S] or None
    position, stride_pb, stride_ph, stride_pn,  # [B, H, S, P] or None
    d_key, stride_dkb, stride_dkh, stride_dkn,  # as the tensors whose gradients they are, None where not needed
    d_value, stride_dvb, stride_dvh, stride_dvn,
    d_log_a, stride_dab, stride_dah, stride_dan,
    references, state, parts,  # References, State, Partials
    H, S, stretch, splits, first_slot, iterations,
    rule, sizes, cut,
):  # fmt: skip
    """All of dℓ over `stretch` keys of one head; DEPTH columns of dk and dŷ, and every d_blocks-th VDEPTH of dv."""
    MP: tl.constexpr = sizes.MP
    d_blocks: tl.constexpr = sizes.DP // cut.DEPTH
    bh, split, block = _place(tl.program_id(0), splits, d_blocks)
    b, h = bh // H, bh % H
    uniform = uniform_mass(state, b, state.uniform)
    b, S = segment_of(state, b, S)
    j, d = tl.arange(0, MP), block * cut.DEPTH + tl.arange(0, cut.DEPTH)
    keys = rows_of(key, b, h, stride_kb, stride_kh, stride_kn, S, cut.STEP)
    values = rows_of(value, b, h, stride_vb, stride_vh, stride_vn, S, cut.STEP)
    masses = rows_of(log_a, b, h, stride_ab, stride_ah, stride_an, S, 1) if log_a is not None else None
    places = places_of(position, references, b, h, stride_pb, stride_ph, stride_pn, sizes) if sizes.P > 0 else None
    d_keys = rows_of(d_key, b, h, stride_dkb, stride_dkh, stride_dkn, S, cut.STEP) if d_key is not None else None
    d_values = rows_of(d_value, b, h, stride_dvb, stride_dvh, stride_dvn, S, cut.STEP) if d_value is not None else None
    d_masses = rows_of(d_log_a, b, h, stride_dab, stride_dah, stride_dan, S, 1) if d_log_a is not None else None
    head, factor = head_of(references, h, sizes, cut), gradient_factor(references.parameters, h, rule.DOT)
    y_own = load_references(head.y, block * cut.DEPTH, MP, sizes.DP, cut.DEPTH)
    d_z = state.d_z + bh * MP * sizes.EP
    d_z_t = load_references_t(d_z, 0, MP, sizes.EP, cut.VDEPTH)
    use, newest = tl.load(state.use_values + bh), _newest(state, bh, iterations, sizes, cut)
    center = relaxation_center(head, state, rule.DOT)
    relaxed, d_g_0 = tl.zeros([cut.ROWS], tl.float32), tl.zeros([MP], tl.float32)
    sums = no_sums(sizes, cut)
    end = tl.minimum(S, (split + 1) * stretch)
    last = end
    if cut.FRUGAL:  # what lies beyond a loop that may not run at all is held through it, not made anew from the thread
        last = tl.maximum(end, split * stretch + 1)
        tl.assume(split * stretch < last)
    ANEW: tl.constexpr = cut.FRUGAL and rule.UPDATE_ROWS  # also where things are that no iteration changes
    LATE: tl.constexpr = cut.FRUGAL and state.first_d_g is not None  # and what is needed only after earlier iterations
    for start in tl.range(split * stretch, last, cut.ROWS, disable_licm=ANEW):
        rows = start + tl.arange(0, cut.ROWS)
        inside = rows < end
        live, mass = key_mass(masses, rows, end, uniform)
        l, kappa, cosine, inverse, x = token_logits(keys, rows, live, places, head, rule.DOT, sizes, cut)
        # Products come where the fewest tiles are alive, beside which their operands are registers too.
        if not cut.FRUGAL:
            v_dz = key_value_products(values, rows, live, d_z, d_z_t, sizes, cut)
        column = load_columns(state, bh * iterations + iterations - 1, sizes)  # here: too many to hold through it
        p, r, lse, first = plan_terms(kappa, l, mass, head, column, rule, sizes)
        weights = pooling_weights(first, column.second, live, use)
        if cut.FRUGAL:  # dv leaves before ⟨v, dz⟩ comes; where the keys lie is not held through the exponentials
            rows = again(rows)
            live, _ = key_mass(masses, rows, end, uniform)
            inside = rows < end
            if d_value is not None:
                store_values(d_values, rows, inside, weights, d_z, d_z_t, block, d_blocks, sizes, cut)
            v_dz = key_value_products(values, rows, live, d_z, d_z_t, sizes, cut)
        terms = last_terms(relaxed, d_g_0, center, p, r, lse, weights, v_dz, use, head, state, parts, bh, rule, sizes)
        if d_value is not None and not cut.FRUGAL:
            store_values(d_values, rows, inside, weights, d_z, d_z_t, block, d_blocks, sizes, cut)
        if state.first_d_g is not None:
            terms = earlier_terms(
                terms, center, kappa, l, mass, newest, head, state, parts, bh, iterations, rule, sizes, cut
            )
        d_l, sent, relaxed, d_g_0 = terms
        if rule.UPDATE_ROWS and sizes.M == 1:  # R = 1, and every Q term is its own row sum: exactly 0 where λ_a = 1
            d_l = tl.where((j < sizes.M)[None, :], ((1.0 - head.lam_a) * sent)[:, None], 0.0)
        if d_log_a is not None:
            if block == 0:
                tl.store(row_starts(d_masses, rows), sent, mask=inside)
        if LATE:
            y_own = tl.load(head.y + again(j)[:, None] * sizes.DP + d[None, :])
        if ANEW:
            tl.debug_barrier()  # or the keys are read before the iterations, and held through them
        if d_blocks > 1 or cut.FRUGAL:
            x = load_rows(keys, again(rows) if cut.FRUGAL else rows, live, d, sizes.D)
        if LATE:
            if d_key is not None:
                same = again(h.to(tl.int32)).to(tl.int64)
                d_keys = rows_of(d_key, b, same, stride_dkb, stride_dkh, stride_dkn, S, cut.STEP)
        total = (1.0 - head.lam_a) * sent if rule.UPDATE_ROWS else sent  # Σ_j R = 1
        sums = leave_tile(
            sums, d_l, total, kappa, cosine, inverse, x, y_own, factor, head.beta, d_keys, rows, inside, live, d, True,
            places, parts, state.d_c is None, rule.DOT, sizes, cut,
        )  # fmt: skip
    if not cut.FRUGAL:  # the program anew: held through the loop, it spills (logits of any range, Triton 3.6)
        bh, split, block = _place(again(tl.program_id(0)), splits, d_blocks)
    slot, d_lambda_b = bh * (first_slot + splits) + first_slot + split, 0.0
    if rule.UPDATE_ROWS:
        if (block == 0) & (split == 0):  # what a head counts once
            others, d_lambda_b = _totals(state, newest, bh, iterations, sizes, cut)
            d_g_0 += others
    if parts.log_b is not None:
        if block == 0:
            tl.store(parts.log_b + slot * MP + j, d_g_0)
    # Not the columns anew: the compiler must know their order, or dŷ leaves in single words.
    store_tile_sums(parts, slot, sums, d, tl.sum(relaxed) * LN2, d_lambda_b, True, block == 0, sizes)


class KeyGradients(NamedTuple):
    """Where the rows' gradients go, None where not needed."""

    key: Tensor | None
    value: Tensor | None
    log_a: Tensor | None


def _column_passes(
    x: Operands, opt: Options, prepared: References, merged: State, tokens: tuple[Any, ...], step: int, rule: Rule
) -> State:
    """Columns settled, and the passes of t = T..2, if there are any: the state, with the last's parts of dg^1."""
    heads, iterations, _ = merged.d_g.shape
    # Where logits may be thousands, and products are not coarser.
    settles = x.key_position is not None and x.key.dtype == torch.float32
    if iterations == 1 and not settles:
        return merged
    t, sizes = gradient_tile(x, opt, "columns_backward"), sizes_of(x)
    split = gradient_split(x.key, t, merged.first is not None)
    cut = cut_of(t, sizes, device_of(x.key), step, t.across)
    if settles:
        settle_columns(x, prepared, merged, tokens, split, rule, cut, t)
    if iterations == 1:
        return merged
    sums = [x.references.new_empty((heads, split.programs, sizes.MP)) for _ in range(min(2, iterations - 1))]
    counts = (x.key.shape[1], x.key.shape[2], *split)
    constants = {"rule": rule.compiled, "sizes": sizes.compiled, "cut": cut.compiled}
    for iteration in range(iterations, 1, -1):
        args = (*tokens, prepared, merged, sums[0], sums[-1], *counts, iteration, iterations)
        kind = {"LAST": iteration == iterations} | constants
        launch(transport_columns_backward_kernel, heads * split.programs, args, kind, t)
        sums.reverse()
    return merged._replace(first_d_g=sums[0], first_splits=float(split.programs))


def transport_backward(
    x: Operands, opt: Options, prepared: References, state: tuple[Tensor, Tensor], given: Cotangents,
    split: Split, out: KeyGradients, parts: Partials, log_b: bool, keys_at: Segments,
) -> None:  # fmt: skip
    """All passes over the keys: `out`, and the slots of `parts` after those of the queries (log_b: that one too)."""
    merged, sizes = merged_state(x, opt, prepared, state, given, parts, keys_at), sizes_of(x)
    key, value, position = unit_rows(x.key), unit_rows(x.value), unit_rows(x.key_position)
    heads, s, packed = merged.d_g.shape[0], key.shape[2], keys_at.first is not None
    step = stride_step(key, value, out.key, out.value)
    tokens = (*strided(key, step, packed), *strided(value, step, packed))
    tokens = (*tokens, *strided(x.log_a, packed=packed), *strided(position, packed=packed))
    rule, t = rule_of(opt, range_known(x, opt)), gradient_tile(x, opt, "keys_backward")
    merged = _column_passes(x, opt, prepared, merged, tokens, step, rule)
    cut = keys_cut_of(t, sizes, device_of(key), step)
    gradients = (*strided(out.key, step, packed), *strided(out.value, step, packed))
    gradients = (*gradients, *strided(out.log_a, packed=packed))
    groups = (prepared, merged, parts if log_b else replaced(parts, log_b=None))
    counts = (key.shape[1], s, *split, given.splits, state[1].shape[2])
    programs = heads * split.programs * (sizes.DP // cut.DEPTH)
    constants = {"rule": rule.compiled, "sizes": sizes.compiled, "cut": cut.compiled}
    launch(transport_keys_backward_kernel, programs, (*tokens, *gradients, *groups, *counts), constants, t)
