"""Causal SeT attention for T ≤ 1: a scan over the keys with an M × (E + 1) state, linear in the length.

f̂_s = −λ_a LSE_j(ℓ_sj + log b_j) (T = 0: 0);  ω_sj = ℓ_sj + f̂_s + log a_s (log weights);
log C_ij = LSE_{s≤i} ω_sj;  z_ij = Σ_{s≤i} e^{ω_sj − log C_ij} v_s;  g_ij = log b_j − λ_b log C_ij (T = 0: log b_j).
The definition's −log n_i in g is the same for all j, so the softmax over j does not see it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .transport import INF, lse

CHUNK = 32  # keys per step: bounds the [chunk, chunk, M] weights in memory


def log_weights(l: Tensor, log_a: Tensor, log_b: Tensor, num_iters: int, lam_a: Tensor) -> Tensor:
    """ω [..., S, M] from ℓ [..., S, M], log a [..., S], log b [..., M], λ_a [..., 1]."""
    f = log_a
    if num_iters == 1:
        f = log_a - lam_a * lse(l + log_b.unsqueeze(-2), -1)
    return l + f.unsqueeze(-1)


def scan(omega: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Prefix log C [..., S, M] (−∞ before the first key) and prefix means z [..., S, M, E] of v [..., S, E]."""
    c = torch.full_like(omega[..., 0, :], -INF)  # [..., M]
    z = v.new_zeros(c.shape + v.shape[-1:])  # [..., M, E]
    all_c, all_z = [], []
    for start in range(0, omega.shape[-2], CHUNK):
        c_chunk, z_chunk = _scan_chunk(omega[..., start : start + CHUNK, :], v[..., start : start + CHUNK, :], c, z)
        c, z = c_chunk[..., -1, :], z_chunk[..., -1, :, :]
        all_c.append(c_chunk)
        all_z.append(z_chunk)
    return torch.cat(all_c, -2), torch.cat(all_z, -3)


def _scan_chunk(omega: Tensor, v: Tensor, c: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk of n keys on top of the state c [..., M], z [..., M, E]."""
    n = omega.shape[-2]
    later = torch.ones(n, n, dtype=torch.bool, device=omega.device).triu(1)
    past = torch.where(later.unsqueeze(-1), -INF, omega.unsqueeze(-3))  # [..., n (i), n (s), M]
    c_all = lse(torch.cat((past, c[..., None, None, :].expand(*past.shape[:-2], 1, -1)), -2), -2)  # [..., n, M]
    finite = torch.where(c_all > -INF, c_all, 0.0)
    weights = (past - finite.unsqueeze(-2)).exp()  # [..., n, n, M]
    carried = (c.unsqueeze(-2) - finite).exp()  # [..., n, M]
    pooled = weights.movedim(-1, -2) @ v.unsqueeze(-3)  # [..., n, M, E]
    return c_all, pooled + carried.unsqueeze(-1) * z.unsqueeze(-3)
