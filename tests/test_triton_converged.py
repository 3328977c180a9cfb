"""Transport to convergence on Triton's kernels: a pass, iterations that stop on the device, and calls by its name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import device_of
from converged_helpers import F64, IMPLICIT, NEWTON, judge_pass, problem, with_gradients
from torch import Tensor

import setformer_kernels.functional as SF
from setformer_kernels import fixed_point
from setformer_kernels.backends.triton import face
from setformer_kernels.problem import SCALARS, Operands, Options, Sinkhorn
from setformer_kernels.reference.attention import widen
from setformer_kernels.reference.converged import Marginals, Solver
from setformer_kernels.reference.converged.attention import marginals
from setformer_kernels.reference.converged.solve import batched
from setformer_kernels.reference.transport import sinkhorn
from setformer_kernels.testing import assert_within_budget, products_of

pytest.importorskip("triton")
DEVICE = device_of("triton")
# One row, several tiles in several programs, columns that are next to unreachable, exponentials that are 0, A in
# blocks of its columns, more columns than a tile holds.
SIZES = [(1, 1, 3, 1.0), (2, 100, 7, 1.5), (2, 600, 20, 30.0), (2, 60, 20, 300.0), (1, 70, 200, 5.0), (1, 50, 300, 5.0)]
B, H, S, M, D = 2, 2, 70, 5, 6
TOL: dict[str, Any] = {"tol": 1e-3}


def on_device(value: Any) -> Any:
    """Tensors where Triton runs."""
    return type(value)(*map(on_device, value)) if isinstance(value, tuple) else value.to(DEVICE)


def on_cpu(value: Any) -> Any:
    return type(value)(*[t.cpu() for t in value])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_pass_over_costs_is_that_of_the_definition(size: tuple[int, int, int, float], poisoned_memory: None) -> None:
    p, g = problem(*size, torch.float32)
    judge_pass(on_cpu(fixed_point.passes(face)(on_device(p), g.to(DEVICE))), p, g)


def keys(dtype: torch.dtype, references: int = M, rich: bool = True, kernel: str = "rbf") -> tuple[Operands, Options]:
    """Keys, the last of each head without mass; rich: NaN there, and everything that may come with them."""
    x = Operands(
        None, torch.randn(B, H, S, D).to(dtype), torch.randn(B, H, S, 3).to(dtype), torch.randn(H, references, D),
        *[None] * 11,
    )  # fmt: skip
    if rich:
        x.key[:, :, -1] = math.nan
        log_a = torch.randn(B, 1, S).log_softmax(-1).expand(B, H, S).clone()
        log_a[:, :, -1] = -math.inf
        x = x._replace(
            log_a=log_a, log_b=torch.randn(H, references).log_softmax(-1), epsilon=torch.tensor([0.05, 0.2]),
            key_relaxation=torch.tensor([1.0, 0.8]), key_position=torch.rand(1, 1, S, 2).expand(B, H, S, 2),
            reference_position=torch.rand(H, references, 2),
        )  # fmt: skip
    return x, Options(SCALARS, kernel, 4)


def of_keys(x: Operands, opt: Options, dtype: torch.dtype) -> Marginals:
    """The problems [BH] of the keys with logits of a dtype."""
    wide = Operands(*[t if t is None else t.to(dtype) for t in widen(x)])
    return Marginals(*[t.flatten(0, 1) for t in batched(marginals(wide, opt))])


@pytest.mark.parametrize(
    ("dtype", "references", "kernel"),
    [
        (torch.float32, 5, "rbf"), (torch.float32, 150, "rbf"), (torch.bfloat16, 5, "rbf"), (torch.bfloat16, 70, "dot"),
    ],
    ids=str,
)  # fmt: skip
def test_a_pass_over_keys_is_that_of_the_definition(
    dtype: torch.dtype, references: int, kernel: str, poisoned_memory: None
) -> None:
    x, opt = keys(dtype, references, kernel == "rbf", kernel)
    p, kernels = fixed_point._problem_of_keys(on_device_keys(x), opt, face)
    with products_of(dtype):
        plain = of_keys(x, opt, torch.float32)
    g = plain.log_b + torch.randn_like(plain.log_b)
    found = on_cpu(kernels.passed(p, g.to(DEVICE), None))
    judge_pass(found, plain, g, of_keys(x, opt, F64))


def on_device_keys(x: Operands) -> Operands:
    return Operands(*[None if t is None else t.to(DEVICE) for t in x])


@pytest.mark.parametrize("of", ["costs", "keys"])
def test_what_has_stopped_is_not_read(of: str) -> None:
    p, g = problem(4, 70, 9, 1.0, torch.float32)
    running = torch.tensor([True, False, True, False]).unsqueeze(-1)
    x, opt = keys(torch.float32)
    kernels = fixed_point._of_costs(face) if of == "costs" else fixed_point._of_keys(on_device_keys(x), opt, face)
    if of == "keys":
        p, g = of_keys(x, opt, torch.float32), of_keys(x, opt, torch.float32).log_b
    want = on_cpu(kernels.passed(on_device(p), g.to(DEVICE), None))
    with torch.no_grad():
        (p.l if of == "costs" else x.key.flatten(0, 1))[~running.squeeze(-1)] = math.nan
    kernels = fixed_point._of_keys(on_device_keys(x), opt, face) if of == "keys" else kernels
    found = on_cpu(kernels.passed(on_device(p), g.to(DEVICE), running.to(DEVICE)))
    for name, a, b in zip(found._fields, found, want, strict=True):
        assert torch.equal(a[::2], b[::2]), name
    assert (found.mass[1::2] == 0).all()


@pytest.mark.parametrize("size", [(20, 9), (150, 70)], ids=["resident", "streaming"])
def test_iterations_over_costs_from_a_start(size: tuple[int, int], poisoned_memory: None) -> None:
    p, start = problem(3, *size, 1.0, torch.float32)
    p = p._replace(l=p.l.nan_to_num() * torch.tensor([1.0, 1.0, 0.01])[:, None, None])
    start[1, 2], tol = math.nan, 0.05  # as good as none
    x = Sinkhorn(*p[:3], p.lam_a.squeeze(-1), p.lam_b.squeeze(-1), num_iters=5, tol=tol)
    moved = Sinkhorn(*[t.to(DEVICE) for t in x.tensors], x.scalars, 5, tol)
    f, g, c, iters = (t.cpu() for t in face.started(moved, start.to(DEVICE)))
    want = sinkhorn(*p[:3], 5, p.lam_a, p.lam_b, tol, start)
    assert torch.equal(iters, want.iters)
    assert iters.unique().numel() > 1
    for a, b in ((f, want.f), (g, want.g), (c, want.c[:, -1:].expand(-1, 5, -1))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_iterations_over_keys_stop_head_by_head(dtype: torch.dtype, poisoned_memory: None) -> None:
    x, opt = keys(dtype)
    x.log_a[1, 0] = -math.inf  # a head without any key
    x = x._replace(epsilon=torch.tensor([2.0, 0.05]))
    with products_of(dtype):
        exact, model = (of_keys(x, opt, kind) for kind in (F64, torch.float32))
    start, tol = model.log_b + torch.randn_like(model.log_b), 1e-2
    p, kernels = fixed_point._problem_of_keys(on_device_keys(x), opt, face)
    found = [t.cpu() for t in kernels.iterated(p, 4, Solver(tol=tol, start=start.to(DEVICE)))]
    wanted = [sinkhorn(*q[:3], 4, *q[3:], tol, start.to(q.l.dtype)) for q in (exact, model)]
    assert torch.equal(found[1], wanted[0].iters)
    assert found[1].unique().numel() > 1
    assert (found[0][2] == -math.inf).all()
    results = [t.clone() for t in (found[0], wanted[0].g, wanted[1].g)]
    for t in results:
        t[2] = 0.0
    assert_within_budget(*({"g": t} for t in results))


def test_a_head_that_has_stopped_is_read_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from setformer_kernels.backends.triton.attention import converged

    x, opt = keys(torch.float32, rich=False)
    x = on_device_keys(x._replace(epsilon=torch.tensor([5.0, 0.05])))
    p, kernels = fixed_point._problem_of_keys(x, opt, face)
    want = kernels.iterated(p, 4, Solver(tol=1e-2))
    launches, launch = [], converged.launch

    def spoiling(kernel: Any, programs: int, args: Any, *rest: Any) -> None:
        """Keys of heads that have stopped become NaN before the next pass."""
        if kernel is converged.columns_kernel:
            launches.append(programs)
            stopped = next(t for t in args if isinstance(t, Tensor) and t.dtype == torch.int32) == 0
            x.key.view(B * H, S, D)[stopped] = math.nan
        launch(kernel, programs, args, *rest)

    monkeypatch.setattr(converged, "launch", spoiling)
    found = kernels.iterated(p, 4, Solver(tol=1e-2))
    assert len(launches) == 4  # the host asks nobody
    assert want[1].min() < 4
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "how", "dtype"),
    [
        ("set_attention", NEWTON, torch.float32), ("set_attention", IMPLICIT, torch.bfloat16),
        ("set_pool", NEWTON, torch.bfloat16), ("set_pool", TOL, torch.float32),
        ("set_transport", IMPLICIT, torch.float32), ("set_attention", TOL, torch.bfloat16),
    ],
    ids=[
        "attention-newton", "attention-implicit-bfloat16", "pool-newton-bfloat16", "pool-tol", "transport-implicit",
        "attention-tol-bfloat16",
    ],
)  # fmt: skip
def test_a_call_by_name_does_what_the_reference_does(name: str, how: dict[str, Any], dtype: torch.dtype) -> None:
    shapes = ((1, 2, 5, 6), (1, 2, 40, 6), (1, 2, 40, 3))
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    inputs = inputs if name == "set_attention" else inputs[1:]
    y = torch.randn(2, 4, 6).requires_grad_()
    how = {**how, "epsilon": 0.3, "num_iters": 6}

    def call(backend: str, kind: torch.dtype | None, device: str = "cpu") -> dict[str, Tensor]:
        given = [t.detach().to(device, kind or t.dtype).requires_grad_() for t in (*inputs, y)]
        found = with_gradients(getattr(SF, name), given[:-1], given[-1], {**how, "backend": backend})
        return {str(i): t.detach().cpu() for i, t in enumerate(found)}

    found, exact = call("triton", None, DEVICE), call("reference", F64)
    with products_of(dtype):
        model = call("reference", torch.float32)
    assert_within_budget(found, exact, model)


# The smaller side on either.
@pytest.mark.parametrize(("size", "lam"), [((12, 7), (1.0, 1.0)), ((5, 9), (0.7, 0.9))], ids=str)
@pytest.mark.parametrize("how", [NEWTON | {"num_iters": 9}, IMPLICIT], ids=["newton", "implicit"])
def test_implicit_gradients_of_costs_are_the_unrolled_ones_at_convergence(
    how: dict[str, Any], size: tuple[int, int], lam: tuple[float, float]
) -> None:
    l, weight = 1.5 * torch.randn(2, *size), torch.randn(2, *size)
    masses = [torch.randn(2, k).log_softmax(-1) for k in size]
    if lam[0] < 1:
        masses[0][0, 1], masses[1][1, 2] = -math.inf, -math.inf
    given = [l, *masses, *(torch.full((2,), x) for x in lam)]
    names = ("log_kernel", "log_a", "log_b", "key_relaxation", "reference_relaxation")
    count = 5 if lam[0] < 1 else 3

    def call(kind: torch.dtype, device: str = "cpu", **options: Any) -> dict[str, Tensor]:
        leaves = [t.to(device, kind).requires_grad_() for t in given]
        rates = dict(zip(names[3:], leaves[3:], strict=True)) if count == 5 else {}
        f, g = SF.sinkhorn(*leaves[:3], **rates, **options)
        plan = (leaves[0] + f.unsqueeze(-1) + g.unsqueeze(-2)).exp()
        found = torch.autograd.grad((weight.to(device, kind) * plan).sum(), leaves[:count])
        return {name: t.cpu() for name, t in zip(("plan", *names[:count]), (plan.detach(), *found), strict=True)}

    found = call(torch.float32, DEVICE, **how, backend="triton")
    many = {"num_iters": 800, "tol": 1e-15, "backend": "reference"}
    exact, model = call(F64, **many), call(torch.float32, **many)
    for name, t in found.items():
        assert t.isfinite().all(), name
        error, allowed = ((r[name].double() - exact[name]).norm() for r in (found, model))
        assert error <= 2 * allowed + 1e-5 * exact[name].norm(), name


def test_info_and_warm_starts() -> None:
    q, k, v, y = (
        torch.randn(*shape, device=DEVICE) for shape in ((2, 2, 5, 6), (2, 2, 40, 6), (2, 2, 40, 3), (2, 4, 6))
    )
    how: dict[str, Any] = {**NEWTON, "tol": 1e-5, "num_iters": 20, "epsilon": 0.02, "backend": "triton"}
    o, cold = SF.set_attention(q, k, v, y, **how, return_info=True)
    assert cold.converged.all()
    assert cold.error.max() < 1e-3
    assert (cold.iters < 20).all()
    again, warm = SF.set_attention(q, k, v, y, **how, return_info=True, initial_potential=cold.potential)
    assert (warm.iters < cold.iters).all()
    torch.testing.assert_close(again, o, rtol=1e-3, atol=1e-4)
    memory, plain = SF.set_transport(
        k, v, y, grad="implicit", tol=1e-5, num_iters=20, epsilon=0.02, initial_potential=cold.potential,
        return_info=True, backend="triton",
    )  # fmt: skip
    assert (plain.iters <= 3).all()
    torch.testing.assert_close(SF.set_read(q, memory, y, epsilon=0.02), o, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", [NEWTON, IMPLICIT, TOL], ids=["newton", "implicit", "tol"])
def test_without_a_key_everything_is_zero_and_the_info_says_so(how: dict[str, Any]) -> None:
    q, k, v = (torch.randn(2, 1, n, d, device=DEVICE).requires_grad_() for n, d in ((5, 6), (20, 6), (20, 3)))
    y = torch.randn(1, 4, 6, device=DEVICE).requires_grad_()
    mask = torch.ones(2, 20, dtype=torch.bool, device=DEVICE)
    mask[0] = False
    options = {**how, "num_iters": 4, "key_mask": mask, "epsilon": 1.0, "backend": "triton", "return_info": True}
    o, info = SF.set_attention(q, k, v, y, **options)
    assert (o[0] == 0).all()
    assert (o[1] != 0).any()
    assert info.error.isfinite().all()
    assert not info.converged[0].any()
    found = torch.autograd.grad(o.square().sum(), [q, k, v, y])
    assert all(gradient.isfinite().all() for gradient in found)
    assert all((gradient[0] == 0).all() for gradient in found[:3])


def infeasible() -> dict[str, Tensor]:
    cut = torch.randn(2, 10, 6)
    cut[0, 3], cut[1, :, 2] = -math.inf, -math.inf
    blocks = torch.full((2, 4, 4), -math.inf)
    blocks[:, :3, :1], blocks[:, 3:, 1:] = 0.0, 1.0
    return {
        "mass that can reach nothing": cut,
        "blocks of other totals": blocks,
        "epsilon beyond the plan's range": -torch.rand(2, 10, 6) / 1e-6,
        "epsilon beyond all numbers": -torch.rand(2, 10, 6) / 1e-42,
    }


@pytest.mark.parametrize("how", [{"grad": "implicit"}, {"method": "newton", "grad": "implicit"}], ids=str)
@pytest.mark.parametrize("name", infeasible())
def test_what_cannot_converge_stays_finite_and_says_so(name: str, how: dict[str, Any]) -> None:
    l = infeasible()[name].to(DEVICE).requires_grad_()
    f, g, info = SF.sinkhorn(l, num_iters=6, tol=1e-6, **how, return_info=True, backend="triton")
    for potential in (f, g):
        assert (potential < math.inf).all()  # and no NaN
    assert info.error.isfinite().all()
    assert not info.converged.any()
    plan = (l + f.unsqueeze(-1) + g.unsqueeze(-2)).exp()
    (gradient,) = torch.autograd.grad((plan.clamp_max(1.0) * torch.randn_like(l)).sum(), l)
    assert not gradient.isnan().any()
