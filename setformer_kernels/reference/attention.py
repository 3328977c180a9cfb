"""SeT attention in plain PyTorch, on normalised `Operands`: the specification every backend is held against.

transport: c, f from ℓ(k, y);  z_j = Σ_s W^k_sj v_s;  read: o_i = Σ_j W^q_ij z_j.  Derivations: README.md beside this.
Half-precision inputs are computed in float32 and the result is rounded once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..problem import HYPER, NO_STREAM, Operands, Options, Stream, compute_dtype, replaced
from .causal import log_weights, scan
from .dense import DenseProblem, dense_weights, normalise_masses, query_masses, unknown
from .dropout import dropout
from .logits import kernel_matrix, logits
from .state import empty_like
from .transport import INF, Plan, pool_weights, read_weights, readable, resumed, sinkhorn

__all__ = [
    "attention",
    "causal",
    "causal_with_state",
    "masked",
    "masked_weights",
    "plan",
    "pool",
    "step",
    "weight_factors",
    "weights",
]


def hyper(x: Operands, opt: Options, name: str) -> Tensor:
    """The hyperparameter `name` as [H, 1, 1] in the compute dtype."""
    value = getattr(x, name)
    if value is None:
        value = x.references.new_full((), opt.scalars[HYPER.index(name)]).expand(x.references.shape[0])
    return value[:, None, None]


def uniform_mass(like: Tensor, n: int) -> Tensor:
    """−log n [n]; counted by a sum, so that a graph traced once serves every length."""
    return -like.new_ones(n).sum().log().expand(n)


def reference_mass(x: Operands) -> Tensor:
    """log b [H, M]."""
    h, m, _ = x.references.shape
    return uniform_mass(x.references, m).expand(h, m) if x.log_b is None else x.log_b


def key_mass(x: Operands) -> Tensor:
    """log a [B, H, S]."""
    b, h, s, _ = x.key.shape
    return uniform_mass(x.references, s).expand(b, h, s) if x.log_a is None else x.log_a


def token_logits(x: Operands, opt: Options, tokens: Tensor, position: Tensor | None) -> Tensor:
    """ℓ [B, H, N, M] of tokens [B, H, N, D] against the references."""
    kappa = kernel_matrix(tokens, x.references, hyper(x, opt, "bandwidth"), opt.kernel)
    return logits(kappa, hyper(x, opt, "epsilon"), hyper(x, opt, "position_scale"), position, x.reference_position)


def widen(x: Operands) -> Operands:
    """q, k, v in the compute dtype, and the content of keys that take no part replaced by zeros (never read)."""
    dtype = compute_dtype(x.key.dtype)
    query = None if x.query is None else x.query.to(dtype)
    key, value = x.key.to(dtype), x.value.to(dtype)
    if x.log_a is not None:
        present = (x.log_a > -INF).unsqueeze(-1)  # [B, H, S, 1]
        key, value = torch.where(present, key, 0.0), torch.where(present, value, 0.0)
    return replaced(x, query=query, key=key, value=value)


def plan(x: Operands, opt: Options, c: Tensor | None = None) -> tuple[Tensor, Plan]:
    """Logits ℓ [B, H, S, M] of the keys and their transport onto the references; found again from the c it left, where
    that is given."""
    l = token_logits(x, opt, x.key, x.key_position)
    lam_a, lam_b = (hyper(x, opt, name).squeeze(-1) for name in ("key_relaxation", "reference_relaxation"))
    known = (l, key_mass(x), reference_mass(x), opt.num_iters, lam_a, lam_b)
    return l, sinkhorn(*known) if c is None else resumed(*known, c)


def query_weights(x: Operands, opt: Options, c: Tensor) -> Tensor:
    """W^q [B, H, L, M] with dropout, from c [B, H, max(T, 1), M]."""
    assert x.query is not None
    l = token_logits(x, opt, x.query, x.query_position)
    w = read_weights(l, c, reference_mass(x), opt.num_iters, hyper(x, opt, "reference_relaxation").squeeze(-1))
    return dropout(w, opt.dropout_p, x.seed)


def pool_with_state(x: Operands, opt: Options) -> tuple[Tensor, Tensor]:
    """(z [B, H, M, E], c [B, H, max(T, 1), M]) in the compute dtype."""
    x = widen(x)
    l, p = plan(x, opt)
    return pool_weights(l, p).transpose(-1, -2) @ x.value, p.c


def attention_with_state(x: Operands, opt: Options) -> tuple[Tensor, Tensor, Tensor]:
    """(o [B, H, L, E] in the dtype of the queries, z and c of `pool_with_state`)."""
    z, c = pool_with_state(x, opt)
    return (query_weights(widen(x), opt, c) @ z).to(x.key.dtype), z, c


def pool(x: Operands, opt: Options) -> Tensor:
    """z [B, H, M, E] in the dtype of the values."""
    return pool_with_state(x, opt)[0].to(x.value.dtype)


def attention(x: Operands, opt: Options) -> Tensor:
    """o [B, H, L, E] in the dtype of the queries."""
    return attention_with_state(x, opt)[0]


def weight_factors(x: Operands, opt: Options, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """W^q [B, H, L, M], with dropout, and W^k [B, H, S, M] in the compute dtype; `c` as in `plan`."""
    x = widen(x)
    l, p = plan(x, opt, c)
    return query_weights(x, opt, p.c), pool_weights(l, p)


def weights(x: Operands, opt: Options) -> Tensor:
    """A = W^q W^kᵀ [B, H, L, S]."""
    w_q, w_k = weight_factors(x, opt)
    return (w_q @ w_k.transpose(-1, -2)).to(x.key.dtype)


def causal(x: Operands, opt: Options) -> Tensor:
    """Causal o [B, H, L, E] for T ≤ 1 by the linear-time scan, or by the dense path where the length is unknown."""
    if unknown(x.key.shape[-2]):
        return masked(x, opt, None, True)
    return causal_with_state(x, opt, NO_STREAM)[0]


def causal_with_state(
    x: Operands, opt: Options, stream: Stream, counters: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(causal o [B, H, L, E] for T ≤ 1, the state after the last key), as state.py lays it out.  Under autocast too its
    products are not narrowed: a state in fewer digits drifts.  `counters` as in `dropout`."""
    device = x.key.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return _causal_with_state(x, opt, stream, counters)
    with torch.autocast(device, enabled=False):
        return _causal_with_state(x, opt, stream, counters)


