"""Counter-based dropout on W^q: Philox4x32-10, the same mask on every backend.

n = ((b·H + h)·L + i)·M + j, key = seed, counter = (n_lo, n_hi, 0, 0); keep iff word 0 ≥ ⌊p·2³²⌋, scaled by 1/(1−p).
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def _multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of a·m; in 16-bit parts, because int64 holds no 64-bit unsigned product."""
    low = a * (m & 0xFFFF)
    high = a * (m >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(n: Tensor, seed: Tensor) -> Tensor:
    """Word 0 of Philox4x32-10 at counters n (int64 ≥ 0), in [0, 2³²) as int64."""
    x0, x1, x2, x3 = n & WORD, n >> 32, torch.zeros_like(n), torch.zeros_like(n)
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(10):
        high0, low0 = _multiply(x0, MULTIPLIERS[0])
        high1, low1 = _multiply(x2, MULTIPLIERS[1])
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return x0


def dropout(w: Tensor, p: float, seed: Tensor | None, counters: Tensor | None = None) -> Tensor:
    """W^q [B, H, L, M] with entries dropped with probability p and the others scaled by 1/(1−p); `counters`: their n,
    where the queries are some of more."""
    if p == 0.0 or seed is None:
        return w
    if p >= 1.0:
        return torch.zeros_like(w)
    n = torch.arange(w.numel(), device=w.device).view(w.shape) if counters is None else counters
    keep = philox(n, seed) >= int(p * 2**32)
    return torch.where(keep, w / (1 - p), 0.0)
