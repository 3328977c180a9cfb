"""The Gaussian kernel of the sphere without its constant harmonic, in units of its linear one: κ̃ = (κ − κ₀)/a₁.

    κ(c) = exp(β(c − 1)) = κ₀ + a₁ c + ...      Gegenbauer series in the cosine c, every term positive semidefinite
    κ₀ = E κ(c),  a₁ = D E c κ(c)               over the cosine of a uniform direction of R^D

With F(β) = E e^{βc}, c₀ = log F/β and A = F'/F, the two are κ₀ = e^{−β} F and a₁ = D κ₀ A, and

    κ̃(c) = s (e^{β(c − c₀)} − 1),  s = κ₀/a₁ = 1/(D A)

which loses nothing as β → 0, where κ̃(c) → c.  README.md, "Centred features", has the Bessel functions behind F and A.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Of κ̃(1): K̃_ww then has a condition of some 1e15 at the default ridge, the most that float64 inverts.
LARGEST = 1e10


class Centring(NamedTuple):
    """What κ̃ and its derivatives are made of, a number for each β."""

    offset: Tensor  # c₀, the cosine at which κ̃ is 0
    gain: Tensor  # s
    mean: Tensor  # A = d(β c₀)/dβ
    growth: Tensor  # d log s/dβ


def _nodes(d: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(c, 1 − c, weights) [n] of the trapezoid rule over the cosines ±c of a uniform direction; weights sum to 1/2.

    With c = tanh(u/2) the density is cosh(u/2)^{−(D−1)}: analytic, and with double exponential decay where β is large.
    The step and the range give float64's precision for every β that `LARGEST` lets in (tests/test_centring.py).
    """
    if d == 1:
        return like.new_ones(1), like.new_zeros(1), like.new_full((1,), 0.5)
    step = 1 / math.sqrt(15 + d)
    end = 1 + 126 / (d - 1) + math.sqrt(700 / (d - 1))
    u = (torch.arange(math.ceil(end / step), dtype=like.dtype, device=like.device) + 0.5) * step
    density = (1 - d) / 2 * (u / 2).sinh().square().log1p()  # (1 − D) log cosh(u/2)
    return (u / 2).tanh(), 2 / (1 + u.exp()), density.softmax(0) / 2


def centring(bandwidth: Tensor, d: int) -> Centring:
    """c₀, s, A and d log s/dβ of β [...] in D dimensions, in float64; differentiable to any order."""
    beta = bandwidth.double().unsqueeze(-1)
    c, gap, weight = _nodes(d, beta)
    near = weight * (-beta * gap).exp()
    constant = (near + weight * (-beta * (2 - gap)).exp()).sum(-1)  # κ₀
    less = (weight * ((-beta * gap).expm1() + (-beta * (2 - gap)).expm1())).sum(-1)  # κ₀ − 1, exact for small β
    beta = beta.squeeze(-1)
    mean = (-near * c * (-2 * beta.unsqueeze(-1) * c).expm1()).sum(-1) / constant
    log_constant = torch.where(less > -0.5, less.clamp_min(-0.5).log1p(), constant.log())
    growth = mean - 1 / mean + (d - 1) / beta  # −A'/A, A' = 1 − A² − (D − 1) A/β
    return Centring(1 + log_constant / beta, 1 / (d * mean), mean, growth)


def centred(cosine: Tensor, bandwidth: Tensor, found: Centring) -> Tensor:
    """κ̃ of cosines [..., N, M]; β and the numbers of `found` [..., 1, 1]."""
    return found.gain * (bandwidth * (cosine - found.offset)).expm1()


def limit(bandwidth: Tensor | None, scalar: float, d: int) -> float:
    """What κ̃(1) does not exceed: a tensor β is not looked at."""
    return LARGEST if bandwidth is not None else math.exp(min(log_bound(scalar, d), math.log(LARGEST)))


def log_bound(bandwidth: float, d: int) -> float:
    """A number that log κ̃(1) does not exceed.

    κ̃(1) < e^β, as F and F'D/β are at least 1; and κ̃(1) < 1/a₁, where A ≥ β/(m + √(m² + β²)) with m = D/2 (Amos 1974)
    bounds log F, its integral, too.
    """
    m = d / 2
    r = math.hypot(m, bandwidth)
    log_f = r - m - m * math.log((m + r) / d)
    return min(bandwidth, bandwidth - log_f + math.log((m + r) / (d * bandwidth)))
