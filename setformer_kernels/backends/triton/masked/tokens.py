"""From the gradients of the logits under a mask to those of queries or keys, and of the parameters."""

from __future__ import annotations

import triton
import triton.language as tl

from ..device.gradients import leave_tile, no_sums, store_tile_sums, sum_slots
from ..device.head import gradient_factor, head_of, load_references
from ..device.logits import token_logits
from ..device.places import places_of
from ..device.plan import row_update
from ..device.primitives import INF, LN2
from ..device.rows import load_rows, row_starts, rows_of
from ..host.launch import kernel


@triton.jit
def finish_logits(l, rows, inside, place, terms, head, rule, sizes):
    """(dℓ [BS, MP] of keys, Σ_t df^t, what λ_a's gradient sums [BS], d log b [MP]): with −λ_a R df^1 of the first row
    sums, R = softmax_j(ℓ + log b), which all queries share.

    Σ_s df^t_is = 0, so LSE_j(ℓ + g) may count from any value.
    """
    j = tl.arange(0, sizes.MP)
    d_l = tl.load(terms.logits + place[:, None] * sizes.MP + j[None, :], mask=inside[:, None], other=0.0)
    mass = tl.load(terms.mass + place, mask=inside, other=0.0)
    relaxed, d_log_b = mass * 0.0, tl.zeros([sizes.MP], tl.float32)
    if rule.UPDATE_ROWS:
        first = tl.load(terms.first + place, mask=inside, other=0.0)
        p, most, total, f = row_update(l, tl.load(head.log_b + j), first, head.lam_a)
        through = p * (head.lam_a * first / total)[:, None]
        d_l -= through
        d_log_b -= tl.sum(through, 0)
        top = tl.max(tl.where((j < sizes.M)[None, :], l, -INF), 1)
        middle = -head.scale if rule.DOT else head.scale * (tl.exp2(-head.beta) - 1.0)
        relaxed = tl.load(terms.relaxed + place, mask=inside, other=0.0) + (mass - first) * (top - middle)
        relaxed += first * (most + tl.log2(total) - middle)
        if sizes.M == 1:  # R = 1, and every Q term is its own row sum: exactly 0 where λ_a = 1
            d_l = tl.where((j < sizes.M)[None, :], ((1.0 - head.lam_a) * mass)[:, None], 0.0)
    return d_l, mass, relaxed, d_log_b


@kernel
def masked_tokens_backward_kernel(
    x, stride_xb, stride_xh, stride_xn,  # [B, H, N, D] queries or keys, strides in units of cut.STEP
    position, stride_pb, stride_ph, stride_pn,  # [B, H, N, P] or None
    d_x, stride_db, stride_dh, stride_dn,  # [B, H, N, D] or None
    d_log_a, stride_mb, stride_mh, stride_mn,  # [B, H, N] or None
    references, live_of,  # References, [heads, N]
    d_logits, back, terms, parts,  # [heads, N, MP], Back, KeyTerms, Partials
    H, N, stretch, splits, first_head, first_slot, slots, blocks,
    KEYS: tl.constexpr, rule, sizes, cut,
):  # fmt: skip
    """`stretch` queries of one head from dS, or KEYS; DEPTH columns of their gradient and of dŷ.

    live_of: −∞ for tokens that are not to be read.  The head's first program of the queries adds up what the `blocks`
    of these left for log b and λ_b.
    """
    d_blocks: tl.constexpr = sizes.DP // cut.DEPTH
    block = tl.program_id(0) % d_blocks
    split = tl.program_id(0) // d_blocks % splits
    at = (tl.program_id(0) // (d_blocks * splits)).to(tl.int64)
    number = at + first_head
    b, h = number // H, number % H
    j, d = tl.arange(0, sizes.MP), block * cut.DEPTH + tl.arange(0, cut.DEPTH)
    tokens = rows_of(x, b, h, stride_xb, stride_xh, stride_xn, N, cut.STEP)
    places = places_of(position, references, b, h, stride_pb, stride_ph, stride_pn, sizes) if sizes.P > 0 else None
    out = rows_of(d_x, b, h, stride_db, stride_dh, stride_dn, N, 1) if d_x is not None else None
    d_masses = rows_of(d_log_a, b, h, stride_mb, stride_mh, stride_mn, N, 1) if d_log_a is not None else None
    head = head_of(references, h, sizes, cut)
    factor = gradient_factor(references.parameters, h, rule.DOT)
    y_own = load_references(head.y, block * cut.DEPTH, sizes.MP, sizes.DP, cut.DEPTH)
    relaxed, d_g = tl.zeros([cut.ROWS], tl.float32), tl.zeros([sizes.MP], tl.float32)
    sums = no_sums(sizes, cut)
    end = tl.minimum(N, (split + 1) * stretch)
    for start in range(split * stretch, end, cut.ROWS):
        rows = start + tl.arange(0, cut.ROWS)
        inside, place = rows < end, at * N + rows
        live = tl.load(live_of + place, mask=inside, other=-INF) > -INF
        l, kappa, cosine, inverse, columns = token_logits(tokens, rows, live, places, head, rule.DOT, sizes, cut)
        total = tl.zeros([cut.ROWS], tl.float32)
        if KEYS:
            d_l, mass, of_tile, d_log_b = finish_logits(l, rows, inside, place, terms, head, rule, sizes)
            relaxed += of_tile
            d_g += d_log_b
            total += (1.0 - head.lam_a) * mass if rule.UPDATE_ROWS else mass  # Σ_j R = 1
            if d_log_a is not None:
                if block == 0:
                    tl.store(row_starts(d_masses, rows), mass, mask=inside)
        else:
            d_l = tl.load(d_logits + place[:, None] * sizes.MP + j[None, :], mask=inside[:, None], other=0.0)
        if d_blocks > 1:
            columns = load_rows(tokens, rows, live, d, sizes.D)
        sums = leave_tile(
            sums, d_l, total, kappa, cosine, inverse, columns, y_own, factor, head.beta, out, rows, inside, live, d,
            True, places, parts, True, rule.DOT, sizes, cut,
        )  # fmt: skip
    d_lambda_b = 0.0
    if not KEYS:
        if split == 0:
            d_g += sum_slots(back.log_b, at, 0, 1, blocks, blocks, sizes.MP, j, j < sizes.MP)
            if rule.UPDATE_ROWS:
                zero = tl.arange(0, 1)
                d_lambda_b += tl.sum(sum_slots(back.relaxation, at, 0, 1, blocks, blocks, 1, zero, zero == 0)) * LN2
    slot = number * slots + first_slot + split
    if block == 0:
        tl.store(parts.log_b + slot * sizes.MP + j, d_g)
    store_tile_sums(parts, slot, sums, d, tl.sum(relaxed) * LN2, d_lambda_b, True, block == 0, sizes)
