"""Nyström features in one pass over the tokens: ψ(x) = ‖x‖ W κ(w, x̂), W = (K_ww + δI)^{−1/2}.

A program takes BN tokens of one head: products with a few normalised landmarks, their κ in registers, and its product
with their rows of W, summed over the landmarks.  The norms stay in float32 and come last.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from ..device.head import head_parameters
from ..device.logits import kernel_value
from ..device.primitives import dot, rounded
from ..host.launch import kernel, launch
from ..host.rows import rows_like, stride_step, strides, unit_rows
from .problem import cut, inverse_lengths, landmark_products, prepared_landmarks, unit_landmarks
from .whitening import whitening


@kernel
def features_kernel(
    x, y, whitening, parameters, psi,
    stride_xb, stride_xh, stride_xn, stride_pb, stride_ph, stride_pn, H, N,
    R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, STEP: tl.constexpr,
    BN: tl.constexpr, DEPTH: tl.constexpr, RC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ψ of BN tokens of one head, RC landmarks at a time."""
    blocks = tl.cdiv(N, BN)
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = bh // H, bh % H
    rows = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    live = rows < N
    x += b * (stride_xb * STEP) + h * (stride_xh * STEP)
    y += h * RP * DP
    whitening += h * RP * RP
    log2_beta, scale, lam_a, lam_b, tau = head_parameters(parameters, h)
    inverse, length = inverse_lengths(x, rows, live, stride_xn * STEP, D, DP, DEPTH)
    j = tl.arange(0, RP)
    out = tl.zeros([BN, RP], tl.float32)
    for first in range(0, RP, RC):
        r = first + tl.arange(0, RC)
        product = landmark_products(x, rows, live, stride_xn * STEP, y, r, D, DP, DEPTH, PRECISION)
        kappa = rounded(kernel_value(product, inverse, log2_beta, False), y.dtype.element_ty)
        out += dot(kappa, tl.load(whitening + r[:, None] * RP + j[None, :]), PRECISION)
    psi += b * (stride_pb * STEP) + h * (stride_ph * STEP)
    psi += rows.to(tl.int64)[:, None] * (stride_pn * STEP) + j[None, :]
    tl.store(psi, rounded(out * length[:, None], psi.dtype.element_ty), mask=live[:, None] & (j < R)[None, :])


def features(x: Tensor, landmarks: Tensor, bandwidth: Tensor | None, scalar: float, ridge: float) -> Tensor:
    """x [B, H, N, D], landmarks [H, R, D] -> ψ [B, H, N, R]."""
    x_, landmarks = unit_rows(x), unit_landmarks(landmarks)
    b, h, n, _ = x.shape
    out = rows_like(x, landmarks.shape[1])
    prepared = prepared_landmarks(x_, landmarks, bandwidth, scalar)
    w = whitening(landmarks, prepared, ridge, x.dtype)
    t, constants = cut(x, landmarks, "features")
    step = stride_step(x_, out.rows)
    args = (x_, prepared.y, w, prepared.parameters, out.rows, *strides(x_, step), *strides(out.rows, step), h, n)
    launch(features_kernel, b * h * -(-n // t.rows), args, constants | {"STEP": step}, t)
    return out.delivered()
