"""Log-domain Sinkhorn with relaxed marginals, pooling along the plan, reading with the dual potential."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

INF = float("inf")


def readable(t: Tensor) -> bool:
    """Whether values of `t` may be looked at: on the CPU, where nobody waits, outside of tracing and functorch."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    return not traced and type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu"


def lse(x: Tensor, dim: int) -> Tensor:
    """log Σ exp over `dim`; −∞ with zero gradient where every term is −∞."""
    peak = x.detach().amax(dim, keepdim=True)
    peak = torch.where(peak.isfinite(), peak, 0.0)
    total = (x - peak).exp().sum(dim, keepdim=True)
    empty = total == 0
    return torch.where(empty, -INF, torch.where(empty, 1.0, total).log() + peak).squeeze(dim)


def potential(log_mass: Tensor, relaxation: Tensor, log_sum: Tensor) -> Tensor:
    """log mass − λ·log_sum: [..., N]; −∞ where nothing can be sent (log_sum = −∞) or there is no mass."""
    reached = log_sum > -INF
    return torch.where(reached, log_mass - relaxation * torch.where(reached, log_sum, 0.0), -INF)


class Plan(NamedTuple):
    """What Sinkhorn leaves: potentials in units of ε, the column log sums, and how many iterations ran."""

    f: Tensor  # [..., S] f^T
    g: Tensor  # [..., M] g^T
    c: Tensor  # [..., max(T, 1), M] c^t = LSE_s(ℓ + f^t)
    iters: Tensor  # [...] int64, T unless a tolerance stopped earlier


def sinkhorn(
    l: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    num_iters: int,
    lam_a: Tensor,
    lam_b: Tensor,
    tol: float | None = None,
    start: Tensor | None = None,
) -> Plan:
    """g⁰ = log b; f^t = log a − λ_a LSE_j(ℓ + g^{t−1}); c^t = LSE_s(ℓ + f^t); g^t = log b − λ_b c^t.

    ℓ [..., S, M], log a [..., S], log b [..., M], λ broadcastable to [..., 1].  T = 0: f = log a, g = log b.
    With `tol` a problem stops once max_j |g^t − g^{t−1}| ≤ tol; its later c^t repeat the last one.
    g⁰ = `start` [..., M] where that is given and finite.
    """
    g = started(start, log_b).expand(l.shape[:-2] + l.shape[-1:])
    f = log_a.expand(l.shape[:-1])
    c = [] if num_iters else [lse(l + f.unsqueeze(-1), -2)]
    running = torch.ones_like(g[..., :1], dtype=torch.bool)
    iters = torch.zeros_like(running, dtype=torch.int64)
    for _ in range(num_iters):
        new_f = potential(log_a, lam_a, lse(l + g.unsqueeze(-2), -1))
        new_c = lse(l + new_f.unsqueeze(-1), -2)
        new_g = potential(log_b, lam_b, new_c)
        moved = torch.where(new_g == g, 0.0, (new_g - g).abs()).amax(-1, keepdim=True)
        f, g = torch.where(running, new_f, f), torch.where(running, new_g, g)
        c.append(torch.where(running, new_c, c[-1]) if c else new_c)
        iters = iters + running
        running = running & (moved > tol) if tol is not None else running
        if tol is not None and readable(l) and not bool(running.any()):
            break
    c += c[-1:] * (num_iters - len(c))
    return Plan(f, g, torch.stack(c, -2), iters.squeeze(-1))


def started(start: Tensor | None, log_b: Tensor) -> Tensor:
    """g⁰ [..., M]: log b, or a start where that is finite and there is mass."""
    if start is None:
        return log_b
    return torch.where(start.isfinite() & (log_b > -INF), start, log_b)


def resumed(
    l: Tensor, log_a: Tensor, log_b: Tensor, num_iters: int, lam_a: Tensor, lam_b: Tensor, c: Tensor
) -> Plan:  # fmt: skip
    """The plan of `sinkhorn` from the c [..., max(T, 1), M] that it left: its last iteration alone."""
    g = potential(log_b, lam_b, c[..., -2, :]) if num_iters > 1 else log_b.expand(c[..., -1, :].shape)
    f = potential(log_a, lam_a, lse(l + g.unsqueeze(-2), -1)) if num_iters else log_a.expand(l.shape[:-1])
    last = lse(l + f.unsqueeze(-1), -2)
    g = potential(log_b, lam_b, last) if num_iters else g
    iters = torch.full_like(g[..., 0], num_iters, dtype=torch.int64)
    return Plan(f, g, torch.cat([c[..., :-1, :], last.unsqueeze(-2)], -2), iters)


def pool_weights(l: Tensor, plan: Plan) -> Tensor:
    """W^k_sj = exp(ℓ_sj + f_s − c_j): [..., S, M], columns summing to 1, or 0 where no key takes part."""
    c = plan.c[..., -1:, :]
    return (l + plan.f.unsqueeze(-1) - torch.where(c > -INF, c, 0.0)).exp()


def read_weights(l: Tensor, c: Tensor, log_b: Tensor, num_iters: int, lam_b: Tensor) -> Tensor:
    """W^q_ij = softmax_j(ℓ_ij + g_j), g = log b − λ_b c^T (T = 0: log b): [..., L, M]."""
    c = c[..., -1, :]
    c = torch.where(c > -INF, c, 0.0)
    g = log_b - lam_b * c if num_iters > 0 else log_b.expand(c.shape)
    return (l + g.unsqueeze(-2)).softmax(-1)
