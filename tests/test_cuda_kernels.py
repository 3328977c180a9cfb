"""The CUDA kernels' own source, run on the CPU by the shim of csrc/cuda/testing, against the float64 reference.

Where there is a GPU the same tests run on it too.
"""

from __future__ import annotations

import functools
import math
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

import test_backends
import torch
from torch import Tensor

import setformer_kernels.functional as SF
from benchmarks.common.shim import cuda_shim
from setformer_kernels import dispatch
from setformer_kernels.backends import cuda, eager
from setformer_kernels.problem import Operands, Options, Sinkhorn
from setformer_kernels.testing import (
    ALL_CASES,
    CASES,
    Case,
    assert_typically_within_budget,
    assert_within_budget,
    measure,
    model_inputs,
)
from setformer_kernels.testing.budget import cast

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"


@pytest.fixture(scope="session")
def shim() -> ModuleType:
    """The kernels built for the CPU."""
    if shutil.which("g++") is None or shutil.which("make") is None:
        pytest.skip("needs g++ and make")
    return cuda_shim()


@pytest.fixture(params=["shim", "gpu"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The CUDA backend on a GPU, or with its kernels on the CPU, where no test may show a race."""
    if request.param == "shim":
        shim = request.getfixturevalue("shim")
        monkeypatch.setattr(cuda, "_C", shim)
        monkeypatch.setattr(cuda, "ABSENT", "")
        monkeypatch.setattr(cuda, "_DEVICE", "cpu")
        shim.watch_races(True)
        yield "cuda"
        shim.watch_races(False)
        assert shim.found_race() == ""
    elif not torch.cuda.is_available() or cuda.ABSENT:
        pytest.skip(cuda.ABSENT or "no GPU")
    else:
        with torch.device("cuda"):
            yield "cuda"


@pytest.fixture
def on_shim(shim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The CUDA backend on the shim."""
    for name, value in {"_C": shim, "ABSENT": "", "_DEVICE": "cpu"}.items():
        monkeypatch.setattr(cuda, name, value)
    return shim


@pytest.mark.parametrize("T", [0, 1, 7])
@pytest.mark.parametrize("kind", ["plain", "masses", "minus_infinity", "wide", "relaxed", "tolerance"])
def test_sinkhorn_within_the_error_budget(kind: str, T: int, backend: str, poisoned_memory: None) -> None:
    test_backends.test_sinkhorn_within_the_error_budget(kind, T, torch.float32, backend)


NOT_CAUSAL = [case for case in CASES if not case.options.get("causal")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", NOT_CAUSAL, ids=lambda case: case.name)
def test_attention_within_the_error_budget(case: Case, dtype: torch.dtype, backend: str, poisoned_memory: None) -> None:
    if not measure.fits(case, dtype):
        pytest.skip("out of float16's range")
    measure.attention(case, dtype, backend).check(case.name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in measure.SMALL_CASES if ALL_CASES[name] in NOT_CAUSAL])
def test_small_gradients_within_the_error_budget(name: str, dtype: torch.dtype, backend: str) -> None:
    assert_typically_within_budget(*measure.small_gradients(ALL_CASES[name], dtype, backend, draws=1), name)


@pytest.mark.parametrize("marginals", test_backends.RELAXED)
def test_positions_far_from_every_reference_keep_the_budget(marginals: str, backend: str) -> None:
    test_backends.test_positions_far_from_every_reference_keep_the_budget(marginals, backend)


@pytest.mark.parametrize(("num_iters", "draw"), test_backends.FAR_APART)
def test_the_scale_of_positions_far_apart_keeps_the_budget(num_iters: int, draw: int, backend: str) -> None:
    test_backends.test_the_scale_of_positions_far_apart_keeps_the_budget(num_iters, draw, backend)


@pytest.mark.parametrize("name", ["plain", "t1", "no_key", "tensors", "far_positions", "length_1000"])
def test_pooling_within_the_error_budget(name: str, backend: str, poisoned_memory: None) -> None:
    case = ALL_CASES[name]
    test_backends.test_pooling_within_the_error_budget(case, torch.float32, backend)


@pytest.mark.parametrize(("B", "L", "S"), [(0, 5, 5), (2, 0, 4), (0, 0, 3), (2, 3, 0), (2, 0, 0)])
def test_empty_batches_queries_and_keys(B: int, L: int, S: int, backend: str) -> None:
    test_backends.test_empty_batches_queries_and_keys(B, L, S, False, backend)


def test_masked_content_is_never_read(backend: str) -> None:
    test_backends.test_masked_content_never_reaches_an_output_or_a_gradient(False, backend)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3)])
def test_output_keeps_the_memory_order(order: tuple[int, ...], backend: str) -> None:
    test_backends.test_output_and_gradients_keep_the_memory_order_of_the_inputs(order, backend)


