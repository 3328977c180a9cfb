"""Single tokens after the first go a short way: with the results of the long one, and only where that may be."""

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
from setformer_kernels import dispatch, streaming
from setformer_kernels.backends.cpu import ABSENT
from setformer_kernels.ops import step as op

pytestmark = pytest.mark.skipif(bool(ABSENT), reason=ABSENT)
B, H, M, D, E = 2, 3, 5, 8, 6
MOST_STEP = 16  # functions in Python of a token after the first, as tests/test_host_time.py counts; a first has 128


def inputs(groups: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {"query": (B, groups * H, D), "key": (B, H, D), "value": (B, H, E)}
    tokens = {name: torch.randn(*shape, dtype=dtype) for name, shape in shapes.items()}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {"state": SF.empty_state(B, H, M, E, dtype=wide), **tokens, "references": torch.randn(H, M, D, dtype=wide)}


def long_way(x: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """o and the state after it of a step that nothing is known of."""
    known, after = dict(streaming._repeats._kept), x["state"].clone()
    streaming._repeats.clear()
    o = SF.set_step(**{**x, "state": after})
    streaming._repeats.clear()
    streaming._repeats._kept.update(known)
    return o, after


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    streaming._repeats.clear()
    yield
    streaming._repeats.clear()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each step that looked like an earlier one went the short way."""
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


EXTRAS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "gates": lambda: {"log_decay": -torch.rand(B, H)},
    "strided gates": lambda: {"log_decay": -torch.rand(B, H, 4)[..., 1]},
    "mask": lambda: {"key_mask": torch.tensor([True, False]), "log_decay": -torch.rand(B, H)},
    "head mask": lambda: {"key_mask": torch.rand(B, H) < 0.5},
    "masses": lambda: {"key_mask": torch.randn(B)},
    "rows": lambda: {"state_indices": torch.tensor([1, 0], dtype=torch.int32)},
    "no row": lambda: {"state_indices": torch.tensor([-1, 1], dtype=torch.int32)},
    "options": lambda: {"num_iters": 0, "epsilon": 0.2, "kernel": "dot", "backend": "cpu"},
}


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize(
    ("groups", "dtype"), [(1, torch.float32), (2, torch.float32), (1, torch.bfloat16), (1, torch.float64)]
)
def test_later_tokens_have_the_bits_of_the_long_way(
    extra: Callable[[], dict[str, Any]], groups: int, dtype: torch.dtype, taken: list[bool]
) -> None:
    x, wide = inputs(groups, dtype), torch.float64 if dtype == torch.float64 else torch.float32
    y, state = x["references"], x["state"]
    for turn in range(3):
        others = {n: t.to(wide) if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in extra().items()}
        now = {**inputs(groups, dtype), "references": y, "state": state, **others}
        want, after = long_way(now)
        version = state._version
        found = SF.set_step(**now)
        assert torch.equal(found, want)
        assert found.stride() == want.stride()
        assert torch.equal(state, after)
        assert state._version > version
        assert taken[-1:] == [True] * (turn > 0)


def test_later_tokens_enter_few_python_functions() -> None:
    x = inputs()
    assert python_calls(lambda: SF.set_step(**x)) <= MOST_STEP


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "decay": ({"log_decay": torch.full((B, H), 0.5)}, "log_decay must be ≤ 0, got 0.5"),
    "twice": ({"state_indices": torch.tensor([1, 1], dtype=torch.int32)}, "must be different ones"),
    "far": ({"state_indices": torch.tensor([0, B], dtype=torch.int32)}, "must be different ones"),
    "before": ({"state_indices": torch.tensor([0, -2], dtype=torch.int32)}, "must be different ones"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_values_are_looked_at_each_time(changes: dict[str, Any], message: str) -> None:
    good = {"log_decay": -torch.rand(B, H), "state_indices": torch.tensor([0, 1], dtype=torch.int32)}
    x = {**inputs(), **good}
    for _ in range(3):
        SF.set_step(**x)
        before = x["state"].clone()
        with pytest.raises(ValueError, match=message):
            SF.set_step(**{**x, **changes})
        assert torch.equal(x["state"], before)


def test_gates_out_of_range_go_the_long_way(taken: list[bool]) -> None:
    x = {**inputs(), "log_decay": torch.zeros(B, H)}
    SF.set_step(**x)
    for value in (-torch.inf, -2000.0, torch.nan):
        now = {**x, "log_decay": torch.full((B, H), value)}
        want, after = long_way(now)
        torch.testing.assert_close(SF.set_step(**now), want, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(x["state"], after, rtol=0, atol=0, equal_nan=True)
        x["state"].zero_()
    assert taken == [False] * 3


def strided(t: Tensor) -> Tensor:
    return torch.stack((t, t), -1)[..., 0]


CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "strides": lambda x: {"query": strided(x["query"]), "references": strided(x["references"])},
    "views to be computed": lambda x: {"key": torch.complex(torch.zeros_like(x["key"]), -x["key"]).conj().imag},
    "zeros": lambda x: {"value": torch._efficientzerotensor(x["value"].shape)},
    "dtype": lambda x: {name: x[name].bfloat16() for name in ("query", "key", "value")},
    "numbers in tensors": lambda x: {"epsilon": torch.full((H,), 0.05)},
    "masses of references": lambda x: {"reference_log_mass": torch.randn(H, M)},
    "another width": lambda x: {"value": torch.randn(B, H, E + 1), "state": SF.empty_state(B, H, M, E + 1)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_looks_otherwise_is_answered_otherwise(change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    x = inputs()
    SF.set_step(**x), SF.set_step(**x)
    now = {**x, **change(x)}
    want, after = long_way(now)
    for _ in range(2):
        state = now["state"].clone()
        assert torch.equal(SF.set_step(**{**now, "state": state}), want)
        assert torch.equal(state, after)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "iterations": ({"num_iters": True}, TypeError, "num_iters"),
    "epsilon": ({"epsilon": "0.05"}, TypeError, "epsilon"),
    "dtype": ({"value": torch.randn(B, H, E).double()}, TypeError, "value must have the dtype of key"),
    "rows": ({"state": SF.empty_state(B + 1, H, M, E)}, ValueError, "state must have shape"),
    "gaps": ({"state": strided(SF.empty_state(B, H, M, E))}, ValueError, "state must be contiguous"),
    "sparse": ({"key": torch.randn(B, H, D).to_sparse()}, TypeError, "key must be a dense Tensor"),
    "gradient": ({"references": torch.randn(H, M, D, requires_grad=True)}, ValueError, "has no gradient"),
    "backend": ({"backend": "cuda"}, ValueError, "cuda"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD)
def test_what_looks_like_a_step_that_passed_is_still_checked(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    x = inputs()
    for _ in range(2):
        SF.set_step(**x)
        with pytest.raises(error, match=message):
            SF.set_step(**{**x, **changes})


@pytest.mark.parametrize("watcher", [Dispatched, Functions, Profiled])
def test_modes_and_profilers_see_later_tokens(watcher: Callable[[], Any]) -> None:
    x = inputs()
    SF.set_step(**x), SF.set_step(**x)
    with watcher() as watching:
        SF.set_step(**x)
    assert "setformer_kernels.set_step" in " ".join(watching.seen)


def test_subclasses_and_transforms_see_later_tokens() -> None:
    x = inputs()
    SF.set_step(**x), SF.set_step(**x)
    want, _ = long_way(x)
    Subclass.seen = ()
    found = SF.set_step(**{**x, "state": x["state"].clone(), "query": x["query"].as_subclass(Subclass)})
    assert any("set_step" in name for name in Subclass.seen)
    assert torch.equal(found.as_subclass(Tensor), want)

    states = x["state"].expand(4, *x["state"].shape).clone()

    def once(state: Tensor) -> Tensor:
        return SF.set_step(**{**x, "state": state})

    with torch.no_grad():
        assert torch.equal(torch.func.vmap(once)(states), want.expand(4, *want.shape))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_modes_are_told_apart(mode: Callable[[], Any], taken: list[bool]) -> None:
    x = inputs()
    x["references"].requires_grad_()
    with mode():
        for _ in range(3):
            assert not SF.set_step(**x).requires_grad
    assert taken == [True, True]
    with pytest.raises(ValueError, match="set_step has no gradient"):
        SF.set_step(**x)
    errors: list[BaseException] = []

    def other() -> None:  # a thread begins with gradients
        try:
            SF.set_step(**x)
        except ValueError as error:
            errors.append(error)

    with mode():
        thread = threading.Thread(target=other)
        thread.start(), thread.join()
    assert len(errors) == 1


def test_autocast_goes_its_own_way() -> None:
    x = inputs()
    SF.set_step(**x), SF.set_step(**x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert SF.set_step(**x).dtype == torch.bfloat16
    assert SF.set_step(**x).dtype == torch.float32


def test_other_backends_are_asked(monkeypatch: pytest.MonkeyPatch, taken: list[bool]) -> None:
    x = inputs()
    SF.set_step(**x), SF.set_step(**x)
    monkeypatch.setattr(dispatch, "NATIVE", dict(dispatch.NATIVE))
    SF.set_step(**x)
    assert taken == [True, False]


def test_no_tensor_is_kept_alive() -> None:
    x = inputs()
    SF.set_step(**x), SF.set_step(**x)
    alive = [weakref.ref(t) for t in x.values()]
    del x
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)


def test_what_is_known_of_steps_is_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming._repeats, "MOST", 3)
    for n in range(1, 9):
        tokens = {name: torch.randn(n, H, D) for name in ("query", "key", "value")}
        SF.set_step(SF.empty_state(n, H, M, D), **tokens, references=torch.randn(H, M, D))
    assert 0 < len(streaming._repeats._kept) <= 3


def test_threads_step_side_by_side() -> None:
    x = inputs()
    SF.set_step(**x)
    begin = [x["state"].clone() for _ in range(4)]
    want = long_way({**x, "state": begin[0].clone()})[1]
    threads = [threading.Thread(target=lambda s=s: SF.set_step(**{**x, "state": s})) for s in begin]
    [t.start() for t in threads], [t.join() for t in threads]
    assert all(torch.equal(s, want) for s in begin)
