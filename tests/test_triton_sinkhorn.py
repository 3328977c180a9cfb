"""Sinkhorn of the Triton backend where it is unlike the others: routes, columns beyond a tile, tolerance on the device.

The op itself is tested with those of the other backends.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import device_of
from torch import Tensor

from setformer_kernels.backends import eager
from setformer_kernels.problem import Sinkhorn
from setformer_kernels.testing import assert_within_budget

pytest.importorskip("triton")
DEVICE = device_of("triton")
G = 2
NAMES = ("log_kernel", "log_a", "log_b", "lam_a", "lam_b")


def problem(n: int, m: int, infinite: bool = False) -> list[Tensor]:
    """ℓ [G, N, M], log a, log b, λ_a, λ_b [G] in float32."""
    l = 2 * torch.randn(G, n, m)
    log_a, log_b = torch.randn(G, n).log_softmax(-1), torch.randn(G, m).log_softmax(-1)
    if infinite:
        l[0, 3], l[-1, :, 2], l[0, 4, 5], log_a[0, 1], log_b[0, 0] = [-math.inf] * 5
    return [l, log_a, log_b, 0.5 + torch.rand(G) / 2, 0.5 + torch.rand(G) / 2]


def both_ways(module: Any, backward: Any, inputs: list[Tensor], num_iters: int, tol: float | None) -> dict[str, Tensor]:
    """f, g, c, iters and the gradients of a fixed combination of f and g."""
    x = Sinkhorn(*inputs, num_iters=num_iters, tol=tol)
    f, g, c, iters = module.sinkhorn(x)
    rows, columns = torch.arange(f.shape[1], device=f.device), torch.arange(g.shape[1], device=g.device)
    d_f = torch.where(f > -math.inf, torch.cos(rows.to(f.dtype)), 0)
    d_g = torch.where(g > -math.inf, torch.sin(columns.to(g.dtype)), 0)
    grads = backward.sinkhorn_backward(x, c, iters, d_f, d_g, (True,) * 5)
    return {"f": f, "g": g, "c": c, "iters": iters} | dict(zip(NAMES, grads, strict=True))


def compare(inputs: list[Tensor], num_iters: int, tol: float | None = None) -> dict[str, Tensor]:
    from setformer_kernels.backends.triton.sinkhorn import backward, forward

    found = both_ways(forward, backward, [t.to(DEVICE) for t in inputs], num_iters, tol)
    found = {name: t.cpu() for name, t in found.items()}
    exact = both_ways(eager, eager, [t.double() for t in inputs], num_iters, tol)
    model = both_ways(eager, eager, inputs, num_iters, tol)
    assert torch.equal(found["iters"], exact["iters"])
    for name in ("f", "g", "c"):
        absent = exact[name] == -math.inf
        for results in (found, exact, model):
            assert torch.equal(results[name] == -math.inf, absent)
            results[name] = results[name].masked_fill(absent, 0)
    large = {name: t for name, t in found.items() if name not in ("iters", "lam_a", "lam_b")}
    assert_within_budget(large, exact, model)
    for name in ("lam_a", "lam_b"):  # two numbers: no norm of rounding errors
        torch.testing.assert_close(found[name].double(), exact[name], rtol=1e-4, atol=1e-5)
    return found


SIZES = {"resident": (20, 37), "resident, then streaming": (64, 100), "streaming": (150, 70), "two tiles": (30, 300)}


@pytest.mark.parametrize("size", SIZES)
def test_the_route_follows_from_the_size(size: str) -> None:
    from setformer_kernels.backends.triton.sinkhorn import backward, problem

    n, m = SIZES[size]
    routes = [problem.resident(n, m) is not None, problem.resident(n, m, backward.RESIDENT) is not None]
    assert routes == [size.startswith("resident"), size == "resident"]
    assert (m > problem.WIDEST) == (size == "two tiles")


@pytest.mark.parametrize("num_iters", [0, 1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_every_route_within_the_error_budget(size: str, num_iters: int, poisoned_memory: None) -> None:
    compare(problem(*SIZES[size], infinite=num_iters == 3), num_iters)


@pytest.mark.parametrize("size", SIZES)
def test_a_tolerance_stops_each_problem_by_itself(size: str, poisoned_memory: None) -> None:
    inputs = problem(*SIZES[size])
    inputs[0][1] *= 0.01  # nearly constant: one iteration is nearly all
    found = compare(inputs, 5, 0.05)
    iters = found["iters"].tolist()
    assert iters[1] < iters[0]
    assert torch.equal(found["c"][1, iters[1] - 1 :], found["c"][1, iters[1] - 1].expand(5 - iters[1] + 1, -1))


@pytest.mark.parametrize("size", ["resident", "two tiles"])
def test_any_strides(size: str, poisoned_memory: None) -> None:
    l, log_a, log_b, lam_a, lam_b = problem(*SIZES[size])
    strided = [l.mT.contiguous().mT, log_a[:1].expand(G, -1), log_b.mT.contiguous().mT, lam_a[:1].expand(G), lam_b]
    found = compare(strided, 1)
    assert found["log_kernel"].stride() == strided[0].stride()
