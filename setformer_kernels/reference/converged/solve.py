"""Which potentials a call of transport ends with, what it says about them, and the gradient they carry."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..transport import INF, Plan, lse, potential, sinkhorn
from .implicit import FixedPoint
from .newton import newton
from .system import Marginals, columns_of, full, rows_of, without_autocast

ENOUGH = 1e-3  # of the mass: the marginal error beyond which nothing counts as converged
LARGEST = 30.0  # log of the masses that an error is made of: it stays finite


class Solver(NamedTuple):
    """How a transport is solved, beside its number of iterations."""

    tol: float | None = None
    method: str = "sinkhorn"  # or "newton"
    grad: str = "unrolled"  # or "implicit"
    start: Tensor | None = None  # [..., M] g⁰


class TransportInfo(NamedTuple):
    """What a solver reached, for each problem [...] of the batch."""

    iters: Tensor  # [...] int64: iterations, or Newton's passes over the rows, that ran
    error: Tensor  # [...] Σ |marginal of the plan − marginal wanted| over rows and columns, in units of mass
    converged: Tensor  # [...] bool: within the tolerance, and an error of at most 1e-3 of the mass
    potential: Tensor  # [..., M] g without gradient: the next call's `initial_potential`


Solving = Callable[[Marginals, int, Solver], Plan]


def solve(p: Marginals, num_iters: int, how: Solver) -> Plan:
    """(f, g, c, iters) with gradient; implicit: of the fixed point, from which the last iteration sets out."""
    p = batched(p)
    if how.grad == "unrolled" and how.method == "sinkhorn":
        return sinkhorn(p.l, p.log_a, p.log_b, num_iters, p.lam_a, p.lam_b, how.tol, how.start)
    with torch.no_grad(), without_autocast(p.l):
        fixed = Marginals(*[t.detach() for t in p])
        g, f, iters = _potentials(fixed, num_iters - 1, how)
    of_columns = p.l.shape[-1] <= p.l.shape[-2]
    f = rows_of(p, FixedPoint.apply(*p, g)) if of_columns else FixedPoint.apply(*p.T, f)
    c, g = columns_of(p, f)
    return Plan(f, g, c.unsqueeze(-2), iters + 1)


def batched(p: Marginals) -> Marginals:
    """Everything in the batch of ℓ: a side's λ is then one that the other side's may be multiplied with."""
    batch, (n, m) = p.l.shape[:-2], p.l.shape[-2:]
    sizes = (n, m, 1, 1)
    return Marginals(p.l, *[t.expand(*batch, size) for t, size in zip(p[1:], sizes, strict=True)])


def _potentials(p: Marginals, num_iters: int, how: Solver) -> tuple[Tensor, Tensor, Tensor]:
    """g [..., M], f [..., N] from it, and how many iterations ran."""
    if how.method == "sinkhorn":
        plan = sinkhorn(p.l, p.log_a, p.log_b, num_iters, p.lam_a, p.lam_b, how.tol, how.start)
        return plan.g, rows_of(p, plan.g), plan.iters
    if p.l.shape[-1] <= p.l.shape[-2]:
        plan = newton(p, num_iters, how.tol, how.start)
        return plan.g, rows_of(p, plan.g), plan.iters
    start = None if how.start is None else rows_of(p, torch.where(how.start.isfinite(), how.start, p.log_b))
    plan = newton(p.T, num_iters, how.tol, start)
    return plan.f, plan.g, plan.iters


def certified(
    p: Marginals, f: Tensor, g: Tensor, iters: Tensor, num_iters: int, tol: float | None, plan: Tensor | None = None
) -> TransportInfo:  # fmt: skip
    """What (f, g) reached, from the `plan` that they give: so also what rounding took, where ε exhausts the range.

    Wanted are the row sums e^{f' + s} of the f' that another iteration would have, s = LSE_j(ℓ + g): balanced, a;
    likewise for the columns.
    """
    with torch.no_grad():
        p = batched(Marginals(*[t.detach() for t in p]))
        f, g = f.detach(), g.detach()
        s, c = lse(p.l + g.unsqueeze(-2), -1), lse(p.l + f.unsqueeze(-1), -2)
        plan = plan_of(p.l, f, g) if plan is None else plan.detach()
        plan = plan.clamp_max(math.exp(LARGEST))
        error = (plan.sum(-1) - _wanted(p.log_a, p.lam_a, s)).abs().sum(-1)
        error = error + (plan.sum(-2) - _wanted(p.log_b, p.lam_b, c)).abs().sum(-1)
        move = torch.where(s > -INF, full(f) - full(potential(p.log_a, p.lam_a, s)), 0.0).abs().amax(-1)
        still = torch.ones_like(iters, dtype=torch.bool) if tol is None else (iters < num_iters) | (move <= tol)
        enough = max(ENOUGH, 0.0 if tol is None else 2 * tol) * p.log_b.exp().sum(-1)
        return TransportInfo(iters, error, still & (error <= enough), g)


def plan_of(l: Tensor, f: Tensor, g: Tensor) -> Tensor:
    """P [..., N, M]."""
    return (l + f.unsqueeze(-1) + g.unsqueeze(-2)).exp()


def _wanted(log_mass: Tensor, lam: Tensor, log_sum: Tensor) -> Tensor:
    """The marginal that relaxation leaves of a mass, and nothing of it where it can go nowhere unless it has to."""
    relaxed = (log_mass + (1 - lam) * full(log_sum)).clamp_max(LARGEST).exp()
    return torch.where((log_sum > -INF) | (lam == 1), relaxed, 0.0)
