"""Calls of set_attention without a gradient that look like an earlier one go a short way, with the long one's bits."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_host_time import Dispatched, Functions, Profiled, Subclass, python_calls
from torch import Tensor

import setformer_kernels.functional as SF
from setformer_kernels import dispatch
from setformer_kernels.backends.cpu import ABSENT
from setformer_kernels.ops import attention as op

pytestmark = pytest.mark.skipif(bool(ABSENT), reason=ABSENT)
B, H, L, S, M, D, E = 2, 3, 7, 9, 5, 8, 6
MOST_AGAIN = 15  # functions in Python of a call after the first, as tests/test_host_time.py counts; a first has 38


def inputs(dtype: torch.dtype = torch.float32, by_token: bool = False) -> dict[str, Tensor]:
    shapes = {"query": (B, H, L, D), "key": (B, H, S, D), "value": (B, H, S, E)}
    tokens = {name: torch.randn(*shape).to(dtype) for name, shape in shapes.items()}
    if by_token:
        tokens = {name: t.transpose(1, 2).contiguous().transpose(1, 2) for name, t in tokens.items()}
    return {**tokens, "references": torch.randn(H, M, D, dtype=torch.float64 if dtype == torch.float64 else None)}


def long_way(x: dict[str, Any], **options: Any) -> Tensor:
    """o of a call that nothing is known of and that a backward may follow."""
    with torch.enable_grad():
        return SF.set_attention(**{**x, "value": x["value"].detach().clone().requires_grad_()}, **options).detach()


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    SF._repeats.clear()
    with torch.no_grad():
        yield
    SF._repeats.clear()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call that looked like an earlier one went the short way."""
    found: list[bool] = []
    again = op.again

    def watched(*args: Any) -> Callable[..., Tensor | None] | None:
        answer = again(*args)

        def call(*given: Any) -> Tensor | None:
            o = answer(*given) if answer is not None else None
            found.append(o is not None)
            return o

        return None if answer is None else call

    monkeypatch.setattr(op, "again", watched)
    return found


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "T 0": {"num_iters": 0},
    "T 3": {"num_iters": 3, "epsilon": 0.2, "bandwidth": 2.0},
    "dot": {"kernel": "dot", "epsilon": 1.0, "backend": "cpu"},
    "relaxed": {"key_relaxation": 0.5, "reference_relaxation": 0.7},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_later_calls_have_the_bits_of_the_long_way(
    dtype: torch.dtype, by_token: bool, options: dict[str, Any], taken: list[bool]
) -> None:
    y = inputs(dtype)["references"]
    for turn in range(3):
        x = {**inputs(dtype, by_token), "references": y}
        found, want = SF.set_attention(**x, **options), long_way(x, **options)
        assert torch.equal(found, want)
        assert found.stride() == want.stride()
        assert taken == [True] * turn


def test_later_calls_enter_few_python_functions() -> None:
    x = inputs()
    assert python_calls(lambda: SF.set_attention(**x)) <= MOST_AGAIN


def test_far_logits_and_one_key_too() -> None:
    """Log domain, and a key that is pooled as it is."""
    for change in ({"kernel": "dot", "epsilon": 1e-3}, {}):
        x = inputs()
        if not change:
            x |= {"key": x["key"][:, :, :1], "value": x["value"][:, :, :1]}
        SF.set_attention(**x, **change)
        assert torch.equal(SF.set_attention(**x, **change), long_way(x, **change))


