"""What both directions share: landmarks prepared as references are, how they are cut, products of tokens with them."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ....problem import Operands, Options
from ..device.logits import load_rows
from ..device.primitives import dot, inverse_norm
from ..host.launch import device_of
from ..host.tiles import Tile, padded, tile
from ..parameters.prepare import Prepared, prepare


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
