"""The two halves of attention: keys onto references, which leaves z and g, and queries that read these.

Defined by `attention.pool_with_state` and `attention.attention_with_state`, which are the two one after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Operands, Options, compute_dtype
from .attention import hyper, pool_with_state, reference_mass, token_logits
from .dropout import dropout
from .transport import INF, potential


def transport(x: Operands, opt: Options) -> tuple[Tensor, Tensor, Tensor]:
    """(z [B, H, M, E], g [B, H, M], c [B, H, max(T, 1), M]); g = log b − λ_b c^T (T = 0: log b), −∞ without a key."""
    z, c = pool_with_state(x, opt)
    z = z.to(compute_dtype(x.key.dtype))  # autocast narrows products
    lam_b = hyper(x, opt, "reference_relaxation").squeeze(-1)
    return z, potential(reference_mass(x), lam_b if opt.num_iters else 0 * lam_b, c[..., -1, :]), c


def read(x: Operands, opt: Options, z: Tensor, g: Tensor, counters: Tensor | None = None) -> Tensor:
    """o_i = Σ_j softmax_j(ℓ_ij + g_j) z_j [B, H, L, E] in the dtype of the queries; 0 where every g_j is −∞.
    `counters` as in `dropout`."""
    assert x.query is not None
    seen = (g > -INF).any(-1, keepdim=True)  # [B, H, 1]
    l = token_logits(x, opt, x.query.to(compute_dtype(x.query.dtype)), x.query_position)
    w = (l + torch.where(seen, g, 0.0).unsqueeze(-2)).softmax(-1)
    o = dropout(w, opt.dropout_p, x.seed, counters) @ z
    return torch.where(seen.unsqueeze(-1), o, 0.0).to(x.query.dtype)
