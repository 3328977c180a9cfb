"""How a call of transport is solved, as its arguments say it: checks, and what the caller is told about the end.

tol, method, grad and initial_potential mean the same wherever they stand.  What differs from the plain iterations runs
on the kernels of `fixed_point` where a backend has them, else in PyTorch: such backends refuse it by name, and `auto`
passes them over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import advice, checks, dispatch, fixed_point
from .fixed_point import Reached
from .ops.memory import read, read_problem
from .ops.operands import attention_problem, logits
from .problem import Operands, Options, compute_dtype
from .reference import converged
from .reference.converged import Marginals, Solver, TransportInfo, certified
from .reference.transport import readable

METHODS, GRADS = ("sinkhorn", "newton"), ("unrolled", "implicit")
BALANCE = 1e-3  # by how much of them two totals of masses may differ: more than float16 rounds


def options(tol: Any, method: Any, grad: Any, num_iters: int) -> tuple[float | None, str, str]:
    """The arguments as Python numbers and strings that go together."""
    tol = None if tol is None else checks.number("tol", tol, 0.0)
    method, grad = checks.choice("method", method, METHODS), checks.choice("grad", grad, GRADS)
    if method == "newton" and grad != "implicit":
        raise ValueError("grad must be 'implicit' with method='newton', which differentiates no step, got 'unrolled'")
    if grad == "implicit" and num_iters < 2:
        raise ValueError(f"num_iters must be ≥ 2 with grad='implicit', whose last iteration is apart, got {num_iters}")
    return tol, method, grad


def checked(
    tol: Any, method: Any, grad: Any, initial_potential: Any, num_iters: int, shape: tuple[int, ...], like: Tensor
) -> Solver:  # fmt: skip
    """The solver of a call whose potentials have this shape [..., M]."""
    return Solver(*options(tol, method, grad, num_iters), _start(initial_potential, shape, like))


def _start(value: Any, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"initial_potential must be a floating-point Tensor {list(shape)}, got {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise ValueError(f"initial_potential must have shape {list(shape)}, got {list(value.shape)}")
    if value.requires_grad:
        raise ValueError("initial_potential gets no gradient, but requires_grad is set: pass it detached")
    checks.same_device("the keys or log_kernel", like, initial_potential=value)
    return value.to(compute_dtype(like.dtype))


def is_plain(how: Solver) -> bool:
    """Whether the kernels' iterations, with their own gradient, are what is asked for; but for a tolerance."""
    return how.method == "sinkhorn" and how.grad == "unrolled" and how.start is None


def kind(how: Solver) -> str:
    """What `Problem.converged` says of it."""
    if how.method == "sinkhorn" and how.grad == "unrolled":
        return "unrolled" if how.start is None else "started"
    return "implicit"


class Asked(NamedTuple):
    """The arguments of a call on tokens that ask for more than its T iterations, unchecked but for return_info."""

    tol: Any
    method: Any
    grad: Any
    initial_potential: Any
    return_info: bool


def asked(tol: Any, method: Any, grad: Any, initial_potential: Any, return_info: Any) -> Asked | None:
    """None where each is its default: plain calls pay for one comparison each, and for no check."""
    if return_info is not False:
        return_info = checks.flag("return_info", return_info)
    if tol is None and method == "sinkhorn" and grad == "unrolled" and initial_potential is None and not return_info:
        return None
    return Asked(tol, method, grad, initial_potential, return_info)


def run(
    op: str, function: Callable[..., tuple[Any, ...]], x: Operands, opt: Options, asked: Asked
) -> tuple[list[Tensor], TransportInfo | None]:
    """The outputs of a function of `reference.converged` on the call, and what was reached if that is asked for."""
    shape = (*x.key.shape[:2], x.references.shape[1])
    how = checked(*asked[:4], opt.num_iters, shape, x.key)
    name = dispatch.choose(replace(attention_problem(op, x, opt), converged=kind(how)), opt.backend, logits(x))
    backend = fixed_point.backend_for(name, x)
    if backend is not None and kind(how) == "implicit" and function in ON_KERNELS:
        *outputs, (iters, transported) = ON_KERNELS[function](x, opt, how, backend)
    else:
        solving = () if backend is None else (fixed_point.solving(backend),)
        *outputs, found = function(x, opt, how, *solving)
        iters, transported = found.plan.iters, lambda: found

    def certify() -> TransportInfo:
        p, plan = transported()
        return certified(p, plan.f, plan.g, iters, opt.num_iters, how.tol)

    return outputs, told(certify, iters, opt.num_iters, how.tol, asked.return_info)


