"""Device functions on the state of a causal scan, in base 2, as `reference/state.py` defines it.

Sums are carried as two numbers, s + what rounding took from s, in units of 2^k with an integer k: all that brings them
to other units is a power of two, which rounds nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..device.primitives import INF, LN2, LOG2E


class Units(NamedTuple):
    """How sums in the units of before reach those of after: (s·scale + new·weight) (1 + fade), in units of 2^k."""

    scale: Any
    weight: Any
    k: Any


@triton.jit
def two_sum(a, b):
    """(s, r): s = a + b as it is rounded, and s + r = a + b exactly."""
    s = a + b
    of_b = s - a
    return s, (a - (s - of_b)) + (b - of_b)


@triton.jit
def power_of_two(n):
    """2^n of integers n ≤ 127, exactly; 0 below the normal range."""
    bits = (tl.maximum(n, -127.0).to(tl.int32) + 127) << 23
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def floor_log2(c):
    """⌊log2 c⌋ of c ≥ 1 or so, exactly; 0 for c = 0."""
    exponent = ((c.to(tl.int32, bitcast=True) >> 23) - 127).to(tl.float32)
    return tl.where(c > 0, exponent, 0.0)


@triton.jit
def fading(decay):
    """(turns, fade) with e^decay = 2^turns (1 + fade); exactly (0, 0) for 0."""
    x = decay * LOG2E
    turns = tl.floor(x + 0.5)
    t = (x - turns) * LN2
    series = 1 + t / 6 * (1 + t / 7)
    return turns, t * (1 + t / 2 * (1 + t / 3 * (1 + t / 4 * (1 + t / 5 * series))))


@triton.jit
def common_units(k, c, peak):
    """`Units` that hold sums c 2^k and new ones in units of 2^peak, peak an integer or −∞."""
    old = tl.where(c > 0, k, -INF)
    top = tl.maximum(old, peak)
    top = tl.where(top == -INF, 0.0, top)
    return Units(power_of_two(old - top), power_of_two(peak - top), top)


@triton.jit
def taken_in(s, lost, new, scale, weight):
    """(s, lost) with new sums, in the units after."""
    return two_sum(s * scale, new * weight + lost * scale)


@triton.jit
def faded(s, lost, fade):
    """(s, lost)·(1 + fade)."""
    return two_sum(s, lost + (s + lost) * fade)


@triton.jit
def log_of(k, c, c_lost):
    """log2 of (c + c_lost) 2^k, −∞ where there is none."""
    total = c + c_lost
    return tl.where(total > 0, k + tl.log2(tl.where(total > 0, total, 1.0)), -INF)


@triton.jit
def load_state(states, at, real, e, E: tl.constexpr):
    """(N, N' [COLUMNS, EP], C, C', k [COLUMNS]) of columns `at` of states [.., M, 2E + 3]; 0 where not `real`."""
    at *= 2 * E + 3
    inside, numbers = (e < E)[None, :] & real[:, None], states + at[:, None] + e[None, :]
    n, n_lost = tl.load(numbers, mask=inside, other=0.0), tl.load(numbers + E + 1, mask=inside, other=0.0)
    c, c_lost = tl.load(states + at + E, mask=real, other=0.0), tl.load(states + at + 2 * E + 1, mask=real, other=0.0)
    return n, n_lost, c, c_lost, tl.load(states + at + 2 * E + 2, mask=real, other=0.0)


@triton.jit
def store_state(states, at, n, n_lost, c, c_lost, k, real, e, E: tl.constexpr):
    """Writes what `load_state` reads."""
    at *= 2 * E + 3
    inside, numbers = (e < E)[None, :] & real[:, None], states + at[:, None] + e[None, :]
    tl.store(numbers, n, mask=inside)
    tl.store(numbers + E + 1, n_lost, mask=inside)
    tl.store(states + at + E, c, mask=real)
    tl.store(states + at + 2 * E + 1, c_lost, mask=real)
    tl.store(states + at + 2 * E + 2, k, mask=real)


@triton.jit
def begun(passed, handed, initial, given, follows, real, e, E: tl.constexpr):
    """The state at `handed` of what the stretch before passed on, or where it does not follow one, at `given` of the
    initial ones, or of no key."""
    n, n_lost, c, c_lost, k = load_state(passed, handed, real & follows, e, E)
    if initial is not None:
        first = load_state(initial, given, real & (follows == 0), e, E)
        n, n_lost, c, c_lost, k = n + first[0], n_lost + first[1], c + first[2], c_lost + first[3], k + first[4]
    return n, n_lost, c, c_lost, k


@triton.jit
def with_bundle(n, n_lost, c, c_lost, k, a_n, a_c, a_k, decay, last):
    """S ⊕ A, with 1 ≤ C < 2; `last` is where the Γ of the whole bundle is."""
    if decay is not None:
        turns, fade = fading(tl.load(decay + 2 * last + 1))
        c, c_lost = faded(c, c_lost, fade)
        n, n_lost = faded(n, n_lost, fade)
        k += turns
    units = common_units(k, c, a_k)
    c, c_lost = taken_in(c, c_lost, a_c, units.scale, units.weight)
    n, n_lost = taken_in(n, n_lost, a_n, units.scale[:, None], units.weight[:, None])
    shift = floor_log2(c)
    unit = power_of_two(-shift)
    return n * unit[:, None], n_lost * unit[:, None], c * unit, c_lost * unit, tl.where(c > 0, units.k + shift, 0.0)
