"""Steps of a walk over tiles of keys, for a block of queries: by products of e^{ℓ−m}, or in the log domain.

    products:  P = V Exᵀ,  U = n P^{−λ_a},  C = Σ_s U Ex          logs:  the same of logarithms, all triples at once

A tile of the log domain is [BL, BS, MP] numbers: few queries and keys, but whatever the range.  Sums, potentials and
masses of a step have one form for both: C [BL, MP], V [BL, MP] and U [BL, BS], or their base-2 logarithms.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..device.primitives import INF, again, dot, dot_of_parts, finite_or_zero, in_parts, log_and_rest, operand, rounded

# Where row sums (of V ≤ 1) and column sums stay above these, what underflows adds less to any sum than rounding:
# 2^−126 of a factor, times 1/LEAST_ROW and 1/LEAST_COLUMN, is below 2^−23.
LEAST_ROW = tl.constexpr(1e-12)
LEAST_COLUMN = tl.constexpr(1e-19)
MOST_COLUMN = tl.constexpr(1e30)
SAFE = 25.0  # logits within so many units keep every sum above these: each is at least the smallest e^ℓ over M


class Keys(NamedTuple):
    """What every query shares of the keys, as `keys.masked_keys_kernel` leaves it; base 2."""

    exp: Any  # [heads, S, MP] e^{ℓ−m}, 0 where a key takes no part or a reference is padding
    rest: Any  # [heads, S, MP] what bfloat16 has left of these; None where one number is enough (`Arguments.far`)
    logs: Any  # [heads, S, MP] ℓ − m, or None where products always hold
    weight: Any  # [heads, S] log a + (1 − λ_a) m
    first: Any  # [heads, S] the same less λ_a LSE_j(ℓ − m + log b): with P^{−λ_a} of the first iteration


class Factors(NamedTuple):
    """What products multiply, e^{ℓ−m} of a tile of keys [BS, MP] or numbers of queries [BL, MP]; in logs as it is."""

    high: Any
    rest: Any  # what bfloat16 has left, in bfloat16; nothing that is read where products take no parts


@triton.jit
def queries_of(program, blocks, ROWS: tl.constexpr):
    """(head of those at hand, block of queries, rows [BL]) of a program."""
    block = program % blocks
    return (program // blocks).to(tl.int64), block, block * ROWS + tl.arange(0, ROWS)


@triton.jit
def key_tile(keys, first, count, KEYS: tl.constexpr, LOGS: tl.constexpr, sizes):
    """Factors of KEYS keys from `first` = head · S + s on, of which `count` are the head's."""
    columns = tl.arange(0, KEYS)
    place = first * sizes.MP + columns[:, None] * sizes.MP + tl.arange(0, sizes.MP)[None, :]
    inside = (columns < count)[:, None]
    if LOGS:
        high = tl.load(keys.logs + place, mask=inside, other=0.0)
        rest = high
    else:
        high = tl.load(keys.exp + place, mask=inside, other=0.0)
        rest = high if keys.rest is None else tl.load(keys.rest + place, mask=inside, other=0.0)
    return Factors(high, rest)


@triton.jit
def whole(tile, cut):
    """A tile's factors in float32."""
    high = tile.high.to(tl.float32)
    return high + tile.rest.to(tl.float32) if cut.PRECISION == "bf16x3" else high


@triton.jit
def step_at(x, at, iterations, t, first, L, ROWS: tl.constexpr, sizes):
    """Where numbers [BL, MP] of iteration t lie, of queries from `first` on; at: the head."""
    start = x + ((at * iterations + t - 1) * L + first) * sizes.MP
    return start + tl.arange(0, ROWS)[:, None] * sizes.MP + tl.arange(0, sizes.MP)[None, :]


@triton.jit
def like(tile, x, cut):
    """float32 x as factors beside a tile."""
    if cut.PRECISION == "bf16x3":
        high, rest = in_parts(x)
    else:
        high = rounded(x, tile.high.dtype)
        rest = high
    return Factors(high, rest)


@triton.jit
def held(keys, x, LOGS: tl.constexpr):
    """The same before a walk over the keys, each of whose tiles they multiply; in logs x as it is.

    Rounded where they are: or Triton takes them to each product's layout first, in float32, which is more registers and
    reads of shared memory than a thread has for several of them.
    """
    if LOGS:
        high = x
        rest = x
    elif keys.rest is None:
        high = operand(x, keys.exp.dtype.element_ty)
        rest = high
    else:
        high, rest = in_parts(x)
        high, rest = again(high), again(rest)
    return Factors(high, rest)


@triton.jit
def transposed(x):
    """The transposed of factors."""
    return Factors(tl.trans(x.high), tl.trans(x.rest))


@triton.jit
def multiply(a, b, cut):
    """a · b of factors, the smallest products first."""
    if cut.PRECISION == "bf16x3":
        return dot_of_parts(a.high, a.rest, b.high, b.rest)
    else:
        return dot(a.high, b.high, cut.PRECISION)


@triton.jit
def multiplied(sums, a, b, cut):
    """sums + a · b likewise, each product onto what is before it."""
    if cut.PRECISION == "bf16x3":
        sums += dot(a.rest, b.high, cut.PRECISION)
        sums += dot(a.high, b.rest, cut.PRECISION)
    return sums + dot(a.high, b.high, cut.PRECISION)


