"""Transport to convergence on given costs: tolerances, what was reached, the gradient of the fixed point, Newton."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import setformer_kernels.functional as SF
from setformer_kernels import advice, dispatch

F64 = torch.float64
NEWTON: dict[str, Any] = {"method": "newton", "grad": "implicit"}
SIZES = [(12, 7), (5, 9)]  # the smaller side on either
RELAXED = [(1.0, 1.0), (0.9, 1.0), (1.0, 0.8), (0.7, 0.9)]


def problem(n: int, m: int, spread: float = 1.5) -> tuple[Tensor, Tensor, Tensor]:
    l = spread * torch.randn(2, n, m, dtype=F64)
    masses = [torch.randn(2, k, dtype=F64).log_softmax(-1) for k in (n, m)]
    return l.requires_grad_(), masses[0].requires_grad_(), masses[1].requires_grad_()


def plan(l: Tensor, f: Tensor, g: Tensor) -> Tensor:
    return (l + f.unsqueeze(-1) + g.unsqueeze(-2)).exp()


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("lam", RELAXED, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("how", [{"grad": "implicit", "num_iters": 1500}, {**NEWTON, "num_iters": 60}], ids=str)
def test_implicit_gradients_are_the_unrolled_ones_at_convergence(
    how: dict[str, Any], size: tuple[int, int], lam: tuple[float, float], backend: str
) -> None:
    leaves = problem(*size)
    rates = [torch.full((2,), x, dtype=F64, requires_grad=x < 1) for x in lam]
    weight = torch.randn(2, *size, dtype=F64)
    found = []
    for options in (how | {"backend": backend}, {"num_iters": 1500, "backend": "reference"}):
        f, g = SF.sinkhorn(*leaves, tol=1e-15, key_relaxation=rates[0], reference_relaxation=rates[1], **options)
        loss = (weight * plan(leaves[0], f, g)).sum() + (weight[0, 0] * (f.unsqueeze(-1) + g.unsqueeze(-2))).sum()
        found.append(torch.autograd.grad(loss, [*leaves, *[x for x in rates if x.requires_grad]]))
    for name, a, b in zip(("log_kernel", "log_a", "log_b", "rate", "rate"), *found, strict=False):
        assert (a - b).norm() <= 1e-10 * b.norm(), name


@pytest.mark.parametrize("size", [(5, 3), (2, 4)], ids=str)
def test_gradcheck_of_the_fixed_point(size: tuple[int, int]) -> None:
    l, log_a, log_b = problem(*size)

    def solved(l: Tensor, a: Tensor, b: Tensor, lam: Tensor) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"tol": 1e-14, "num_iters": 50, **NEWTON}
        balanced = plan(l, *SF.sinkhorn(l, a.log_softmax(-1), b.log_softmax(-1), **options))
        return balanced, *SF.sinkhorn(l, a, b, key_relaxation=lam, reference_relaxation=0.9, **options)

    lam = torch.tensor([0.6, 0.95], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(solved, (l, log_a, log_b, lam), fast_mode=True)


def test_the_bias_of_an_implicit_gradient_is_proportional_to_the_residual() -> None:
    leaves = problem(12, 7, 8.0)
    weight = torch.randn(2, 12, 7, dtype=F64)

    def gradient(num_iters: int, method: str = "sinkhorn") -> tuple[Tensor, float]:
        f, g = SF.sinkhorn(*leaves, num_iters=num_iters, method=method, grad="implicit")
        with torch.no_grad():
            residual = (g - SF.sinkhorn(*leaves, num_iters=num_iters - 1, backend="reference")[1]).abs().max().item()
        return torch.autograd.grad((weight * plan(leaves[0], f, g)).sum(), leaves[0])[0], residual

    exact, _ = gradient(60, "newton")
    constants = []
    for num_iters in (20, 40, 80, 160):
        found, residual = gradient(num_iters)
        assert residual > 1e-9
        constants.append(((found - exact).norm() / exact.norm()).item() / residual)
    assert constants[0] * constants[-1] > 0  # a bias there is
    assert max(constants) <= 3 * min(constants)


def test_memory_of_an_implicit_gradient_does_not_depend_on_the_iterations() -> None:
    l = torch.randn(2, 50, 8, requires_grad=True)

    def saved(num_iters: int, **how: Any) -> int:
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with saved_tensors_hooks(pack, lambda t: t):
            held = SF.sinkhorn(l, num_iters=num_iters, **how)
        assert held[0].requires_grad
        return sum(kept.values())

    assert saved(100, grad="implicit") == saved(3, grad="implicit") == saved(100, **NEWTON)
    assert saved(100, backend="reference") > 10 * saved(100, grad="implicit")


def test_derivatives_there_are_none_of_name_the_remedy() -> None:
    l = torch.randn(4, 3, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(SF.sinkhorn(l, grad="implicit")[0].square().sum(), l, create_graph=True)
    with pytest.raises(RuntimeError, match="pass grad='unrolled' and backend='reference'"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda l: SF.sinkhorn(l, grad="implicit")[0], (l.detach(),), (torch.ones_like(l),))


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("epsilon", [0.1, 0.01, 0.001])
def test_newton_needs_few_passes_where_sinkhorn_crawls(epsilon: float, dtype: torch.dtype) -> None:
    x, y = torch.rand(2, 60, 2, dtype=dtype), torch.rand(2, 40, 2, dtype=dtype)
    l = -torch.cdist(x, y).square() / epsilon
    f, g, info = SF.sinkhorn(l, num_iters=100, tol=2e-5, **NEWTON, return_info=True)
    assert info.converged.all()
    assert info.error.max() <= 1e-4
    more = {0.1: 1, 0.01: 5, 0.001: 10}[epsilon] * int(info.iters.max())
    slow = SF.sinkhorn(l, num_iters=more, tol=2e-5, return_info=True)[2]
    assert not slow.converged.any()
    exact = SF.sinkhorn(l.double(), num_iters=100, tol=1e-10, **NEWTON)
    close(plan(l, f, g).double(), plan(l.double(), *exact), 1e-3)


def test_newton_converges_from_any_start_and_soon_from_a_near_one() -> None:
    l = 10 * torch.randn(3, 50, 20, dtype=F64)
    f, g, cold = SF.sinkhorn(l, num_iters=100, tol=1e-10, **NEWTON, return_info=True)
    for scale in (1.0, 100.0):
        start = scale * torch.randn(3, 20, dtype=F64)
        f_far, g_far, far = SF.sinkhorn(
            l, num_iters=200, tol=1e-10, **NEWTON, initial_potential=start, return_info=True
        )
        assert far.converged.all()
        close(plan(l, f_far, g_far), plan(l, f, g), 1e-8)
    moved = l + 1e-3 * torch.randn_like(l)
    warm = SF.sinkhorn(
        moved, num_iters=100, tol=1e-10, **NEWTON, initial_potential=cold.potential, return_info=True
    )[2]  # fmt: skip
    assert warm.converged.all()
    assert warm.iters.max() <= 5 < cold.iters.min()
    plain = SF.sinkhorn(l, num_iters=3, initial_potential=cold.potential, return_info=True)
    assert plain[2].error.max() < 1e-8  # Sinkhorn's iterations start there too


@pytest.mark.parametrize("lam", [1.0, 0.9])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_newton_converges_from_starts_that_leave_no_digits(backend: str, constant: bool, lam: float) -> None:
    l = 10 * torch.randn(3, 50, 20)
    how: dict[str, Any] = {**NEWTON, "num_iters": 200, "tol": 1e-4, "key_relaxation": lam, "backend": backend}
    start = 1e5 * (torch.ones(3, 20) if constant else torch.randn(3, 20))
    f, g, info = SF.sinkhorn(l, initial_potential=start, return_info=True, **how)
    assert info.converged.all()
    close(plan(l, f, g), plan(l, *SF.sinkhorn(l, **how)), 2e-3)


@pytest.mark.parametrize("how", [{"grad": "implicit"}, NEWTON], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_each_problem_stops_by_itself(how: dict[str, Any], size: tuple[int, int]) -> None:
    l = torch.stack([torch.zeros(size), torch.randn(size), 6 * torch.randn(size)]).double()
    f, g, info = SF.sinkhorn(l, num_iters=300, tol=1e-6, **how, return_info=True)
    assert info.iters[0] < info.iters[1] < info.iters[2]
    assert info.converged.all()
    for i in range(3):
        alone = SF.sinkhorn(l[i], num_iters=300, tol=1e-6, **how, return_info=True)
        assert alone[2].iters == info.iters[i]
        close(plan(l[i], f[i], g[i]), plan(l[i], *alone[:2]), 1e-12)


def test_info_says_what_the_plan_is_short_of(native: str) -> None:
    if native == "triton":
        pytest.skip("the iterations are those of its other tests")
    l = 5 * torch.randn(2, 3, 12, 7)
    log_a = torch.randn(12).log_softmax(-1)
    f, g, info = SF.sinkhorn(l, log_a, num_iters=6, tol=1e-9, backend=native, return_info=True)
    p = plan(l, f, g)
    error = (p.sum(-1) - log_a.exp()).abs().sum(-1) + (p.sum(-2) - 1 / 7).abs().sum(-1)
    torch.testing.assert_close(info.error, error, rtol=1e-4, atol=1e-6)
    assert info.iters.shape == (2, 3)
    assert (info.iters == 6).all()
    assert not info.converged.any()
    assert torch.equal(info.potential, g)


def test_relaxed_marginals_are_no_error() -> None:
    options: dict[str, Any] = {"key_relaxation": 0.8, "reference_relaxation": 0.6, "return_info": True}
    info = SF.sinkhorn(torch.randn(12, 7, dtype=F64), num_iters=300, **options)[2]
    assert info.error < 1e-12
    assert info.converged


def test_what_did_not_converge_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "enabled", True)
    monkeypatch.setattr(advice, "_told", set())
    l = 5 * torch.randn(2, 12, 7)
    with pytest.warns(UserWarning, match="in num_iters = 3: the largest marginal error of 2 problems"):
        SF.sinkhorn(l, num_iters=3, tol=1e-6)
    SF.sinkhorn(l, num_iters=3, tol=1e-6)  # once: pytest makes errors of warnings
    monkeypatch.setattr(advice, "_told", set())
    SF.sinkhorn(l, num_iters=3)
    SF.sinkhorn(l, num_iters=3000, tol=1e-3)
    with pytest.warns(UserWarning, match="has not converged"):
        SF.sinkhorn(l, num_iters=3, return_info=True)


def infeasible() -> dict[str, tuple[Tensor, Tensor | None, bool]]:
    """log kernel, log a, and whether any of it is feasible."""
    cut = torch.randn(2, 10, 6)
    cut[0, 3], cut[1, :, 2] = -math.inf, -math.inf
    blocks = torch.full((2, 4, 4), -math.inf)
    blocks[:, :3, :1], blocks[:, 3:, 1:] = 0.0, 1.0
    nobody = torch.zeros(2, 10).log_softmax(-1)
    nobody[0] = -math.inf
    return {
        "mass that can reach nothing": (cut, None, False),
        "blocks of other totals": (blocks, None, False),
        "no mass at all": (torch.randn(2, 10, 6), nobody, True),
        "epsilon beyond the plan's range": (-torch.rand(2, 10, 6) / 1e-6, None, False),
        "epsilon beyond the potentials' digits": (-torch.rand(2, 10, 6) / 1e-20, None, False),
        "epsilon beyond all numbers": (-torch.rand(2, 10, 6) / 1e-42, None, False),
    }


@pytest.mark.parametrize("how", [{}, {"grad": "implicit"}, NEWTON], ids=str)
@pytest.mark.parametrize("name", infeasible())
def test_what_cannot_converge_stays_finite_and_says_so(name: str, how: dict[str, Any]) -> None:
    l, log_a, partly = infeasible()[name]
    l.requires_grad_()
    f, g, info = SF.sinkhorn(l, log_a, num_iters=30, tol=1e-6, **how, return_info=True)
    for potential in (f, g):
        assert (potential < math.inf).all()  # and no NaN
    assert info.error.isfinite().all()
    assert info.error[0] > 1e-2
    assert not info.converged[0]
    assert info.converged[1] == partly
    (gradient,) = torch.autograd.grad((plan(l, f, g).clamp_max(1.0) * torch.randn(l.shape)).sum(), l)
    assert not gradient.isnan().any()


def test_masses_of_other_totals_are_refused_by_how_much() -> None:
    l = torch.randn(2, 5, 4)
    message = r"log_a and log_b must have equal totals .* got 5 and 1 in problem 0"
    for how in ({"tol": 1e-3}, NEWTON, {"return_info": True}):
        with pytest.raises(ValueError, match=message):
            SF.sinkhorn(l, torch.zeros(5), **how)
    SF.sinkhorn(l, torch.zeros(5), tol=1e-3, key_relaxation=0.9)
    SF.sinkhorn(l, torch.zeros(5))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"method": "newton"}, ValueError, "grad must be 'implicit' with method='newton'"),
        ({"method": "nelder"}, ValueError, "method must be one of sinkhorn, newton, got 'nelder'"),
        ({"grad": "exact"}, ValueError, "grad must be one of unrolled, implicit, got 'exact'"),
        ({"grad": "implicit", "num_iters": 1}, ValueError, "num_iters must be ≥ 2 with grad='implicit'"),
        ({"initial_potential": torch.zeros(3)}, ValueError, r"initial_potential must have shape \[4\], got \[3\]"),
        ({"initial_potential": 0.0}, TypeError, "initial_potential must be a floating-point Tensor"),
        ({"initial_potential": torch.zeros(4, requires_grad=True)}, ValueError, "initial_potential gets no gradient"),
        ({"return_info": 2}, TypeError, "return_info must be a bool"),
        ({**NEWTON, "backend": "cuda"}, ValueError, "has no kernels for grad='implicit', method='newton'"),
        ({"initial_potential": torch.zeros(4), "backend": "cpu"}, ValueError, "no kernels for initial_potential with"),
        ({"initial_potential": torch.zeros(4), "backend": "triton"}, ValueError, "kernels for initial_potential with"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SF.sinkhorn(torch.randn(5, 4), **given)


def test_of_the_backends_of_gpus_one_has_kernels_for_convergence() -> None:
    for op in ("sinkhorn", "attention"):
        problem = dispatch.Problem(op, "cuda", torch.float32, M=4, converged="implicit")
        reasons = dispatch.available_backends(problem)
        assert any("grad='implicit', method='newton'" in reason for reason in reasons["cuda"])
        assert not any("no kernels for" in reason for reason in reasons["triton"])


def solved(l: Tensor, how: dict[str, Any]) -> Tensor:
    return plan(l, *SF.sinkhorn(l, num_iters=3, tol=1e-9, **how))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile itself does
def test_nothing_is_read_back_while_it_runs() -> None:
    """One graph, without a value that a host would have to see."""
    l = 3 * torch.randn(2, 6, 4, dtype=F64)
    torch.testing.assert_close(torch.compile(solved, fullgraph=True, backend="eager")(l, NEWTON), solved(l, NEWTON))


@pytest.mark.parametrize("how", [{"grad": "implicit"}, NEWTON], ids=str)
def test_vmap_vmap_of_grad_and_no_values(how: dict[str, Any]) -> None:
    l = 3 * torch.randn(2, 6, 4, dtype=F64)

    def loss(l: Tensor) -> Tensor:
        return solved(l, how).square().sum()

    torch.testing.assert_close(torch.func.vmap(lambda l: solved(l, how))(l), solved(l, how))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(l), torch.func.grad(loss)(l))
    assert solved(l.to("meta"), how).shape == l.shape
