"""Damped Newton on the semi-dual, the concave function of g that is left when f is at its best:

    Φ(g) = Σ_j b_j φ(g_j − log b_j; (1 − λ_b)/λ_b) − Σ_i a_i φ(s_i; −(1 − λ_a)),   φ(x; r) = (1 − e^{−rx})/r

with s = LSE_j(ℓ + g), φ(x; 0) = x.  Its gradient is D (e^{ρ/λ_b} − 1), ρ = F(g) − g, and Newton's step for F(g) = g
solves (I − J) δ = ρ, the system of system.py.  One evaluation, a pass over the rows, finds Φ, its gradient, the step
from there and Sinkhorn's, F(g) itself.  A step is cut to a trust radius, and taken if Φ says that it helps; after two
refusals, and where the system is singular, Sinkhorn's step is taken, which never lowers Φ: so it converges from any
start.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..transport import INF, Plan, potential, readable, started
from .system import Marginals, Pass, Passed, full, passed, resolvent

RADIUS, SMALLEST, LARGEST = 4.0, 0.25, 256.0  # of |δ_j|; the largest keeps infeasible problems, where Φ → ∞, finite
REFUSALS = 2
SUFFICIENT, GOOD = 1e-4, 0.5  # of the gain that the gradient promises: for a step to be taken, the radius to grow
NOISE = 4  # rounding units of the sizes of what Φ sums
FAR = 1.0  # ρ/λ_b beyond which a column is starved, and asks for log rather than linear growth


class Point(NamedTuple):
    """Potentials g [..., M] and what a pass from there found."""

    g: Tensor  # [..., M]
    f: Tensor  # [..., N]
    c: Tensor  # [..., M]
    after: Tensor  # [..., M] F(g)
    step: Tensor  # [..., M] δ
    moved: Tensor  # [..., 1] max_j |ρ_j|
    value: Tensor  # [..., 1] Φ, float64
    noise: Tensor  # [..., 1] of Φ
    slope: Tensor  # [..., 1] ⟨∇Φ, δ⟩; 0 where there is no step


def newton(
    p: Marginals, num_iters: int, tol: float | None, start: Tensor | None, by: Passed = passed
) -> Plan:  # fmt: skip
    """At most so many passes; a problem stops once Sinkhorn's step would move no g_j by more than tol."""
    shape = p.l.shape[:-2] + p.l.shape[-1:]
    first = started(start, p.log_b).expand(shape)
    at = _evaluate(p, first if start is None else _centred(p, first), None, by)
    refused = torch.full_like(at.moved, REFUSALS if start is None else 0, dtype=torch.int64)
    radius, iters = torch.full_like(at.value, RADIUS), torch.ones_like(refused)
    limit = -1.0 if tol is None else tol
    for _ in range(num_iters - 1):
        running = at.moved > limit
        if readable(p.l) and not bool(running.any()):
            break
        # What moves further than any of Newton's steps may goes all the way in one of Sinkhorn's.
        plain = (refused >= REFUSALS) | (at.slope <= 0) | (at.moved > LARGEST)
        after = at.after if start is None else _centred(p, at.after)
        length = at.step.abs().amax(-1, keepdim=True)
        t = (radius / length.clamp_min(torch.finfo(length.dtype).tiny)).clamp_max(1.0)
        trial = _evaluate(p, torch.where(plain, after, (at.g + t * at.step).to(at.g.dtype)), running, by)
        gain, promised = trial.value - at.value, t * at.slope
        good = (gain >= SUFFICIENT * promised - at.noise) & trial.value.isfinite()
        taken = running & (plain | good)
        wider = torch.where(gain >= GOOD * promised - at.noise, torch.maximum(radius, 4 * t * length), radius)
        radius = torch.where(plain, radius, torch.where(good, wider, t * length / 4)).clamp(SMALLEST, LARGEST)
        refused = torch.where(plain | good, 0, refused + 1)
        iters = iters + running
        at = Point(*[torch.where(taken, new, old) for new, old in zip(trial, at, strict=True)])
    return Plan(at.f, at.after, at.c.unsqueeze(-2), iters.squeeze(-1))


def _centred(p: Marginals, g: Tensor) -> Tensor:
    """g less the constant that balanced potentials may have, where it is so large that it leaves them no digits."""
    live = (g > -INF) & (p.log_b > -INF)
    b = torch.where(live, p.log_b.exp(), 0.0)
    mean = (b * torch.where(live, g - p.log_b, 0.0)).sum(-1, keepdim=True) / b.sum(-1, keepdim=True).clamp_min(1e-30)
    return g - torch.where((p.lam_a * p.lam_b == 1) & (mean.abs() > LARGEST), mean, 0.0)


def _evaluate(p: Marginals, g: Tensor, running: Tensor | None, by: Passed) -> Point:
    q = by(p, g, running)
    after = potential(p.log_b, p.lam_b, q.c)
    log_b, at = torch.where(q.live, p.log_b, 0.0), torch.where(q.live, g, 0.0)
    seen = q.live & (q.mass > torch.finfo(q.mass.dtype).tiny)
    # Balanced, log b − log D: no difference of large potentials.
    residual = log_b - (1 - p.lam_b) * at - p.lam_b * torch.where(seen, q.mass, 1.0).log()
    residual = torch.where(seen, residual, torch.where(q.live, full(after) - at, 0.0))
    step, slope = _step(p, q, residual.double())
    value, noise = _semi_dual(p, q, at.double() - log_b)
    return Point(g, q.f, q.c, after, step, residual.abs().amax(-1, keepdim=True), value, noise, slope)


def _step(p: Marginals, q: Pass, residual: Tensor) -> tuple[Tensor, Tensor]:
    """δ [..., M] and ⟨∇Φ, δ⟩ [..., 1] from ρ [..., M]."""
    lam = p.lam_b.double().clamp_min(1e-3)  # below, Sinkhorn's step is the answer
    growth = torch.expm1((residual / lam).clamp_max(FAR))
    step, found = resolvent(p, q, torch.where(residual > FAR * lam, residual, lam * growth))
    step = torch.where(q.live, step, 0.0)
    slope = (q.mass.double() * torch.expm1((residual / lam).clamp_max(LARGEST)) * step).sum(-1, keepdim=True)
    return step, torch.where(found & slope.isfinite(), slope, 0.0)


def _semi_dual(p: Marginals, q: Pass, psi: Tensor) -> tuple[Tensor, Tensor]:
    """Φ [..., 1] and its rounding, from ψ = g − log b [..., M], 0 where there is no mass."""
    a, b = (torch.where(t > -INF, t.double().exp(), 0.0) for t in (p.log_a, p.log_b))
    s, lam_b = full(q.s).double(), p.lam_b.double().clamp_min(1e-3)
    terms = b * _phi(psi, (1 - lam_b) / lam_b), a * _phi(s, p.lam_a.double() - 1)
    of_b, of_a = (t.sum(-1, keepdim=True) for t in terms)
    size = (b * psi.abs()).sum(-1, keepdim=True) + (a * s.abs()).sum(-1, keepdim=True)
    return of_b - of_a, NOISE * torch.finfo(q.s.dtype).eps * size


def _phi(x: Tensor, r: Tensor) -> Tensor:
    """(1 − e^{−rx})/r; x at r = 0."""
    none = r == 0
    return torch.where(none, x, -torch.expm1(-r * x) / torch.where(none, 1.0, r))
