"""One Sinkhorn iteration on a tile: the row update, and column weights by rescaling or in the log domain."""

import triton
import triton.language as tl

from .primitives import INF, SPAN, finite_or_zero


@triton.jit
def row_update(l, g, mass, relaxation):
    """(p = 2^{ℓ+g−m} [BN, M], m, Σ_j p, f [BN]) of the row update under potentials g [M] and log masses [BN]."""
    u = l + g[None, :]
    m = tl.max(u, 1)
    p = tl.exp2(u - m[:, None])
    r = tl.sum(p, 1)
    return p, m, r, mass - relaxation * (m + tl.log2(r))


@triton.jit
def column_weights(l, g, mass, relaxation, narrow, UPDATE_ROWS: tl.constexpr):
    """(2^{ℓ+f−peak} [BN, M], peak [M]): by rescaling p where `narrow` says that nothing underflows, else anew."""
    f = mass
    peak = g
    weights = l
    if UPDATE_ROWS:
        p, m, r, f = row_update(l, g, mass, relaxation)
        if narrow:
            w = f + m
            largest = tl.max(w, 0)
            weights = p * tl.exp2(w - finite_or_zero(largest))[:, None]
            peak = tl.where(g > -INF, largest - finite_or_zero(g), -INF)
        else:
            weights, peak = _column_softmax(l + f[:, None])
    else:
        weights, peak = _column_softmax(l + f[:, None])
    return weights, peak


@triton.jit
def _column_softmax(h):
    """(2^{h − peak}, peak) of each column of h [BN, M]; 0 and −∞ where a column is empty."""
    peak = tl.max(h, 0)
    return tl.exp2(h - finite_or_zero(peak)[None, :]), peak


@triton.jit
def potentials_narrow(g, beta, scale, M_TRUE: tl.constexpr):
    """Whether every ℓ + g of the rbf kernel without positions lies within 80 of any other: ℓ ≥ −(1 − e^{−2β})/ε."""
    j = tl.arange(0, g.shape[0])
    spread = tl.max(tl.where(j < M_TRUE, g, -INF)) - tl.min(tl.where(j < M_TRUE, g, INF))
    return scale * (1.0 - tl.exp2(-2.0 * beta)) + spread <= SPAN


@triton.jit
def tile_narrow(l, g, live, M_TRUE: tl.constexpr):
    """Whether every ℓ + g of the live rows of this tile lies within 80 of its row's largest."""
    u = l + g[None, :]
    real = (tl.arange(0, g.shape[0]) < M_TRUE)[None, :]
    spread = tl.max(u, 1) - tl.min(tl.where(real, u, INF), 1)
    return tl.max(tl.where(live, spread, 0.0)) <= SPAN
