"""Nyström features in one pass over the tokens: ψ(x) = ‖x‖ W κ(w, x̂), W = (K_ww + δI)^{−1/2}.

A program takes BN tokens of one head: products with a few normalised landmarks, their κ in registers, and its product
with their rows of W, summed over the landmarks.  The norms stay in float32 and come last.

Defined by `reference.features.nystrom_features`.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from ..device.head import head_parameters, plain_parameters
from ..device.logits import kernel_value
from ..device.primitives import again, dot, rounded
from ..device.rows import rows_of, store_rows
from ..host.launch import kernel, launch
from ..host.rows import rows_like, stride_step, strided, unit_rows
from .problem import centred_value, centring_of, inverse_lengths, landmark_cut, landmark_products, prepared_landmarks
from .whitening import whitening


@kernel
def features_kernel(
    x, stride_xb, stride_xh, stride_xn,  # [B, H, N, D], strides in units of cut.STEP
    psi, stride_pb, stride_ph, stride_pn,  # [B, H, N, R], likewise
    y, inverse_norm, parameters, whitening,  # as in Landmarks, [H, RP, RP]
    H, N,
    cut,
):  # fmt: skip
    """ψ of a tile of tokens of one head, RC landmarks at a time."""
    blocks = tl.cdiv(N, cut.ROWS)
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = bh // H, bh % H
    rows = tl.program_id(0) % blocks * cut.ROWS + tl.arange(0, cut.ROWS)
    live = rows < N
    tokens = rows_of(x, b, h, stride_xb, stride_xh, stride_xn, N, cut.STEP)
    y += h * cut.RP * cut.DP
    whitening += h * cut.RP * cut.RP
    log2_beta, unused_scale, lam_a, lam_b, squared_tau = head_parameters(parameters, h)
    beta, epsilon, tau = plain_parameters(parameters, h)
    offset, gain, mean, growth = centring_of(parameters, h)
    inverse, length = inverse_lengths(tokens, rows, live, cut)
    j = tl.arange(0, cut.RP)
    out = tl.zeros([cut.ROWS, cut.RP], tl.float32)
    for first in range(0, cut.RP, cut.RC):
        r = first + tl.arange(0, cut.RC)
        product = landmark_products(tokens, rows, live, y, r, cut)
        if cut.CENTER:
            directed = (tl.load(inverse_norm + h * cut.RP + r) > 0)[None, :]
            value, scale = centred_value(product * inverse[:, None], directed, beta, offset, gain)
        else:
            value = kernel_value(product, inverse, log2_beta, False)
        kappa = rounded(value, y.dtype.element_ty)
        out += dot(kappa, tl.load(whitening + r[:, None] * cut.RP + j[None, :]), cut.PRECISION)
    # Where the tile goes is found anew: held through the loop, it spills (D 128, sm_80, Triton 3.6).
    rows = again(rows)
    live = rows < N
    outputs = rows_of(psi, b, h, stride_pb, stride_ph, stride_pn, N, cut.STEP)
    store_rows(outputs, rows, live, j, cut.R, out * length[:, None])


def features(
    x: Tensor, landmarks: Tensor, bandwidth: Tensor | None, scalar: float, ridge: float, center: bool
) -> Tensor:
    """x [B, H, N, D], landmarks [H, R, D] -> ψ [B, H, N, R]."""
    x_, landmarks = unit_rows(x), unit_rows(landmarks)
    b, h, n, _ = x.shape
    out = rows_like(x, landmarks.shape[1])
    prepared = prepared_landmarks(x_, landmarks, bandwidth, scalar, center)
    w = whitening(landmarks, prepared, ridge, x.dtype)
    step = stride_step(x_, out.rows)
    t, cut = landmark_cut(x, landmarks, "features", step, center)
    landmark_args = (prepared.y, prepared.inverse_norm, prepared.parameters, w)
    args = (*strided(x_, step), *strided(out.rows, step), *landmark_args, h, n)
    launch(features_kernel, b * h * -(-n // t.rows), args, {"cut": cut.compiled}, t)
    return out.delivered()
