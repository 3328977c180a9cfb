"""The Triton causal scan where the shared cases do not reach: ragged chunks, ranges too wide for products, parts."""

from __future__ import annotations

import functools
import itertools
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
from setformer_kernels.testing.budget import assert_typically_within_budget, cast
from setformer_kernels.testing.cases import ALL_CASES, make

pytest.importorskip("triton")
from setformer_kernels.backends.triton import face
from setformer_kernels.backends.triton.causal import scan, scan_back, state
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


def test_the_scale_of_positions_far_apart_within_the_error_budget() -> None:
    """Its gradient cancels unless the parts of a column sum to 1, whatever the size of their logits."""
    case = replace(ALL_CASES["causal_t1"], P=2, position_spread=30.0)
    found = measure.small_gradients(case, torch.float32, "triton", draw=1, draws=1)
    assert_typically_within_budget(*found, case.name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [17, 63, 64, 65, 130])
def test_lengths_around_a_chunk(length: int, dtype: torch.dtype, poisoned_memory: None) -> None:
    check(inputs(length), dtype)


def test_one_key(poisoned_memory: None) -> None:
    given = cast(inputs(1), torch.float32)
    found = gradients(functools.partial(causal, backend="triton"), given, torch.randn(given["value"].shape))
    torch.testing.assert_close(found["output"], given["value"].detach())
    assert all((found[name] == 0).all() for name in ("query", "key", "references"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_of_any_range_in_any_chunk(dtype: torch.dtype) -> None:
    check(any_range(), dtype)


def test_weights_of_any_range_in_any_stretch(stretches: None) -> None:
    check(any_range(210, 170))


def any_range(length: int = 140, cut: int = 100) -> dict[str, Any]:
    """Masses from 1e-80 up, from `cut` on e^150 above all before: no product of two exponentials holds them."""
    given: dict[str, Any] = inputs(length)
    mask = 30 * torch.randn(1, length, dtype=torch.float64)
    mask[:, cut:] += 150
    return given | {"key_mask": mask}


def test_wide_head_dims_in_blocks() -> None:
    check(inputs(70, heads=1, d=80, e=72, m=20))


CHUNK = {False: 4 * 16 * (16 + 10), True: 4 * 16 * (16 + 16 + 3 * 64 + 16)}  # bytes of one, of `inputs`, and backward


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
    """Every bundle of a head is a stretch of its own."""
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
@pytest.mark.parametrize(("H", "L"), [(2, 100), (8, 512), (16, 1024)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_calls_take_few_launches(H: int, L: int, family: str, dtype: torch.dtype) -> None:
    with recorded(Device(family, 132, "tf32x3")) as launches, torch.device("meta"):
        for call, most in zip(both(1, H, L, 64, dtype)[1], (4, 9), strict=True):
            launches.clear()
            call()
            assert len(launches) == most


@pytest.mark.parametrize(("B", "H", "L", "scans"), [(1, 8, 4096, 3), (1, 1, 65536, 3), (16, 16, 1024, 1)])
def test_bundles_go_side_by_side_where_a_scan_is_long_and_heads_are_few(B: int, H: int, L: int, scans: int) -> None:
    with recorded(Device("sm_90", 132, "tf32x3")) as launches, torch.device("meta"):
        both(B, H, L, 64, torch.bfloat16)[1][0]()
        names = [launch.kernel.fn.__name__ for launch in launches]
    assert names.count("causal_kernel") * scans == len(names) - 1 - 2 * names.count("causal_kernel")


def walk_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on bundles do, whatever takes less."""

    def way_of(*args: Any) -> Any:
        return way(*args)._replace(side_by_side=True)

    way = scan.way_of
    for module in (scan, scan_back):
        monkeypatch.setattr(module, "way_of", way_of)


@pytest.fixture
def side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    walk_side_by_side(monkeypatch)


@pytest.mark.parametrize("length", [193, 450])
def test_bundles_within_the_error_budget(length: int, side_by_side: None, poisoned_memory: None) -> None:
    check(inputs(length, heads=1), torch.bfloat16)


STREAMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "t0": {"num_iters": 0},
    "mask": {"key_mask": True},
    "gates": {"log_decay": 1.0},
    "state": {"log_decay": 0.01, "initial_state": True},
    "strong_gates": {"log_decay": 90.0, "initial_state": True, "key_mask": True},
    "positions": {"positions": True},
}


def streamed(name: str, length: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A piece of a sequence, its tensors that want gradients and its options; a whole bundle is masked."""
    kind = dict(STREAMS[name])
    given = {n: t.to(dtype if n != "references" else torch.float32) for n, t in inputs(length, heads=1).items()}
    if "log_decay" in kind:
        given["log_decay"] = -kind.pop("log_decay") * torch.rand(1, 1, length)
    if kind.pop("initial_state", False):
        past = (torch.randn(1, 1, 40, 16) for _ in range(3))
        state = SF.set_causal(*past, given["references"], output_final_state=True, backend="reference")[1]
        assert state is not None
        given["initial_state"] = state
    if kind.pop("positions", False):
        places = torch.rand(length, 2)
        kind |= {"query_position": places, "key_position": places, "reference_position": torch.rand(1, 8, 2)}
    if kind.pop("key_mask", False):
        kind["key_mask"] = torch.rand(1, length) < 0.7
        kind["key_mask"][:, 192:384] = False
    return given, kind


def scanned(given: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """Output, final state, and the gradient of both to each that is given."""
    torch.manual_seed(7)
    leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
    o, state = SF.set_causal(**leaves, **options, output_final_state=True, backend="triton")
    assert state is not None
    cotangents = [torch.randn(t.shape).to(t.dtype) for t in (o, state)]
    cotangents[1][..., state.shape[-1] // 2 :] = 0
    gradients = torch.autograd.grad([o, state], list(leaves.values()), cotangents)
    return {"output": o, "state": state} | dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("name", STREAMS)
def test_side_by_side_or_in_stretches_a_scan_has_the_same_bits(
    name: str, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    case = streamed(name, 450, torch.bfloat16 if name == "gates" else torch.float32)
    found = [scanned(*case)]
    walk_side_by_side(monkeypatch)
    found.append(scanned(*case))
    monkeypatch.setattr(state, "WORKSPACE_SHARE", 0.0)
    monkeypatch.setattr(state, "FEW_TOKENS", 0)
    found.append(scanned(*case))
    one, two, three = found
    for name, wanted in one.items():
        assert torch.equal(two[name], wanted), name
        if name == "references":  # which adds chunks up, and then stretches
            torch.testing.assert_close(three[name], wanted)
        else:
            assert torch.equal(three[name], wanted), name


@pytest.mark.parametrize("apart", [False, True])
def test_pieces_of_whole_bundles_have_the_bits_of_one_call(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if apart:
        walk_side_by_side(monkeypatch)
    given, _ = streamed("gates", 450, torch.float32)
    y = given.pop("references")
    own: dict[str, Any] = {"output_final_state": True, "backend": "triton"}
    whole, last = SF.set_causal(references=y, **given, **own)
    found, after = [], None
    for at in (slice(0, 192), slice(192, 384), slice(384, 450)):
        piece = {name: t[:, :, at] for name, t in given.items()}
        o, after = SF.set_causal(references=y, **piece, initial_state=after, **own)
        found.append(o)
    assert torch.equal(torch.cat(found, 2), whole)
    assert after is not None
    assert last is not None
    assert torch.equal(after, last)


LENGTHS = (0, 200, 5, 0)


def test_segments_in_any_parts_have_the_bits_they_have_alone(stretches: None, poisoned_memory: None) -> None:
    """Output, states, and the gradients of tokens, gates and states; a part begins and ends within a segment."""
    total, n = sum(LENGTHS), len(LENGTHS)
    cu = torch.tensor([0, *itertools.accumulate(LENGTHS)])
    names = {"query": (1, 16), "key": (1, 16), "value": (1, 16), "log_decay": (1,)}
    given = {name: torch.randn(total + 3, *width) for name, width in names.items()}
    given["log_decay"] = -given["log_decay"].abs()
    for t in given.values():
        t[total:] = torch.nan
    y, past = torch.randn(1, 8, 16), (torch.randn(n, 1, 40, 16) for _ in range(3))
    state = SF.set_causal(*past, y, output_final_state=True, backend="reference")[1]
    assert state is not None
    leaves = {name: t.requires_grad_() for name, t in (given | {"initial_state": state.detach()}).items()}
    own: dict[str, Any] = {"references": y, "backend": "triton", "output_final_state": True}
    o, states = SF.set_attention_varlen(**leaves, cu_seqlens_q=cu, causal=True, **own)
    into = torch.randn(o.shape), torch.randn(states.shape)
    into[1][..., states.shape[-1] // 2 :] = 0
    found = torch.autograd.grad([o, states], list(leaves.values()), into)
    assert not o[total:].any()
    assert not any(t[total:].any() for t in found[:4])
    for i, rows in enumerate(itertools.starmap(slice, itertools.pairwise(cu.tolist()))):
        if LENGTHS[i] == 0:  # the state passes through
            assert torch.equal(states[i], state[i])
            assert torch.equal(found[4][i], into[1][i])
            continue
        alone = {name: t.detach()[rows].transpose(0, 1)[None].requires_grad_() for name, t in given.items()}
        before = state.detach()[i : i + 1].requires_grad_()
        one, after = SF.set_causal(**alone, initial_state=before, **own)
        assert after is not None
        assert torch.equal(one[0].transpose(0, 1), o[rows])
        assert torch.equal(after[0], states[i])
        cotangents = [into[0][rows].transpose(0, 1)[None], into[1][i : i + 1]]
        wanted = torch.autograd.grad([one, after], [*alone.values(), before], cotangents)
        for a, b in zip(found[:4], wanted, strict=False):
            assert torch.equal(a[rows], b[0].transpose(0, 1)), i
        assert torch.equal(found[4][i : i + 1], wanted[4])


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
