"""Sinkhorn's problem on any cost, for whoever has a cost and no tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from . import checks, dispatch, fixed_point, ops, reference, solver
from .arguments import Hyper
from .ops.direct import differentiated
from .problem import Sinkhorn, compute_dtype
from .reference.converged import Marginals, TransportInfo, plan_of, solve
from .tracing import leaf

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from . import signatures


@overload
def sinkhorn(
    log_kernel: Tensor, log_a: Tensor | None = ..., log_b: Tensor | None = ..., *, return_info: Literal[False] = ...,
    **options: Unpack[signatures.Convergence],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def sinkhorn(
    log_kernel: Tensor, log_a: Tensor | None = ..., log_b: Tensor | None = ..., *, return_info: Literal[True],
    **options: Unpack[signatures.Convergence],
) -> tuple[Tensor, Tensor, TransportInfo]: ...  # fmt: skip
@overload
def sinkhorn(
    log_kernel: Tensor, log_a: Tensor | None = ..., log_b: Tensor | None = ..., *, return_info: bool,
    **options: Unpack[signatures.Convergence],
) -> Any: ...  # fmt: skip
@leaf
def sinkhorn(
    log_kernel: Tensor,
    log_a: Tensor | None = None,
    log_b: Tensor | None = None,
    *,
    num_iters: int = 100,
    tol: float | None = None,
    key_relaxation: Hyper = 1.0,
    reference_relaxation: Hyper = 1.0,
    method: str = "sinkhorn",
    grad: str = "unrolled",
    initial_potential: Tensor | None = None,
    return_info: bool = False,
    backend: str = "auto",
) -> tuple[Any, ...]:
    """Log-domain Sinkhorn on any cost, batched: [..., N, M] -> potentials (f [..., N], g [..., M]) in units of ε.

    g⁰ = log b; f^t = log a − λ_a LSE_j(ℓ + g^{t−1}); g^t = log b − λ_b LSE_i(ℓ + f^t), with ℓ = `log_kernel` = −cost/ε.
    The plan is exp(ℓ + f + g).  `log_a` [..., N] and `log_b` [..., M] are log masses, uniform (−log N, −log M) when
    None, broadcast over the batch.  −inf is allowed anywhere: what has no mass, or can reach nothing, has potential
    −inf.  Relaxations: λ in [0, 1], a float or a tensor broadcastable to the batch [...].

    Args:
        num_iters: T ≥ 0; with `tol` the most.  Newton counts passes over the rows, of about an iteration each.
        tol: a problem stops by itself once an iteration moves no g_j by more than this, in units of ε; decided on the
            device, without waiting.  On the CPU a warning says once if T did not suffice.
        method: "sinkhorn", or "newton": damped Newton on the semi-dual, one min(N, M) × min(N, M) system a step, from
            any start; a Sinkhorn step where that system is singular.  Few passes where ε is small.
        grad: "unrolled": exact for the iterations that ran.  "implicit": that of the fixed point, by one system of
            the smaller side; memory does not depend on T, second derivatives raise.  It is exact at convergence.  Off
            it, without a `tol` or where T did not suffice, its error is proportional to the residual
            r = max_j |g^T − g^{T−1}|: at most of the order of r/(1 − ρ) of the gradient, where ρ is the factor by
            which an iteration shrinks r.  Balanced potentials have a constant in f − g that no problem determines:
            a loss that depends on it gets the gradient without that part.
        initial_potential: g⁰ [..., M] without gradient, such as the last call's g; where it is not finite, log b.
        return_info: also a `TransportInfo`, for half an iteration more: (iters, error, converged, potential).
        backend: "auto" or a name.  grad="implicit", also by Newton, has kernels on "cpu" and "triton" (traced calls
            are PyTorch); it runs in PyTorch elsewhere, and an initial_potential with unrolled gradients everywhere.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it wants; also for masses of different totals
            where both sides are balanced and tol, method, grad or return_info ask for convergence (CPU tensors alone:
            elsewhere it would wait for the device).
    """
    f, g, info, _ = solved(
        log_kernel, log_a, log_b, num_iters=num_iters, tol=tol, key_relaxation=key_relaxation,
        reference_relaxation=reference_relaxation, method=method, grad=grad, initial_potential=initial_potential,
        return_info=return_info, backend=backend,
    )  # fmt: skip
    return (f, g) if info is None else (f, g, info)


def solved(
    log_kernel: Tensor, log_a: Tensor | None, log_b: Tensor | None, *, num_iters: int, tol: float | None,
    key_relaxation: Hyper, reference_relaxation: Hyper, method: str, grad: str, initial_potential: Tensor | None,
    return_info: bool, backend: str, with_plan: bool = False,
) -> tuple[Tensor, Tensor, TransportInfo | None, Tensor | None]:  # fmt: skip
    """f, g, the info and the plan [..., N, M] in the compute dtype, these two where they are wanted."""
    if not isinstance(log_kernel, Tensor):
        raise TypeError(f"log_kernel must be a Tensor [..., N, M], got {type(log_kernel).__name__}")
    if log_kernel.ndim < 2 or 0 in log_kernel.shape[-2:]:
        raise ValueError(f"log_kernel must have shape [..., N, M], N and M > 0, got {list(log_kernel.shape)}")
    checks.tensor("log_kernel", log_kernel, "." * log_kernel.ndim)
    num_iters, backend = checks.iterations(num_iters), checks.text("backend", backend)
    batch, (n, m) = log_kernel.shape[:-2], log_kernel.shape[-2:]
    how = solver.checked(tol, method, grad, initial_potential, num_iters, (*batch, m), log_kernel)
    return_info = checks.flag("return_info", return_info)
    dtype = compute_dtype(log_kernel.dtype)
    groups = math.prod(batch)
    l = log_kernel.to(dtype).reshape(groups, n, m)
    log_a, log_b = (_batched(*a, batch, dtype) for a in (("log_a", log_a, n), ("log_b", log_b, m)))
    relaxations = (("key_relaxation", key_relaxation), ("reference_relaxation", reference_relaxation))
    lam = [_batched_relaxation(name, value, batch, dtype) for name, value in relaxations]
    scalars = [1.0 if isinstance(v, Tensor) else float(v) for _, v in relaxations]
    checks.same_device("log_kernel", log_kernel, log_a=log_a, log_b=log_b, key_relaxation=lam[0],
                       reference_relaxation=lam[1])  # fmt: skip
    asked = how.tol is not None or return_info or not solver.is_plain(how)
    problem = replace(ops.sinkhorn.sinkhorn_problem(l), converged="" if solver.is_plain(how) else solver.kind(how))
    name = dispatch.choose(problem, backend, l.numel() * num_iters)
    beyond = problem.converged or how.tol is not None  # what kernels have beside the op
    native = fixed_point.backend_for(name, (l, log_a, log_b, *lam)) if beyond else None
    on_pytorch = name == dispatch.REFERENCE or (bool(problem.converged) and native is None)
    p = _marginals(l, log_a, log_b, lam, scalars) if asked or on_pytorch else None
    if p is not None and asked and all(t is None for t in lam) and scalars == [1.0, 1.0]:
        solver.balanced(p.log_a, p.log_b)
    if p is not None and (on_pytorch or problem.converged):
        how = how._replace(start=None if how.start is None else how.start.reshape(groups, m))
        f, g, _, iters = solve(p, num_iters, how) if native is None else fixed_point.solve(p, num_iters, how, native)
    elif native is not None and not differentiated((l, log_a, log_b, *lam)):  # without the c of every iteration
        x = Sinkhorn(l, log_a, log_b, lam[0], lam[1], scalars, num_iters, how.tol)
        f, g, _, iters = native.started(x, None)
    else:
        f, g, _, iters = ops.sinkhorn.sinkhorn(l, log_a, log_b, *lam, scalars, num_iters, how.tol, backend)
    plan = plan_of(l, f, g) if with_plan else None
    info = None if p is None else solver.report(p, f, g, iters, num_iters, how.tol, return_info, plan)
    info = None if info is None else TransportInfo(*[t.reshape((*batch, *t.shape[1:])) for t in info])
    plan = None if plan is None else plan.reshape(*batch, n, m)
    return f.reshape(*batch, n).to(log_kernel.dtype), g.reshape(*batch, m).to(log_kernel.dtype), info, plan


def _marginals(
    l: Tensor, log_a: Tensor | None, log_b: Tensor | None, lam: list[Tensor | None], scalars: list[float]
) -> Marginals:
    """ℓ [G, N, M], masses [G, N] and [G, M], relaxations [G, 1]."""
    groups, n, m = l.shape
    masses = [reference.uniform_mass(l, k) if t is None else t for t, k in ((log_a, n), (log_b, m))]
    rates = [l.new_full((1, 1), s) if t is None else t.unsqueeze(-1) for t, s in zip(lam, scalars, strict=True)]
    return Marginals(l, *[t.expand(groups, -1) for t in masses], *rates)


def _batched(name: str, value: Tensor | None, size: int, batch: torch.Size, dtype: torch.dtype) -> Tensor | None:
    """Log masses broadcast to [G, size] in the compute dtype."""
    if value is None:
        return None
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point Tensor [..., {size}], got {type(value).__name__}")
    return _broadcast(name, value, (*batch, size), dtype).reshape(math.prod(batch), size)


def _batched_relaxation(name: str, value: Hyper, batch: torch.Size, dtype: torch.dtype) -> Tensor | None:
    if not isinstance(value, Tensor):
        checks.hyperparameter(name, value, 0, 0.0, 1.0)
        return None
    return _broadcast(name, value, tuple(batch), dtype).reshape(math.prod(batch))


def _broadcast(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    try:
        return value.to(dtype).expand(shape)
    except RuntimeError as error:
        raise ValueError(f"{name} must broadcast to {list(shape)}, got {list(value.shape)}") from error
