"""What both directions share: landmarks prepared as references are, how they are cut, products of tokens with them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....problem import Operands, Options
from ....reference.centring import Centring, centring, limit
from ..device.head import head_parameters, plain_parameters
from ..device.primitives import dot, expm1, inverse_norm
from ..device.rows import load_rows
from ..host.groups import Group
from ..host.launch import device_of
from ..host.tiles import Tile, padded, tile
from ..parameters.prepare import prepared_with_norms


class Landmarks(NamedTuple):
    """Landmarks, prepared as references are."""

    y: Tensor  # [H, RP, DP] ŵ in the dtype of the tokens
    inverse_norm: Tensor  # [H, RP] 1/‖w‖
    parameters: Tensor  # [H, NUMBERS]: the bandwidth, and the centring in the places that `centring_of` reads
    largest: float | None  # what κ̃(1) does not exceed; None where κ is not centred


def prepared_landmarks(
    x: Tensor, landmarks: Tensor, bandwidth: Tensor | None, scalar: float, center: bool
) -> Landmarks:  # fmt: skip
    """The landmarks of one call on tokens x; a centring travels in the places of hyperparameters that features lack."""
    absent = (None,) * 11
    x_, d = Operands(None, x, x, landmarks, *absent)._replace(bandwidth=bandwidth), landmarks.shape[-1]
    scalars, largest = (scalar, 1.0, 1.0, 1.0, 1.0), limit(bandwidth, scalar, d) if center else None
    if center and bandwidth is None:
        offset, gain, mean, growth = _numbers(scalar, d)
        scalars = (scalar, gain, offset, mean, growth)
    elif center and bandwidth is not None:
        numbers = Centring(*[t.to(landmarks.dtype) for t in centring(bandwidth, d)])
        x_ = x_._replace(epsilon=numbers.gain, key_relaxation=numbers.offset)
        x_ = x_._replace(reference_relaxation=numbers.mean, position_scale=numbers.growth)
    found, inverse_norm = prepared_with_norms(x_, Options(scalars, "rbf", num_iters=1))
    return Landmarks(found.y, inverse_norm, found.parameters, largest)


@functools.lru_cache(maxsize=256)
def _numbers(scalar: float, d: int) -> tuple[float, ...]:
    """The centring of a number β, on the host: a call on it asks nothing of the device."""
    found = centring(torch.tensor(scalar, dtype=torch.float64, device="cpu"), d)
    return tuple(t.item() for t in found)


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
    CENTER: bool  # whether κ̃ takes the place of κ


def landmark_cut(x: Tensor, landmarks: Tensor, kind: str, step: int, center: bool) -> tuple[Tile, Cut]:
    """The tile of a kernel, and what follows from it and the sizes."""
    r, d = landmarks.shape[1:]
    rp, dp, device = padded(r), padded(d), device_of(x)
    t = tile(kind, device.family, max(r, d), x.element_size())
    return t, _cut(r, rp, d, dp, t.rows, min(t.depth, dp), min(t.depth, rp), step, device.precision, center)


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


@triton.jit
def centring_of(parameters, h):
    """(c₀, s, A, d log s/dβ) of head h."""
    log2_beta, unused_scale, offset, mean, unused_tau = head_parameters(parameters, h)
    beta, gain, growth = plain_parameters(parameters, h)
    return offset, gain, mean, growth


@triton.jit
def centred_value(cosine, directed, beta, offset, gain):
    """(κ̃, s) of cosines [I, J], both 0 where a side has no direction."""
    scale = tl.where(directed, gain, 0.0)
    return scale * expm1(beta * (cosine - offset)), scale


@triton.jit
def value_and_slope(cosine, directed, beta, log2_beta, offset, gain, CENTER: tl.constexpr):
    """κ and dκ/dĉ / β of cosines [I, J], of κ̃ if CENTER."""
    if CENTER:
        value, scale = centred_value(cosine, directed, beta, offset, gain)
        return value, value + scale
    else:
        value = tl.exp2(log2_beta * (cosine - 1.0))
        return value, value
