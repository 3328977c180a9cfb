"""How the CUDA backend lays problems out: what is refused, what `auto` takes, and what the driver is asked."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_cuda_kernels import both_ways, on_shim, problem, shim

from setformer_kernels import dispatch
from setformer_kernels.backends import cuda
from setformer_kernels.problem import SCALARS, Operands, Options

__all__ = ["on_shim", "shim"]  # fixtures


def sizes_of(draw: random.Random) -> dict[str, Any]:
    """Facts of a random attention problem: few keys and many queries, or the reverse, of all widths."""
    facts = {name: draw.choice(of) for name, of in (
        ("B", (1, 2)), ("H", (1, 2)), ("L", (0, 1, 16, 64, 300)), ("N", (1, 9, 16, 64, 300)), ("M", (7, 64, 128, 512)),
        ("D", (16, 64, 128, 256)), ("E", (8, 64, 256)), ("num_iters", (0, 1, 3, 10, 50)),
    )}  # fmt: skip
    return facts | {"dtype": draw.choice((torch.float32, torch.bfloat16))}


def takes(facts: dict[str, Any], shim: ModuleType) -> tuple[bool, bool]:
    """Whether a launch finds a layout for tensors of these sizes, forward and backward."""
    b, h, m, d = (facts[name] for name in "BHMD")
    shapes = {"query": (b, h, facts["L"], d), "key": (b, h, facts["N"], d), "value": (b, h, facts["N"], facts["E"])}
    given = {name: torch.empty((), dtype=facts["dtype"]).expand(shape) for name, shape in shapes.items()}
    given["references"] = torch.empty(()).expand(h, m, d)
    x = Operands(**{name: given.get(name) for name in Operands._fields})
    x = x if facts["L"] else x._replace(query=None)
    views, options = cuda._common(x, Options(SCALARS, "rbf", facts["num_iters"]))[:2]
    backward = shim.cuda_gradient_parts(views, options, facts["num_iters"], 0) > 0
    return shim.forward_fits(views, options, facts["num_iters"]), backward


def test_a_problem_is_refused_or_it_runs(on_shim: ModuleType) -> None:
    """Facts and tensors of random problems are laid out alike, forward and backward."""
    draw, count = random.Random(1), {True: 0, False: 0}
    for _ in range(300):
        facts = sizes_of(draw)
        for backward, fits in enumerate(takes(facts, on_shim)):
            op = "attention" if facts["L"] else "pool"
            problem = dispatch.Problem(op, "cpu", **facts, backward=bool(backward))
            assert (cuda.unsupported_reasons(problem) == []) == fits, problem
            count[fits] += 1
    assert min(count.values()) > 20


@pytest.mark.parametrize(("dtype", "sizes"), [
    (torch.float32, (16, 64, 64, 128, 8, 10)), (torch.bfloat16, (9, 64, 512, 16, 16, 1)),
])  # fmt: skip
def test_few_keys_and_many_queries_run_both_ways(
    dtype: torch.dtype, sizes: tuple[int, ...], on_shim: ModuleType
) -> None:
    """What is not refused runs: S, L, M, D, E, T of problems whose warps are asked for by the queries alone."""
    s, length, m, d, e, iterations = sizes
    q, k, v = (torch.randn(1, 1, n, w, dtype=dtype) for n, w in ((length, d), (s, d), (s, e)))
    given = {"query": q, "key": k, "value": v, "references": torch.randn(1, m, d)}
    x, options = Operands(**{name: given.get(name) for name in Operands._fields}), Options(SCALARS, "rbf", iterations)
    for backward in (False, True):
        facts = {"B": 1, "H": 1, "L": length, "N": s, "M": m, "D": d, "E": e, "num_iters": iterations}
        assert cuda.unsupported_reasons(dispatch.Problem("attention", "cpu", dtype, **facts, backward=backward)) == []
    o, z, c = cuda.attention(x, options)
    grads = cuda.attention_backward(x, options, z, c, torch.ones_like(o), [n in given for n in Operands._fields])
    assert all(t.isfinite().all() for t in (o, *[g for g in grads if g is not None]))


# B, H, L = S, backward -> the backend of `auto` on an H100, where both can run: M = D = E = 64, T = 3, bfloat16.
CHOICES = {
    (1, 16, 4096, False): "triton",  # measured: 76 us and 51
    (8, 16, 2048, False): "triton",  # 178 and 177, 150 and 123 at T = 1
    (1, 16, 1024, False): "cuda",  # 27 and 39
    (8, 16, 1024, False): "cuda",  # 75 and 107
    (256, 16, 49, False): "cuda",  # 222 and 1165
    (1, 1, 1024, False): "cuda",
    (1, 1, 256, False): "cuda",  # too short for anything but the launches to count
    (1, 16, 4096, True): "triton",  # with the forward pass: 888 and 260
    (8, 16, 512, True): "triton",
    (256, 16, 49, True): "triton",
    (1, 1, 100_000, False): "triton",  # does not fit
}


@pytest.mark.parametrize("case", CHOICES, ids=str)
def test_auto_takes_what_fills_the_device(
    case: tuple[int, int, int, bool], on_shim: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {"cuda": cuda, "triton": SimpleNamespace(unsupported_reasons=lambda p: [])}
    monkeypatch.setattr(dispatch, "NATIVE", others)
    b, h, n, backward = case
    facts = {"B": b, "H": h, "L": n, "N": n, "D": 64, "E": 64, "M": 64, "num_iters": 3, "backward": backward}
    problem = dispatch.Problem("attention", "cpu", torch.bfloat16, **facts)
    assert dispatch.select(problem) == CHOICES[case]
    monkeypatch.setattr(dispatch, "NATIVE", {"cuda": cuda})  # alone it takes all that fits
    assert dispatch.select(problem) == ("reference" if n > 10_000 else "cuda")


H100 = (132, 227 * 1024)


@pytest.fixture
def devices(shim: ModuleType) -> Iterator[ModuleType]:
    """The shim, to describe devices to; one H100 again afterwards."""
    yield shim
    shim.set_devices([(*H100, (0, 0, 0), False)])


def cluster_of(heads: int, devices: ModuleType) -> int:
    """Blocks of a cluster that runs the forward of so many heads of 2048 bfloat16 tokens."""
    sizes = 1, heads, 2048, 2048, 64, 64, 64, 0, 3
    return devices.layout(sizes, cuda.DTYPE_CODES[torch.bfloat16], False)[0]


# Clusters of 2, 4 and 8 that the driver tells -> blocks of a cluster for 14, 15, 16 and 17 heads.
TOLD = {
    (66, 30, 15): (8, 8, 4, 4),  # measured on an H200: these run in one turn, and one more waits for another
    (60, 30, 16): (8, 8, 8, 4),
    (60, 30, 17): (8, 8, 8, 8),
    (60, 30, 14): (8, 4, 4, 4),
    (60, 30, 0): (4, 4, 4, 4),  # part of a device: none of 8 at all
}


@pytest.mark.parametrize("told", TOLD, ids=str)
def test_clusters_are_as_large_as_the_driver_lets_run_at_once(told: tuple[int, int, int], devices: ModuleType) -> None:
    devices.set_devices([(*H100, told, True)])
    assert devices.cuda_devices()[0][-1] == (132, *(count for count in told if count))
    assert tuple(cluster_of(heads, devices) for heads in (14, 15, 16, 17)) == TOLD[told]


def test_where_no_driver_is_asked_some_processors_are_taken_to_be_left_over(devices: ModuleType) -> None:
    devices.set_devices([(*H100, (60, 28, 14), False)])  # nobody is asked for a context
    assert devices.cuda_devices()[0][-1] == (132, 66, 30, 15)
    assert [cluster_of(heads, devices) for heads in (15, 16)] == [8, 4]


def test_a_device_without_a_context_gets_none(devices: ModuleType) -> None:
    devices.set_devices([(*H100, (0, 0, 0), False), (*H100, (0, 0, 0), True)])
    assert devices.visit(1, 1) == []
    assert devices.visit(0, 1) == ["device 1"]  # and not back: that would make one on device 0
    devices.set_devices([(*H100, (0, 0, 0), True)] * 2)
    assert devices.visit(0, 1) == ["device 1", "device 0"]


def test_a_kernel_is_given_its_memory_once(devices: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set to each launch's own size it would be another thread's by the time of the launch."""
    monkeypatch.setattr(cuda, "_C", devices)
    monkeypatch.setattr(cuda, "_where", lambda t: (5, 0))  # a device that no other test has launched on
    devices.set_devices([(*H100, (0, 0, 0), True)] * 6)
    for n in (20, 300, 40):
        both_ways(cuda, problem(n, 37), 1, None)
    made_current, *memory = devices.done()[:1] + [line for line in devices.done() if "memory" in line]
    assert made_current == "device 5"
    assert memory == [f"shared memory {H100[1]}"] * 2  # forward and backward
