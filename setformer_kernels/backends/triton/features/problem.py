"""What both directions share: landmarks prepared as references are, how they are cut, products of tokens with them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ....problem import Operands, Options
from ..device.primitives import dot, inverse_norm
from ..device.rows import load_rows
from ..host.groups import Group
from ..host.launch import device_of
from ..host.tiles import Tile, padded, tile
from ..parameters.prepare import prepared_with_norms


class Landmarks(NamedTuple):
    """Landmarks, prepared as references are."""

    y: Tensor  # [H, RP, DP] ŵ in the dtype of the tokens
    inverse_norm: Tensor  # [H, RP] 1/‖w‖
    parameters: Tensor  # [H, NUMBERS], of which only the bandwidth counts


def prepared_landmarks(x: Tensor, landmarks: Tensor, bandwidth: Tensor | None, scalar: float) -> Landmarks:
    """The landmarks of one call on tokens x."""
    absent = (None,) * 11
    x_ = Operands(None, x, x, landmarks, *absent)._replace(bandwidth=bandwidth)
    found, inverse_norm = prepared_with_norms(x_, Options((scalar, 1.0, 1.0, 1.0, 1.0), "rbf", num_iters=1))
    return Landmarks(found.y, inverse_norm, found.parameters)


@dataclass(frozen=True, eq=False)
class Cut(Group):
    """The sides of tokens and landmarks, the powers of two that their tiles have, and how these are cut."""

    R: int
    RP: int
    D: int
    DP: int
    ROWS: int  # tokens of a step
    DEPTH: int  # head dims in one product
    RC: int  # landmarks at a time
    STEP: int  # unit of the strides of tokens
    PRECISION: str  # of float32 products


def landmark_cut(x: Tensor, landmarks: Tensor, kind: str, step: int) -> tuple[Tile, Cut]:
    """The tile of a kernel, and what follows from it and the sizes."""
    r, d = landmarks.shape[1:]
    rp, dp, device = padded(r), padded(d), device_of(x)
    t = tile(kind, device.family, max(r, d), x.element_size())
    return t, _cut(r, rp, d, dp, t.rows, min(t.depth, dp), min(t.depth, rp), step, device.precision)


_cut = functools.cache(Cut)


@triton.jit
def inverse_lengths(x, rows, live, cut):
    """(1/‖x‖, ‖x‖) [BN], both 0 where ‖x‖ ≤ 1e-12."""
    square = tl.zeros([rows.shape[0]], tl.float32)
    for start in range(0, cut.DP, cut.DEPTH):
        wide = load_rows(x, rows, live, start + tl.arange(0, cut.DEPTH), cut.D).to(tl.float32)
        square += tl.sum(wide * wide, 1)
    inverse = inverse_norm(square)
    return inverse, square * inverse


@triton.jit
def landmark_products(x, rows, live, y, r, cut):
    """⟨x_i, ŵ_r⟩ [BN, RC] of some landmarks."""
    product = tl.zeros([rows.shape[0], r.shape[0]], tl.float32)
    for start in range(0, cut.DP, cut.DEPTH):
        d = start + tl.arange(0, cut.DEPTH)
        chunk = load_rows(x, rows, live, d, cut.D)
        product += dot(chunk, tl.trans(tl.load(y + r[:, None] * cut.DP + d[None, :])), cut.PRECISION)
    return product
