"""Query-dependent masks: query i sees the keys with its own masses N_i = softmax(mask row i), T iterations each.

Ex = e^ℓ [S, M];  U = N, V = b;  T times U = N·(V Exᵀ)^{−λ_a}, V = b·(U Ex)^{−λ_b};  then Cn = U Ex,
W^q = softmax_j(ℓ_q + log V), A = U ⊙ ((W^q/Cn) Exᵀ), o = A v.  O(T·L·S·M) time: the one path that is not linear.

The products hold while e^{±3·max|ℓ|} fits the dtype; where that is not known the same recursion runs in the log
domain on [L, S, M] logits, in chunks of queries that are recomputed in the backward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..problem import replaced
from .transport import INF, lse, potential

# max |ℓ| up to which e^{±3·|ℓ|} stays inside the dtype, from log(max) = 88 and 709.
SAFE_BOUND = {torch.float32: 25.0, torch.float64: 200.0}
CHUNK_ELEMENTS = 1 << 22  # logits of one chunk of queries in the log domain


class DenseProblem(NamedTuple):
    l_q: Tensor  # [B, H, L, M]
    l_k: Tensor  # [B, H, S, M]
    log_n: Tensor  # [B, H, L, S] log masses, rows normalised; −∞ where banned
    log_b: Tensor  # [H, 1, M]
    lam_a: Tensor  # [H, 1, 1]
    lam_b: Tensor  # [H, 1, 1]
    num_iters: int


def normalise_masses(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Unnormalised log masses [..., S] -> (log softmax, which rows see a key [..., 1]); a blind row becomes uniform."""
    seen = (mask > -INF).any(-1, keepdim=True)
    return torch.where(seen, mask, 0.0).log_softmax(-1), seen


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as unnormalised log masses."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -INF)


def query_masses(like: Tensor, length: int, s: int, mask: Tensor | None, causal: bool) -> Tensor:
    """Log masses [B or 1, H or 1, L, S] of a mask, and of `causal`: query i sees the keys s ≤ i + S − L."""
    masses = like.new_zeros(()).expand(1, 1, length, s) if mask is None else additive(mask, like.dtype)
    if not causal:
        return masses
    # Counted from the last query and key: no arithmetic on lengths, which a graph may be traced without.
    later = like.new_ones((length, s), dtype=torch.bool).tril(-1).flip((-2, -1))
    return masses.masked_fill(later, -INF)


def weights_by_products(p: DenseProblem, keep: Tensor | float) -> Tensor:
    """A [B, H, L, S] by matrix products; `keep` is the dropout factor on W^q."""
    ex, n, b = p.l_k.exp(), p.log_n.exp(), p.log_b.exp()
    u, v = n, b.expand(p.l_q.shape)
    for _ in range(p.num_iters):
        u = n * (v @ ex.transpose(-1, -2)).pow(-p.lam_a)
        v = b * (u @ ex).pow(-p.lam_b)
    w_q = (p.l_q + v.log()).softmax(-1) * keep
    return u * ((w_q / (u @ ex)) @ ex.transpose(-1, -2))


def weights_by_logs(p: DenseProblem, keep: Tensor | float) -> Tensor:
    """A [B, H, L, S] in the log domain: the recursion of `transport.sinkhorn` for every query."""
    l = p.l_k.unsqueeze(-3)  # [B, H, 1, S, M]
    log_b, lam_a, lam_b = p.log_b.unsqueeze(-3), p.lam_a, p.lam_b
    f, g = p.log_n, log_b.squeeze(-2).expand(p.l_q.shape)
    for _ in range(p.num_iters):
        f = potential(p.log_n, lam_a, lse(l + g.unsqueeze(-2), -1))
        g = potential(log_b.squeeze(-2), lam_b, lse(l + f.unsqueeze(-1), -2))
    w_k = (l + f.unsqueeze(-1)).softmax(-2)  # [B, H, L, S, M]
    w_q = (p.l_q + g).softmax(-1) * keep
    return (w_k @ w_q.unsqueeze(-1)).squeeze(-1)


def dense_weights(p: DenseProblem, keep: Tensor | float, logit_bound: float) -> Tensor:
    """A [B, H, L, S]; `logit_bound` bounds max |ℓ| of the keys, ∞ where nothing is known."""
    dtype = p.l_k.dtype
    if logit_bound <= SAFE_BOUND[dtype]:
        return weights_by_products(p, keep)
    if logit_bound <= SAFE_BOUND[torch.float64]:
        wide = replaced(p, **{name: getattr(p, name).double() for name in p._fields if name != "num_iters"})
        return weights_by_products(wide, keep).to(dtype)
    return _by_chunks(p, keep)


def unknown(length: int) -> bool:
    """Whether a graph is traced for any length: a loop over it would be right for the one it is traced with alone."""
    return not isinstance(length, int)  # a SymInt of torch.export, a tensor of torch.jit.trace


def _by_chunks(p: DenseProblem, keep: Tensor | float) -> Tensor:
    b, h, length, m = p.l_q.shape
    if unknown(length) or length == 0:
        return weights_by_logs(p, keep)
    rows = max(1, CHUNK_ELEMENTS // max(1, b * h * p.l_k.shape[-2] * m))
    chunks = []
    for start in range(0, length, rows):
        part = replaced(p, l_q=p.l_q[:, :, start : start + rows], log_n=p.log_n[:, :, start : start + rows])
        kept = keep[:, :, start : start + rows] if isinstance(keep, Tensor) else keep
        chunks.append(_recomputed(part, kept))
    return torch.cat(chunks, -2)


def _recomputed(p: DenseProblem, keep: Tensor | float) -> Tensor:
    """weights_by_logs without keeping [L, S, M] for the backward pass, where saved-tensor hooks are allowed."""
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return weights_by_logs(p, keep)
    return checkpoint(weights_by_logs, p, keep, use_reentrant=False, preserve_rng_state=False)
