"""Backward of the Nyström features: one pass over the tokens, then the landmarks.

    dκ' = dψ Wᵀ (not yet times ‖x‖),  dĉ' = βκ' dκ',  dx = dĉ' ŵ + x̂ (Σ_r κ dκ' − Σ_r dĉ' ĉ),
    dŵ = dĉ'ᵀ x,   dW = (‖x‖κ)ᵀ dψ,   dβ = Σ ‖x‖ dκ' ∂κ/∂β

with κ' = κ and ∂κ/∂β = κ (ĉ − 1); for the centred κ̃ (problem.py) κ' = κ̃ + s and ∂κ̃/∂β = κ' (ĉ − A) + κ̃ d log s/dβ.

The norms cancel from dx and dŵ.  A program walks a stretch of the tokens of one head and keeps a few landmarks' rows of
dW and dŵ; partial sums of all programs are added in a fixed order.  Then dA from dW (whitening.py), and

    dĉ_ww = β (dA + dAᵀ) K'_ww,   dŵ += dĉ_ww ŵ,   dβ += Σ dA ∂K_ww/∂β,   dw = (dŵ − ŵ⟨ŵ, dŵ⟩)/‖w‖
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton.language as tl
from torch import Tensor

from ....problem import empty_in_order
from ..device.head import head_parameters, plain_parameters
from ..device.primitives import dot, rounded
from ..device.rows import load_rows, rows_of, store_rows, wide
from ..host.launch import device_of, kernel, launch, split_tokens
from ..host.rows import rows_like, stride_step, strided, unit_rows
from ..host.tiles import INTERPRETER, Tile
from .problem import (
    Landmarks,
    centring_of,
    inverse_lengths,
    landmark_cut,
    landmark_products,
    prepared_landmarks,
    value_and_slope,
)
from .whitening import landmark_cosines, whitening, whitening_backward

EXTRA = 16  # numbers behind dW and dŵ in a partial sum: dβ of up to 16 blocks of landmarks
SUM_TILE = Tile(rows=16, depth=256, warps=4, stages=1)  # partial sums are read once: rows · depth loads in flight
LANDMARK_TILE = Tile(rows=16, depth=16, warps=4, stages=1)  # [16, 256] sums are 32 registers a thread


@kernel
def features_backward_kernel(
    x, stride_xb, stride_xh, stride_xn,  # [B, H, N, D], strides in units of cut.STEP
    d_psi, stride_pb, stride_ph, stride_pn,  # [B, H, N, R], likewise
    d_x, stride_db, stride_dh, stride_dn,  # [B, H, N, D] or None, likewise
    y, inverse_norm, parameters, whitening,  # as in Landmarks, [H, RP, RP]
    sums,  # [BH, splits, SIZE] or None
    H, N, stretch, splits,
    SIZE: tl.constexpr, cut,
):  # fmt: skip
    """dx from all landmarks, or partial sums of RC rows of dW [RP, RP] and dŵ [RP, DP]; both at once if RC = RP."""
    RP: tl.constexpr = cut.RP
    DP: tl.constexpr = cut.DP
    RC: tl.constexpr = cut.RC
    blocks: tl.constexpr = RP // RC if d_x is None else 1
    split = tl.program_id(0) // blocks % splits
    bh = (tl.program_id(0) // (blocks * splits)).to(tl.int64)
    b, h = bh // H, bh % H
    tokens = rows_of(x, b, h, stride_xb, stride_xh, stride_xn, N, cut.STEP)
    gradients = rows_of(d_psi, b, h, stride_pb, stride_ph, stride_pn, N, cut.STEP)
    d_tokens = rows_of(d_x, b, h, stride_db, stride_dh, stride_dn, N, cut.STEP) if d_x is not None else None
    y += h * RP * DP
    whitening += h * RP * RP
    near, j, d = tl.arange(0, RC), tl.arange(0, RP), tl.arange(0, DP)
    first = tl.program_id(0) % blocks * RC
    last = RP if d_x is not None else first + RC
    log2_beta, scale, lam_a, lam_b, squared_tau = head_parameters(parameters, h)
    beta, epsilon, tau = plain_parameters(parameters, h)
    offset, gain, mean, growth = centring_of(parameters, h)
    if sums is not None:
        d_w, d_y = tl.zeros([RC, RP], tl.float32), tl.zeros([RC, DP], tl.float32)
        d_beta = tl.zeros([cut.ROWS], tl.float32)
    for start in range(split * stretch, tl.minimum(N, (split + 1) * stretch), cut.ROWS):
        rows = start + tl.arange(0, cut.ROWS)
        live = rows < N
        inverse, length = inverse_lengths(tokens, rows, live, cut)
        if d_x is not None:
            out = tl.zeros([cut.ROWS, DP], tl.float32)
            along = tl.zeros([cut.ROWS], tl.float32)
        for landmark in range(first, last, RC):
            r = landmark + near
            product = landmark_products(tokens, rows, live, y, r, cut)
            cosine = product * inverse[:, None]
            d_kappa = tl.zeros([cut.ROWS, RC], tl.float32)
            for other in range(0, RP, RC):
                columns = other + near
                w = tl.load(whitening + r[:, None] * RP + columns[None, :])
                d_kappa += dot(load_rows(gradients, rows, live, columns, cut.R), tl.trans(w), cut.PRECISION)
            directed = (tl.load(inverse_norm + h * RP + r) > 0)[None, :]
            kappa, slope = value_and_slope(cosine, directed, beta, log2_beta, offset, gain, cut.CENTER)
            d_kappa = tl.where((inverse > 0)[:, None], d_kappa, 0.0)
            d_log = slope * d_kappa
            d_product = rounded(beta * d_log, x.dtype.element_ty)
            if cut.CENTER:  # by sums of a row, which take fewer registers
                of_kappa, of_slope = tl.sum(d_kappa * kappa, 1), tl.sum(d_log * (cosine - mean), 1)
            if d_x is not None:
                if cut.CENTER:
                    along += of_kappa - beta * (of_slope + mean * tl.sum(d_log, 1))
                else:
                    along += tl.sum(d_kappa * kappa - d_log * (beta * cosine), 1)
                out += dot(d_product, tl.load(y + r[:, None] * DP + d[None, :]), cut.PRECISION)
            if sums is not None:
                d_y += dot(tl.trans(d_product), load_rows(tokens, rows, live, d, cut.D), cut.PRECISION)
                scaled = rounded(kappa * length[:, None], x.dtype.element_ty)
                d_w += dot(tl.trans(scaled), load_rows(gradients, rows, live, j, cut.R), cut.PRECISION)
                if cut.CENTER:
                    d_beta += (of_slope + growth * of_kappa) * length
                else:
                    d_beta += tl.sum(d_log * (cosine - 1.0), 1) * length
        if d_x is not None:
            own = load_rows(tokens, rows, live, d, cut.D).to(tl.float32)
            out += own * (along * inverse)[:, None]
            store_rows(d_tokens, rows, live, d, cut.D, out)
    if sums is not None:
        sums += (bh * splits + split) * SIZE
        r = first + near
        tl.store(sums + r[:, None] * RP + j[None, :], d_w)
        tl.store(sums + RP * RP + r[:, None] * DP + d[None, :], d_y)
        tl.store(sums + RP * (RP + DP) + first // RC, tl.sum(d_beta, 0))


@kernel
def features_sums_backward_kernel(
    sums, out, H, B, splits, USED: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """out[h] = Σ over the batch and the splits of the first USED of sums [B, H, splits, SIZE]: BLOCK of one head."""
    h = (tl.program_id(0) // tl.cdiv(USED, BLOCK)).to(tl.int64)
    n = tl.program_id(0) % tl.cdiv(USED, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, B * splits, ROWS):
        part = start + tl.arange(0, ROWS)
        row = (part // splits * H + h) * splits + part % splits
        mask = (part < B * splits)[:, None] & (n < USED)[None, :]
        total += tl.sum(tl.load(sums + row[:, None] * SIZE + n[None, :], mask=mask, other=0.0), 0)
    tl.store(out + h * SIZE + n, total, mask=n < USED)


@kernel
def features_landmarks_backward_kernel(
    landmarks, stride_h, stride_r,  # [H, R, D]
    d_landmarks, stride_oh, stride_or, stride_od,  # [H, R, D] or None
    d_bandwidth,  # [H] or None
    inverse_norm, parameters,  # as in Landmarks
    d_a, sums,  # [H, RP, RP], [H, SIZE]
    R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SIZE: tl.constexpr,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    """d landmarks and dβ of one head, from dA and the summed dŵ and dβ of the tokens."""
    h = tl.program_id(0).to(tl.int64)
    landmarks += h * wide(stride_h)
    stride_r = wide(stride_r)
    inverse = inverse_norm + h * RP
    d_a += h * RP * RP
    sums += h * SIZE + RP * RP
    log2_beta, scale, lam_a, lam_b, squared_tau = head_parameters(parameters, h)
    beta, epsilon, tau = plain_parameters(parameters, h)
    offset, gain, mean, growth = centring_of(parameters, h)
    d = tl.arange(0, DP)
    blocks = tl.arange(0, 16)
    d_beta = tl.sum(tl.load(sums + RP * DP + blocks, mask=blocks < BLOCKS, other=0.0))
    for first in range(0, RP, ROWS):
        i = first + tl.arange(0, ROWS)
        total = tl.load(sums + i[:, None] * DP + d[None, :])  # [ROWS, DP] dŵ
        for other in range(0, RP, COLUMNS):
            j = other + tl.arange(0, COLUMNS)
            cosine = landmark_cosines(landmarks, inverse, i, j, stride_r, R, D, DP)
            directed = (tl.load(inverse + i) > 0)[:, None] & (tl.load(inverse + j) > 0)[None, :]
            kappa, slope = value_and_slope(cosine, directed, beta, log2_beta, offset, gain, CENTER)
            here = tl.load(d_a + i[:, None] * RP + j[None, :])
            if CENTER:
                d_beta += tl.sum(here * kappa) * growth
            here *= slope
            there = tl.load(d_a + j[None, :] * RP + i[:, None]) * slope
            d_beta += tl.sum(here * (cosine - (mean if CENTER else 1.0)))
            inside = (j < R)[:, None] & (d < D)[None, :]
            other_w = tl.load(landmarks + j[:, None] * stride_r + d[None, :], mask=inside, other=0.0)
            other_w *= tl.load(inverse + j)[:, None]
            total += dot(beta * (here + there), other_w, PRECISION)
        inside = (i < R)[:, None] & (d < D)[None, :]
        shrink = tl.load(inverse + i)
        unit = tl.load(landmarks + i[:, None] * stride_r + d[None, :], mask=inside, other=0.0) * shrink[:, None]
        total = (total - unit * tl.sum(total * unit, 1)[:, None]) * shrink[:, None]
        if d_landmarks is not None:
            at = d_landmarks + h * wide(stride_oh) + i[:, None] * wide(stride_or) + d[None, :] * wide(stride_od)
            tl.store(at, total, mask=inside)
    if d_bandwidth is not None:
        tl.store(d_bandwidth + h, d_beta)


def _over_tokens(
    x: Tensor, landmarks: Tensor, prepared: Landmarks, w: Tensor, d_psi: Tensor, d_x: Tensor | None, parameters: bool
) -> tuple[Tensor, int]:
    """Writes dx where it is wanted; (dW, dŵ, dβ summed over tokens and batch [H, SIZE], how many parts dβ has)."""
    b, h, n, _ = x.shape
    step = stride_step(x, d_psi, d_x)
    t, cut = landmark_cut(x, landmarks, "features_backward", step, prepared.largest is not None)
    blocks, size = cut.RP // cut.RC, cut.RP * (cut.RP + cut.DP) + EXTRA
    split = split_tokens(n, t, b * h, device_of(x).multiprocessors)
    constants = {"SIZE": size, "cut": cut.compiled}
    tokens, counts = (*strided(x, step), *strided(d_psi, step)), (h, n, *split)
    given = (prepared.y, prepared.inverse_norm, prepared.parameters, w)
    sums = landmarks.new_empty((b, h, split.programs, size)) if parameters else None
    programs = b * h * split.programs
    if parameters and d_x is not None and blocks > 1:
        args = (*tokens, *strided(d_x, step), *given, None, *counts)
        launch(features_backward_kernel, programs, args, constants, t)
        d_x = None
    programs *= blocks if d_x is None else 1
    args = (*tokens, *strided(d_x, step), *given, sums, *counts)
    launch(features_backward_kernel, programs, args, constants, t)
    out = landmarks.new_empty((h, size))
    if sums is not None:
        used = size - EXTRA + blocks
        cut_sum: dict[str, Any] = {"USED": used, "SIZE": size, "ROWS": SUM_TILE.rows, "BLOCK": SUM_TILE.depth}
        programs = h * -(-used // SUM_TILE.depth)
        launch(features_sums_backward_kernel, programs, (sums, out, h, b, split.programs), cut_sum, SUM_TILE)
    return out, blocks


def features_backward(
    x: Tensor, landmarks: Tensor, bandwidth: Tensor | None, scalar: float, ridge: float, center: bool,
    d_psi: Tensor, needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(dx, d landmarks, d bandwidth), None where not needed."""
    x_, d_psi, landmarks_ = unit_rows(x), unit_rows(d_psi), unit_rows(landmarks)
    d_x = rows_like(x, x.shape[-1]) if needs[0] else None
    prepared = prepared_landmarks(x_, landmarks_, bandwidth, scalar, center)
    w = whitening(landmarks_, prepared, ridge, x.dtype)
    wants_bandwidth = needs[2] and bandwidth is not None
    written = None if d_x is None else d_x.rows
    sums, blocks = _over_tokens(x_, landmarks_, prepared, w, d_psi, written, needs[1] or wants_bandwidth)
    result = None if d_x is None else d_x.delivered()
    if not (needs[1] or wants_bandwidth):
        return result, None, None
    d_landmarks = empty_in_order(landmarks, landmarks.shape) if needs[1] else None
    d_bandwidth = landmarks.new_empty(landmarks.shape[:1]) if wants_bandwidth else None
    d_a = whitening_backward(landmarks_, prepared, ridge, sums)
    (h, r, d), (rp, dp) = landmarks.shape, prepared.y.shape[1:]
    tensors = (landmarks_, *landmarks_.stride()[:2], *strided(d_landmarks), d_bandwidth)
    args = (*tensors, prepared.inverse_norm, prepared.parameters, d_a, sums)
    device = device_of(x)
    # ptxas spills 8 bytes for one more block: up to 64 dims on four warps (Triton 3.6), beyond on eight (3.9).
    t = LANDMARK_TILE if dp > 64 else LANDMARK_TILE._replace(warps=8)
    if device.family == "interpreter":
        t = INTERPRETER
    constants = {
        "R": r, "RP": rp, "D": d, "DP": dp, "SIZE": sums.shape[1], "BLOCKS": blocks, "PRECISION": device.precision,
        "ROWS": min(t.rows, rp), "COLUMNS": min(t.depth, rp), "CENTER": center,
    }  # fmt: skip
    launch(features_landmarks_backward_kernel, h, args, constants, t)
    return result, d_landmarks, d_bandwidth
