"""Solvers of entropic transport with the same face: what is installed of POT, geomloss and OTT-JAX, and `sinkhorn`.

A problem is a log kernel ℓ = −C/ε [G, N, M] with uniform masses.  A solver is stopped by its own test (a tolerance), or
where it has none by a number of iterations; how far it came is judged by `error_of` alike for all.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import setformer_kernels.functional as SF

INNER = 10  # iterations between two looks of OTT-JAX at its error, its default


class Solver(NamedTuple):
    """One way to solve a problem; `module` is what has to be installed."""

    module: str
    potentials: Callable[[Tensor, float, int], Tensor]  # (ℓ, tolerance, most iterations) -> g [G, M] in units of ε
    counted: bool = False  # runs all iterations: they are what has to be found
    gradient: Callable[[Tensor, float, int, Tensor], Tensor] | None = None  # of Σ w ⊙ P with respect to ℓ

    def missing(self) -> str:
        """Why it cannot run here, empty if it can."""
        return "" if importlib.util.find_spec(self.module) else f"the module {self.module!r} is not installed"


def error_of(l: Tensor, g: Tensor) -> float:
    """Σ_j |Σ_i P_ij − 1/M| of the plan of g [G, M], whose rows are right by construction, in float64: the largest."""
    worst = 0.0
    for one, potential in zip(l, g, strict=True):
        plan = (one.double() + potential.double()).softmax(-1) / l.shape[-2]
        worst = max(worst, float((plan.sum(-2) - 1 / l.shape[-1]).abs().sum()))
    return worst


def _ours(l: Tensor, tolerance: float, most: int, **how: Any) -> Tensor:
    with torch.no_grad():
        return SF.sinkhorn(l, num_iters=most, tol=tolerance, **how)[1]


def _ours_gradient(l: Tensor, tolerance: float, most: int, weight: Tensor, **how: Any) -> Tensor:
    l = l.detach().requires_grad_()
    f, g = SF.sinkhorn(l, num_iters=most, tol=tolerance, **how)
    plan = torch.exp(l + f.unsqueeze(-1) + g.unsqueeze(-2))
    return torch.autograd.grad((weight * plan).sum(), l)[0]


def _pot(l: Tensor, tolerance: float, most: int) -> Tensor:
    from ot.batch import bregman_log_projection_batch

    a, b = _uniform(l)
    return bregman_log_projection_batch(l, a, b, max_iter=most, tol=tolerance)["potentials"][1]


def _pot_gradient(l: Tensor, tolerance: float, most: int, weight: Tensor) -> Tensor:
    from ot.batch import bregman_log_projection_batch

    l, (a, b) = l.detach().requires_grad_(), _uniform(l)
    plan = bregman_log_projection_batch(l, a, b, max_iter=most, tol=tolerance, grad="autodiff")["T"]
    return torch.autograd.grad((weight * plan).sum(), l)[0]


def _pot_scaling(l: Tensor, tolerance: float, most: int) -> Tensor:
    from ot.batch import bregman_projection_batch

    a, b = _uniform(l)
    return bregman_projection_batch(torch.exp(l), a, b, max_iter=most, tol=tolerance)["potentials"][1].log()


def _uniform(l: Tensor) -> tuple[Tensor, Tensor]:
    groups, n, m = l.shape
    return l.new_full((groups, n), 1 / n), l.new_full((groups, m), 1 / m)


def _geomloss(l: Tensor, tolerance: float, most: int) -> Tensor:
    from geomloss import ot

    return ot.solve_batch(-l, reg=1.0, max_iter=most).potential_b


@functools.cache
def _ott(kind: str, threshold: float, most: int) -> Any:
    """The compiled function of costs [G, N, M] at ε = 1: potentials, or the gradient of Σ w ⊙ P."""
    import jax
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn

    jax.config.update("jax_enable_x64", True)
    solver = sinkhorn.Sinkhorn(threshold=threshold, max_iterations=max(most // INNER, 1) * INNER)

    def solved(cost: Any) -> Any:
        return solver(linear_problem.LinearProblem(geometry.Geometry(cost_matrix=cost, epsilon=1.0)))

    def loss(costs: Any, weight: Any) -> Any:
        return (weight * jax.vmap(lambda cost: solved(cost).matrix)(costs)).sum()

    return jax.jit(jax.grad(loss) if kind == "gradient" else jax.vmap(lambda cost: solved(cost).g))


def _ott_potentials(l: Tensor, tolerance: float, most: int) -> Tensor:
    return _call_ott("potentials", tolerance, most, -l)


def _ott_gradient(l: Tensor, tolerance: float, most: int, weight: Tensor) -> Tensor:
    return -_call_ott("gradient", tolerance, most, -l, weight)


def _call_ott(kind: str, tolerance: float, most: int, *tensors: Tensor) -> Tensor:
    import jax

    jax.config.update("jax_enable_x64", True)
    arrays = [jax.numpy.asarray(t.numpy()) for t in tensors]
    return torch.from_dlpack(_ott(kind, tolerance, most)(*arrays).block_until_ready())


NEWTON: dict[str, Any] = {"method": "newton", "grad": "implicit"}
OURS = ("set", "set-newton")
SOLVERS = {
    "set": Solver("setformer_kernels", _ours, gradient=functools.partial(_ours_gradient, grad="implicit")),
    "set-newton": Solver(
        "setformer_kernels",
        functools.partial(_ours, **NEWTON),
        gradient=functools.partial(_ours_gradient, **NEWTON),
    ),
    "set-unrolled": Solver("setformer_kernels", _ours, gradient=_ours_gradient),
    "pot": Solver("ot", _pot, gradient=_pot_gradient),
    "pot-scaling": Solver("ot", _pot_scaling),
    "geomloss": Solver("geomloss", _geomloss, counted=True),
    "ott": Solver("ott", _ott_potentials, gradient=_ott_gradient),
}
