"""What a tile of queries and keys adds in the backward pass, by products or in the log domain.

With X_is = ⟨do_i, v_s⟩, W the weights with which the queries read, and dC = d log C / C:

    df^T = U ⊙ (X ⊙ ((W/C) Exᵀ) + dC Exᵀ),   df^t = U ⊙ (dC Exᵀ) of t < T,   dP = −λ_a df/P
    dEx += (U ⊙ X)ᵀ (W/C) of t = T,   dEx += Uᵀ dC + dPᵀ V^{t−1},   d log V^{t−1} = V ⊙ (dP Ex)

An operand of a product is read right before it: all those of a tile at once are more than a thread can hold.

In logs Q = e^{ℓ + f − log C} / N, whose columns sum to 1, and R = e^{ℓ + g − log P}, whose rows do, stand for the
products: df = Σ_j Q (X W + d log C), dℓ += Q (X W + d log C) − λ_a R df, d log V = −λ_a Σ_s R df.  What Q multiplies
holds its divisor N (`walks.settled`), as by products it holds C.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..device.primitives import INF, dot, finite_or_zero
from ..device.rows import load_rows
from .masses import log_masses
from .walks import (
    LEAST_ROW,
    held,
    key_tile,
    like,
    log_columns,
    masses,
    multiplied,
    multiply,
    pooled,
    potentials,
    row_sums,
    step_at,
    transposed,
)


class Back(NamedTuple):
    """What the blocks of queries leave beside `Work`, float32."""

    weights: Any  # [heads, L, MP] W/N after dropout
    d_sums: Any  # [heads, T, L, MP] (d log C^t)/N^t, by products dC^t
    d_logits: Any  # [heads, L, MP] dS, the gradient of the queries' logits
    log_b: Any  # [heads, slots, MP] parts of Σ_i d log V^t
    relaxation: Any  # [heads, slots] parts of Σ_ij d log V^t log2 C^t
    excess: Any  # [heads, L] Σ_s Σ_t df^t, which is 0 but for rounding, over `Work.totals`; or None


@triton.jit
def load_numbers(x, at, iterations, t, first, L, ROWS: tl.constexpr, sizes):
    """Numbers [BL, MP] of iteration t of queries from `first` on; 1 beyond the last."""
    inside = (first + tl.arange(0, ROWS) < L)[:, None]
    return tl.load(step_at(x, at, iterations, t, first, L, ROWS, sizes), mask=inside, other=1.0)


@triton.jit
def load_factors(keys, x, at, iterations, t, first, L, ROWS: tl.constexpr, LOGS: tl.constexpr, sizes):
    """The same as factors beside these keys."""
    return held(keys, load_numbers(x, at, iterations, t, first, L, ROWS, sizes), LOGS)


@triton.jit
def load_divisors(work, c, at, iterations, t, first, L, ROWS: tl.constexpr, LOGS: tl.constexpr, sizes):
    """N^t [BL, MP] of a block of queries; c: C^t by products."""
    return load_numbers(work.divisors, at, iterations, t, first, L, ROWS, sizes) if LOGS else c


@triton.jit
def load_potentials(keys, work, head, at, iterations, t, first, L, ROWS: tl.constexpr, LOGS: tl.constexpr, sizes):
    """V^{t−1} [BL, MP] of a block of queries, t ≥ 2."""
    v = potentials(load_numbers(work.sums, at, iterations, t - 1, first, L, ROWS, sizes), head, LOGS, sizes)
    return held(keys, v, LOGS)


@triton.jit
def load_sums(keys, work, back, at, iterations, t, first, L, ROWS: tl.constexpr, LOGS: tl.constexpr, sizes):
    """(log2 C^t in logs, where alone it is needed, (d log C^t)/N^t) [BL, MP] of a block of queries."""
    d_c = load_factors(keys, back.d_sums, at, iterations, t, first, L, ROWS, LOGS, sizes)
    c = load_numbers(work.sums, at, iterations, t, first, L, ROWS, sizes) if LOGS else d_c
    return c, d_c


class Step(NamedTuple):
    """An iteration as the walks over the keys need it."""

    c: Any  # [BL, MP] C^t, in logs log2 C^t
    d_c: Any  # [BL, MP] (d log C)/N
    y: Any  # [BL, MP] W/N
    v: Any  # [BL, MP] V^{t−1}


@triton.jit
def tile_at_keys(keys, given, values, at, rows, start, L, S, KEYS, FIRST, LOGS, CAUSAL, sizes):
    """(log masses [BL, BS], e^{ℓ−m} or ℓ − m [BS, MP], v [BS, EP]) of a tile."""
    columns = start + tl.arange(0, KEYS)
    weights = keys.first if FIRST else keys.weight
    weight = tl.load(weights + at + columns, mask=columns < S, other=-INF)
    x = log_masses(given, weight, rows, columns, L, S, CAUSAL)
    v = load_rows(values, columns, weight > -INF, tl.arange(0, sizes.EP), sizes.E)
    return x, key_tile(keys, at + start, S - start, KEYS, LOGS, sizes), v


@triton.jit
def spread(c, seen, LOGS: tl.constexpr, sizes):
    """log2 C_ij less its largest [BL, MP]: Σ_j d log V_ij = 0, so only that counts."""
    real = (tl.arange(0, sizes.MP) < sizes.M)[None, :]
    logs = log_columns(c, LOGS)
    return tl.where(real & seen[:, None], logs - tl.max(tl.where(real, logs, -INF), 1)[:, None], 0.0)


@triton.jit
def add_parts(back, slot, d_v, c, seen, LOGS: tl.constexpr, sizes):
    """Adds what an iteration's d log V [BL, MP], of C [BL, MP], has for the slot of its block."""
    log_b, relaxation = back.log_b + slot * sizes.MP + tl.arange(0, sizes.MP), back.relaxation + slot
    tl.store(log_b, tl.load(log_b) + tl.sum(d_v, 0))
    relaxed = tl.sum(tl.sum(d_v * spread(c, seen, LOGS, sizes), 1), 0)
    tl.store(relaxation, tl.load(relaxation) + relaxed)


