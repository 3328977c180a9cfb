"""The gradient of the fixed point g = F(g; θ), whatever led there: dθ = (∂F/∂θ)ᵀ u,  (I − Jᵀ) u = dg.

With R, Q, D, K of system.py, u = D^{1/2} K^{−1} D^{−1/2} dg, and then as one more iteration backwards:

    d log b = u,   dλ_b = −⟨u, c⟩,   dℓ = −λ_b Q u,   df = Σ_j dℓ,   d log a = df,   dλ_a = −⟨df, s⟩,   dℓ −= λ_a R df
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .system import Marginals, Pass, adjoint_resolvent, full, passed


def refuse(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        "grad='implicit' has first derivatives alone: pass grad='unrolled' and backend='reference', which "
        "differentiate to any order"
    )


class FixedPoint(torch.autograd.Function):
    """g [..., M], a fixed point of the problems, as a function of these."""

    generate_vmap_rule = True

    @staticmethod
    def forward(l: Tensor, log_a: Tensor, log_b: Tensor, lam_a: Tensor, lam_b: Tensor, g: Tensor) -> Tensor:
        return g.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, d_g: Tensor) -> tuple[Tensor | None, ...]:
        # A compiled backward is differentiated by nobody, and torch.compile does not look for a Function inside of one.
        found = adjoint if torch.compiler.is_compiling() else Adjoint.apply
        return *found(*ctx.saved_tensors, d_g), None


class Adjoint(torch.autograd.Function):
    """`adjoint`, which has no backward itself."""

    generate_vmap_rule = True
    backward = staticmethod(refuse)

    @staticmethod
    def forward(*args: Tensor) -> tuple[Tensor, ...]:
        return adjoint(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        pass


def adjoint(*args: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the five tensors of `Marginals` from these, g and dg."""
    p, g, d_g = Marginals(*args[:5]), args[5], args[6]
    q = passed(p, g)
    u = through(p, q, d_g)
    r = (p.l + g.unsqueeze(-2) - full(q.s).unsqueeze(-1)).exp()
    columns = (p.l + q.f.unsqueeze(-1) - full(q.c).unsqueeze(-2)).exp()
    d_l = columns * (-p.lam_b * u).unsqueeze(-2)
    d_f = d_l.sum(-1)
    d_l = d_l - r * (p.lam_a * d_f).unsqueeze(-1)
    d_lam_a, d_lam_b = -(d_f * full(q.s)).sum(-1, keepdim=True), -(u * full(q.c)).sum(-1, keepdim=True)
    found = (d_l, d_f, u, d_lam_a, d_lam_b)
    return tuple(t.sum_to_size(x.shape) for t, x in zip(found, p, strict=True))


def through(p: Marginals, q: Pass, d_g: Tensor) -> Tensor:
    """u [..., M] of dg, at the potentials of which q is the pass."""
    u, _ = adjoint_resolvent(p, q, torch.where(q.live, d_g, 0.0).double())
    return torch.where(q.live, u, 0.0).to(d_g.dtype)
