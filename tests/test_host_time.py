"""What a call costs before its kernels, as far as it can be counted; and that whoever has to see a call sees it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import setformer_kernels.functional as SF
from setformer_kernels import SeTAttention, arguments, dispatch
from setformer_kernels.backends.cpu import ABSENT
from setformer_kernels.ops import direct
from setformer_kernels.problem import SCALARS, Operands, Options, Problem

native_cpu = pytest.mark.skipif(bool(ABSENT), reason=ABSENT)


def tokens(grad: bool = False) -> list[Tensor]:
    shapes = ((2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 5), (3, 4, 8))
    return [torch.randn(*shape, requires_grad=grad) for shape in shapes]


def python_calls(call: Callable[[], Any]) -> int:
    """Functions written in Python that a call enters, once all is warm."""
    call()
    call()
    entered = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal entered
        entered += event == "call"

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered - 1  # the lambda itself


# Each a ratchet: what is counted today, and a few for another release of torch or Python (3.12 has no frames for list
# comprehensions).  A Python function costs a third of a microsecond and more.  When checks were made anew at each call
# and the dispatcher was crossed twice, a forward had 163 and a backward, autograd's own included, 241.
MOST_FORWARD, MOST_BACKWARD, MOST_MODULE = 40, 92, 54


@native_cpu
def test_a_forward_enters_few_python_functions() -> None:
    x = tokens()
    assert python_calls(lambda: SF.set_attention(*x)) <= MOST_FORWARD


@native_cpu
def test_a_backward_enters_few_python_functions() -> None:
    x = tokens(grad=True)
    forward = python_calls(lambda: SF.set_attention(*x))
    both = python_calls(lambda: torch.autograd.grad(SF.set_attention(*x).sum(), x))
    assert both - forward <= MOST_BACKWARD


@native_cpu
def test_a_module_call_enters_few_python_functions() -> None:
    module, x = SeTAttention(24, 3, batch_first=True, num_references=4).eval(), torch.randn(1, 5, 24)
    with torch.no_grad():
        assert python_calls(lambda: module(x, x, x, need_weights=False)) <= MOST_MODULE


@native_cpu
def test_a_backend_is_chosen_once_for_calls_that_look_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def select(problem: Problem, requested: str) -> str:
        asked.append(f"{problem.op} {problem.N} {requested}")
        return "cpu"

    monkeypatch.setattr(dispatch, "select", select)
    monkeypatch.setattr(arguments, "_passed", {})
    q, k, v, y = tokens()
    for _ in range(3):
        SF.set_attention(q, k, v, y)
    assert asked == ["attention 9 auto"]  # with the sizes that the op would ask with
    SF.set_attention(q[:, :, :5], k[:, :, :5], v[:, :, :5], y)
    SF.set_pool(k, v, y)
    assert asked[1:] == ["attention 5 auto", "pool 9 auto"]
    monkeypatch.setattr(dispatch, "NATIVE", dict(dispatch.NATIVE))  # other backends than those there were
    SF.set_attention(q, k, v, y)
    assert asked[3:] == ["attention 9 auto"]


@native_cpu
def test_a_backward_chooses_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, str]] = []

    def select(problem: Problem, requested: str) -> str:
        asked.append((problem.backward, requested))
        return "cpu"

    monkeypatch.setattr(dispatch, "select", select)
    monkeypatch.setattr(arguments, "_passed", {})
    SF.set_attention(*tokens(grad=True)).sum().backward()
    assert asked == [(False, "auto"), (True, "auto")]


def test_a_graph_holds_what_was_asked_for_and_not_what_was_chosen_here() -> None:
    q, k, v, y = tokens()
    SF.set_attention(q, k, v, y)  # chosen, and remembered

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, y: Tensor) -> Tensor:
            return SF.set_attention(q, k, v, y)

    graph = torch.export.export(Module(), (q, k, v, y)).graph
    (node,) = [n for n in graph.nodes if "setformer_kernels" in str(n.target)]
    assert node.args[-1] == "auto"


# (op, T, backward) -> (launches, functions in Python of the backend with its launches recorded).  Of attention forward:
# one launch to prepare, one for each pass over the keys, one that merges the last (whose tile is looked up apart: seven
# functions), one for the queries.
MOST_LAUNCHES = {
    ("attention", 1, False): (4, 95), ("attention", 1, True): (5, 196), ("attention", 3, False): (6, 99),
    ("attention", 3, True): (7, 200), ("causal", 1, False): (4, 94), ("causal", 1, True): (9, 208),
}  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize(("op", "T", "backward"), MOST_LAUNCHES)
def test_a_call_on_triton_takes_few_launches_and_few_python_functions(op: str, T: int, backward: bool) -> None:
    from setformer_kernels.backends.triton import face
    from setformer_kernels.backends.triton.host.launch import Device, recorded

    q, k, v = (torch.empty(1, 16, 1024, 64, dtype=torch.bfloat16) for _ in range(3))
    x, opt = Operands(q, k, v, torch.empty(16, 64, 64), *[None] * 11), Options(SCALARS, "rbf", T)
    state = (torch.empty(1, 16, 64, 64), torch.empty(1, 16, T, 64)) if op == "attention" else ()
    run: Any = getattr(face, f"{op}_backward" if backward else op)
    rest = (*state, q, [t is not None for t in x]) if backward else ()
    with recorded(Device("sm_90", 132, "tf32x3")) as taken:
        run(x, opt, *rest)
        count = len(taken)
        entered = python_calls(lambda: run(x, opt, *rest))
    launches, functions = MOST_LAUNCHES[op, T, backward]
    assert count <= launches
    assert entered <= functions, entered


class Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **kwargs or {})


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **kwargs or {})


class Profiled(AbstractContextManager[Any]):
    def __enter__(self) -> Profiled:
        self.profile = torch.autograd.profiler.profile()
        self.profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.profile.__exit__(*error)
        self.seen = [event.name.replace("::", ".") for event in self.profile.function_events]


class Subclass(Tensor):
    seen: tuple[str, ...] = ()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Subclass.seen += (str(func),)
        return super().__torch_function__(func, types, args, kwargs or {})


@native_cpu
@pytest.mark.parametrize("watcher", [Dispatched, Functions, Profiled])
@pytest.mark.parametrize("grad", [False, True])
def test_modes_and_profilers_see_the_ops(watcher: Callable[[], Any], grad: bool) -> None:
    x = tokens(grad)
    with watcher() as watching:
        output = SF.set_attention(*x)
        if grad:
            output.sum().backward()
    seen = " ".join(watching.seen)
    assert "setformer_kernels.set_attention" in seen
    assert ("setformer_kernels.set_attention_backward" in seen) == (grad and watcher is not Functions)


@native_cpu
def test_subclasses_of_tensors_see_the_op() -> None:
    q, *others = tokens()
    wanted = SF.set_attention(q, *others)
    Subclass.seen = ()
    found = SF.set_attention(q.as_subclass(Subclass), *others)
    assert any("setformer_kernels.set_attention" in name for name in Subclass.seen)
    assert torch.equal(found.as_subclass(Tensor), wanted)


@native_cpu
def test_views_that_are_yet_to_be_computed_are_computed() -> None:
    q, k, v, y = tokens()
    negated = torch.complex(torch.zeros_like(q), -q).conj().imag
    assert negated.is_neg()
    assert torch.equal(SF.set_attention(negated, k, v, y), SF.set_attention(q, k, v, y))
    zeros = torch._efficientzerotensor(q.shape)
    assert torch.equal(SF.set_attention(zeros, k, v, y), SF.set_attention(torch.zeros_like(q), k, v, y))


@native_cpu
def test_tensors_that_outlive_their_transform_are_unwrapped() -> None:
    q, k, v, y = tokens()
    kept = []

    def f(x: Tensor) -> Tensor:
        kept.append(x * 1)
        return x.sum()

    torch.func.grad(f)(q)
    assert torch.equal(SF.set_attention(kept[0], k, v, y), SF.set_attention(q, k, v, y))


@native_cpu
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_a_plain_call_is_seen_by_nobody(mode: Callable[[], AbstractContextManager[Any]]) -> None:
    x = tokens()
    with mode():
        assert direct.unwatched(x)
        assert direct.unwatched([*tokens(), None, torch.nn.Parameter(x[0])])
    assert not direct.unwatched([torch.empty(2, device="meta")])


GOOD: dict[str, Any] = {"num_iters": 1, "epsilon": 1.0, "dropout_p": 0.0, "kernel": "rbf"}


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"num_iters": 1.0}, TypeError, "num_iters"),
        ({"num_iters": True}, TypeError, "num_iters"),
        ({"epsilon": True}, TypeError, "epsilon"),
        ({"epsilon": "1.0"}, TypeError, "epsilon"),
        ({"kernel": ["rbf"]}, ValueError, "kernel"),
        ({"dropout_p": False}, TypeError, "dropout_p"),
        ({"num_iters": torch.tensor(-1)}, ValueError, "num_iters"),
        ({"key_mask": torch.ones(2, 8)}, ValueError, "key_mask"),
    ],
)
def test_what_looks_like_a_call_that_passed_is_still_checked(
    changes: dict[str, Any], error: type[Exception], match: str
) -> None:
    x = tokens()
    SF.set_attention(*x, **GOOD)
    for _ in range(2):
        with pytest.raises(error, match=match):
            SF.set_attention(*x, **{**GOOD, **changes})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("at", range(4))
def test_other_tensors_than_those_of_a_call_that_passed_are_checked(at: int) -> None:
    x = tokens()
    SF.set_attention(*x)
    nested = torch.nested.nested_tensor([torch.randn(3, 4)])
    for wrong in (x[at][..., :3], x[at].to(torch.int64), x[at].to_sparse(), x[at][0], nested, x[at].tolist()):
        others = [*x[:at], wrong, *x[at + 1 :]]
        if at == 2 and isinstance(wrong, Tensor) and not wrong.is_nested and wrong.shape == (2, 3, 9, 3):
            assert SF.set_attention(*others).shape == (2, 3, 7, 3)  # any width of the values will do
            continue
        for _ in range(2):
            with pytest.raises((ValueError, TypeError)):
                SF.set_attention(*others)


def test_checked_calls_are_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "MOST_PASSED", 3)
    _, k, v, y = tokens()
    for length in range(1, 9):
        SF.set_attention(torch.randn(2, 3, length, 8), k, v, y)
    assert len(arguments._passed) <= 3