def _causal_with_state(
    x: Operands, opt: Options, stream: Stream, counters: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype, before = x.key.dtype, stream.initial_state
    x = widen(x)
    assert x.query is not None
    if x.key.shape[-2] == 0:
        state = empty_like(x).zero_() if before is None else before.clone()
        return x.query.new_zeros((*x.query.shape[:-1], x.value.shape[-1]), dtype=dtype), state
    log_b, lam_a, lam_b = (
        reference_mass(x),
        *(hyper(x, opt, n).squeeze(-1) for n in ("key_relaxation", "reference_relaxation")),
    )
    l_k, l_q = (token_logits(x, opt, t, p) for t, p in ((x.key, x.key_position), (x.query, x.query_position)))
    log_a = l_k.new_zeros(l_k.shape[:-1]) if x.log_a is None else x.log_a
    gates = torch.zeros_like(log_a) if stream.log_decay is None else stream.log_decay
    omega = log_weights(l_k, log_a, log_b, opt.num_iters, lam_a)
    c, z, state = scan(omega, x.value, gates, before)  # [B, H, L, M], [B, H, L, M, E]
    g = log_b.unsqueeze(-2) - opt.num_iters * lam_b.unsqueeze(-1) * torch.where(c > -INF, c, 0.0)
    w = dropout((l_q + g).softmax(-1), opt.dropout_p, x.seed, counters)
    return (w.unsqueeze(-2) @ z).squeeze(-2).to(dtype), state


def step(x: Operands, opt: Options, pool: Tensor, log_decay: Tensor | None, rows: Tensor | None) -> Tensor:
    """o [B, H, 1, E] of one token each; in place on the states pool [N, H, M, 2E + 3], of which `rows` [B] says whose
    turn it is (−1: nobody's, o = 0), or all in their order."""
    if rows is None:
        o, after = causal_with_state(x, opt, Stream(log_decay, pool))
        pool.copy_(after)
        return o
    at = rows.clamp_min(0).long()
    o, after = causal_with_state(x, opt, Stream(log_decay, pool[at]))
    # Found from the pool's side: two rows of −1 and of 0 would write the same state.
    turn = rows == torch.arange(pool.shape[0], device=rows.device).unsqueeze(-1)  # [N, B]
    if rows.shape[0] > 0:
        pool.copy_(torch.where(turn.any(-1)[:, None, None, None], after[turn.byte().argmax(-1)], pool))
    return torch.where((rows >= 0)[:, None, None, None], o, 0.0)


def masked(x: Operands, opt: Options, mask: Tensor | None, causal: bool) -> Tensor:
    """o [B, H, L, E] under a mask [B or 1, H or 1, L, S], bool or log masses, and the causal one where asked."""
    return _dense(x, opt, mask, causal)[0]


def masked_weights(x: Operands, opt: Options, mask: Tensor | None, causal: bool) -> Tensor:
    """A [B, H, L, S] of `masked`."""
    return _dense(x, opt, mask, causal)[1]


def _dense(x: Operands, opt: Options, given: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """(o [B, H, L, E], A [B, H, L, S])."""
    assert x.query is not None
    dtype = x.key.dtype
    mask = query_masses(x.references, x.query.shape[-2], x.key.shape[-2], given, causal)
    if x.log_a is not None:
        mask = mask + x.log_a.unsqueeze(-2)
    visible = (mask > -INF).any(-2)  # [B, H, S]: a key no query sees is never read
    x = widen(replaced(x, log_a=torch.where(visible, 0.0, -INF).to(mask.dtype).expand(x.key.shape[:-1])))
    assert x.query is not None
    log_n, seen = normalise_masses(mask.expand(x.query.shape[:-1] + x.key.shape[-2:-1]))
    l_k, l_q = (token_logits(x, opt, t, p) for t, p in ((x.key, x.key_position), (x.query, x.query_position)))
    lam_a, lam_b = (hyper(x, opt, n) for n in ("key_relaxation", "reference_relaxation"))
    problem = DenseProblem(l_q, l_k, log_n, reference_mass(x).unsqueeze(-2), lam_a, lam_b, opt.num_iters)
    keep = dropout(torch.ones_like(l_q), opt.dropout_p, x.seed) if x.seed is not None else 1.0
    a = torch.where(seen, dense_weights(problem, keep, _logit_bound(x, opt, l_k)), 0.0)
    return (a @ x.value).to(dtype), a.to(dtype)


def _logit_bound(x: Operands, opt: Options, l_k: Tensor) -> float:
    """max |ℓ| of the keys: (1 − e^{−2β})/ε where that is known statically, else read off, else ∞.

    It is read on the CPU only, where reading does not stall a device, and outside of tracing and functorch.
    """
    bandwidth, epsilon = opt.scalars[:2]
    learned = x.bandwidth is not None or x.epsilon is not None
    if opt.kernel == "rbf" and x.reference_position is None and not learned:
        return (1 - math.exp(-2 * bandwidth)) / epsilon
    if not readable(l_k) or l_k.numel() == 0:
        return INF
    return float(l_k.detach().abs().max())
