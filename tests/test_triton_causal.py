"""The Triton causal scan where the shared cases do not reach: ragged chunks, ranges too wide for products, parts."""

from __future__ import annotations

import functools
import os
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import setformer_kernels.functional as SF
from setformer_kernels.problem import SCALARS, Operands, Options
from setformer_kernels.testing import gradients, measure, model_inputs
from setformer_kernels.testing.budget import cast
from setformer_kernels.testing.cases import ALL_CASES, make

pytest.importorskip("triton")
from setformer_kernels.backends.triton import face
from setformer_kernels.backends.triton.causal import state
from setformer_kernels.backends.triton.host.launch import Device, recorded

causal = functools.partial(SF.set_attention, causal=True, num_iters=1)


@pytest.fixture(autouse=True)
def on_device() -> Any:
    with torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"):
        yield


def inputs(length: int, heads: int = 2, d: int = 16, e: int = 16, m: int = 8) -> dict[str, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    tokens = (normal(1, heads, length, d), normal(1, heads, length, d), normal(1, heads, length, e))
    return dict(zip(("query", "key", "value", "references"), (*tokens, normal(heads, m, d)), strict=True))


def check(given: dict[str, Any], dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Tensor]:
    """The Triton results, held to the error budget."""
    cotangent = torch.randn(given["value"].shape, dtype=torch.float64)
    exact, model = model_inputs(functools.partial(causal, backend="reference", **options), given, dtype, cotangent)
    fast = gradients(
        functools.partial(causal, backend="triton", **options), cast(given, torch.float32, dtype), cotangent
    )
    measure.Measured(fast, exact, model).check("causal")
    return fast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [17, 63, 64, 65, 130])
def test_lengths_around_a_chunk(length: int, dtype: torch.dtype, poisoned_memory: None) -> None:
    check(inputs(length), dtype)


def test_one_key(poisoned_memory: None) -> None:
    given = cast(inputs(1), torch.float32)
    found = gradients(functools.partial(causal, backend="triton"), given, torch.randn(given["value"].shape))
    torch.testing.assert_close(found["output"], given["value"].detach())
    assert all((found[name] == 0).all() for name in ("query", "key", "references"))


# Masses 150 apart in the exponent: of ω − log C, numbers of 216 in base 2, float32 keeps 2e-5, and the gradient of the
# masses is off by up to 13 times what the reference's is (six draws), whose sums keep an exponent of their own.
LOGARITHMS_LOSE = pytest.mark.xfail(reason="logarithms this large keep 17 bits behind the point", strict=False)


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=LOGARITHMS_LOSE), torch.bfloat16, torch.float16], ids=str
)
def test_weights_of_any_range_in_any_chunk(dtype: torch.dtype) -> None:
    check(any_range(), dtype)


@LOGARITHMS_LOSE
def test_weights_of_any_range_in_any_stretch(stretches: None) -> None:
    check(any_range())


def any_range() -> dict[str, Any]:
    """Masses from 1e-80 up, in the second chunk e^150 above all before: no product of two exponentials holds them."""
    given: dict[str, Any] = inputs(140)
    mask = 30 * torch.randn(1, 140, dtype=torch.float64)
    mask[:, 100:] += 150
    return given | {"key_mask": mask}


def test_wide_head_dims_in_blocks() -> None:
    check(inputs(70, heads=1, d=80, e=72, m=20))


CHUNK = {False: 4 * 16 * (16 + 6), True: 4 * 16 * (16 + 16 + 3 * 64 + 8)}  # bytes of one, of `inputs`, and backward