def _attention(x: Operands, opt: Options, how: Solver, backend: ModuleType) -> tuple[Tensor, Reached]:
    """o [B, H, L, E]: the two halves of attention."""
    z, g, found = fixed_point.transport(x, opt, how, backend)
    assert x.query is not None
    names = ("references", "bandwidth", "epsilon", "position_scale", "query_position", "reference_position", "seed")
    given = {name: getattr(x, name) for name in names}
    return read(read_problem(x.query, z, given), Options(*opt[:2], 1, *opt[3:]), z, g), found


def _pool(x: Operands, opt: Options, how: Solver, backend: ModuleType) -> tuple[Tensor, Reached]:
    """z [B, H, M, E] in the dtype of the values."""
    z, _, found = fixed_point.transport(x, opt, how, backend)
    return z.to(x.value.dtype), found


# Functions of `reference.converged` -> the same with the gradient of the fixed point, on a backend's kernels.
ON_KERNELS: dict[Callable[..., tuple[Any, ...]], Callable[..., tuple[Any, ...]]] = {
    converged.attention: _attention,
    converged.pool: _pool,
    converged.transport: fixed_point.transport,
}


def same_keys(attn_mask: Any, causal: Any) -> None:
    """Transport of masses that differ from query to query is for T iterations only."""
    if attn_mask is not None or causal:
        raise ValueError(
            "tol, method, grad, initial_potential and return_info are for queries that all see the same keys: got"
            f" {'attn_mask' if attn_mask is not None else 'causal=True'} as well (key_mask may be given)"
        )


def dense() -> None:
    raise ValueError(
        "nested tensors must be padded (and masked) for tol, method, grad, initial_potential and return_info"
    )


def report(
    p: Marginals, f: Tensor, g: Tensor, iters: Tensor, num_iters: int, tol: float | None, wanted: bool,
    plan: Tensor | None = None,
) -> TransportInfo | None:  # fmt: skip
    """`told` of problems and potentials."""
    return told(lambda: certified(p, f, g, iters, num_iters, tol, plan), iters, num_iters, tol, wanted)


def told(
    certify: Callable[[], TransportInfo], iters: Tensor, num_iters: int, tol: float | None, wanted: bool
) -> TransportInfo | None:  # fmt: skip
    """What was reached, if it is wanted; where it can be read without waiting, whoever asks is warned once."""
    may_warn = readable(iters) and iters.numel() > 0
    may_warn = may_warn and (wanted or (tol is not None and bool((iters == num_iters).any())))
    if not wanted and not may_warn:
        return None
    info = certify()
    if may_warn:
        advice.unconverged(num_iters, info.converged, info.error)
    return info if wanted else None


def balanced(log_a: Tensor, log_b: Tensor) -> None:
    """Log masses [G, N] and [G, M] of constraints on both sides have equal totals; 0 is that of an absent problem."""
    if not (readable(log_a) and readable(log_b)) or log_a.shape[0] == 0:
        return
    with torch.no_grad():
        a, b = log_a.logsumexp(-1), log_b.logsumexp(-1)
        apart = torch.where(a.isfinite() & b.isfinite(), (a - b).abs(), 0.0)
        worst = int(apart.argmax())
    if apart[worst] > math.log1p(BALANCE):
        raise ValueError(
            f"log_a and log_b must have equal totals of mass where both sides are balanced (relaxations 1), got"
            f" {float(a[worst].exp()):.6g} and {float(b[worst].exp()):.6g} in problem {worst}: these are log masses,"
            " usually those of log_softmax"
        )
