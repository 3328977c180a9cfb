"""Nyström features in one pass over the tokens: ψ(x) = ‖x‖ W κ(w, x̂), W = (K_ww + δI)^{−1/2}.

A program takes BN tokens of one head: products with a few normalised landmarks, their κ in registers, and its product
with their rows of W, summed over the landmarks.  The norms stay in float32 and come last.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...problem import Operands, Options
from .config import Tile, padded, tile
from .launch import device_of, launch
from .logits import kernel_value, load_rows
from .prepare import Prepared, prepare, rows_like, stride_step, strides, unit_rows
from .primitives import dot, inverse_norm, rounded
from .whitening import whitening

COUNTS = ["stride_xb", "stride_xh", "stride_xn", "stride_pb", "stride_ph", "stride_pn", "H", "N"]


@triton.jit
def inverse_lengths(x, rows, live, stride, D: tl.constexpr, DP: tl.constexpr, DEPTH: tl.constexpr):
    """(1/‖x‖, ‖x‖) [BN], both 0 where ‖x‖ ≤ 1e-12."""
    square = tl.zeros([rows.shape[0]], tl.float32)
    for start in range(0, DP, DEPTH):
        wide = load_rows(x, rows, live, stride, start + tl.arange(0, DEPTH), D).to(tl.float32)
        square += tl.sum(wide * wide, 1)
    inverse = inverse_norm(square)
    return inverse, square * inverse


@triton.jit
def landmark_products(
    x, rows, live, stride, y, r, D: tl.constexpr, DP: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr
):
    """⟨x_i, ŵ_r⟩ [BN, RC] of some landmarks."""
    product = tl.zeros([rows.shape[0], r.shape[0]], tl.float32)
    for start in range(0, DP, DEPTH):
        d = start + tl.arange(0, DEPTH)
        chunk = load_rows(x, rows, live, stride, d, D)
        product += dot(chunk, tl.trans(tl.load(y + r[:, None] * DP + d[None, :])), PRECISION)
    return product


@triton.jit(do_not_specialize=COUNTS)
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
    log2_beta = tl.load(parameters + h * 8)
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


def prepared_landmarks(x: Tensor, landmarks: Tensor, bandwidth: Tensor | None, scalar: float) -> Prepared:
    """ŵ [H, RP, DP] in the dtype of x, 1/‖w‖ and the bandwidths: landmarks are prepared as references are."""
    absent = (None,) * 11
    x_ = Operands(None, x, x, landmarks, *absent)._replace(bandwidth=bandwidth)
    return prepare(x_, Options(scalars=(scalar, 1.0, 1.0, 1.0, 1.0)))


def unit_landmarks(landmarks: Tensor) -> Tensor:
    return landmarks if landmarks.stride(-1) == 1 else landmarks.contiguous()


def cut(x: Tensor, landmarks: Tensor, kind: str) -> tuple[Tile, dict[str, Any]]:
    """The tile of a kernel, and the constants that follow from it and the sizes."""
    r, d = landmarks.shape[1:]
    device = device_of(x)
    t = tile(kind, device.family, max(r, d), x.element_size())
    constants = {"R": r, "RP": padded(r), "D": d, "DP": padded(d), "BN": t.rows, "PRECISION": device.precision}
    return t, constants | {"DEPTH": min(t.depth, padded(d)), "RC": min(t.depth, padded(r))}


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