@triton.jit
def log_row_sums(l, g):
    """LSE_j(ℓ_sj + g_ij) [BL, BS]."""
    u = l[None, :, :] + g[:, None, :]
    top = tl.max(u, 2)
    safe = finite_or_zero(top)
    return safe + tl.log2(tl.sum(tl.exp2(u - safe[:, :, None]), 2))


@triton.jit
def row_sums(tile, v, LOGS: tl.constexpr, cut):
    """P [BL, BS] of a tile."""
    return log_row_sums(tile.high, v.high) if LOGS else multiply(v, transposed(tile), cut)


@triton.jit
def masses(x, p, top, lam, LOGS: tl.constexpr, FIRST: tl.constexpr, UNIT: tl.constexpr):
    """U [BL, BS] from log masses x, of which those of FIRST iterations hold P's power; UNIT: λ_a = 1."""
    if LOGS:
        u = x if FIRST else tl.where(x > -INF, x - lam * p, -INF)
    else:
        u = tl.exp2(x - top[:, None])
        if not FIRST:
            p = tl.where((x > -INF) & (p >= LEAST_ROW), p, 1.0)
            power = 1.0 / p if UNIT else tl.where(lam == 1.0, 1.0 / p, tl.exp2(-lam * tl.log2(p)))
            u = tl.where(x > -INF, u * power, 0.0)
    return u


@triton.jit
def add_columns(c, peak, tile, u, LOGS: tl.constexpr, cut):
    """(C, peak) [BL, MP] with a tile's Σ_s U Ex; in logs Σ = C 2^peak."""
    if LOGS:
        h = tile.high[None, :, :] + u[:, :, None]
        new = tl.maximum(peak, tl.max(h, 1))
        safe = finite_or_zero(new)
        c = c * tl.exp2(peak - safe) + tl.sum(tl.exp2(h - safe[:, None, :]), 1)
        peak = new
    else:
        c += multiply(like(tile, u, cut), tile, cut)
    return c, peak


@triton.jit
def settled(c, peak, seen, LOGS: tl.constexpr, sizes):
    """(C, in logs log2 C; N; whether products hold).  C is 1 where they do not, for blind queries and for padding.

    N divides what sums to 1 over the keys: U Ex, and in logs Q = 2^(log2 U + ℓ − m − log2 C).  By products it is C, in
    logs what rounding has left of C: log2 C of thousands is off by up to 2^−13, and Σ_s Q by as much.
    """
    there = seen[:, None] & (tl.arange(0, sizes.MP) < sizes.M)[None, :]
    if LOGS:
        held = there & (c > 0)
        c, divisor = log_and_rest(tl.where(held, peak, 0.0), tl.where(held, c, 1.0))
    else:
        held = there & (c >= LEAST_COLUMN) & (c <= MOST_COLUMN)
        c = tl.where(held, c, 1.0)
        divisor = c
    fits = tl.max(tl.max((there & ~held).to(tl.int32), 1), 0) == 0
    return c, divisor, fits


@triton.jit
def potentials(c, head, LOGS: tl.constexpr, sizes):
    """V = b C^{−λ_b} [BL, MP] over its row's largest, or its logarithm; 0 (−∞) for padding."""
    log_b = tl.load(head.log_b + tl.arange(0, sizes.MP))[None, :]
    if LOGS:
        g = log_b - head.lam_b * c
        v = g - tl.max(g, 1)[:, None]
    else:
        v = tl.where(head.lam_b == 1.0, tl.exp2(log_b) / c, tl.exp2(log_b - head.lam_b * tl.log2(c)))
        v = v * (1.0 / tl.max(v, 1))[:, None]
    return v


@triton.jit
def log_columns(c, LOGS: tl.constexpr):
    """log2 C."""
    return c if LOGS else tl.log2(c)


@triton.jit
def pooled(tile, u, c, y, LOGS: tl.constexpr, cut):
    """A = Σ_j U Ex (W/C)_j [BL, BS]; y: W/N."""
    if LOGS:
        q = tl.exp2((tile.high[None, :, :] + u[:, :, None]) - c[:, None, :])
        a = tl.sum(q * y.high[:, None, :], 2)
    else:
        a = u * multiply(y, transposed(tile), cut)
    return a


@triton.jit
def by_tokens(a, x, tile, cut):
    """a [I, K], rounded as a tile is, times tokens x [K, E]: bfloat16 is exact beside any factor."""
    if cut.PRECISION == "bf16x3":
        return dot(a, x if x.dtype == tl.bfloat16 else x.to(tl.float32), cut.PRECISION)
    else:
        return dot(rounded(a, tile.high.dtype), x, cut.PRECISION)


@triton.jit
def by_values(a, v, tile, LOGS: tl.constexpr, cut):
    """a [BL, BS] · v [BS, E]; too few keys for a product in logs, and summed along the last axis, as Triton makes one
    of a sum along another."""
    if LOGS:
        return tl.sum(a[:, None, :] * tl.trans(v.to(tl.float32))[None, :, :], 2)
    else:
        return by_tokens(a, v, tile, cut)
