"""Which memory Triton's kernels touch, on the interpreter: strides beyond 32 bits, reads of what nobody wrote."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks.compiled import workloads
from benchmarks.compiled.workloads import Call

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("on the interpreter, which sees every address", allow_module_level=True)

from triton.runtime import interpreter

from setformer_kernels.backends.triton import face


def calls() -> Iterator[Call]:
    """Every op in both directions, every operand that may be absent absent and present."""
    base = Call("attention", dtype=torch.float32, B=2, H=2, L=5, D=16, E=16, M=16)
    for T in (0, 1, 3):
        yield replace(base, T=T)
    for call in (replace(base, op="pool"), replace(base, op="causal", T=1), replace(base, op="features")):
        yield call
        yield replace(call, rich=True)
    yield replace(base, rich=True)
    for rich in (False, True):
        yield replace(base, op="sinkhorn", rich=rich)


def forward_calls() -> Iterator[Call]:
    """The ops of transport to convergence, which have no backward of their own."""
    base = Call("linearised", dtype=torch.float32, B=2, H=2, L=5, D=16, E=16, M=16)
    for op in ("linearised", "iterated", "linearised_costs", "started"):
        for rich in (False, True):
            yield replace(base, op=op, rich=rich)


def routes() -> Iterator[Any]:
    """All of them, Sinkhorn's by both of its routes."""
    for forward in calls():
        for call in (forward, replace(forward, backward=True)):
            yield pytest.param(call, False, id=str(call))
            if call.op == "sinkhorn":
                yield pytest.param(call, True, id=f"{call} streaming")
    for call in forward_calls():
        for streams in (False, True) if call.op == "started" else (False,):
            yield pytest.param(call, streams, id=f"{call} streaming" if streams else str(call))