@pytest.mark.parametrize("backward", [False, True])
def test_parts_of_the_heads_equal_the_whole(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = cast({k: v.repeat(2, 1, 1, 1) if v.ndim == 4 else v for k, v in inputs(70, heads=3).items()}, torch.float32)
    cotangent, call = torch.randn(given["value"].shape), functools.partial(causal, backend="triton", dropout_p=0.2)
    call = functools.partial(call, seed=torch.tensor(5))
    whole = gradients(call, given, cotangent)
    monkeypatch.setattr(state, "WORKSPACE_SHARE", 0.0)
    monkeypatch.setattr(state, "FEW_BYTES", 8 * CHUNK[backward])  # 4 of the 6 heads
    in_parts = gradients(call, given, cotangent)
    assert all(torch.equal(whole[name], in_parts[name]) for name in (whole if backward else ["output"]))


@pytest.fixture
def stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chunk of a head is a stretch of its own."""
    monkeypatch.setattr(state, "WORKSPACE_SHARE", 0.0)
    monkeypatch.setattr(state, "FEW_TOKENS", 0)


STRETCHED = {
    "causal_t0": {"D": 40, "E": 16},  # slots of dŷ larger than the means whose memory they take
    "causal_tensors": {"E": 40},
    "causal_dropout": {},
    "causal_float_mask": {},
    "causal_no_key": {},
}


@pytest.mark.parametrize("name", STRETCHED)
def test_stretches_of_the_length(name: str, stretches: None, poisoned_memory: None) -> None:
    given, options = make(replace(ALL_CASES[name], L=200, S=200, **STRETCHED[name]))
    check(given | options)


def test_stretches_of_several_chunks(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    """5 in 3 and 2, where memory allows 4."""
    monkeypatch.setattr(state, "WORKSPACE_SHARE", 0.0)
    monkeypatch.setattr(state, "FEW_BYTES", 4 * CHUNK[True])
    check(inputs(300), torch.bfloat16)


class Workspace(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside the block: `live` now, and at most."""

    def __init__(self, launches: list[Any]) -> None:
        super().__init__()
        self.launches, self.live, self.most = launches, 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launches.clear()  # a record of their arguments would keep these alive
        out = function(*args, **(kwargs or {}))
        if "empty" in str(function):
            storage = out.untyped_storage()
            weakref.finalize(storage, self.freed, storage.nbytes())
            self.live += storage.nbytes()
            self.most = max(self.most, self.live)
        return out

    def freed(self, size: int) -> None:
        self.live -= size


def both(B: int, H: int, L: int, D: int, dtype: torch.dtype) -> tuple[Operands, list[Any]]:
    """A call of these sizes, D = E = M, on the current device: its tensors, and what runs it in each direction."""
    q, k, v, d_o = (torch.empty(B, H, L, D, dtype=dtype) for _ in range(4))
    x = Operands(q, k, v, torch.empty(H, D, D), *[None] * 11)
    back = functools.partial(face.causal_backward, d_o=d_o, needs=[t is not None for t in x])
    return x, [functools.partial(call, x, Options(SCALARS, "rbf", 1)) for call in (face.causal, back)]


def workspaces(B: int, H: int, L: int, D: int, dtype: torch.dtype) -> tuple[list[int], int]:
    """(The most that forward and backward allocate beside their results, the bytes of q, k, v and o)."""
    found = []
    with recorded(Device("sm_90", 132, "tf32x3")) as launches, torch.device("meta"):
        x, calls = both(B, H, L, D, dtype)
        for call in calls:
            with Workspace(launches) as workspace:
                result = call()
            results = [result] if isinstance(result, Tensor) else [t for t in result if t is not None]
            given = sum(t.nbytes for t in results)
            launches.clear()
            assert workspace.live == given
            found.append(workspace.most - given)
    assert x.query is not None
    return found, x.query.nbytes + x.key.nbytes + 2 * x.value.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("B", "H", "L"), [(1, 8, 16384), (1, 8, 65536), (1, 16, 16384), (8, 16, 4096)])
@pytest.mark.parametrize("D", [64, 128])
def test_workspaces_take_at_most_a_quarter_of_the_tokens(B: int, H: int, L: int, D: int, dtype: torch.dtype) -> None:
    taken, tokens = workspaces(B, H, L, D, dtype)
    assert min(taken) > 0
    assert max(taken) <= 0.25 * tokens


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(("H", "L"), [(1, 100), (8, 4096), (16, 8191)])
def test_workspaces_of_few_tokens_take_megabytes(H: int, L: int, D: int) -> None:
    assert max(workspaces(1, H, L, D, torch.bfloat16)[0]) <= 104 << 20


@pytest.mark.parametrize("family", ["sm_80", "sm_90", "sm_100", "default"])
@pytest.mark.parametrize(("H", "L"), [(2, 100), (8, 512), (8, 4096)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_calls_take_few_launches(H: int, L: int, family: str, dtype: torch.dtype) -> None:
    with recorded(Device(family, 132, "tf32x3")) as launches, torch.device("meta"):
        for call, most in zip(both(1, H, L, 64, dtype)[1], (4, 9), strict=True):
            launches.clear()
            call()
            assert len(launches) == most


def test_nothing_depends_on_later_keys() -> None:
    given, cut = cast(inputs(130), torch.float32), 70
    cotangent = torch.randn(given["value"].shape)
    cotangent[:, :, cut:] = 0
    call = functools.partial(causal, backend="triton")
    before = gradients(call, given, cotangent)
    changed = {n: t.detach().clone() for n, t in given.items()}
    for name in ("query", "key", "value"):
        changed[name][:, :, cut:] = torch.randn_like(changed[name][:, :, cut:])
    after = gradients(call, {n: t.requires_grad_() for n, t in changed.items()}, cotangent)
    assert torch.equal(before["output"][:, :, :cut], after["output"][:, :, :cut])
    assert all((before[name][:, :, cut:] == 0).all() for name in ("query", "key", "value"))
    assert all(torch.equal(before[n][:, :, :cut], after[n][:, :, :cut]) for n in ("query", "key", "value"))