# B, S, L, M, D, E: one block; clusters of all sizes, some blocks without keys; several passes over the values; more
# batch elements than blocks that run at a time.
SHAPES = {"block": (1, 60, 33, 7, 16, 16), "pair": (1, 300, 20, 64, 64, 64), "eight": (1, 1100, 700, 40, 32, 48),
          "empty_blocks": (1, 129, 2000, 16, 16, 8), "passes": (1, 200, 40, 80, 24, 100),
          "windows": (700, 9, 9, 20, 16, 16)}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("epsilon", [0.05, 0.002])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_of_every_layout(
    shape: str, epsilon: float, dtype: torch.dtype, shim: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the budget, in all schedules alike; ε = 0.002 leaves the range of the scaled form."""
    monkeypatch.setattr(cuda, "_C", shim)
    b, s, l, m, d, e = SHAPES[shape]
    q, k, v = (torch.randn(b, 2, n, w, dtype=torch.float64) for n, w in ((l, d), (s, d), (s, e)))
    inputs = {"query": q, "key": k, "value": v, "references": torch.randn(2, m, d, dtype=torch.float64)}
    reference = functools.partial(SF.set_attention, backend="reference", epsilon=epsilon, num_iters=3)
    cotangent = torch.randn(b, 2, l, e, dtype=torch.float64)
    exact, model = model_inputs(reference, inputs, dtype, cotangent)
    given = {name: t.detach() for name, t in cast(inputs, torch.float32, dtype).items()}
    x = Operands(**{name: given.get(name) for name in Operands._fields})
    options, results = Options((1.0, epsilon, 1.0, 1.0, 1.0), "rbf", 3), []
    for schedule in reversed(shim.SCHEDULES):  # the first one last: the others' tests have it
        shim.set_schedule(schedule)
        o, z, c = cuda.attention(x, options)
        grads = cuda.attention_backward(x, options, z, c, cotangent.to(dtype), [n in given for n in Operands._fields])
        results.append({"output": o, "z": z, "c": c} | {n: t for n, t in grads._asdict().items() if t is not None})
    assert all(torch.equal(t, other[name]) for other in results for name, t in results[0].items())
    found = {name: t for name, t in results[0].items() if name in exact}
    assert found.keys() == exact.keys()
    assert_within_budget(found, exact, model, shape)


@pytest.mark.parametrize("backend", ["gpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_heads_that_take_the_whole_device_are_what_they_are_alone(dtype: torch.dtype, backend: str) -> None:
    """As many blocks of 8 as there are processors, more than its clusters hold: in a graph too, and again and again."""
    *_, processors, _, blocks, at_once = cuda.MODULE.cuda_devices()[0]
    heads = processors // 8
    if blocks < 8 or at_once[-1] >= heads:
        pytest.skip("all clusters of this device run at a time")
    q, k, v = (torch.randn(1, heads, 4096, 64, dtype=dtype) for _ in range(3))
    y = torch.randn(heads, 64, 64)
    call = functools.partial(SF.set_attention, num_iters=3, backend=backend)
    with torch.no_grad():
        alone = torch.cat([call(*(t[:, h : h + 1] for t in (q, k, v)), y[h : h + 1]) for h in range(heads)], 1)
        found = [call(q, k, v, y) for _ in range(20)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found.append(call(q, k, v, y))
        graph.replay()
    assert all(torch.equal(o, alone) for o in found)


@pytest.mark.parametrize("num_iters", [0, 1, 3])
@pytest.mark.parametrize("epsilon", [0.05, 0.002])
def test_pooling_passes_on_the_gradient_of_c(
    num_iters: int, epsilon: float, shim: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against autograd in float64, from cotangents of both z and c."""
    monkeypatch.setattr(cuda, "_C", shim)
    k, v, y = torch.randn(2, 1, 70, 16), torch.randn(2, 1, 70, 24), torch.randn(1, 9, 16)
    log_b = torch.randn(1, 9).log_softmax(-1)
    given = {"key": k, "value": v, "references": y, "log_b": log_b}
    options = Options((1.0, epsilon, 0.8, 0.9, 1.0), "rbf", num_iters)
    x = Operands(**{name: given.get(name) for name in Operands._fields})
    z, c = cuda.pool(x, options)
    d_z, d_c = torch.randn_like(z), torch.randn_like(c)
    found = cuda.pool_backward(x, options, z, c, d_z, d_c, [n in given for n in Operands._fields])
    leaves = {name: t.double().requires_grad_() for name, t in given.items()}
    exact = eager.pool(Operands(**{name: leaves.get(name) for name in Operands._fields}), options)
    incoming = (d_z.double(), d_c.double())
    wanted = torch.autograd.grad(exact, list(leaves.values()), incoming, allow_unused=True, materialize_grads=True)
    for name, want in zip(leaves, wanted, strict=True):
        error = (getattr(found, name).double() - want).norm()
        assert error <= 1e-4 * want.norm(), (name, error)


def problem(n: int, m: int, groups: int = 2) -> list[Tensor]:
    """ℓ [G, N, M], log a, log b, λ_a, λ_b [G], with −∞ here and there."""
    l = 2 * torch.randn(groups, n, m)
    log_a, log_b = torch.randn(groups, n).log_softmax(-1), torch.randn(groups, m).log_softmax(-1)
    if n > 5 and m > 5:
        l[0, 3], l[-1, :, 2], l[0, 4, 5], log_a[0, 1], log_b[0, 0] = [-math.inf] * 5
    return [l, log_a, log_b, 0.5 + torch.rand(groups) / 2, 0.5 + torch.rand(groups) / 2]


def both_ways(module: Any, inputs: list[Tensor], num_iters: int, tol: float | None) -> list[Tensor]:
    """f, g, c, iters and the gradients of a fixed combination of f and g."""
    x = Sinkhorn(*inputs, num_iters=num_iters, tol=tol)
    f, g, c, iters = module.sinkhorn(x)
    d_f = torch.where(f > -math.inf, torch.cos(torch.arange(f.shape[1])), 0).to(f.dtype)
    d_g = torch.where(g > -math.inf, torch.sin(torch.arange(g.shape[1])), 0).to(f.dtype)
    grads = module.sinkhorn_backward(x, c, iters, d_f, d_g, (True,) * 5)
    return [f, g, c, iters, *grads]


# One block; a cluster with ragged shares; more columns than strips of a block; one row, one column.
SIZES = {
    "small": (20, 37),
    "cluster": (150, 70),
    "wide": (9, 700),
    "row": (1, 40),
    "column": (40, 1),
    "large": (300, 190),
}


@pytest.mark.parametrize("num_iters", [0, 1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_sinkhorn_of_every_layout(size: str, num_iters: int, backend: str, poisoned_memory: None) -> None:
    inputs = problem(*SIZES[size])
    found = both_ways(cuda, inputs, num_iters, None)
    exact = both_ways(eager, [t.double() for t in inputs], num_iters, None)
    for got, want in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=2e-5, atol=2e-5 * max(1, num_iters))


def test_a_tolerance_stops_each_problem_by_itself(backend: str, poisoned_memory: None) -> None:
    inputs = problem(150, 70)
    inputs[0][1] = 0.01 * inputs[0][1].nan_to_num(neginf=0)  # nearly constant: one iteration is nearly all
    _, _, c, iters, *_ = both_ways(cuda, inputs, 5, 0.05)
    assert torch.equal(iters, eager.sinkhorn(Sinkhorn(*[t.double() for t in inputs], num_iters=5, tol=0.05))[3])
    ran = int(iters[1])
    assert ran < iters[0]
    assert torch.equal(c[1, ran - 1 :], c[1, ran - 1].expand(5 - ran + 1, -1))


def test_any_strides(backend: str, poisoned_memory: None) -> None:
    l, log_a, log_b, lam_a, lam_b = problem(20, 37)
    strided = [l.mT.contiguous().mT, log_a[:1].expand(2, -1), log_b.mT.contiguous().mT, lam_a[:1].expand(2), lam_b]
    found = both_ways(cuda, strided, 2, None)
    dense = both_ways(cuda, [t.contiguous() for t in strided], 2, None)
    assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))
    assert found[4].stride() == strided[0].stride()