OTHERS: dict[str, dict[str, Any]] = {
    "mask": {"key_mask": torch.rand(B, S) < 0.5},
    "rows": {"attn_mask": torch.rand(L, S) < 0.9},
    "mass": {"reference_log_mass": torch.randn(H, M)},
    "dropout": {"dropout_p": 0.5, "seed": torch.tensor(3)},
    "tensor": {"epsilon": torch.full((H,), 0.1)},
    "reference": {"backend": "reference"},
    "converged": {"tol": 1e-3, "num_iters": 50},
    "cut": {"references": torch.randn(H, M, D).half()},
    "places": {"query_position": torch.rand(L, 2), "key_position": torch.rand(S, 2),
               "reference_position": torch.rand(H, M, 2)},
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_other_calls_are_answered_otherwise(other: dict[str, Any], taken: list[bool]) -> None:
    x = inputs()
    plain = SF.set_attention(**x)
    want = SF.set_attention(**{**x, **other}).clone()
    for _ in range(2):
        assert torch.equal(SF.set_attention(**{**x, **other}), want)
    assert taken == []
    assert torch.equal(SF.set_attention(**x), plain)
    assert taken == [True]


def test_what_looks_like_a_call_that_passed_is_still_checked() -> None:
    x = inputs()
    for _ in range(2):
        SF.set_attention(**x)
        with pytest.raises(ValueError, match="epsilon"):
            SF.set_attention(**x, epsilon=-1.0)
        with pytest.raises(ValueError, match="value"):
            SF.set_attention(**{**x, "value": x["value"][:, :, 1:]})
        with pytest.raises(TypeError, match="query"):
            SF.set_attention(**{**x, "query": x["query"].tolist()})
        with pytest.raises((TypeError, ValueError), match="causal"):
            SF.set_attention(**x, causal="yes")


@pytest.mark.parametrize("watcher", [Dispatched, Functions, Profiled])
def test_modes_and_profilers_see_later_calls(watcher: Callable[[], Any]) -> None:
    x = inputs()
    SF.set_attention(**x), SF.set_attention(**x)
    with watcher() as watching:
        SF.set_attention(**x)
    assert "setformer_kernels.set_attention" in " ".join(watching.seen)


def test_subclasses_transforms_and_graphs_see_later_calls() -> None:
    x = inputs()
    SF.set_attention(**x)
    want = SF.set_attention(**x)
    Subclass.seen = ()
    found = SF.set_attention(**{**x, "query": x["query"].as_subclass(Subclass)})
    assert any("set_attention" in name for name in Subclass.seen)
    assert torch.equal(found.as_subclass(Tensor), want)
    queries = torch.stack([x["query"]] * 2)
    mapped = torch.func.vmap(lambda q: SF.set_attention(**{**x, "query": q}))(queries)
    torch.testing.assert_close(mapped, torch.stack([want] * 2))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(t) for name, t in x.items()}
        assert isinstance(SF.set_attention(**fake), torch._subclasses.FakeTensor)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_go_the_long_way(mode: Callable[[], Any], taken: list[bool]) -> None:
    x = inputs()
    x["references"].requires_grad_()
    with mode():
        for _ in range(3):
            assert not SF.set_attention(**x).requires_grad
    assert taken == [True, True]
    with torch.enable_grad():
        assert SF.set_attention(**x).requires_grad
    assert taken == [True, True]


def test_autocast_goes_its_own_way() -> None:
    x = inputs()
    SF.set_attention(**x), SF.set_attention(**x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert SF.set_attention(**x).dtype == torch.bfloat16
    assert SF.set_attention(**x).dtype == torch.float32


def test_other_backends_are_asked(monkeypatch: pytest.MonkeyPatch, taken: list[bool]) -> None:
    x = inputs()
    SF.set_attention(**x), SF.set_attention(**x)
    monkeypatch.setattr(dispatch, "NATIVE", dict(dispatch.NATIVE))
    SF.set_attention(**x)
    assert taken == [True, False]


def test_no_tensor_is_kept_alive() -> None:
    x = inputs()
    SF.set_attention(**x), SF.set_attention(**x)
    alive = [weakref.ref(t) for t in x.values()]
    del x
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)


def test_threads_call_side_by_side() -> None:
    x, found = inputs(), []

    def call() -> None:
        with torch.no_grad():
            found.extend(SF.set_attention(**x) for _ in range(20))

    threads = [threading.Thread(target=call) for _ in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    want = long_way(x)
    assert len(found) == 80
    assert all(torch.equal(o, want) for o in found)
