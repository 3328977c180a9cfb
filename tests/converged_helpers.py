"""Problems of transport and their judges, for the tests of every backend's kernels to convergence."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from setformer_kernels.reference.converged import Marginals
from setformer_kernels.reference.converged.system import Pass, passed

F64 = torch.float64
IMPLICIT: dict[str, Any] = {"grad": "implicit", "num_iters": 60, "tol": 1e-12}
NEWTON: dict[str, Any] = {"method": "newton", **IMPLICIT}


def problem(groups: int, n: int, m: int, spread: float, dtype: torch.dtype) -> tuple[Marginals, Tensor]:
    """Marginals and a g: with a row that takes no part, whose content is NaN, and a column without mass."""
    l = spread * torch.randn(groups, n, m, dtype=dtype)
    log_a, log_b = (torch.randn(groups, k, dtype=dtype).log_softmax(-1) for k in (n, m))
    if n > 1:
        log_a[0, n // 2], l[0, n // 2] = -math.inf, math.nan
        log_b[0, m // 2] = -math.inf
    lam = 1 - 0.1 * torch.rand(2, groups, 1, dtype=dtype)
    return Marginals(l, log_a, log_b, *lam), torch.where(log_b > -math.inf, log_b + torch.randn_like(log_b), -math.inf)


def judge_pass(found: Pass, p: Marginals, g: Tensor, exact: Marginals | None = None) -> None:
    """A pass of float32 or float64 against the definition in float64, whose error in the pass's dtype it may double.

    exact: the problems whose logits p's are but a model of.
    """
    dtype, there = found.s.dtype, p.log_a > -math.inf
    p = p._replace(l=torch.where(there.unsqueeze(-1), p.l, 0.0))
    want = passed(Marginals(*[t.double() for t in p]) if exact is None else exact, g.double())
    model = passed(p, g)
    assert (found.s[~there] == -math.inf).all()
    assert torch.equal(found.live, model.live)
    for name in ("s", "f", "c", "mass", "gram"):
        a, b, c = (getattr(q, name).double() for q in (found, model, want))
        known = there & c.isfinite() if name in ("s", "f") else c.isfinite()
        if name in ("mass", "gram"):
            known = known & (c < 1e27)  # beyond, c alone is right
        assert a[known].isfinite().all(), name
        error, allowed = ((t - c)[known].norm() for t in (a, b))
        rounding = 1e-12 if dtype == F64 else 2 * torch.finfo(dtype).eps
        assert error <= 2 * allowed + rounding * c[known].norm() + torch.finfo(dtype).tiny, name


def with_gradients(function: Any, inputs: list[Tensor], y: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """The outputs of a call, potentials but for their constant, and the gradients of a fixed combination of them."""
    out = function(*inputs, y, **options)
    outs = [*out] if isinstance(out, tuple) else [out]
    if len(outs) == 2:  # potentials are known up to a constant
        outs[1] = outs[1] - outs[1].mean(-1, keepdim=True)
    loss = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in outs)
    assert isinstance(loss, Tensor)
    return [*outs, *torch.autograd.grad(loss, [*inputs, y])]
