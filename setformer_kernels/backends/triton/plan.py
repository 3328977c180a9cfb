"""One Sinkhorn iteration on a tile: the row update, and column weights by rescaling or in the log domain."""

import math

import torch
import triton
import triton.language as tl

from ...problem import Operands, Options
from .primitives import INF, NARROW, SPAN, finite_or_zero


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
    """Whether all ℓ + g of the rbf kernel without positions lie so close that `narrow_weights` holds for every tile.

    ℓ ≥ −(1 − e^{−2β})/ε, so this is known before any key is read.
    """
    j = tl.arange(0, g.shape[0])
    spread = tl.max(tl.where(j < M_TRUE, g, -INF)) - tl.min(tl.where(j < M_TRUE, g, INF))
    return scale * (1.0 - tl.exp2(-2.0 * beta)) + spread <= NARROW


@triton.jit
def narrow_weights(kappa, scale, shift, mass, relaxation, UPDATE_ROWS: tl.constexpr):
    """e^{ℓ+f+g − (1−λ)·top} [BN, M], top = max_j g, where `potentials_narrow`; shift = g − 1/ε − top (T = 0: −1/ε).

    ℓ + g never exceeds top and never falls far below it: no row maximum, no running one, no rescaling of sums.
    """
    p = tl.exp2(kappa * scale + shift[None, :])
    w = mass
    if UPDATE_ROWS:
        w -= relaxation * tl.log2(tl.sum(p, 1))
    return p * tl.exp2(w)[:, None]


@triton.jit
def tile_narrow(l, g, live, M_TRUE: tl.constexpr):
    """Whether every ℓ + g of the live rows of this tile lies within 80 of its row's largest."""
    u = l + g[None, :]
    real = (tl.arange(0, g.shape[0]) < M_TRUE)[None, :]
    spread = tl.max(u, 1) - tl.min(tl.where(real, u, INF), 1)
    return tl.max(tl.where(live, spread, 0.0)) <= SPAN


def range_known(x: Operands, opt: Options) -> str:
    """Where the range of ℓ + g is decided: "always" narrow, on the "device", or "tile" by tile.

    The spread of c^t is at most that of ℓ, so numbers for β and ε and uniform references settle it before the launch.
    float16 has too few exponents for weights that are not relative to their column's largest.
    """
    if opt.kernel == "dot" or x.reference_position is not None or x.key.dtype == torch.float16:
        return "tile"
    bandwidth, epsilon = opt.scalars[:2]
    spread = 2 * (1 - math.exp(-2 * bandwidth)) / epsilon * math.log2(math.e)
    given = x.bandwidth is not None or x.epsilon is not None or x.log_b is not None
    return "always" if not given and spread <= NARROW.value else "device"
