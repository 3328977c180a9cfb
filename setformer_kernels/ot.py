"""Entropic optimal transport as users of POT write it: costs, masses, ε and ρ in their own units, batched.

Letters: C = `cost` [..., N, M], a [..., N] and b [..., M] masses (not their logarithms), P the plan, ε = `epsilon` in
units of the cost.  P minimises  ⟨P, C⟩ + ε KL(P | a ⊗ b)  over plans with marginals a and b, or with ρ KL(P 1 | a) and
ρ KL(Pᵀ 1 | b) in the place of these constraints.  Leading dimensions are a batch; problems of different sizes share one
by masks, or by masses of 0, whose costs are not read.  `functional.sinkhorn` solves it, in units of ε.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import checks
from .arguments import Hyper
from .functional import TransportInfo
from .problem import compute_dtype
from .reference.transport import readable
from .sinkhorn import solved
from .tracing import leaf

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from . import signatures

__all__ = ["barycentric_projection", "sinkhorn_divergence", "squared_distance", "transport_cost", "transport_plan"]

Rho = Hyper | tuple[Hyper, Hyper] | None


class Solved(NamedTuple):
    """A problem, and what solves it."""

    cost: Tensor  # [..., N, M], 0 where it is infinite or a mass is missing
    log_a: Tensor  # [..., N]
    log_b: Tensor  # [..., M]
    f: Tensor  # [..., N] in units of ε
    g: Tensor  # [..., M]
    plan: Tensor  # [..., N, M]
    info: TransportInfo


@overload
def transport_plan(
    cost: Tensor, a: Tensor | None = ..., b: Tensor | None = ..., *, epsilon: Hyper, return_info: Literal[False] = ...,
    **options: Unpack[signatures.Plan],
) -> Tensor: ...  # fmt: skip
@overload
def transport_plan(
    cost: Tensor, a: Tensor | None = ..., b: Tensor | None = ..., *, epsilon: Hyper, return_info: Literal[True],
    **options: Unpack[signatures.Plan],
) -> tuple[Tensor, TransportInfo]: ...  # fmt: skip
@overload
def transport_plan(
    cost: Tensor, a: Tensor | None = ..., b: Tensor | None = ..., *, epsilon: Hyper, return_info: bool,
    **options: Unpack[signatures.Plan],
) -> Any: ...  # fmt: skip
@leaf
def transport_plan(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: Hyper,
    rho: Rho = None,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    num_iters: int = 1000,
    tol: float | None = None,
    method: str = "sinkhorn",
    grad: str = "unrolled",
    key_relaxation: Hyper = 1.0,
    reference_relaxation: Hyper = 1.0,
    initial_potential: Tensor | None = None,
    return_info: bool = False,
    backend: str = "auto",
) -> Any:
    """P [..., N, M], as `ot.sinkhorn(a, b, cost, epsilon)` and `ot.unbalanced.sinkhorn_unbalanced(..., rho)` return it.

    Args:
        cost: [..., N, M], of any floating dtype; +inf forbids a pair.
        a, b: masses ≥ 0, broadcast to [..., N] and [..., M]; uniform and of total 1 when None.  Balanced totals agree.
        epsilon: ε > 0 in units of the cost, a float or a tensor broadcastable to the batch [...].
        rho: ρ > 0 of relaxed marginals in units of the cost (POT's reg_m, reg_type="kl"), one or a pair (of a, of b);
            inf or None: a constraint.  In its place λ = ρ/(ρ + ε) may be given, `key_relaxation` for a and
            `reference_relaxation` for b.
        mask_a, mask_b: bool [..., N] and [..., M], True where there is a point; uniform masses are shared out among
            these alone.
        num_iters, tol, method, grad, initial_potential, backend: as in `functional.sinkhorn`.  A warning says once
            (on the CPU) if the marginals are off by more than a thousandth.
        return_info: the result is (P, `TransportInfo`).

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it wants; also for masses below 0 (CPU tensors
            alone: elsewhere they count as 0).
    """
    found = _solve(
        cost, a, b, epsilon, rho, mask_a, mask_b, key_relaxation=key_relaxation,
        reference_relaxation=reference_relaxation, num_iters=num_iters, tol=tol, method=method, grad=grad,
        initial_potential=initial_potential, backend=backend,
    )  # fmt: skip
    plan = found.plan.to(cost.dtype)
    return (plan, found.info) if checks.flag("return_info", return_info) else plan


@overload
def transport_cost(
    cost: Tensor, a: Tensor | None = ..., b: Tensor | None = ..., *, epsilon: Hyper, return_info: Literal[False] = ...,
    **options: Unpack[signatures.Cost],
) -> Tensor: ...  # fmt: skip
@overload
def transport_cost(
    cost: Tensor, a: Tensor | None = ..., b: Tensor | None = ..., *, epsilon: Hyper, return_info: Literal[True],
    **options: Unpack[signatures.Cost],
) -> tuple[Tensor, TransportInfo]: ...  # fmt: skip
@overload
def transport_cost(
    cost: Tensor, a: Tensor | None = ..., b: Tensor | None = ..., *, epsilon: Hyper, return_info: bool,
    **options: Unpack[signatures.Cost],
) -> Any: ...  # fmt: skip
@leaf
def transport_cost(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: Hyper,
    rho: Rho = None,
    entropy: bool = False,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    num_iters: int = 1000,
    tol: float | None = None,
    method: str = "sinkhorn",
    grad: str = "unrolled",
    key_relaxation: Hyper = 1.0,
    reference_relaxation: Hyper = 1.0,
    initial_potential: Tensor | None = None,
    return_info: bool = False,
    backend: str = "auto",
) -> Any:
    """⟨P, C⟩ [...], as `ot.sinkhorn2` returns it; with `entropy` ⟨P, C⟩ + ε KL(P | a ⊗ b), the minimum itself.

    KL(P | Q) = Σ P log(P/Q) − ΣP + ΣQ.  Arguments and errors as in `transport_plan`.
    """
    found = _solve(
        cost, a, b, epsilon, rho, mask_a, mask_b, key_relaxation=key_relaxation,
        reference_relaxation=reference_relaxation, num_iters=num_iters, tol=tol, method=method, grad=grad,
        initial_potential=initial_potential, backend=backend,
    )  # fmt: skip
    value = _value(found, epsilon, checks.flag("entropy", entropy)).to(cost.dtype)
    return (value, found.info) if checks.flag("return_info", return_info) else value


@leaf
def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: Hyper,
    cost: Callable[[Tensor, Tensor], Tensor] | None = None,
    entropy: bool = False,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    num_iters: int = 1000,
    tol: float | None = None,
    method: str = "sinkhorn",
    grad: str = "unrolled",
    backend: str = "auto",
) -> Tensor:
    """The debiased W(x, y) − (W(x, x) + W(y, y))/2 of two weighted point sets: [..., N, D], [..., M, D] -> [...].

    W is `transport_cost` with these masses; the `cost` of points is their squared Euclidean distance, or a function of
    two sets to [..., N, M].  As `ot.bregman.empirical_sinkhorn_divergence`, but not cut off at 0; with `entropy`, as
    geomloss's (whose cost is half the squared distance): ≥ 0, and 0 with zero gradient where the sets are equal.
    Other arguments and errors as in `transport_plan`.
    """
    for name, points in (("x", x), ("y", y)):
        if not isinstance(points, Tensor) or not points.is_floating_point() or points.ndim < 2:
            raise ValueError(f"{name} must be a floating-point Tensor [..., points, D], got {_shown(points)}")
    if x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
        raise ValueError(f"y must have the batch and D of x, {list(x.shape)}, got {list(y.shape)}")
    of = squared_distance if cost is None else cost
    x, y = _present(x, a, mask_a), _present(y, b, mask_b)
    entropy = checks.flag("entropy", entropy)

    def value(x: Tensor, y: Tensor, a: Any, b: Any, mask_a: Any, mask_b: Any) -> Tensor:
        found = _solve(of(x, y), a, b, epsilon, None, mask_a, mask_b, num_iters=num_iters, tol=tol, method=method,
                       grad=grad, backend=backend)  # fmt: skip
        return _value(found, epsilon, entropy)

    alone = value(x, x, a, a, mask_a, mask_a) + value(y, y, b, b, mask_b, mask_b)
    return (value(x, y, a, b, mask_a, mask_b) - alone / 2).to(x.dtype)


@leaf
def barycentric_projection(plan: Tensor, y: Tensor) -> Tensor:
    """Where a plan P [..., N, M] sends its rows on average, Σ_j P_ij y_j / Σ_j P_ij: y [..., M, D] -> [..., N, D].

    0 for a row that sends nothing.  The mapping of POT's `ot.da` transports.
    """
    if plan.ndim < 2 or y.ndim < 2 or plan.shape[-1] != y.shape[-2]:
        raise ValueError(f"y must be [..., M, D] for a plan [..., N, M] = {list(plan.shape)}, got {list(y.shape)}")
    mass = plan.sum(-1, keepdim=True)
    sends = mass > 0
    return torch.where(sends, plan / torch.where(sends, mass, 1.0), 0.0) @ y


def squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """‖x_i − y_j‖² [..., N, M] in float32 or better, by differences: 0 where they are equal."""
    x, y = (t.to(compute_dtype(t.dtype)) for t in (x, y))
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()


def _solve(
    cost: Any, a: Any, b: Any, epsilon: Any, rho: Any, mask_a: Any, mask_b: Any,
    key_relaxation: Hyper = 1.0, reference_relaxation: Hyper = 1.0, initial_potential: Any = None, **options: Any,
) -> Solved:  # fmt: skip
    if not isinstance(cost, Tensor) or not cost.is_floating_point() or cost.ndim < 2:
        raise ValueError(f"cost must be a floating-point Tensor [..., N, M], got {_shown(cost)}")
    cost = cost.to(compute_dtype(cost.dtype))
    epsilon = _positive("epsilon", epsilon, cost)
    batch, (n, m) = cost.shape[:-2], cost.shape[-2:]
    log_a, log_b = _log_mass("a", a, mask_a, (*batch, n), cost), _log_mass("b", b, mask_b, (*batch, m), cost)
    present = (log_a > -math.inf).unsqueeze(-1) & (log_b > -math.inf).unsqueeze(-2)
    cost = torch.where(present, cost, 0.0)
    log_kernel = -cost / (epsilon[..., None, None] if isinstance(epsilon, Tensor) else epsilon)
    rates = _relaxations(rho, epsilon, (key_relaxation, reference_relaxation), cost)
    f, g, info, plan = solved(log_kernel, log_a, log_b, key_relaxation=rates[0], reference_relaxation=rates[1],
                              return_info=True, with_plan=True, initial_potential=initial_potential,
                              **options)  # fmt: skip
    assert info is not None
    assert plan is not None
    return Solved(torch.where(cost.isfinite(), cost, 0.0), log_a, log_b, f, g, plan, info)


def _value(x: Solved, epsilon: Hyper, entropy: bool) -> Tensor:
    """⟨P, C⟩ [...], and ε KL(P | a ⊗ b) = ε (Σ P (f − log a + g − log b) − ΣP + ΣaΣb) − ⟨P, C⟩ more with entropy."""
    if not entropy:
        return (x.plan * x.cost).sum((-2, -1))
    rows, columns = x.plan.sum(-1), x.plan.sum(-2)
    of_a = (rows * _difference(x.f, x.log_a)).sum(-1)
    of_b = (columns * _difference(x.g, x.log_b)).sum(-1)
    return epsilon * (of_a + of_b - rows.sum(-1) + x.log_a.exp().sum(-1) * x.log_b.exp().sum(-1))


def _difference(potential: Tensor, log_mass: Tensor) -> Tensor:
    there = (potential > -math.inf) & (log_mass > -math.inf)
    return torch.where(there, torch.where(there, potential, 0.0) - torch.where(there, log_mass, 0.0), 0.0)


def _log_mass(name: str, mass: Any, mask: Any, shape: tuple[int, ...], cost: Tensor) -> Tensor:
    """log masses of this shape from masses [..., N] and a mask; uniform ones of total 1 where there are none."""
    if mass is not None and (not isinstance(mass, Tensor) or not mass.is_floating_point()):
        raise TypeError(f"{name} must be a floating-point Tensor {list(shape)}, got {_shown(mass)}")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
        raise TypeError(f"mask_{name} must be a bool Tensor {list(shape)}, got {_shown(mask)}")
    for what, t in ((name, mass), (f"mask_{name}", mask)):
        if t is not None and not _broadcasts(t, shape):
            raise ValueError(f"{what} must broadcast to {list(shape)}, got {list(t.shape)}")
    checks.same_device("cost", cost, **{name: mass, f"mask_{name}": mask})
    if mass is not None and readable(mass) and not bool((mass >= 0).all()):
        raise ValueError(f"{name} must be masses ≥ 0, got {float(mass.detach().nan_to_num(-math.inf).min()):.6g}")
    there = torch.ones(shape, dtype=torch.bool, device=cost.device) if mask is None else mask.expand(shape)
    if mass is None:
        count = there.sum(-1, keepdim=True).clamp_min(1)
        return torch.where(there, -count.to(cost.dtype).log(), -math.inf)
    there = there & (mass > 0)
    return torch.where(there, torch.where(there, mass, 1.0).to(cost.dtype).log(), -math.inf)


def _present(points: Tensor, mass: Any, mask: Any) -> Tensor:
    """Points with 0 in the place of those that are not there."""
    for t in (mass, mask):
        if isinstance(t, Tensor) and t.ndim < points.ndim:
            points = torch.where((t > 0).unsqueeze(-1), points, 0.0)
    return points


def _relaxations(rho: Any, epsilon: Hyper, given: tuple[Hyper, Hyper], cost: Tensor) -> tuple[Hyper, Hyper]:
    """λ = ρ/(ρ + ε) of both sides, as tensors of the batch or numbers."""
    if rho is None:
        return given
    if any(isinstance(x, Tensor) or x != 1.0 for x in given):
        raise ValueError("rho stands for key_relaxation and reference_relaxation, got both")
    pair = rho if isinstance(rho, (tuple, list)) else (rho, rho)
    if len(pair) != 2:
        raise ValueError(f"rho must be one number or tensor, or a pair (of a, of b), got {len(pair)}")
    found: list[Hyper] = []
    for x in pair:
        if x is None or (isinstance(x, float) and x == math.inf):
            found.append(1.0)
            continue
        x = _positive("rho", x, cost)
        found.append(x / (x + epsilon))
    return found[0], found[1]


def _positive(name: str, value: Any, cost: Tensor) -> Hyper:
    """A positive number, or a tensor broadcastable to the batch, whose values are not read."""
    if not isinstance(value, Tensor):
        return checks.number(name, value, 0.0, open_low=True)
    batch = cost.shape[:-2]
    if not value.is_floating_point() or not _broadcasts(value, batch):
        raise ValueError(
            f"{name} must be a float or a tensor broadcastable to the batch {list(batch)}, got {_shown(value)}"
        )
    return value.to(cost.dtype).expand(batch)


def _broadcasts(t: Tensor, shape: tuple[int, ...]) -> bool:
    sizes = shape[len(shape) - t.ndim :]
    return t.ndim <= len(shape) and all(s in (1, size) for s, size in zip(t.shape, sizes, strict=True))


def _shown(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
