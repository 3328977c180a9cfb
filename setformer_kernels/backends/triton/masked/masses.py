"""The masses that the keys have for each query: from a mask of any strides, read where it lies, and the causal edge."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..device.primitives import INF, LOG2E
from ..device.rows import wide


class Given(NamedTuple):
    """A mask [L, S] of one head: uint8 (1 takes part) or log masses."""

    start: Any
    stride_l: Any
    stride_s: Any


@triton.jit
def mask_of(mask, b, h, stride_b, stride_h, stride_l, stride_s):
    """The mask of one head; strides of broadcast dimensions are 0."""
    return Given(mask + b * wide(stride_b) + h * wide(stride_h), wide(stride_l), wide(stride_s))


@triton.jit
def mask_at(given, rows, columns):
    """Where the entries [BL, BS] of a tile lie."""
    return given.start + rows[:, None] * given.stride_l + columns[None, :] * given.stride_s


@triton.jit
def log_masses(given, weights, rows, columns, L, S, CAUSAL: tl.constexpr):
    """log2 n_is [BL, BS] of keys with log2 masses `weights` [BS]; −∞ where the query does not see the key."""
    inside = (rows < L)[:, None] & (columns < S)[None, :]
    if CAUSAL:
        inside &= columns[None, :] <= rows[:, None] + (S - L)
    if given is not None:
        if given.start.dtype.element_ty == tl.uint8:
            inside &= tl.load(mask_at(given, rows, columns), mask=inside, other=0) != 0
            x = tl.where(inside, weights[None, :], -INF)
        else:
            x = tl.load(mask_at(given, rows, columns), mask=inside, other=-INF) * LOG2E + weights[None, :]
            x = tl.where(inside & (x > -INF), x, -INF)  # NaN bans, as −∞ does
    else:
        x = tl.where(inside, weights[None, :], -INF)
    return x


@triton.jit
def last_key(row, L, S, CAUSAL: tl.constexpr):
    """How many keys stand before the first that query `row` may not see for being later."""
    return tl.maximum(0, tl.minimum(S, row + 1 + S - L)) if CAUSAL else S


@triton.jit
def first_query(column, L, S, CAUSAL: tl.constexpr):
    """The first query that may see the key."""
    return tl.maximum(0, column - (S - L)) if CAUSAL else 0


@triton.jit
def some(x):
    """Whether any query of a tile sees a key."""
    return tl.max(tl.max(x, 1), 0) > -INF
