"""Backward of reading: one pass over the queries gives dq, and the sums dz, dg^T and the parameters' parts.

    dP_ij = ⟨do_i, z_j⟩,  dS_ij = W^q_ij (dP_ij − Σ_j W^q_ij dP_ij),  dz_j = Σ_i W^q_ij do_i,  dg^T_j = Σ_i dS_ij

and from dℓ = dS on as `device.gradients` says.  A program walks a stretch of the queries of one head.  Its sums hold
DEPTH columns of dŷ and VDEPTH columns of dz: longer head dims are shared among programs, which form the logits anew.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ....problem import Operands, Options
from ..device.gradients import gradient_tile, leave_tile, no_sums, store_tile_sums
from ..device.head import gradient_factor, head_of, load_references
from ..device.logits import token_logits
from ..device.places import places_of
from ..device.primitives import dot, rounded, tokens_by
from ..device.rows import few_keys, load_rows, rows_of, segment_of
from ..device.softmax import below_top, dropout_constants, keep_mask, numerators, read_gradient
from ..host.groups import Dropout, Segments, cut_of, rule_of, sizes_of
from ..host.launch import Split, device_of, kernel, launch
from ..host.rows import stride_step, strided, unit_rows
from ..parameters.gradients import Partials
from ..parameters.prepare import References
from .read import Pooled, dual_potential, given_potential, load_pooled, read_range, seeds_of, store_zeros


@triton.jit
def output_products(gradients, rows, live, z, bh, z_t, use, operand: tl.constexpr, sizes, cut):
    """⟨do_i, z_j⟩ [BL, MP]; z_t: the first VDEPTH columns of z·use, transposed.  And the first columns of do."""
    columns = tl.arange(0, cut.VDEPTH)
    do = load_rows(gradients, rows, live, columns, sizes.E)
    product = tokens_by(do, z_t, cut.PRECISION, cut.ACROSS)
    if sizes.EP > cut.VDEPTH:
        for first in range(cut.VDEPTH, sizes.EP, cut.VDEPTH):
            chunk = load_rows(gradients, rows, live, first + columns, sizes.E)
            z_chunk = rounded(load_pooled(z, bh, first, sizes, cut.VDEPTH) * use, operand)
            product += tokens_by(chunk, tl.trans(z_chunk), cut.PRECISION, cut.ACROSS)
    return product, do


@kernel
def read_backward_kernel(
    query, stride_qb, stride_qh, stride_qn,  # [B, H, L, D], strides in units of cut.STEP
    d_o, stride_ob, stride_oh, stride_on,  # [B, H, L, E], likewise
    log_a, stride_ab, stride_ah, stride_an,  # [B, H, S] or None
    position, stride_pb, stride_ph, stride_pn,  # [B, H, L, P] or None
    d_query, stride_db, stride_dh, stride_dn,  # [B, H, L, D] or None, as the queries
    references, queries_at, keys_at, pooled, dropout,  # References, Segments twice, Pooled, Dropout
    part_z, parts,  # [BH, splits, MP, EP] or None, Partials
    H, L, S, stretch, splits, slots, iterations, threshold,
    rule, sizes, cut,
):  # fmt: skip
    """`stretch` queries of one head, DEPTH columns of dq and dŷ, VDEPTH columns of dz."""
    MP: tl.constexpr = sizes.MP
    d_blocks: tl.constexpr = sizes.DP // cut.DEPTH
    e_blocks: tl.constexpr = sizes.EP // cut.VDEPTH
    blocks: tl.constexpr = d_blocks if d_blocks > e_blocks else e_blocks
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks % splits
    bh = (tl.program_id(0) // (blocks * splits)).to(tl.int64)
    b, h = bh // H, bh % H
    stream, counter = dropout, bh
    if queries_at.first is not None:  # a segment of a packed batch has a seed of its own
        if dropout.seed is not None:
            stream, counter = Dropout(dropout.seed + b, dropout.keep_scale), h
    key_b, S = segment_of(keys_at, b, S)
    b, L = segment_of(queries_at, b, L)
    j = tl.arange(0, MP)
    d = block % d_blocks * cut.DEPTH + tl.arange(0, cut.DEPTH)
    e = block % e_blocks * cut.VDEPTH + tl.arange(0, cut.VDEPTH)
    queries = rows_of(query, b, h, stride_qb, stride_qh, stride_qn, L, cut.STEP)
    gradients = rows_of(d_o, b, h, stride_ob, stride_oh, stride_on, L, cut.STEP)
    masses = rows_of(log_a, key_b, h, stride_ab, stride_ah, stride_an, S, 1) if log_a is not None else None
    out = rows_of(d_query, b, h, stride_db, stride_dh, stride_dn, L, cut.STEP) if d_query is not None else None
    places = places_of(position, references, b, h, stride_pb, stride_ph, stride_pn, sizes) if sizes.P > 0 else None
    head = head_of(references, h, sizes, cut)
    y_own = load_references(head.y, block % d_blocks * cut.DEPTH, MP, sizes.DP, cut.DEPTH)
    factor = gradient_factor(references.parameters, h, rule.DOT)
    operand: tl.constexpr = references.y.dtype.element_ty
    use = 1.0
    if dropout.seed is None:  # where one key takes part alone, every z_j is its value and dS is exactly 0
        use = tl.where(few_keys(masses, S), 0.0, 1.0)
    z_t = tl.trans(rounded(load_pooled(pooled.z, bh, 0, sizes, cut.VDEPTH) * use, operand))
    d_z = tl.zeros([MP, cut.VDEPTH], tl.float32)
    d_g = tl.zeros([MP], tl.float32)
    sums = no_sums(sizes, cut)
    end = tl.minimum(L, (split + 1) * stretch)
    if pooled.g is not None:
        given, seen = given_potential(pooled.g, bh, sizes)
        if not seen:
            if out is not None:
                store_zeros(out, split * stretch, end, sizes.D, cut.DEPTH, sizes.DP, cut)
            end = split * stretch
    # What is invariant in the loop stays there: held through it, it spills.
    for start in tl.range(split * stretch, end, cut.ROWS, disable_licm=True):
        rows = start + tl.arange(0, cut.ROWS)
        live = rows < end
        l, kappa, cosine, inverse, x = token_logits(queries, rows, live, places, head, rule.DOT, sizes, cut)
        # Read in the loop: a thread cannot hold its share of the columns beside the tiles.
        g = dual_potential(head, pooled, bh, iterations, rule.UPDATE_ROWS, sizes)
        w = numerators(l, kappa, g, below_top(g, head.scale), head.scale, rule.RANGE)
        d_o_z, do = output_products(gradients, rows, live, pooled.z, bh, z_t, use, operand, sizes, cut)
        keep = keep_mask(stream, counter, L, rows, threshold, sizes)
        kept, d_s = read_gradient(w, d_o_z, keep, stream, sizes)
        if e_blocks > 1:
            do = load_rows(gradients, rows, live, e, sizes.E)
        if part_z is not None:
            d_z += dot(tl.trans(rounded(kept, do.dtype)), do, cut.PRECISION)
            d_g += tl.sum(d_s, 0)
        if d_blocks > 1:
            x = load_rows(queries, rows, live, d, sizes.D)
        sums = leave_tile(
            sums, d_s, 0.0, kappa, cosine, inverse, x, y_own, factor, head.beta, out, rows, live, live, d,
            block < d_blocks, places, parts, True, rule.DOT, sizes, cut,
        )  # fmt: skip
    if part_z is not None:
        if block < e_blocks:
            at = part_z + ((bh * splits + split) * MP + j)[:, None] * sizes.EP
            tl.store(at + e[None, :], d_z)
        if block == 0:
            tl.store(parts.log_b + (bh * slots + split) * MP + j, d_g)
    store_tile_sums(parts, bh * slots + split, sums, d, 0.0, 0.0, block < d_blocks, block == 0, sizes)


def read_backward(
    x: Operands, opt: Options, prepared: References, pooled: Pooled, d_o: Tensor, split: Split,
    d_query: Tensor | None, part_z: Tensor | None, parts: Partials, at: tuple[Segments, Segments] | None = None,
) -> None:  # fmt: skip
    """One pass over the queries: d_query [B, H, L, D], part_z [BH, splits, MP, EP] and the first slots of `parts`.

    Without part_z neither dz nor dg^T is wanted.  at: the segments of queries and of keys.
    """
    assert x.query is not None
    query, d_o, sizes = unit_rows(x.query), unit_rows(d_o), sizes_of(x)
    (b, h), l, packed = pooled.z.shape[:2], query.shape[2], at is not None
    queries_at, keys_at = at or (Segments(), Segments())
    device, t = device_of(query), gradient_tile(x, opt, "read_backward")
    threshold, keep_scale = dropout_constants(opt.dropout_p)
    # Of a memory nothing is known of its keys: as many as keep every gradient.
    keys, iterations = (2, 1) if pooled.c is None else (x.key.shape[2], pooled.c.shape[2])
    step = stride_step(query, d_o, d_query)
    tokens = (*strided(query, step, packed), *strided(d_o, step, packed), *strided(x.log_a, packed=packed))
    tokens = (*tokens, *strided(unit_rows(x.query_position), packed=packed), *strided(d_query, step, packed))
    dropout = Dropout(seeds_of(x, queries_at), keep_scale)
    groups = (prepared, queries_at, keys_at, pooled, dropout, part_z, parts)
    counts = (h, l, keys, *split, parts.log_b.shape[1], iterations, threshold)
    cut = cut_of(t, sizes, device, step, t.across)
    constants = {"rule": rule_of(opt, read_range(x, opt)).compiled, "sizes": sizes.compiled, "cut": cut.compiled}
    programs = b * h * split.programs * max(sizes.DP // cut.DEPTH, sizes.EP // cut.VDEPTH)
    launch(read_backward_kernel, programs, (*tokens, *groups, *counts), constants, t)
