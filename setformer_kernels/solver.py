"""How a call of transport is solved, as its arguments say it: checks, and what the caller is told about the end.

tol, method, grad and initial_potential mean the same wherever they stand, and what differs from the plain iterations is
PyTorch on every device: backends refuse it by name, and `auto` passes them over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import advice, checks, dispatch
from .ops.operands import attention_problem, logits
from .problem import Operands, Options, compute_dtype
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


class Asked(NamedTuple):
    """The arguments of a call on tokens that ask for more than its T iterations, unchecked.

    Made where one of them is not its default, which callers look at in place: plain calls pay for no function.
    """

    tol: Any
    method: Any
    grad: Any
    initial_potential: Any
    return_info: Any


def run(
    op: str, function: Callable[..., tuple[Any, ...]], x: Operands, opt: Options, asked: Asked
) -> tuple[list[Tensor], TransportInfo | None]:
    """The outputs of a function of `reference.converged` on the call, and what was reached if that is asked for.

    ValueError if a backend was asked for by name, for it has no kernels for this.
    """
    shape = (*x.key.shape[:2], x.references.shape[1])
    how = checked(*asked[:4], opt.num_iters, shape, x.key)
    wanted = checks.flag("return_info", asked.return_info)
    dispatch.choose(replace(attention_problem(op, x, opt), converged=True), opt.backend, logits(x))
    *outputs, (p, plan) = function(x, opt, how)
    return outputs, report(p, plan.f, plan.g, plan.iters, opt.num_iters, how.tol, wanted)


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
    """What was reached, if it is wanted; where it can be read without waiting, whoever asks is warned once."""
    may_warn = readable(p.l) and iters.numel() > 0
    may_warn = may_warn and (wanted or (tol is not None and bool((iters == num_iters).any())))
    if not wanted and not may_warn:
        return None
    info = certified(p, f, g, iters, num_iters, tol, plan)
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
