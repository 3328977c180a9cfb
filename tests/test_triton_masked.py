"""Triton's kernels for masks of every query on small problems: the interpreter takes minutes for the shared cases."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import setformer_kernels.functional as SF
from setformer_kernels.dispatch import NATIVE
from setformer_kernels.problem import Problem
from setformer_kernels.testing import ALL_CASES, Case, assert_typically_within_budget, measure
from setformer_kernels.testing.cases import make

pytest.importorskip("triton")
L, S = 20, 30  # two tiles of queries and of keys
DTYPES = (torch.float32, torch.bfloat16)
NAMES = ("causal", "t0", "banned", "tensors", "unbalanced", "dot_wide_range", "dropout")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Tiles of 16 tokens on the interpreter, so that a few tokens are several; the device of the tests."""
    reasons = NATIVE["triton"].unsupported_reasons(Problem("masked", "cpu", torch.float32, 16, 16, 7))
    device = torch.device("cuda" if reasons and torch.cuda.is_available() else "cpu")
    if reasons and device.type == "cpu":
        pytest.skip("; ".join(reasons))
    from setformer_kernels.backends.triton.host import tiles

    monkeypatch.setattr(tiles, "INTERPRETER", tiles.Tile(16, 16, 4, 1))
    with device:
        yield device


def small(case: Case) -> Case:
    """Of few numbers, but not so few that one rounding error is most of a gradient's norm."""
    return replace(case, B=2, H=2, L=L, S=S)


def measured(case: Case, dtype: torch.dtype, **others: Any) -> measure.Measured:
    """Output and every gradient of a case, with other keywords."""
    inputs, keywords = make(case)
    cotangent = torch.randn(case.B, case.H, case.L, case.E, dtype=torch.float64)
    return measure.beside(SF.set_attention, inputs | keywords | others, dtype, cotangent, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["triton"])
def test_small_masked_problems_within_the_error_budget(
    backend: str, name: str, dtype: torch.dtype, small_tiles: torch.device, poisoned_memory: None
) -> None:
    measured(small(ALL_CASES[f"masked_{name}"]), dtype).check(name)


