"""(K_ww + δI)^{−1/2} of every head, and its derivative, by matrix products in float32.

Coupled Newton–Schulz on A = K_ww + δI, with c the largest row sum of A (at least its largest eigenvalue) and ρ ≥ 1:

    Y₀ = A/c,  Z₀ = I;   V = ρ(3I − ρ²ZY)/2 − I,  Y ← Y + YV,  Z ← Z + VZ;   Y → (A/c)^{1/2},  Z → (A/c)^{−1/2}

A step maps every x = √(λ/c) in [low, 1] to ρx(3 − ρ²x²)/2: ρ > 1 while low is small makes a small x grow by 2.1
instead of 1.5, so half of the steps do, and half of the rounding.  V vanishes as the iteration converges, so the last
products add nothing but small numbers to Y and Z.  Y and Z must stay as they come: making them symmetric would break
their commuting, on which the stability of the coupled form rests.

Centred features have K̃_ww in the place of K_ww: A is divided by κ̃(1) ≥ 1, the diagonal of K̃_ww, first, and
A^{−1/2} = (A/κ̃(1))^{−1/2}/√κ̃(1) at the end.

Backward: the derivative of the same iteration in the direction dW.  The derivative of A^{−1/2} is its own adjoint
(A is symmetric), so this solves the Sylvester equation of reference/README.md, to the accuracy of the forward pass.

One program per head; its matrices lie in a workspace (a few hundred kilobytes: the second-level cache) and are worked
on in blocks, with barriers in between.  In registers five to ten of them would spill from 64 landmarks on.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device.head import head_parameters, plain_parameters
from ..device.primitives import dot, rounded
from ..device.rows import wide
from ..host.launch import device_of, kernel, launch
from ..host.tiles import INTERPRETER, Tile, padded
from .problem import Landmarks, centred_value, centring_of

# A [64, 64] block is 16 registers a thread; products take 16 columns at a time, since tf32x3 splits each into three.
TILE = Tile(rows=64, depth=16, warps=8, stages=1)
GROWTH = 2.0  # largest ρ²: at 3 the largest eigenvalue would be mapped near 0, at 1 there would be twice as many steps
CONVERGED = 1 - 1e-4  # of low: one more step squares the rest
SMALLEST_RIDGE = 2.0**-20  # rounding moves the eigenvalues of K_ww by as much: a smaller one would not keep A positive


def schedule(landmarks: int, ridge: float) -> tuple[int, float]:
    """(steps, low) for eigenvalues in [δ, R + δ]: 11 steps at R = 64, δ = 1e-3, and never more than 18."""
    low = first = math.sqrt(ridge / (landmarks + ridge))
    steps = 1
    while low < CONVERGED:
        square = min(GROWTH, 3 / (1 + low + low * low))
        scale = 0.5 * math.sqrt(square)
        low = min(scale * low * (3 - square * low * low), scale * (3 - square))
        steps += 1
    return steps, first


@triton.jit
def _advance(low, GROWTH: tl.constexpr):
    """(ρ², the next low) of one step."""
    square = tl.minimum(GROWTH, 3.0 / (1.0 + low + low * low))
    scale = 0.5 * tl.sqrt(square)
    return square, tl.minimum(scale * low * (3.0 - square * low * low), scale * (3.0 - square))


@triton.jit
def _correction(zy, eye, half, square):
    """V from ZY, ρ/2 and ρ²: exact where ZY is near I."""
    return (half * (3.0 - square) - 1.0) * eye - half * square * (zy - eye)


@triton.jit
def _identity(i, j):
    return tl.where(i[:, None] == j[None, :], 1.0, 0.0)


@triton.jit
def landmark_cosines(w, inverse, i, j, stride, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """⟨ŵ_i, ŵ_j⟩ [I, J]; IEEE products, because A^{−1/2} magnifies what is lost here by up to its condition."""
    cosine = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    for start in range(0, DP, 16):
        d = start + tl.arange(0, 16)
        left = tl.load(w + i[:, None] * stride + d[None, :], mask=(i < R)[:, None] & (d < D)[None, :], other=0.0)
        right = tl.load(w + j[None, :] * stride + d[:, None], mask=(j < R)[None, :] & (d < D)[:, None], other=0.0)
        cosine += dot(left, right, "ieee")
    return cosine * tl.load(inverse + i)[:, None] * tl.load(inverse + j)[None, :]


@triton.jit
def _regularised(
    w, inverse, parameters, h, i, j, stride, top, ridge,
    R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    """A/κ̃(1) [I, J]; rows and columns of padding belong to an identity, whose eigenvalue 1 + δ is in range."""
    cosine = landmark_cosines(w, inverse, i, j, stride, R, D, DP)
    if CENTER:
        directed = (tl.load(inverse + i) > 0)[:, None] & (tl.load(inverse + j) > 0)[None, :]
        beta, epsilon, tau = plain_parameters(parameters, h)
        offset, gain, mean, growth = centring_of(parameters, h)
        value, scale = centred_value(cosine, directed, beta, offset, gain)
        kappa = value / top
    else:
        log2_beta, unused_scale, lam_a, lam_b, tau = head_parameters(parameters, h)
        kappa = tl.exp2(log2_beta * (cosine - 1.0))
    real = (i < R)[:, None] & (j < R)[None, :]
    return tl.where(real, kappa, _identity(i, j)) + ridge * _identity(i, j)


@triton.jit
def _direction(d_whitening, i, j, R: tl.constexpr, RP: tl.constexpr):
    """dW [I, J], 0 in padding."""
    real = (i < R)[:, None] & (j < R)[None, :]
    return tl.load(d_whitening + i[:, None] * RP + j[None, :], mask=real, other=0.0)


@triton.jit
def _product(a, b, i, j, RP: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """Block (i, j) [I, J] of the product of two matrices in memory."""
    total = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    for start in range(0, RP, DEPTH):
        k = start + tl.arange(0, DEPTH)
        left = tl.load(a + i[:, None] * RP + k[None, :])
        total += dot(left, tl.load(b + k[:, None] * RP + j[None, :]), PRECISION)
    return total


@kernel
def features_whitening_kernel(
    landmarks, stride_h, stride_r,  # [H, R, D]
    inverse_norm, parameters, d_whitening,  # as in Landmarks, [H, SIZE] or None
    out, workspace,  # [H, RP, RP], [H, 5 or 10, RP, RP]
    ridge, least_ridge, low, steps,
    R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
    GROWTH: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    """(K_ww + δI)^{−1/2} of one head, or dA where dW is given.

    Workspace [5 or 10, RP, RP]: V, Y and Z before and after a step; then their derivatives in the same order.
    """
    size: tl.constexpr = RP * RP
    side: tl.constexpr = RP // BLOCK
    tangent: tl.constexpr = d_whitening is not None
    h = tl.program_id(0).to(tl.int64)
    w, stride_r = landmarks + h * wide(stride_h), wide(stride_r)
    v = workspace + h * (10 if tangent else 5) * size
    y, z, next_y, next_z = v + size, v + 2 * size, v + 3 * size, v + 4 * size
    near = tl.arange(0, BLOCK)
    top = low * 0.0 + 1.0
    if CENTER:
        beta, epsilon, tau = plain_parameters(parameters, h)
        offset, gain, mean, growth = centring_of(parameters, h)
        one, unused_gain = centred_value(top, top > 0, beta, offset, gain)
        top = tl.maximum(one, 1.0)
    ridge = tl.maximum(ridge / top, least_ridge)
    largest = low * 0.0
    for row in range(side):
        i = row * BLOCK + near
        sums = tl.zeros([BLOCK], tl.float32)
        for column in range(0, RP, DEPTH):
            j = column + tl.arange(0, DEPTH)
            a = _regularised(w, inverse_norm + h * RP, parameters, h, i, j, stride_r, top, ridge, R, D, DP, CENTER)
            sums += tl.sum(tl.abs(a), 1)
            tl.store(next_y + i[:, None] * RP + j[None, :], a)
        largest = tl.maximum(largest, tl.max(sums))
    tl.debug_barrier()
    scale = 1.0 / largest
    for block in range(side * side):
        i, j = block // side * BLOCK + near, block % side * BLOCK + near
        index = i[:, None] * RP + j[None, :]
        tl.store(y + index, tl.load(next_y + index) * scale)
        tl.store(z + index, _identity(i, j))
        if tangent:
            tl.store(y + 5 * size + index, _direction(d_whitening + h * SIZE, i, j, R, RP) * scale)
            tl.store(z + 5 * size + index, tl.zeros([BLOCK, BLOCK], tl.float32))
    for _ in range(steps):
        square, low = _advance(low, GROWTH)
        half = 0.5 * tl.sqrt(square)
        tl.debug_barrier()
        for block in range(side * side):
            i, j = block // side * BLOCK + near, block % side * BLOCK + near
            index = i[:, None] * RP + j[None, :]
            zy = _product(z, y, i, j, RP, DEPTH, PRECISION)
            tl.store(v + index, _correction(zy, _identity(i, j), half, square))
            if tangent:
                d_zy = _product(z + 5 * size, y, i, j, RP, DEPTH, PRECISION)
                d_zy += _product(z, y + 5 * size, i, j, RP, DEPTH, PRECISION)
                tl.store(v + 5 * size + index, -half * square * d_zy)
        tl.debug_barrier()
        for block in range(side * side):
            i, j = block // side * BLOCK + near, block % side * BLOCK + near
            index = i[:, None] * RP + j[None, :]
            tl.store(next_y + index, tl.load(y + index) + _product(y, v, i, j, RP, DEPTH, PRECISION))
            tl.store(next_z + index, tl.load(z + index) + _product(v, z, i, j, RP, DEPTH, PRECISION))
            if tangent:
                dy = _product(y + 5 * size, v, i, j, RP, DEPTH, PRECISION)
                dy += _product(y, v + 5 * size, i, j, RP, DEPTH, PRECISION)
                tl.store(next_y + 5 * size + index, tl.load(y + 5 * size + index) + dy)
                dz = _product(v + 5 * size, z, i, j, RP, DEPTH, PRECISION)
                dz += _product(v, z + 5 * size, i, j, RP, DEPTH, PRECISION)
                tl.store(next_z + 5 * size + index, tl.load(z + 5 * size + index) + dz)
        y, z, next_y, next_z = next_y, next_z, y, z
    tl.debug_barrier()
    for block in range(side * side):
        i, j = block // side * BLOCK + near, block % side * BLOCK + near
        index = i[:, None] * RP + j[None, :]
        result = tl.load((z + 5 * size if tangent else z) + index) * (tl.sqrt(scale / top) / (top if tangent else 1.0))
        tl.store(out + h * size + index, rounded(result, out.dtype.element_ty))


def whitening(landmarks: Tensor, prepared: Landmarks, ridge: float, dtype: torch.dtype) -> Tensor:
    """(K_ww + δI)^{−1/2} [H, RP, RP]; what stands in rows and columns of padding is finite."""
    out = landmarks.new_empty((landmarks.shape[0], *prepared.y.shape[1:2] * 2), dtype=dtype)
    _whiten(landmarks, prepared, ridge, None, out)
    return out


def whitening_backward(landmarks: Tensor, prepared: Landmarks, ridge: float, d_whitening: Tensor) -> Tensor:
    """dA [H, RP, RP] from dW [H, RP·RP] with unit stride along its last dimension; 0 in rows and columns of padding."""
    out = landmarks.new_empty((landmarks.shape[0], *prepared.y.shape[1:2] * 2))
    _whiten(landmarks, prepared, ridge, d_whitening, out)
    return out


def _whiten(landmarks: Tensor, prepared: Landmarks, ridge: float, d_whitening: Tensor | None, out: Tensor) -> None:
    h, r, d = landmarks.shape
    rp, largest = out.shape[-1], prepared.largest
    steps, low = schedule(r, max(ridge / (largest or 1.0), SMALLEST_RIDGE))
    device = device_of(landmarks)
    cut = INTERPRETER if device.family == "interpreter" else TILE
    constants: dict[str, Any] = {
        "R": r, "RP": rp, "D": d, "DP": padded(d), "BLOCK": min(cut.rows, rp), "DEPTH": min(cut.depth, rp),
        "GROWTH": GROWTH, "SIZE": 0 if d_whitening is None else d_whitening.stride(0), "PRECISION": device.precision,
        "CENTER": largest is not None,
    }  # fmt: skip
    workspace = landmarks.new_empty((h, 5 if d_whitening is None else 10, rp, rp))
    tensors = (
        landmarks,
        *landmarks.stride()[:2],
        prepared.inverse_norm,
        prepared.parameters,
        d_whitening,
        out,
        workspace,
    )
    launch(features_whitening_kernel, h, (*tensors, ridge, SMALLEST_RIDGE, low, steps), constants, cut)
