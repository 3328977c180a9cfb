"""`setformer_kernels.ot` against POT, and against itself one problem at a time."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from setformer_kernels import ot as mine
from setformer_kernels.reference.converged import solve as solving

ot = pytest.importorskip("ot")

F64 = torch.float64
EPSILON = 0.3
SOLVERS: list[dict[str, Any]] = [
    {"tol": 1e-12}, {"tol": 1e-12, "grad": "implicit"}, {"tol": 1e-12, "method": "newton", "grad": "implicit"}
]  # fmt: skip
solver = pytest.mark.parametrize("how", SOLVERS, ids=["unrolled", "implicit", "newton"])


def points() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, y, a, b and their costs, of three problems."""
    x, y = torch.randn(3, 12, 2, dtype=F64), torch.randn(3, 9, 2, dtype=F64) + 0.5
    a, b = (torch.rand(3, n, dtype=F64) + 0.1 for n in (12, 9))
    a, b = (t / t.sum(-1, keepdim=True) for t in (a, b))
    return x, y, a, b, mine.squared_distance(x, y)


def close(found: Tensor, want: Any, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(found, torch.as_tensor(want), rtol=tolerance, atol=tolerance)


@solver
def test_plans_and_costs_are_those_of_pot(how: dict[str, Any]) -> None:
    _, _, a, b, cost = points()
    plan, info = mine.transport_plan(cost, a, b, epsilon=EPSILON, **how, return_info=True)
    value = mine.transport_cost(cost, a, b, epsilon=EPSILON, **how)
    assert info.converged.all()
    for i in range(3):
        options = {"method": "sinkhorn_log", "numItermax": 5000, "stopThr": 1e-13}
        close(plan[i], ot.sinkhorn(a[i], b[i], cost[i], EPSILON, **options))
        close(value[i], ot.sinkhorn2(a[i], b[i], cost[i], EPSILON, **options))


@solver
def test_the_entropic_cost_is_the_minimum(how: dict[str, Any]) -> None:
    _, _, a, b, cost = points()
    plan = mine.transport_plan(cost, a, b, epsilon=EPSILON, **how)
    product = a.unsqueeze(-1) * b.unsqueeze(-2)
    kl = (plan * (plan / product).log() - plan + product).sum((-2, -1))
    found = mine.transport_cost(cost, a, b, epsilon=EPSILON, entropy=True, **how)
    close(found, (plan * cost).sum((-2, -1)) + EPSILON * kl)
    uniform = mine.transport_cost(cost, epsilon=EPSILON, entropy=True, **how)
    for i in range(3):
        close(uniform[i], ot.solve(cost[i], reg=EPSILON, reg_type="KL", max_iter=5000, tol=1e-13).value, 1e-6)


@pytest.mark.parametrize("rho", [1.5, (0.7, 2.0), (math.inf, 1.0)], ids=str)
@solver
def test_relaxed_plans_are_those_of_pot(rho: Any, how: dict[str, Any]) -> None:
    _, _, a, b, cost = points()
    a = 2 * a  # totals need not agree
    plan = mine.transport_plan(cost, a, b, epsilon=EPSILON, rho=rho, **how)
    pair = rho if isinstance(rho, tuple) else (rho, rho)
    options = {"reg_type": "kl", "numItermax": 20000, "stopThr": 1e-14}
    for i in range(3):
        close(plan[i], ot.unbalanced.sinkhorn_unbalanced(a[i], b[i], cost[i], EPSILON, pair, **options), 1e-7)
    lam = [1.0 if x == math.inf else x / (x + EPSILON) for x in pair]
    options = {"key_relaxation": lam[0], "reference_relaxation": lam[1]}
    close(mine.transport_plan(cost, a, b, epsilon=EPSILON, **options, **how), plan)


@solver
def test_divergences_are_those_of_pot(how: dict[str, Any]) -> None:
    x, y, a, b, _ = points()
    found = mine.sinkhorn_divergence(x, y, a, b, epsilon=1.0, **how)
    for i in range(3):
        want = ot.bregman.empirical_sinkhorn_divergence(
            x[i], y[i], 1.0, a[i], b[i], method="sinkhorn_log", numIterMax=5000, stopThr=1e-14, warn=False
        )
        close(found[i], want.squeeze())
    same = x.clone().requires_grad_()
    value = mine.sinkhorn_divergence(same, x, a, a, epsilon=1.0, entropy=True, **how)
    (gradient,) = torch.autograd.grad(value.sum(), same)
    close(value, torch.zeros(3, dtype=F64))
    close(gradient, torch.zeros_like(x), 1e-7)
    halves = mine.sinkhorn_divergence(
        x, y, a, b, epsilon=1.0, cost=lambda x, y: mine.squared_distance(x, y) / 2, entropy=True, **how
    )
    assert (halves > 0).all()


@solver
def test_gradients_are_right(how: dict[str, Any]) -> None:
    x, y, a, b, _ = points()

    def divergence(x: Tensor, y: Tensor, log_a: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        a = log_a.softmax(-1)
        cost = mine.squared_distance(x, y)
        relaxed = mine.transport_cost(cost, a, b[:1, :4], epsilon=epsilon, rho=0.5, num_iters=500, **how)
        masses = b[:1, :4] / b[:1, :4].sum()
        return relaxed, mine.sinkhorn_divergence(x, y, a, masses, epsilon=epsilon, num_iters=500, **how)

    epsilon = torch.tensor([2.0], dtype=F64)
    inputs = [t.clone().requires_grad_() for t in (x[:1, :5], y[:1, :4], a[:1, :5].log(), epsilon)]
    assert torch.autograd.gradcheck(divergence, inputs, fast_mode=True, atol=1e-5)


@solver
def test_problems_of_different_sizes_share_a_batch(how: dict[str, Any]) -> None:
    x, y, a, b, _ = points()
    sizes = [(12, 9), (5, 3), (3, 7)]
    mask_a = torch.stack([torch.arange(12) < n for n, _ in sizes])
    mask_b = torch.stack([torch.arange(9) < m for _, m in sizes])
    x, y = (torch.where(mask.unsqueeze(-1), t, math.nan) for mask, t in ((mask_a, x), (mask_b, y)))
    x.requires_grad_()
    options: dict[str, Any] = {"epsilon": EPSILON, **how}
    plan = mine.transport_plan(mine.squared_distance(x, y), mask_a=mask_a, mask_b=mask_b, **options)
    divergence = mine.sinkhorn_divergence(x, y, mask_a=mask_a, mask_b=mask_b, **options)
    for i, (n, m) in enumerate(sizes):
        alone = mine.transport_plan(mine.squared_distance(x[i, :n], y[i, :m]), **options)
        close(plan[i, :n, :m], alone)
        assert plan[i].sum().item() == pytest.approx(1.0)
        close(divergence[i], mine.sinkhorn_divergence(x[i, :n], y[i, :m], **options))
    (gradient,) = torch.autograd.grad(divergence.sum(), x)
    assert gradient.isfinite().all()
    assert (gradient[~mask_a] == 0).all()
    masses = torch.where(mask_a, a, 0.0)
    masses = masses / masses.sum(-1, keepdim=True)
    kept = torch.where(mask_b, b, 0.0)
    kept = kept / kept.sum(-1, keepdim=True)
    by_mass = mine.transport_plan(mine.squared_distance(x, y), masses, kept, **options)
    assert by_mass.isfinite().all()
    close(by_mass.sum(-1), masses, 1e-7)
    close(by_mass.sum(-2), kept, 1e-7)


def test_projections_are_those_of_pot() -> None:
    x, y, _, _, cost = points()
    transport = ot.da.SinkhornTransport(reg_e=EPSILON, max_iter=5000, tol=1e-13)
    transport.fit(Xs=x[0].numpy(), Xt=y[0].numpy())
    plan = mine.transport_plan(cost[0], epsilon=EPSILON, tol=1e-12)
    close(mine.barycentric_projection(plan, y[0]), transport.transform(Xs=x[0].numpy()), 1e-6)
    plan = torch.cat([plan, torch.zeros(1, 9, dtype=F64)])
    assert (mine.barycentric_projection(plan, y[0])[-1] == 0).all()


def test_forbidden_pairs_carry_nothing() -> None:
    cost = torch.rand(4, 4, dtype=F64)
    cost[0, 1:3] = math.inf
    cost.requires_grad_()
    for how in SOLVERS:
        plan = mine.transport_plan(cost, epsilon=0.1, **how)
        assert (plan[0, 1:3] == 0).all()
        close(plan.sum(-1), torch.full((4,), 0.25, dtype=F64), 1e-7)
        value = mine.transport_cost(cost, epsilon=0.1, **how)
        (gradient,) = torch.autograd.grad(value, cost)
        assert value.isfinite()
        assert gradient.isfinite().all()


@solver
def test_half_precision_is_solved_in_single(how: dict[str, Any]) -> None:
    x, y = (t.bfloat16() for t in points()[:2])
    options = {"epsilon": 1.0, **how, "tol": 1e-5}
    cost = mine.squared_distance(x, y).bfloat16()
    plan = mine.transport_plan(cost, **options)
    assert plan.dtype == torch.bfloat16
    torch.testing.assert_close(plan, mine.transport_plan(cost.float(), **options).bfloat16())
    divergence = mine.sinkhorn_divergence(x, y, **options)
    assert divergence.dtype == torch.bfloat16
    assert torch.equal(divergence, mine.sinkhorn_divergence(x.float(), y.float(), **options).bfloat16())


@solver
def test_what_cannot_be_solved_stays_finite(how: dict[str, Any]) -> None:
    """One problem without a point, one with a point that may go nowhere, at an ε that exhausts the range."""
    cost = torch.rand(3, 5, 4)
    cost[1, 2] = math.inf
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0] = False
    cost.requires_grad_()
    for epsilon in (0.1, 1e-6, 1e-30):
        options = {"epsilon": epsilon, "mask_a": mask, **how, "num_iters": 50, "tol": 1e-4}
        plan, info = mine.transport_plan(cost, **options, return_info=True)
        value = mine.transport_cost(cost, **options)
        assert (plan[0] == 0).all()
        assert not info.converged[:2].any()
        assert info.error.isfinite().all()
        assert bool(info.converged[2]) == (epsilon == 0.1)
        if epsilon == 0.1:
            assert value.isfinite().all()
            (gradient,) = torch.autograd.grad(value.sum(), cost)
            assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"a": torch.ones(5)}, ValueError, "equal totals of mass .* got 5 and 1"),
        ({"a": torch.ones(4)}, ValueError, r"a must broadcast to \[5\], got \[4\]"),
        ({"a": torch.tensor([0.5, -0.25, 0.25, 0.25, 0.25])}, ValueError, "a must be masses ≥ 0, got -0.25"),
        ({"b": torch.tensor([math.nan, 0.5, 0.5])}, ValueError, "b must be masses ≥ 0"),
        ({"a": [0.2] * 5}, TypeError, r"a must be a floating-point Tensor \[5\], got list"),
        ({"mask_b": torch.ones(3)}, TypeError, r"mask_b must be a bool Tensor \[3\]"),
        ({"epsilon": 0.0}, ValueError, "epsilon must be finite and > 0"),
        (
            {"epsilon": torch.ones(2)},
            ValueError,
            r"epsilon must be a float or a tensor broadcastable to",
        ),
        ({"rho": -1.0}, ValueError, "rho must be finite and > 0"),
        ({"rho": (1.0, 1.0, 1.0)}, ValueError, "rho must be one number or tensor, or a pair"),
        ({"rho": 1.0, "key_relaxation": 0.5}, ValueError, "rho stands for key_relaxation and reference_relaxation"),
        ({"cost": torch.rand(5)}, ValueError, r"cost must be a floating-point Tensor \[..., N, M\]"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refusals(given: dict[str, Any], error: type[Exception], message: str) -> None:
    options: dict[str, Any] = {"cost": torch.rand(5, 3), "epsilon": 0.1} | given
    with pytest.raises(error, match=message):
        mine.transport_plan(options.pop("cost"), **options)


def test_points_and_plans_have_to_fit() -> None:
    with pytest.raises(ValueError, match="y must have the batch and D of x"):
        mine.sinkhorn_divergence(torch.rand(5, 2), torch.rand(4, 3), epsilon=0.1)
    with pytest.raises(ValueError, match="x must be a floating-point Tensor"):
        mine.sinkhorn_divergence(torch.rand(5), torch.rand(4), epsilon=0.1)
    with pytest.raises(ValueError, match=r"y must be \[..., M, D\]"):
        mine.barycentric_projection(torch.rand(5, 2), torch.rand(4, 3))


def test_the_plan_is_formed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says about the plan is said of the one that it returns."""

    def again(*_: Tensor) -> Tensor:
        raise AssertionError("the plan is formed a second time")

    cost = torch.rand(2, 5, 4)
    wanted, info = mine.transport_plan(cost, epsilon=0.5, return_info=True)
    monkeypatch.setattr(inspect.getmodule(solving), "plan_of", again)
    plan, found = mine.transport_plan(cost, epsilon=0.5, return_info=True)
    assert torch.equal(plan, wanted)
    torch.testing.assert_close(found, info)
