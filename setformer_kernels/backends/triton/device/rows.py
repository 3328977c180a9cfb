"""The rows of one head: the way from (b, h) to where they begin, how far apart they lie and how many they are.

Tokens stand in tensors [B, H, N, ·] of any strides, with unit stride along their last dimension.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .primitives import INF, LOG2E, rounded


class Rows(NamedTuple):
    """Queries, keys, values, outputs, masses or positions of one head."""

    start: Any
    stride: Any
    count: Any


@triton.jit
def wide(stride, STEP: tl.constexpr = 1):
    """A stride in units of STEP as one that is counted in 64 bits: its products may be beyond 32 where it is not."""
    return stride.to(tl.int64) * STEP


@triton.jit
def rows_of(x, b, h, stride_b, stride_h, stride_n, count, STEP: tl.constexpr):
    """The `count` rows of x of one head; strides in units of STEP."""
    head = b * wide(stride_b, STEP) + h * wide(stride_h, STEP)
    return Rows(x + head, wide(stride_n, STEP), count)


@triton.jit
def segment_of(segments, b, count):
    """(what stands for b, the number of rows): of a batch, what is given; of segment b of a packed one, its first row,
    as the host passes the stride of rows as that of elements, and how many it has."""
    if segments.first is None:
        return b, count
    else:
        return tl.load(segments.first + b), tl.load(segments.length + b)


@triton.jit
def uniform_mass(segments, b, uniform):
    """log2 of a key's mass where none is given, in batch element or segment b."""
    if segments.uniforms is None:
        return uniform
    else:
        return tl.load(segments.uniforms + b)


@triton.jit
def row_starts(x, rows):
    """Where the given rows begin."""
    return x.start + rows * x.stride


@triton.jit
def load_rows(x, rows, live, columns, WIDTH: tl.constexpr):
    """Some columns of rows [BN, depth]; 0 where a row is not live or a column padding."""
    mask = live[:, None] & (columns < WIDTH)[None, :]
    return tl.load(row_starts(x, rows)[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(x, rows, live, columns, WIDTH: tl.constexpr, values):
    """Writes live rows, rounded to the dtype of x."""
    mask = live[:, None] & (columns < WIDTH)[None, :]
    tl.store(row_starts(x, rows)[:, None] + columns[None, :], rounded(values, x.start.dtype.element_ty), mask=mask)


@triton.jit
def key_mass(log_a, rows, last, uniform):
    """(which rows hold a key that takes part, log2 a) [BN]; −∞ where there is none."""
    live = rows < last
    if log_a is None:
        return live, tl.where(live, uniform, -INF)
    else:
        mass = tl.load(row_starts(log_a, rows), mask=live, other=-INF) * LOG2E
        return mass > -INF, mass


@triton.jit
def few_keys(log_a, count):
    """Whether at most one key takes part; reads on only until the second."""
    if log_a is None:
        return count < 2
    else:
        seen = 0
        start = 0
        while (start < count) & (seen < 2):
            rows = start + tl.arange(0, 1024)
            mass = tl.load(row_starts(log_a, rows), mask=rows < count, other=-INF)
            seen += tl.sum((mass > -INF).to(tl.int32), 0)
            start += 1024
        return seen < 2
