"""The op of Sinkhorn's iterations on any cost.

sinkhorn          log_kernel [G, N, M], log_a?, log_b?, λ_a [G]?, λ_b [G]? -> f, g, c [G, max(T, 1), M], iters [G]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..problem import Problem, Sinkhorn
from .registration import HEAD, Spec, register


def sinkhorn_problem(log_kernel: Tensor, rows: int = 0, backward: bool = False) -> Problem:
    m = log_kernel.shape[-1]
    return Problem("sinkhorn", log_kernel.device.type, log_kernel.dtype, M=m, N=rows, backward=backward)


def _run_sinkhorn(*args: Any) -> tuple[Tensor, ...]:
    x = Sinkhorn(*args[:-1])
    problem = sinkhorn_problem(x.log_kernel, x.log_kernel.shape[1])
    return dispatch.implementation(problem, args[-1]).sinkhorn(x)


def _run_sinkhorn_backward(d_f: Tensor, d_g: Tensor, c: Tensor, iters: Tensor, *args: Any) -> Sequence[Tensor | None]:
    x, (backend, needs) = Sinkhorn(*args[:-2]), args[-2:]
    problem = sinkhorn_problem(x.log_kernel, x.log_kernel.shape[1], backward=True)
    return dispatch.implementation(problem, backend).sinkhorn_backward(x, c, iters, d_f, d_g, needs)


def _fake_sinkhorn(*args: Any) -> tuple[Tensor, ...]:
    x = Sinkhorn(*args[:-1])
    (g, n, m), empty = x.log_kernel.shape, x.log_kernel.new_empty
    return empty((g, n)), empty((g, m)), empty((g, max(x.num_iters, 1), m)), empty((g,), dtype=torch.int64)


sinkhorn = register(
    Spec(
        name="sinkhorn",
        tensors={
            "log_kernel": (HEAD, False),
            "log_a": (HEAD, True),
            "log_b": (HEAD, True),
            "lam_a": (HEAD, True),
            "lam_b": (HEAD, True),
        },
        constants="float[] scalars, int num_iters, float? tol, str backend",
        outputs={"f": HEAD, "g": HEAD, "c": HEAD, "iters": HEAD},
        differentiable=("f", "g"),
        saved=("c", "iters"),
        no_grad=(),
        run=_run_sinkhorn,
        run_backward=_run_sinkhorn_backward,
        fake=_fake_sinkhorn,
        decomposition=lambda *args: dispatch.EAGER.sinkhorn(Sinkhorn(*args[:-1])),
    )
)
