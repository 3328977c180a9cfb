"""One Sinkhorn iteration on a tile: the row update, and column weights by rescaling or in the log domain."""

import math

import torch
import triton
import triton.language as tl

from ....problem import Operands, Options
from .primitives import INF, NARROW, finite_or_zero


@triton.jit
def row_update(l, g, mass, relaxation):
    """(p = 2^{ℓ+g−m} [BN, M], m, Σ_j p, f [BN]) of the row update under potentials g [M] and log masses [BN]."""
    u = l + g[None, :]
    m = tl.max(u, 1)
    p = tl.exp2(u - m[:, None])
    r = tl.sum(p, 1)
    return p, m, r, mass - relaxation * (m + tl.log2(r))


@triton.jit
def log_domain_weights(l, g, mass, relaxation, UPDATE_ROWS: tl.constexpr):
    """(e^{ℓ+f−peak} [BN, M], peak [M]) whatever the range; 0 and −∞ where a column is empty."""
    f = mass
    if UPDATE_ROWS:
        p, m, r, f = row_update(l, g, mass, relaxation)
    h = l + f[:, None]
    peak = tl.max(h, 0)
    return tl.exp2(h - finite_or_zero(peak)[None, :]), peak


@triton.jit
def potentials_narrow(g, beta, scale, M_TRUE: tl.constexpr, distance=0.0):
    """Whether all ℓ + g of the rbf kernel lie so close that `narrow_weights` holds for every tile.

    0 ≥ ℓ ≥ −(1 − e^{−2β})/ε − `distance`, so this is known before any key is read.
    """
    j = tl.arange(0, g.shape[0])
    spread = tl.max(tl.where(j < M_TRUE, g, -INF)) - tl.min(tl.where(j < M_TRUE, g, INF))
    return scale * (1.0 - tl.exp2(-2.0 * beta)) + distance + spread <= NARROW


@triton.jit
def row_factor(r, mass, relaxation):
    """a·r^{−λ} [BN]; a quotient where λ = 1, since a power would lose |log r| units in the last place."""
    return tl.where(relaxation == 1.0, tl.exp2(mass) / r, tl.exp2(mass - relaxation * tl.log2(r)))


@triton.jit
def narrow_weights(exponent, mass, relaxation, UPDATE_ROWS: tl.constexpr):
    """e^{ℓ+f+g − (1−λ)·top} [BN, M], top = max_j g, where `potentials_narrow`; exponent = ℓ + g − top (T = 0: ℓ).

    ℓ + g never exceeds top and never falls far below it: no row maximum, no running one, no rescaling of sums.
    """
    p = tl.exp2(exponent)
    return p * (row_factor(tl.sum(p, 1), mass, relaxation) if UPDATE_ROWS else tl.exp2(mass))[:, None]


def range_known(x: Operands, opt: Options) -> str:
    """Where the range of ℓ + g is decided: "always" narrow, on the "device" from the potentials, or "tile" by tile.

    The spread of c^t is at most that of ℓ, so numbers for β and ε and uniform references settle it before the launch.
    float16 has too few exponents for weights that are not relative to their column's largest.
    """
    if opt.kernel == "dot" or x.key.dtype == torch.float16 or x.reference_position is not None:
        return "tile"
    bandwidth, epsilon = opt.scalars[:2]
    spread = 2 * (1 - math.exp(-2 * bandwidth)) / epsilon * math.log2(math.e)
    given = x.bandwidth is not None or x.epsilon is not None or x.log_b is not None
    return "always" if not given and spread <= NARROW.value else "device"
