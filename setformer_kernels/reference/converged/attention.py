"""The functions of SeT attention on a transport that a `Solver` finds."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...problem import Operands, Options, compute_dtype
from ..attention import hyper, key_mass, query_weights, reference_mass, token_logits, widen
from ..transport import Plan, pool_weights
from .solve import Solver, Solving, solve
from .system import Marginals


class Transported(NamedTuple):
    """The keys' problems of transport [B, H], and their plans."""

    p: Marginals
    plan: Plan


def _transported(x: Operands, opt: Options, how: Solver, by: Solving) -> tuple[Tensor, Transported]:
    """W^k [B, H, S, M] of widened operands, and the plan behind it."""
    p = marginals(x, opt)
    plan = by(p, opt.num_iters, how)
    return pool_weights(p.l, plan), Transported(p, plan)


def marginals(x: Operands, opt: Options) -> Marginals:
    """The keys' problems of transport [B, H] of widened operands."""
    return around(token_logits(x, opt, x.key, x.key_position), x, opt)


def around(l: Tensor, x: Operands, opt: Options) -> Marginals:
    """Those problems but for their logits, which are given."""
    lam = (hyper(x, opt, name).squeeze(-1) for name in ("key_relaxation", "reference_relaxation"))
    return Marginals(l, key_mass(x), reference_mass(x), *lam)


def pool(x: Operands, opt: Options, how: Solver, by: Solving = solve) -> tuple[Tensor, Transported]:
    """z [B, H, M, E] in the dtype of the values."""
    x, dtype = widen(x), x.value.dtype
    w, found = _transported(x, opt, how, by)
    return (w.mT @ x.value).to(dtype), found


def transport(x: Operands, opt: Options, how: Solver, by: Solving = solve) -> tuple[Tensor, Tensor, Transported]:
    """z [B, H, M, E] and g [B, H, M] in the compute dtype."""
    x, dtype = widen(x), compute_dtype(x.key.dtype)
    w, found = _transported(x, opt, how, by)
    return (w.mT @ x.value).to(dtype), found.plan.g, found


def attention(x: Operands, opt: Options, how: Solver, by: Solving = solve) -> tuple[Tensor, Transported]:
    """o [B, H, L, E] in the dtype of the queries."""
    x, dtype = widen(x), x.key.dtype
    w, found = _transported(x, opt, how, by)
    return (query_weights(x, opt, found.plan.c) @ (w.mT @ x.value)).to(dtype), found


def weights(x: Operands, opt: Options, how: Solver, by: Solving = solve) -> tuple[Tensor, Tensor, Transported]:
    """o, and A = W^q W^kᵀ [B, H, L, S]."""
    x, dtype = widen(x), x.key.dtype
    w, found = _transported(x, opt, how, by)
    w_q = query_weights(x, opt, found.plan.c)
    return (w_q @ (w.mT @ x.value)).to(dtype), (w_q @ w.mT).to(dtype), found
