"""Backward of reading: one pass over the queries gives dq, and the sums dz, dg^T and the parameters' parts.

    dP_ij = ⟨do_i, z_j⟩,  dS_ij = W^q_ij (dP_ij − Σ_j W^q_ij dP_ij),  dz_j = Σ_i W^q_ij do_i,  dg^T_j = Σ_i dS_ij

and from dℓ = dS on as `device.gradients` says.  A program walks a stretch of the queries of one head.  Its sums hold
DEPTH columns of dŷ and VDEPTH columns of dz: longer head dims are shared among programs, which form the logits anew.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from ....problem import Operands, Options
from ..device.gradients import across, gradient_tile, kernel_sums, position_sums, store_sums, token_gradient, tokens_by
from ..device.head import gradient_factor, head_parameters
from ..device.logits import load_references, load_references_t, load_rows, token_logits
from ..device.plan import range_known
from ..device.primitives import dot, rounded
from ..device.softmax import dropout_constants, read_gradient
from ..host.launch import Split, device_of, kernel, launch
from ..host.rows import stride_step, strides, unit_rows
from ..host.tiles import padded, power_of_two
from ..parameters.gradients import Partials
from ..parameters.prepare import Prepared
from .plan_backward import few_keys
from .read import dual_potential, load_pooled


@kernel
def read_backward_kernel(
    query, d_o, log_a, position, y, log_b, pi, parameters, c, z, seed,
    d_query, part_z, part_g, part_y, part_sums, part_position,
    stride_qb, stride_qh, stride_qn, stride_ob, stride_oh, stride_on, stride_db, stride_dh, stride_dn,
    stride_ab, stride_ah, stride_an, stride_pb, stride_ph, stride_pn,
    H, L, S, stretch, splits, slots, iterations, threshold, keep_scale,
    RANGE: tl.constexpr, T_POSITIVE: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, PLACES: tl.constexpr,
    DOT: tl.constexpr, DROPOUT: tl.constexpr, STEP: tl.constexpr,
    BL: tl.constexpr, DEPTH: tl.constexpr, VDEPTH: tl.constexpr, PRECISION: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """`stretch` queries of one head, DEPTH columns of dq and dŷ, VDEPTH columns of dz."""
    d_blocks: tl.constexpr = DP // DEPTH
    e_blocks: tl.constexpr = EP // VDEPTH
    blocks: tl.constexpr = d_blocks if d_blocks > e_blocks else e_blocks
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks % splits
    bh = (tl.program_id(0) // (blocks * splits)).to(tl.int64)
    b, h = bh // H, bh % H
    j = tl.arange(0, MP)
    d = block % d_blocks * DEPTH + tl.arange(0, DEPTH)
    e = block % e_blocks * VDEPTH + tl.arange(0, VDEPTH)
    beta, scale, lam_a, lam_b, tau = head_parameters(parameters, h)
    factor = gradient_factor(parameters, h, DOT)
    query += b * (stride_qb * STEP) + h * (stride_qh * STEP)
    d_o += b * (stride_ob * STEP) + h * (stride_oh * STEP)
    if P > 0:
        position += b * stride_pb + h * stride_ph
        pi += h * M * P
    y += h * MP * DP
    y_t = load_references_t(y, 0, MP, DP, DEPTH)
    y_own = load_references(y, block % d_blocks * DEPTH, MP, DP, DEPTH)
    use = 1.0
    if not DROPOUT:  # where one key takes part alone, every z_j is its value and dS is exactly 0
        if log_a is not None:
            log_a += b * stride_ab + h * stride_ah
        use = tl.where(few_keys(log_a, stride_an, S), 0.0, 1.0)
    z_t = tl.trans(rounded(load_pooled(z, bh, 0, M, MP, E, VDEPTH) * use, y.dtype.element_ty))
    d_z = tl.zeros([MP, VDEPTH], tl.float32)
    d_g = tl.zeros([MP], tl.float32)
    d_y = tl.zeros([MP, DEPTH], tl.float32)
    d_pi = tl.zeros([MP, PP], tl.float32)
    d_beta, d_epsilon, d_tau = (tl.zeros([BL], tl.float32), tl.zeros([BL], tl.float32), tl.zeros([BL], tl.float32))
    end = tl.minimum(L, (split + 1) * stretch)
    for start in range(split * stretch, end, BL):
        rows = start + tl.arange(0, BL)
        live = rows < end
        l, kappa, cosine, inverse, x = token_logits(
            query, rows, live, stride_qn * STEP, position, stride_pn, pi, y, y_t, beta, scale, tau,
            M, D, DP, DEPTH, P, DOT, PRECISION, ACROSS,
        )  # fmt: skip
        # Read in the loop: a thread cannot hold its share of the columns beside the tiles.
        g = dual_potential(log_b, c, bh, iterations, h, lam_b, M, MP, T_POSITIVE)
        if RANGE == "always":
            shift = g - scale - tl.max(g, 0)  # ℓ + g never exceeds the largest g
            w = tl.exp2(kappa * scale + shift[None, :])  # [BL, MP]
        else:
            u = l + g[None, :]
            w = tl.exp2(u - tl.max(u, 1)[:, None])
        do = load_rows(d_o, rows, live, stride_on * STEP, tl.arange(0, VDEPTH), E)
        d_o_z = tokens_by(do, z_t, PRECISION, ACROSS)
        if EP > VDEPTH:
            for first in range(VDEPTH, EP, VDEPTH):
                chunk = load_rows(d_o, rows, live, stride_on * STEP, first + tl.arange(0, VDEPTH), E)
                z_chunk = rounded(load_pooled(z, bh, first, M, MP, E, VDEPTH) * use, y.dtype.element_ty)
                d_o_z += tokens_by(chunk, tl.trans(z_chunk), PRECISION, ACROSS)
        kept, d_s = read_gradient(w, d_o_z, seed, bh, L, rows, threshold, keep_scale, M, DROPOUT)
        if e_blocks > 1:
            do = load_rows(d_o, rows, live, stride_on * STEP, e, E)
        if part_z is not None:
            d_z += dot(tl.trans(rounded(kept, do.dtype)), do, PRECISION)
            d_g += tl.sum(d_s, 0)
        if d_blocks > 1:
            x = load_rows(query, rows, live, stride_qn * STEP, d, D)
        operand, x_hat, d_x = token_gradient(
            d_s, kappa, cosine, inverse, x, y_own, factor, d_blocks == 1, DOT, PRECISION, ACROSS
        )
        if d_query is not None:
            at = (
                d_query
                + b * (stride_db * STEP)
                + h * (stride_dh * STEP)
                + rows.to(tl.int64)[:, None] * (stride_dn * STEP)
            )
            if block < d_blocks:
                tl.store(at + d[None, :], rounded(d_x, x.dtype), mask=live[:, None] & (d < D)[None, :])
        if part_y is not None:
            d_y += dot(tl.trans(operand), x_hat, PRECISION)
        if part_sums is not None:
            beta_rows, epsilon_rows = kernel_sums(d_s, kappa, cosine, DOT)
            d_beta += beta_rows
            d_epsilon += epsilon_rows
        if PLACES:
            tau_rows, pi_sums = position_sums(d_s, position, rows, live, stride_pn, pi, M, P, PP)
            d_tau += tau_rows
            d_pi += pi_sums
    out = (bh * splits + split) * MP + j
    slot = (bh * slots + split) * MP + j
    if part_z is not None:
        if block < e_blocks:
            tl.store(part_z + out[:, None] * EP + e[None, :], d_z)
        if block == 0:
            tl.store(part_g + slot, d_g)
    if part_y is not None:  # noqa: SIM102  (known when compiled; the inner one is not)
        if block < d_blocks:
            tl.store(part_y + slot[:, None] * DP + d[None, :], d_y)
    if block == 0:
        if part_sums is not None:
            store_sums(part_sums, bh * slots + split, tl.sum(d_beta), tl.sum(d_epsilon), 0.0, 0.0, tl.sum(d_tau))
        if part_position is not None:
            tl.store(part_position + slot[:, None] * PP + tl.arange(0, PP)[None, :], d_pi)


def read_backward(
    x: Operands, opt: Options, prepared: Prepared, state: tuple[Tensor, Tensor], d_o: Tensor, split: Split,
    d_query: Tensor | None, part_z: Tensor | None, parts: Partials,
) -> None:  # fmt: skip
    """One pass over the queries: d_query [B, H, L, D], part_z [BH, splits, MP, EP] and the first slots of `parts`.

    `state` is (z, c).  Without part_z neither dz nor dg^T is wanted.
    """
    assert x.query is not None
    query, d_o = unit_rows(x.query), unit_rows(d_o)
    position = None if x.query_position is None else unit_rows(x.query_position)
    (b, h, l, d), (m, e) = query.shape, state[0].shape[-2:]
    _, mp, dp = prepared.y.shape
    ep = padded(e)
    device = device_of(query)
    cut = gradient_tile(x, opt)
    threshold, keep_scale = dropout_constants(opt.dropout_p)
    step = stride_step(query, d_o, d_query)
    spans = (*strides(query, step), *strides(d_o, step), *strides(d_query, step), *strides(x.log_a), *strides(position))
    references = (prepared.y, prepared.log_b, prepared.position, prepared.parameters)
    tensors = (query, d_o, x.log_a, position, *references, state[1], state[0], x.seed, d_query, part_z, *parts)
    counts = (h, l, x.key.shape[2], *split, parts.log_b.shape[1], state[1].shape[2], threshold, keep_scale)
    p = 0 if position is None else position.shape[-1]
    depth, value_depth = min(cut.depth, dp), min(cut.depth, ep)
    constants = {
        "RANGE": range_known(x, opt), "T_POSITIVE": opt.num_iters > 0, "M": m, "MP": mp, "D": d, "DP": dp, "E": e,
        "EP": ep, "P": p, "PP": power_of_two(p), "PLACES": p > 0 and any(t is not None for t in parts[2:]),
        "DOT": opt.kernel == "dot", "DROPOUT": x.seed is not None, "STEP": step,
        "BL": cut.rows, "DEPTH": depth, "VDEPTH": value_depth, "PRECISION": device.precision,
        "ACROSS": across(device, query),
    }  # fmt: skip
    blocks = max(dp // depth, ep // value_depth)
    launch(read_backward_kernel, b * h * split.programs * blocks, (*tensors, *spans, *counts), constants, cut)
