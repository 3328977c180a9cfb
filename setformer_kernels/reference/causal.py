"""Causal SeT attention for T ≤ 1: a scan over the keys with an M × (E + 1) state, linear in the length.

f̂_s = −λ_a LSE_j(ℓ_sj + log b_j) (T = 0: 0);  ω_sj = ℓ_sj + f̂_s + log a_s (log weights);  Γ_i = Σ_{r≤i} log γ_r;
log C_ij = LSE_{s≤i} (ω_sj + Γ_i − Γ_s);  z_ij = Σ_{s≤i} e^{ω_sj + Γ_i − Γ_s − log C_ij} v_s;
g_ij = log b_j − λ_b log C_ij (T = 0: log b_j).
The definition's −log n_i in g is the same for all j, so the softmax over j does not see it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .state import advance, log_sum, means, width
from .transport import INF, lse

CHUNK = 32  # keys per step: bounds the [chunk, chunk, M] weights in memory


def log_weights(l: Tensor, log_a: Tensor, log_b: Tensor, num_iters: int, lam_a: Tensor) -> Tensor:
    """ω [..., S, M] from ℓ [..., S, M], log a [..., S], log b [..., M], λ_a [..., 1]."""
    f = log_a
    if num_iters == 1:
        f = log_a - lam_a * lse(l + log_b.unsqueeze(-2), -1)
    return l + f.unsqueeze(-1)


def scan(omega: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Prefix log C [..., S, M] (−∞ before the first key), prefix means z [..., S, M, E] of v [..., S, E], and the state
    after the last key; log γ [..., S], the state before the first key or None."""
    if state is None:
        state = v.new_zeros((*omega.shape[:-2], omega.shape[-1], width(v.shape[-1])))
    all_c, all_z = [], []
    for start in range(0, omega.shape[-2], CHUNK):
        part = slice(start, start + CHUNK)
        c, z, state = _scan_chunk(omega[..., part, :], v[..., part, :], log_decay[..., part], state)
        all_c.append(c)
        all_z.append(z)
    return torch.cat(all_c, -2), torch.cat(all_z, -3), state


def gate_sums(log_decay: Tensor) -> Tensor:
    """Γ_i − Γ_s [..., n (i), n (s)] for s ≤ i, else −∞: a sum over the keys between, no difference of large numbers."""
    n = log_decay.shape[-1]
    later = torch.ones(n, n, dtype=torch.bool, device=log_decay.device).triu()
    between = torch.where(later, 0.0, log_decay.unsqueeze(-1)).cumsum(-2)
    return torch.where(later.triu(1), -INF, between)


def _scan_chunk(omega: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One chunk of n keys: log C [..., n, M], z [..., n, M, E], and the state after it."""
    between, since = gate_sums(log_decay), log_decay.cumsum(-1)  # [..., n, n], [..., n]
    past = omega.unsqueeze(-3) + between.unsqueeze(-1)  # [..., n (i), n (s), M]
    before = log_sum(state).unsqueeze(-2) + since.unsqueeze(-1)  # [..., n, M]
    c = lse(torch.cat((past, before.unsqueeze(-2)), -2), -2)  # [..., n, M]
    finite = torch.where(c > -INF, c, 0.0)
    weights = (past - finite.unsqueeze(-2)).exp()  # [..., n, n, M]
    carried = (before - finite).exp()  # [..., n, M]
    pooled = weights.movedim(-1, -2) @ v.unsqueeze(-3)  # [..., n, M, E]
    z = pooled + carried.unsqueeze(-1) * means(state).unsqueeze(-3)
    return c, z, advance(state, omega + between[..., -1, :].unsqueeze(-1), v, since[..., -1])