@triton.jit
def value_products(do, v, LOGS: tl.constexpr, cut):
    """X [BL, BS] of do [BL, E] and v [BS, E]."""
    if LOGS:
        x = tl.sum(do.to(tl.float32)[:, None, :] * v.to(tl.float32)[None, :, :], 2)
    else:
        x = dot(do, tl.trans(v), cut.PRECISION)
    return x


@triton.jit
def plan_terms_of(x, tile, v, top, lam, FIRST: tl.constexpr, LOGS: tl.constexpr, UNIT: tl.constexpr, cut):
    """(P, U) [BL, BS] of an iteration."""
    p = x if FIRST else row_sums(tile, v, LOGS, cut)
    return p, masses(x, p, finite_or_zero(top), lam, LOGS, FIRST, UNIT)


@triton.jit
def column_weights(tile, u, c):
    """Q N [BL, BS, MP] in logs."""
    return tl.exp2((tile.high[None, :, :] + u[:, :, None]) - c[:, None, :])


@triton.jit
def forces(tile, u, c, d_c, LOGS: tl.constexpr, cut):
    """What df^t [BL, BS] gets from column sums."""
    return (
        tl.sum(column_weights(tile, u, c) * d_c.high[:, None, :], 2)
        if LOGS
        else u * multiply(d_c, transposed(tile), cut)
    )


@triton.jit
def last_forces(tile, u, c, d_c, y, products, LOGS: tl.constexpr, cut):
    """(A of the values' gradients, df^T) [BL, BS]: by products one sum after the other, or what both multiply is loaded
    at once, which is more than a thread can hold."""
    if LOGS:
        a = pooled(tile, u, c, y, LOGS, cut)
        d_f = a * products + forces(tile, u, c, d_c, LOGS, cut)
    else:
        ex = transposed(tile)
        shares = multiply(y, ex, cut)
        a = u * shares
        d_f = u * multiplied(shares * products, d_c, ex, cut)
    return a, d_f


@triton.jit
def column_terms(tile, u, c, d_c, LOGS: tl.constexpr, cut):
    """What the keys get from column sums [BS, MP]: of dEx, in logs of dℓ."""
    if LOGS:
        terms = tl.sum(column_weights(tile, u, c) * d_c.high[:, None, :], 0)
    else:
        terms = multiply(transposed(like(tile, u, cut)), d_c, cut)
    return terms


@triton.jit
def value_terms(tile, u, c, y, products, LOGS: tl.constexpr, cut):
    """The same from what the LAST iteration pools."""
    if LOGS:
        terms = tl.sum(column_weights(tile, u, c) * products[:, :, None] * y.high[:, None, :], 0)
    else:
        terms = multiply(transposed(like(tile, u * products, cut)), y, cut)
    return terms


@triton.jit
def returned(p, d_f, lam, LOGS: tl.constexpr):
    """−λ_a df/P [BL, BS], in logs −λ_a df."""
    back = -lam * d_f
    return back if LOGS else tl.where(p >= LEAST_ROW, back / tl.where(p >= LEAST_ROW, p, 1.0), 0.0)


@triton.jit
def row_weights(tile, v, p):
    """R [BL, BS, MP] in logs."""
    return tl.exp2((tile.high[None, :, :] + v.high[:, None, :]) - p[:, :, None])


@triton.jit
def to_potentials(tile, v, p, back, LOGS: tl.constexpr, cut):
    """What d log V gets from row sums [BL, MP]; by products that over V."""
    return tl.sum(row_weights(tile, v, p) * back[:, :, None], 1) if LOGS else multiply(like(tile, back, cut), tile, cut)


@triton.jit
def to_keys(tile, v, p, back, LOGS: tl.constexpr, cut):
    """What the keys get from row sums [BS, MP]."""
    if LOGS:
        terms = tl.sum(row_weights(tile, v, p) * back[:, :, None], 0)
    else:
        terms = multiply(transposed(like(tile, back, cut)), v, cut)
    return terms


@triton.jit
def log_row_sum(p, LOGS: tl.constexpr):
    """log2 P, 0 where products do not hold."""
    return p if LOGS else tl.log2(tl.where(p >= LEAST_ROW, p, 1.0))


@triton.jit
def belongs(work, at, first, L, BLOCK: tl.constexpr, LOGS: tl.constexpr):
    """Whether the block of queries from `first` on is computed by products, or in logs."""
    if work.out_of_range is None:
        return first >= 0
    else:
        out = tl.load(work.out_of_range + at * ((L + BLOCK - 1) // BLOCK) + first // BLOCK) != 0
        return out if LOGS else ~out


@triton.jit
def load_do(gradients, rows, seen, sizes):
    """do [BL, EP]; 0 for queries that see nothing."""
    return load_rows(gradients, rows, seen, tl.arange(0, sizes.EP), sizes.E)