def test_what_does_not_fit_says_why_and_goes_to_another_backend(backend: str) -> None:
    l = torch.randn(1, 1500, 400)
    facts = {"device": l.device.type, "dtype": torch.float32, "M": 400}
    too_large = dispatch.Problem("sinkhorn", **facts, N=1500)
    assert any("1500 x 400" in reason for reason in cuda.unsupported_reasons(too_large))
    assert dispatch.implementation(too_large, "auto") is not cuda
    with pytest.raises(ValueError, match="1500 x 400"):
        SF.sinkhorn(l, num_iters=1, backend=backend)


def test_a_gradient_that_does_not_fit_comes_from_another_backend(backend: str) -> None:
    """The forward's capacity is twice the backward's: 700 x 500 numbers fit once, not twice."""
    l = torch.randn(1, 700, 500, requires_grad=True)
    with torch.no_grad():
        f, g = SF.sinkhorn(l, num_iters=2, backend=backend)
    want = SF.sinkhorn(l, num_iters=2, backend="reference")
    torch.testing.assert_close((f, g), want, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(SF.sinkhorn(l, num_iters=2, backend=b)[0].square().sum(), l)[0]
             for b in (backend, "reference")]  # fmt: skip
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


def test_what_has_no_kernel_is_told() -> None:
    reasons = cuda.unsupported_reasons(dispatch.Problem("features", "cuda", torch.float32, 64, 64, 64))
    assert any("no kernel for features" in reason for reason in reasons)
    assert any("float64" in r for r in cuda.unsupported_reasons(dispatch.Problem("sinkhorn", "cuda", torch.float64)))


def test_assembly_and_the_hardware_stand_behind_one_door() -> None:
    forbidden = re.compile(r"\basm\b|__shfl|__syncthreads|threadIdx|blockIdx|__shared__")
    for path in SOURCES.rglob("*"):
        if path.suffix in (".cu", ".cuh") and path.name != "device.cuh":
            assert not forbidden.search(path.read_text()), path
