"""Positions of a head's tokens and of its references, and the squared distances between them."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .primitives import INF
from .rows import wide


class Places(NamedTuple):
    """Positions of the tokens of one head, with unit stride along P, and of its references [M, P]."""

    start: Any
    stride: Any
    pi: Any


@triton.jit
def places_of(position, references, b, h, stride_b, stride_h, stride_n, sizes):
    """The positions of one head and of the prepared references."""
    head = b * wide(stride_b) + h * wide(stride_h)
    return Places(position + head, wide(stride_n), references.position + h.to(tl.int64) * (sizes.M * sizes.P))


@triton.jit
def coordinate(places, rows, axis):
    """Where a coordinate of the given tokens lies."""
    return places.start + rows * places.stride + axis


@triton.jit
def differences(places, at, axis, sizes):
    """p_i − π_j [BN, MP] along an axis from the tokens' coordinates `at` [BN]."""
    j = tl.arange(0, sizes.MP)
    return at[:, None] - tl.load(places.pi + j * sizes.P + axis, mask=j < sizes.M, other=0.0)[None, :]


@triton.jit
def squared_distance(places, rows, live, sizes):
    """‖p_i − π_j‖² [BN, MP]; 0 for a token that has none (its position is NaN)."""
    distance = tl.zeros([rows.shape[0], sizes.MP], tl.float32)
    for axis in tl.static_range(sizes.P):
        at = tl.load(coordinate(places, rows, axis), mask=live, other=0.0)
        difference = differences(places, at, axis, sizes)
        distance += difference * difference
    return tl.where(distance == distance, distance, 0.0)


@triton.jit
def position_sums(dl, total, places, rows, live, sizes):
    """(Σ_j dℓ ‖p_i − π_j‖² [BN], Σ_i dℓ_ij (p_i − π_j) [MP, PP]); a token whose position is NaN adds nothing.

    A row of dℓ sums to `total` [BN], but for rounding: a squared distance of thousands would multiply that error.  So
    squares count from the row's smallest on, and the smallest times the exact sum.
    """
    j, axes = tl.arange(0, sizes.MP), tl.arange(0, sizes.PP)
    whole = tl.zeros([dl.shape[0]], tl.float32)
    for axis in tl.static_range(sizes.P):
        whole += tl.load(coordinate(places, rows, axis), mask=live, other=0.0)
    placed = whole == whole
    distance = squared_distance(places, rows, live, sizes)
    nearest = tl.min(tl.where((j < sizes.M)[None, :], distance, INF), 1)
    squares = tl.sum(dl * (distance - nearest[:, None]), 1) + nearest * total
    sums = tl.zeros([sizes.MP, sizes.PP], tl.float32)
    for axis in tl.static_range(sizes.P):
        at = tl.load(coordinate(places, rows, axis), mask=live & placed, other=0.0)
        weighted = tl.where(placed[:, None], dl * differences(places, at, axis, sizes), 0.0)
        sums += tl.where(axes[None, :] == axis, tl.sum(weighted, 0)[:, None], 0.0)
    return squares, sums


@triton.jit
def farthest(places, start, end, sizes):
    """A bound of ‖p − π_j‖² over tokens start..end and all references: that of their bounding boxes."""
    i, j = tl.arange(0, 128), tl.arange(0, sizes.MP)
    bound = start * 0.0
    for axis in tl.static_range(sizes.P):
        low, high = tl.full([128], INF, tl.float32), tl.full([128], -INF, tl.float32)
        for first in range(start, end, 128):
            live = first + i < end
            at = tl.load(coordinate(places, first + i, axis), mask=live, other=0.0)
            placed = live & (at == at)
            low, high = tl.minimum(low, tl.where(placed, at, INF)), tl.maximum(high, tl.where(placed, at, -INF))
        there = tl.load(places.pi + j * sizes.P + axis, mask=j < sizes.M, other=0.0)
        right = tl.max(tl.where(j < sizes.M, there, -INF)) - tl.min(low)
        left = tl.max(high) - tl.min(tl.where(j < sizes.M, there, INF))
        reach = tl.maximum(tl.maximum(left, right), 0.0)  # 0 where no token has a position
        bound += reach * reach
    return bound