@pytest.fixture
def route(streams: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sinkhorn on the route of large problems at a small size."""
    # Tensors on the CPU are not copied for the interpreter, so there is nothing to copy back; it would, all of it.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    for module in ("forward", "backward") if streams else ():
        monkeypatch.setattr(f"setformer_kernels.backends.triton.sinkhorn.{module}.resident", lambda *size: None)


every_route = pytest.mark.parametrize(("call", "streams"), list(routes()))


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors_in(part)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The value with every tensor changed, in tuples and named tuples too."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        parts = [mapped(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


class Given:
    """The backend, called with what `prepare` makes of each call's arguments; keeps the results."""

    def __init__(self, prepare: Callable[[str, tuple[Any, ...]], tuple[Any, ...]]) -> None:
        self.prepare, self.found = prepare, None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.found = getattr(face, name)(*self.prepare(name, args))
            return self.found

        return call


def filled(t: Tensor, whole: int) -> Tensor:
    """Numbers around 1; counts are `whole`."""
    generator = torch.Generator().manual_seed(t.numel())
    if not t.is_floating_point():
        return torch.full(t.shape, whole, dtype=t.dtype)
    return (0.5 + torch.rand(t.shape, generator=generator)).to(t.dtype)


class Far:
    """Copies of tensors whose rows lie gigabytes apart, in sparse files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0

    def __call__(self, t: Tensor, step: int, last: bool) -> Tensor:
        """Every dimension strides over `step` elements and more; the last one only where it is not a row's (`last`)."""
        strides, span = [], step
        sizes = t.shape if last else t.shape[:-1]
        for size in reversed(sizes):
            strides.insert(0, span)
            span *= max(size, 1)
        self.number += 1
        name = str(self.folder / str(self.number))
        room = torch.from_file(name, shared=True, size=span + t.shape[-1], dtype=t.dtype)
        return room.as_strided(t.shape, strides if last else [*strides, 1]).copy_(t)


# Strides that reach kernels in units of 16 are beyond 32 bits, in these units not; others only when multiplied.
UNITS, SINGLE = (1 << 31) + 16, (1 << 30) + 1


def far_arguments(name: str, args: tuple[Any, ...], far: Far) -> tuple[Any, ...]:
    """The arguments of an op, those that it takes by strides far apart."""

    def rows(t: Tensor) -> Tensor:
        return far(t, UNITS, last=False)

    if name == "linearised":
        l, log_a, lam_a, *rest = args
        return far(l, SINGLE, last=False), far(log_a, SINGLE, last=True), far(lam_a, SINGLE, last=True), *rest
    if name.startswith(("sinkhorn", "started")):
        x, *rest = args
        given = [x.log_a, x.log_b]
        masses = [None if t is None else far(t, SINGLE, last=True) for t in given]
        return x._replace(log_kernel=far(x.log_kernel, SINGLE, last=False), log_a=masses[0], log_b=masses[1]), *rest
    if name.startswith("features"):
        x, landmarks, *rest = args
        return rows(x), far(landmarks, SINGLE, last=False), *[rows(t) if is_tokens(t) else t for t in rest]
    x, *rest = args
    tokens = {n: rows(t) for n in ("query", "key", "value", "references") if (t := getattr(x, n)) is not None}
    single = {
        n: far(t, SINGLE, last=n == "log_a")
        for n in ("log_a", "log_b", "query_position", "key_position")
        if (t := getattr(x, n)) is not None
    }
    of_queries = name in ("attention_backward", "causal_backward")
    d_o = [rows(t) if of_queries and is_tokens(t) and t.shape == x.value.shape else t for t in rest]
    return x._replace(**tokens, **single), *d_o


def is_tokens(t: Any) -> bool:
    return isinstance(t, Tensor) and t.ndim == 4


@every_route
def test_rows_may_lie_gigabytes_apart(call: Call, streams: bool, route: None, tmp_path: Path) -> None:
    far = Far(tmp_path)

    def near_arguments(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return mapped(args, lambda t: filled(t, call.T))

    near = Given(near_arguments)
    workloads.RUN[call.op](near, call)
    distant = Given(lambda name, args: far_arguments(name, near_arguments(name, args), far))
    workloads.RUN[call.op](distant, call)
    expected, found = list(tensors_in(near.found)), list(tensors_in(distant.found))
    assert far.number > 0
    assert len(expected) == len(found) > 0
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


class Written(TorchDispatchMode):
    """Which bytes of the tensors that are made inside the block were written, by operations of torch or by kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[int, np.ndarray] = {}  # by address
        self.real = interpreter._interpreter

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if "empty" in str(function):
            storage = out.untyped_storage()
            if storage.nbytes():
                self.bytes[storage.data_ptr()] = np.zeros(storage.nbytes(), bool)
                weakref.finalize(storage, self.bytes.pop, storage.data_ptr(), None)
        else:
            for argument, value in zip(function._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self.write(value)
        return out

    def write(self, t: Tensor) -> None:
        """Marks the elements of a tensor."""
        start = t.untyped_storage().data_ptr()
        if start in self.bytes:
            size = t.element_size()
            index = np.arange(self.bytes[start].size // size)
            view = np.lib.stride_tricks.as_strided(
                index[t.storage_offset() :], t.shape, [8 * stride for stride in t.stride()]
            )
            self.bytes[start].reshape(-1, size)[view.ravel()] = True

    def whole(self, t: Tensor) -> bool:
        """Whether every byte of a result's memory was written."""
        return bool(self.bytes.get(t.untyped_storage().data_ptr(), np.ones(1)).all())

    def _places(self, pointers: np.ndarray, mask: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(The marks of an allocation in elements, which of these an access takes)."""
        at = pointers[mask].astype(np.int64)
        for start, marks in self.bytes.items():
            inside = at[(at >= start) & (at < start + marks.size)]
            if inside.size:
                yield marks[: marks.size // size * size].reshape(-1, size), (inside - start) // size

    def load(self, pointers: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: Any) -> np.ndarray:
        for marks, places in self._places(pointers, mask, np.dtype(dtype).itemsize):
            if not marks[places].all():
                raise AssertionError("reads what nobody wrote")
        return self.real.load(pointers, mask, other, dtype)

    def store(self, pointers: np.ndarray, values: np.ndarray, mask: np.ndarray) -> None:
        for marks, places in self._places(pointers, mask, values.dtype.itemsize):
            marks[places] = True
        self.real.store(pointers, values, mask)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


@every_route
def test_nothing_is_read_that_nobody_wrote(
    call: Call, streams: bool, route: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Written()
    monkeypatch.setattr(interpreter, "_interpreter", watch)
    backend = Given(lambda name, args: mapped(args, lambda t: filled(t, call.T)))
    with watch:
        workloads.RUN[call.op](backend, call)
        assert all(watch.whole(t) for t in tensors_in(backend.found))
