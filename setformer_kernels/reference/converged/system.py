"""The linear system that the gradient of the fixed point and Newton's step share: M × M, of the potentials g.

One iteration takes g to F(g), and with R = softmax_j(ℓ + g), P = e^{ℓ + f + g}, D = diag of the column sums of P

    ∂F/∂g = J = λ_a λ_b D^{−1} A,   A = PᵀR        symmetric, as R is P over its row sums
    I − J = D^{−1/2} K D^{1/2},     K = I − λ_a λ_b D^{−1/2} A D^{−1/2}        positive semidefinite

Balanced (λ_a λ_b = 1), K has the null vector v = D^{1/2} 1: potentials are determined up to a constant.  v vᵀ/‖v‖² is
added there and the component along v taken off the right-hand side.  Where the plan falls into parts there is a null
vector a part: a ridge far below what counts holds these.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ..transport import INF, lse, potential

RIDGE = 64  # in rounding units of what A was summed in


class Marginals(NamedTuple):
    """Problems of transport [...], and how strictly their masses hold."""

    l: Tensor  # [..., N, M]
    log_a: Tensor  # [..., N], or what broadcasts to it
    log_b: Tensor  # [..., M], likewise
    lam_a: Tensor  # [..., 1], likewise
    lam_b: Tensor  # [..., 1], likewise

    @property
    def T(self) -> Marginals:
        """The same problems with rows and columns exchanged."""
        return Marginals(self.l.mT, self.log_b, self.log_a, self.lam_b, self.lam_a)


class Pass(NamedTuple):
    """What one pass over the rows finds from potentials g [..., M]."""

    s: Tensor  # [..., N] LSE_j(ℓ + g)
    f: Tensor  # [..., N]
    c: Tensor  # [..., M] LSE_i(ℓ + f)
    gram: Tensor  # [..., M, M] A
    mass: Tensor  # [..., M] D, by a sum of P: potentials may be too large for e^{c + g} to be accurate
    live: Tensor  # [..., M] columns that have mass and can be reached


# (problems, g, which of them [..., 1] are still wanted: of the others anything may come out; None: all)
Passed = Callable[[Marginals, Tensor, Tensor | None], Pass]


def rows_of(p: Marginals, g: Tensor) -> Tensor:
    """f [..., N] from g [..., M]."""
    return potential(p.log_a, p.lam_a, lse(p.l + g.unsqueeze(-2), -1))


def columns_of(p: Marginals, f: Tensor) -> tuple[Tensor, Tensor]:
    """c and g [..., M] from f [..., N]."""
    c = lse(p.l + f.unsqueeze(-1), -2)
    return c, potential(p.log_b, p.lam_b, c)


def full(t: Tensor) -> Tensor:
    """0 for −∞, in the differences that an e^{−∞} beside it takes out again."""
    return torch.where(t > -INF, t, 0.0)


def passed(p: Marginals, g: Tensor, running: Tensor | None = None) -> Pass:
    scores = p.l + g.unsqueeze(-2)
    s = lse(scores, -1)
    f = potential(p.log_a, p.lam_a, s)
    c = lse(p.l + f.unsqueeze(-1), -2)
    r = (scores - full(s).unsqueeze(-1)).exp()
    sent = ((p.log_a + (1 - p.lam_a) * full(s)).exp() * (s > -INF)).unsqueeze(-1)  # row sums of P
    with without_autocast(r):
        half = r * sent.sqrt()
        gram = half.mT @ half
    return Pass(s, f, c, gram, (sent * r).sum(-2), is_live(p, g, c))


def is_live(p: Marginals, g: Tensor, c: Tensor) -> Tensor:
    return (c > -INF) & (g > -INF) & (p.log_b > -INF)


def without_autocast(t: Tensor) -> AbstractContextManager[None]:
    """Products in the dtype of their operands, whatever the caller's autocast would make of them."""
    return nullcontext() if t.device.type == "meta" else torch.autocast(t.device.type, enabled=False)


def resolvent(p: Marginals, q: Pass, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """((I − J)^{−1} rhs [..., M] in float64, whether it was found [..., 1])."""
    x, found = _solved(p, q, root_of(q) * rhs)
    return x / root_of(q), found


def adjoint_resolvent(p: Marginals, q: Pass, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """((I − Jᵀ)^{−1} rhs [..., M] in float64, whether it was found [..., 1])."""
    x, found = _solved(p, q, rhs / root_of(q))
    return x * root_of(q), found


def root_of(q: Pass) -> Tensor:
    """D^{1/2} in float64, and 1 where a column has no mass."""
    return torch.where(q.live & (q.mass > 0), q.mass, 1.0).double().sqrt()


def _solved(p: Marginals, q: Pass, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """K^{−1} rhs."""
    root, lam = root_of(q), (p.lam_a * p.lam_b).double().expand((*q.c.shape[:-1], 1))
    v = torch.where(q.live & (lam == 1), root, 0.0)
    v = (v / v.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)).unsqueeze(-1)
    ridge = RIDGE * torch.finfo(q.gram.dtype).eps
    # K + ridge in as few passes over [M, M] as there are: of small problems with M near N they are most of the time.
    k = v * v.mT - q.gram * (lam / root).unsqueeze(-1) / root.unsqueeze(-2)
    k = k + (1 + ridge) * torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    rhs = rhs.unsqueeze(-1)
    rhs = rhs - v * (v * rhs).sum(-2, keepdim=True)
    factor, failed = torch.linalg.cholesky_ex(k)
    x = torch.cholesky_solve(rhs, factor)
    x = (x + torch.cholesky_solve(rhs - (k @ x - ridge * x), factor)).squeeze(-1)  # what the ridge took
    found = (failed == 0).unsqueeze(-1) & x.isfinite().all(-1, keepdim=True)
    return torch.where(found, x, rhs.squeeze(-1)), found
