"""Transport to convergence on the CPU's kernels: a pass, iterations from a start, and calls by the backend's name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from converged_helpers import F64, IMPLICIT, NEWTON, judge_pass, problem, with_gradients

import setformer_kernels.functional as SF
from setformer_kernels import fixed_point
from setformer_kernels.backends import cpu
from setformer_kernels.problem import Sinkhorn
from setformer_kernels.reference.transport import sinkhorn

pytestmark = pytest.mark.skipif(bool(cpu.ABSENT), reason=cpu.ABSENT)
# Sizes and the spread of ℓ: one row, several blocks of rows, an A that is formed apart, columns that are next to
# unreachable, numbers whose exponentials are denormal or 0.
SIZES = [(1, 1, 3, 1.0), (2, 100, 7, 1.5), (3, 230, 64, 30.0), (1, 50, 600, 5.0), (2, 60, 20, 300.0)]


@pytest.fixture(params=["generic", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.MODULE.cpu_isa()
    if not cpu.MODULE.set_cpu_isa(request.param):
        pytest.skip(f"no {request.param} here")
    yield request.param
    cpu.MODULE.set_cpu_isa(before)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_a_pass_is_that_of_the_definition(
    dtype: torch.dtype, size: tuple[int, int, int, float], threads: int, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    p, g = problem(*size, dtype)
    judge_pass(fixed_point.passes(cpu)(p, g), p, g)


def test_denormals_are_zero_in_kernels_alone() -> None:
    l = -torch.rand(1, 30, 20) / 1e-3
    SF.sinkhorn(l, num_iters=4)
    SF.sinkhorn(l, **NEWTON)
    assert (torch.full((3,), 1e-40) * 0.5 > 0).all()


@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_iterations_from_a_start_are_those_of_the_definition(spread: float) -> None:
    p, start = problem(3, 40, 9, spread, F64)
    p = p._replace(l=p.l.nan_to_num())
    start[1, 2] = math.nan  # as good as none
    x = Sinkhorn(*p[:3], p.lam_a.squeeze(-1), p.lam_b.squeeze(-1), num_iters=5, tol=1e-2)
    f, g, c, iters = cpu.started(x, start)
    want = sinkhorn(*p[:3], 5, p.lam_a, p.lam_b, 1e-2, start)
    torch.testing.assert_close(f, want.f, equal_nan=False)
    torch.testing.assert_close(g, want.g, equal_nan=False)
    torch.testing.assert_close(c, want.c[:, -1:].expand(-1, 5, -1), equal_nan=False)
    assert torch.equal(iters, want.iters)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("spread", [150.0, 2000.0])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_many_iterations_at_a_small_epsilon(
    dtype: torch.dtype, spread: float, apart: bool, threads: int, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Potentials drift far and are taken into the kernel again and again; not so where a column has no mass."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, y = torch.rand(3, 130, 2, dtype=dtype), torch.rand(3, 40, 2, dtype=dtype)
    l = -spread * torch.cdist(x, y).square()
    log_a, log_b = (torch.randn(3, n, dtype=dtype).log_softmax(-1) for n in (130, 40))
    if apart:
        log_a[:, 5], log_b[:, 7] = -math.inf, -math.inf
    one = torch.ones(3, dtype=dtype)
    f, g, c, iters = cpu.sinkhorn(Sinkhorn(l, log_a, log_b, one, one, (1.0, 1.0), 60))
    model, want = (
        sinkhorn(*(t.to(kind) for t in (l, log_a, log_b)), 60, *2 * [torch.ones(3, 1, dtype=kind)])
        for kind in (dtype, F64)
    )
    assert (iters == 60).all()
    for a, b, exact in zip((f, g, c), model, want, strict=False):
        known = exact.isfinite()
        assert torch.equal(a.isfinite(), known)
        rounding = (1e-13 if dtype == F64 else 2 * torch.finfo(dtype).eps) * spread * math.sqrt(exact.numel())
        assert (a - exact)[known].norm() <= 2 * (b - exact)[known].norm() + rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64], ids=str)
@pytest.mark.parametrize("how", [NEWTON, IMPLICIT, {"tol": 1e-4, "num_iters": 50}], ids=["newton", "implicit", "tol"])
@pytest.mark.parametrize("name", ["set_attention", "set_pool", "set_transport"])
def test_a_backend_by_name_does_what_the_reference_does(
    name: str, how: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for part in ("transport", "solving"):
        monkeypatch.setattr(fixed_point, part, _counted(getattr(fixed_point, part), calls))
    monkeypatch.setattr("setformer_kernels.solver.ON_KERNELS", _on_kernels())
    shapes = ((2, 2, 5, 6), (2, 2, 40, 6), (2, 2, 40, 3))
    inputs = [torch.randn(shape, dtype=F64).to(dtype).requires_grad_() for shape in shapes]
    inputs = inputs if name == "set_attention" else inputs[1:]
    y = torch.randn(2, 4, 6, dtype=F64).to(F64 if dtype == F64 else torch.float32).requires_grad_()
    found = [with_gradients(getattr(SF, name), inputs, y, {**how, "epsilon": 0.3, "backend": b}) for b in
             ("cpu", "reference")]  # fmt: skip
    assert len(calls) == 1
    limit = {torch.float32: 2e-3, torch.bfloat16: 6e-2, F64: 1e-9}[dtype]
    for a, b in zip(*found, strict=True):
        assert (a - b).double().norm() <= limit * b.double().norm()


def _counted(function: Any, calls: list[Any]) -> Any:
    def counted(*args: Any) -> Any:
        calls.append(function)
        return function(*args)

    return counted


def _on_kernels() -> dict[Any, Any]:
    from setformer_kernels import solver

    return solver.ON_KERNELS | {solver.converged.transport: lambda *args: fixed_point.transport(*args)}