@pytest.mark.parametrize(("rows", "keys"), [(16, 32), (32, 16)])
@pytest.mark.parametrize("name", ["causal", "tensors", "small_epsilon", "float"])
@pytest.mark.parametrize("backend", ["triton"])
def test_tiles_of_more_keys_than_queries_and_of_fewer(
    backend: str, name: str, rows: int, keys: int, small_tiles: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from setformer_kernels.backends.triton.host import tiles

    monkeypatch.setattr(tiles, "INTERPRETER", tiles.Tile(rows, 16, 4, 1, keys=keys))
    measured(small(ALL_CASES[f"masked_{name}"]), torch.float32).check(name)


@pytest.mark.parametrize(
    ("name", "dtype", "frugal"),
    [
        *(("far_positions", dtype, False) for dtype in (torch.float32, torch.bfloat16)),
        *(("far_positions", dtype, True) for dtype in (torch.bfloat16, torch.float16)),
        ("small_epsilon", torch.float32, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["triton"])
def test_logits_far_apart_under_a_mask_within_the_error_budget(
    backend: str,
    name: str,
    dtype: torch.dtype,
    frugal: bool,
    small_tiles: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    poisoned_memory: None,
) -> None:
    """At the shared cases' own lengths: of fewer numbers, one rounding error is most of a norm."""
    from setformer_kernels.backends.triton.host import tiles

    monkeypatch.setattr(tiles, "INTERPRETER", tiles.Tile(64, 64, 4, 1, frugal=frugal))
    measured(replace(ALL_CASES[f"masked_{name}"], B=1), dtype).check(name)


@pytest.mark.parametrize("backend", ["triton"])
def test_the_scale_of_positions_far_apart_under_a_mask_within_the_error_budget(
    backend: str, small_tiles: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradient cancels unless the weights of a column sum to 1, whatever the size of their logits."""
    from setformer_kernels.backends.triton.host import tiles

    monkeypatch.setattr(tiles, "INTERPRETER", tiles.Tile(64, 64, 4, 1))
    case = ALL_CASES["masked_far_positions"]
    found = measure.small_gradients(case, torch.float32, "triton", draw=1, draws=1)
    assert_typically_within_budget(*found, case.name)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["triton"])
def test_every_dtype_under_a_mask_within_the_error_budget(
    backend: str, dtype: torch.dtype, small_tiles: torch.device
) -> None:
    """At an ε at which no product of the model underflows in float16."""
    case = small(replace(ALL_CASES["masked_float"], E=33, options={"num_iters": 2, "epsilon": 0.5}))
    measured(case, dtype).check("every dtype")


def masks() -> dict[str, Tensor]:
    """By name: every form a mask comes in, float64."""
    bias = torch.randn(L, S, dtype=torch.float64).masked_fill(torch.rand(L, S) < 0.3, -math.inf)
    bias[3] = -math.inf
    return {
        "LS": bias,
        "BLS": torch.randn(2, L, S, dtype=torch.float64),
        "shared by the batch": torch.randn(1, 2, L, S, dtype=torch.float64).expand(2, 2, L, S),
        "BHLS": torch.randn(2, 2, L, S, dtype=torch.float64),
        "rows expanded": bias[:1].expand(L, S),
        "transposed": bias.T.contiguous().T,
        "bool": bias > 0,
    }


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("name", masks())
def test_masks_of_every_form_on_tiles(name: str, backend: str, small_tiles: torch.device) -> None:
    """Gradients of a mask that heads share are sums over them; queries come after S − L keys."""
    causal = name in ("BLS", "rows expanded", "bool")
    case = replace(small(ALL_CASES["masked_t1"]), B=2, mask="bool", options={"num_iters": 2 if causal else 1})
    measured(case, torch.float32, attn_mask=masks()[name], causal=causal).check(name)


@pytest.mark.parametrize("spread", [30.0, 3000.0])
@pytest.mark.parametrize("backend", ["triton"])
def test_masks_beyond_the_range_of_products_stay_exact(backend: str, spread: float, small_tiles: torch.device) -> None:
    """Blocks in which masses differ by more than products hold go to the log domain, and the others do not."""
    case = replace(small(ALL_CASES["masked_bool"]), H=1)
    inputs, _ = make(case)
    mask = torch.randn(L, S, dtype=torch.float64).float()
    mask[16:] = spread * torch.rand(L - 16, S)
    options: dict[str, Any] = {"num_iters": 2, "attn_mask": mask}
    leaves = [t.to(small_tiles).float().requires_grad_() for t in inputs.values()]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    found = SF.set_attention(*leaves, backend="triton", **options)
    wanted = SF.set_attention(*exact, backend="reference", **options | {"attn_mask": mask.double()})
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3)
    grads = [torch.autograd.grad(o.sin().sum(), t) for o, t in ((found, leaves), (wanted, exact))]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_results_under_a_mask_repeat_bit_for_bit(small_tiles: torch.device) -> None:
    leaves = [torch.randn(1, 2, 20, 16, requires_grad=True) for _ in range(3)] + [torch.randn(2, 7, 16)]
    mask, runs = torch.randn(20, 20, requires_grad=True), []
    for _ in range(2):
        o = SF.set_attention(*leaves, attn_mask=mask, causal=True, num_iters=2, backend="triton")
        runs.append([o, *torch.autograd.grad(o.square().sum(), [*leaves[:3], mask])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_auto_takes_triton_for_masks_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from setformer_kernels import dispatch

    assert dispatch.select(Problem("masked", "cuda", torch.bfloat16, 64, 64, 64, num_iters=3)) == "triton"
    too_many = dispatch.available_backends(Problem("masked", "cuda", torch.bfloat16, 64, 64, 300, num_iters=3))
    assert too_many["triton"] == ["holds at most 256 references, not 300"]


@pytest.mark.parametrize("expanded", [False, True])
def test_no_mask_is_read_where_there_is_no_batch(expanded: bool, small_tiles: torch.device) -> None:
    from setformer_kernels.backends.triton.host import launch

    q, y = torch.randn(0, 2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.randn(1, 1, 3, 3).expand(0, 2, 3, 3) if expanded else torch.randn(0, 2, 3, 3)
    with launch.recorded(launch.device_of(q)) as taken:
        SF.set_attention(q, q, q, y, attn_mask=mask, num_iters=2, backend="triton")
    assert [one for one in taken if "mask" in one.kernel.fn.__name__] == []
