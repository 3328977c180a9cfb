"""Correctness before speed: nothing is timed until every implementation is right.

The package is held to the error budget of its own tests (`setformer_kernels.testing`), output and every gradient,
against the float64 reference.  The others are checked to compute what their name says: softmax, elu and Sinkhorn
written out in float64, within SANITY; so a comparison never wins against a broken opponent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

import setformer_kernels.functional as SF
from benchmarks.common import implementations
from benchmarks.common.cases import (
    BANDWIDTH,
    BOTH,
    ENTRIES,
    EPSILON,
    AttentionCase,
    AttentionInputs,
    Entry,
    Plan,
    SinkhornCase,
    attention_inputs,
    sinkhorn_log_kernel,
)
from setformer_kernels import testing

SANITY = 1e-4  # relative Frobenius error allowed to the other implementations
# geomloss anneals ε and averages its updates: after the same number of iterations it is elsewhere on the way to the
# same plan, so it is only checked to head there.
LOOSE = {"geomloss": 0.1}
NAMES = ("o", "dq", "dk", "dv", "dreferences")


class Wrong(Exception):
    """An implementation's result is outside its budget; nothing is timed."""


def _evaluate(run: implementations.Attention, x: AttentionInputs, count: int) -> list[Tensor]:
    """o and the first `count` gradients."""
    output = run(x)
    return [output.detach(), *torch.autograd.grad(output, x.leaves()[:count], x.grad_output)]


def _wide(x: AttentionInputs) -> AttentionInputs:
    return AttentionInputs(*(t.detach().double().requires_grad_(t.requires_grad) for t in x))


def _softmax(x: AttentionInputs) -> Tensor:
    scores = x.query @ x.key.transpose(-1, -2) / x.query.shape[-1] ** 0.5  # [B, H, L, S]
    return scores.softmax(dim=-1) @ x.value


def _quadratic_elu(x: AttentionInputs) -> Tensor:
    """elu linear attention the quadratic way: rows of φ(q)φ(k)ᵀ normalised."""
    q, k = (torch.where(t > 0, t + 1, t.exp()) for t in (x.query, x.key))
    weights = q @ k.transpose(-1, -2)  # [B, H, L, S]
    return (weights / weights.sum(dim=-1, keepdim=True)) @ x.value


OTHERS: dict[str, Callable[[AttentionInputs], Tensor]] = {"sdpa": _softmax, "elu": _quadratic_elu}


def relative_error(value: Tensor, exact: Tensor) -> float:
    """‖value − exact‖/‖exact‖, inf when not finite."""
    error = (value.double() - exact).norm() / exact.norm().clamp_min(1e-300)
    return error.item() if torch.isfinite(error) else float("inf")


def _check_package(L: int, T: int) -> float:
    """SeT within its error budget, o and every gradient; returns the relative error of o."""

    def function(backend: str) -> Callable[..., Tensor]:
        return partial(SF.set_attention, bandwidth=BANDWIDTH, epsilon=EPSILON, num_iters=T, backend=backend)

    x = attention_inputs(AttentionCase("correctness", L, BOTH))
    leaves = dict(zip(AttentionInputs._fields, x.leaves(), strict=False))
    exact, model = testing.model_inputs(function("reference"), leaves, x.query.dtype, x.grad_output)
    fast = testing.gradients(function("auto"), leaves, x.grad_output)
    try:
        testing.assert_within_budget(fast, exact, model, f"set_attention, L = {L}, T = {T}:")
    except AssertionError as error:
        raise Wrong(str(error)) from error
    return relative_error(fast["output"], exact["output"])


def _check_other(entry: Entry, L: int) -> float:
    """Worst relative error of an opponent, output and gradients."""
    x = attention_inputs(AttentionCase("correctness", L, BOTH))
    count = 4 if implementations.has_references(entry) else 3
    exact_run = OTHERS.get(entry.impl) or implementations.attention(Entry("reference", entry.T))
    exact = _evaluate(exact_run, _wide(x), count)
    implementations.forget_graphs()
    values = _evaluate(implementations.attention(entry), x, count)
    errors = [relative_error(value, true) for value, true in zip(values, exact, strict=True)]
    for name, error in zip(NAMES, errors, strict=False):
        if not error <= SANITY:
            raise Wrong(f"{entry}, L = {L}: {name} is off by {error:.3g} (relative, allowed {SANITY:g})")
    return max(errors)


def _sinkhorn_results(solver: implementations.Sinkhorn, log_kernel: Tensor, T: int) -> list[Tensor]:
    """The plan, and the gradient the timed call computes if it computes one."""
    results = [solver.plan(log_kernel, T).detach()]
    if log_kernel.requires_grad:
        (gradient,) = torch.autograd.grad(sum(p.sum() for p in solver.solve(log_kernel, T)), log_kernel)
        results.append(gradient)
    return results


def _check_sinkhorn(case: SinkhornCase) -> dict[str, float]:
    """Relative error of every solver after T iterations, against the recursion in float64."""
    log_kernel = sinkhorn_log_kernel(case)
    wide = log_kernel.detach().double().requires_grad_(log_kernel.requires_grad)
    exact = _sinkhorn_results(implementations.SINKHORN["plain"], wide, case.T)
    errors = {}
    for impl in case.entries:
        if implementations.missing(impl):
            continue
        values = _sinkhorn_results(implementations.SINKHORN[impl], log_kernel, case.T)
        errors[impl] = max(relative_error(value, true) for value, true in zip(values, exact, strict=True))
        allowed = LOOSE.get(impl, SANITY)
        if not errors[impl] <= allowed:
            raise Wrong(f"sinkhorn by {impl}, {case.mode}: off by {errors[impl]:.3g} (relative, allowed {allowed:g})")
    return errors


def _others(plan: Plan) -> Iterable[Entry]:
    return (entry for entry in ENTRIES if entry.impl != "set" and (plan.compile or entry.impl != "compiled"))


def check(plan: Plan, log: Callable[[str], None] = print) -> dict[str, float]:
    """Check everything the plan times; Wrong at the first failure.  Returns relative errors."""
    found: dict[str, float] = {}
    for L in plan.check_lengths:
        for T in (1, 3):
            found[f"set L={L} T={T} (within budget; relative error of o)"] = _check_package(L, T)
    length = plan.check_lengths[1]
    for entry in _others(plan):
        found[f"{entry} L={length} (relative error)"] = _check_other(entry, length)
    for case in plan.sinkhorn:
        for impl, error in _check_sinkhorn(case).items():
            found[f"sinkhorn {impl} {case.G}x{case.N}x{case.M} {case.mode} (relative error)"] = error
    for name, value in found.items():
        log(f"correct: {name}: {value:.3g}")
    return {name: float(f"{value:.3g}") for name, value in found.items()}
