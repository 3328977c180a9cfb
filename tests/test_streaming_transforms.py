"""Calls with states under what PyTorch does to calls: compiled, exported, mapped, cast, counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import setformer_kernels.functional as SF

B, H, M, D, E, N = 2, 3, 5, 8, 6, 3
Call = Callable[..., Any]


def causal(backend: str = "auto") -> Call:
    def call(q: Tensor, k: Tensor, v: Tensor, y: Tensor, decay: Tensor, state: Tensor) -> Any:
        return SF.set_causal(
            q, k, v, y, log_decay=decay, initial_state=state, output_final_state=True, backend=backend
        )  # fmt: skip

    return call


def packed(backend: str = "auto") -> Call:
    """Tokens [1, H, T, C] of two segments of equal lengths and an empty one between them."""

    def call(q: Tensor, k: Tensor, v: Tensor, y: Tensor, decay: Tensor, state: Tensor) -> Any:
        rows = (t.squeeze(0).transpose(0, 1) for t in (q, k, v))
        n = q.shape[2]
        cu = n // 2 * torch.tensor([0, 1, 1, 2])
        return SF.set_attention_varlen(
            *rows, y, cu, causal=True, log_decay=decay.squeeze(0).mT, initial_state=state, output_final_state=True,
            backend=backend,
        )  # fmt: skip

    return call


def step(backend: str = "auto") -> Call:
    """The last token; the states are not those of the caller."""

    def call(q: Tensor, k: Tensor, v: Tensor, y: Tensor, decay: Tensor, state: Tensor) -> Any:
        after = state.clone()
        o = SF.set_step(after, *(t[:, :, -1] for t in (q, k, v)), y, log_decay=decay[:, :, -1], backend=backend)
        return o, after

    return call


CALLS = {"causal": causal, "packed": packed, "step": step}


def inputs(name: str, n: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v, y, gates and states with keys in them."""
    b, states = (1, N) if name == "packed" else (B, B)
    x = [torch.randn(b, H, n, c, dtype=dtype) for c in (D, D, E)]
    y, decay = torch.randn(H, M, D, dtype=dtype), -torch.rand(b, H, n, dtype=dtype)
    past = (torch.randn(states, H, 9, c, dtype=dtype) for c in (D, D, E))
    state = SF.set_causal(*past, y, output_final_state=True, backend="reference")[1]
    assert state is not None
    return [*x, y, decay, state]


def not_again(native: str) -> None:
    if native == "triton":
        pytest.skip("how an op is traced and mapped is the same on every backend; a minute on the interpreter")


def graded(name: str) -> bool:
    return name != "step"


@pytest.mark.parametrize("name", CALLS)
def test_one_graph_serves_every_length_of_states(name: str, native: str) -> None:
    not_again(native)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    f = CALLS[name](native)
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    for n in (14, 70):  # no size of anything else
        x = inputs(name, n)
        leaves = [t.requires_grad_() for t in x] if graded(name) else x
        found, wanted = compiled(*leaves), f(*leaves)
        torch.testing.assert_close(found, wanted)
        if graded(name):
            grads = [torch.autograd.grad([t.square().sum() for t in out], leaves) for out in (found, wanted)]
            torch.testing.assert_close(*grads)
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_export_of_states_with_a_dynamic_length(name: str, strict: bool) -> None:
    class Module(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, y: Tensor, decay: Tensor, state: Tensor) -> Any:
            return CALLS[name]()(q, k, v, y, decay, state)

    at = {2: torch.export.Dim.DYNAMIC}
    shapes = {"q": at, "k": at, "v": at, "y": None, "decay": at, "state": None}
    program = torch.export.export(Module(), tuple(inputs(name)), dynamic_shapes=shapes, strict=strict)
    for n in (4, 40):
        other = inputs(name, n)
        torch.testing.assert_close(program.module()(*other), Module()(*other))


def test_a_compiled_step_writes_the_states_of_its_caller(native: str) -> None:
    def decode(state: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor) -> Tensor:
        return torch.stack([SF.set_step(state, q, k, v, y, backend=native) for _ in range(3)])

    q, k, v, y, _, state = inputs("step", 1)
    now, other = [t.squeeze(2) for t in (q, k, v)], state.clone()
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(state, *now, y), decode(other, *now, y))
    assert torch.equal(state, other)


@pytest.mark.parametrize("name", ["causal", "packed"])
@pytest.mark.parametrize("dims", [(0, 0, 0, None, 0, 0), (None, 1, None, 0, None, None), (None,) * 5 + (1,)], ids=str)
def test_vmap_and_vmap_of_grad_of_states(name: str, dims: tuple[int | None, ...], native: str) -> None:
    not_again(native)
    f = CALLS[name](native)
    own = [
        t if d is None else torch.stack([t, t * (1 - 0.1 * torch.rand_like(t)), t], d)
        for t, d in zip(inputs(name), dims, strict=True)
    ]

    def loss(*t: Tensor) -> Tensor:
        o, state = f(*t)
        return o.square().sum() + state[..., : E + 1].square().sum()

    for function in (f, torch.func.grad(loss, argnums=tuple(range(6)))):
        found = torch.vmap(function, in_dims=dims)(*own)
        rows = [
            function(*(t if d is None else t.select(d, i) for t, d in zip(own, dims, strict=True))) for i in range(3)
        ]
        torch.testing.assert_close(tuple(found), tuple(map(torch.stack, zip(*rows, strict=True))))


def test_vmap_of_a_step_writes_each_ones_states(native: str) -> None:
    not_again(native)
    q, k, v, y, _, state = inputs("step", 1)
    rows = torch.tensor([1, -1], dtype=torch.int32)
    tokens = [torch.stack([t, 2 * t], 1) for t in (q[:, :, 0], k[:, :, 0], v[:, :, 0])]
    states = torch.stack([state, state.flip(0)])
    each = states.clone().unbind()

    def call(state: Tensor, *now: Tensor) -> Tensor:
        return SF.set_step(state, *now, y, state_indices=rows, backend=native)

    found = torch.vmap(call, in_dims=(0, 1, 1, 1))(states, *tokens)
    for i, own in enumerate(each):
        assert torch.equal(found[i], call(own, *(t[:, i] for t in tokens)))
        assert torch.equal(states[i], own)
    with pytest.raises(ValueError, match="state must be mapped"):
        torch.vmap(lambda q, k, v: SF.set_step(state, q, k, v, y, backend=native), in_dims=1)(*tokens)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("by", ["native", "reference"])
def test_autocast_keeps_states_in_float32(name: str, by: str, native: str) -> None:
    """Tokens are cast, sums are not narrowed."""
    f, x = CALLS[name](native if by == "native" else by), inputs(name)
    with torch.autocast("cpu", torch.bfloat16):
        o, state = f(*x)
    assert o.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    wanted, after = f(*(t.bfloat16() for t in x[:3]), *x[3:])
    assert torch.equal(o, wanted)
    assert torch.equal(state, after)


@pytest.mark.parametrize("name", CALLS)
def test_flops_of_states_count_products(name: str, native: str) -> None:
    x, n = inputs(name), 16
    b, n = {"causal": (B, n), "packed": (1, n), "step": (B, 1)}[name]
    leaves = [t.requires_grad_() for t in x] if graded(name) else x
    with FlopCounterMode(display=False) as counter:
        o, state = CALLS[name](native)(*leaves)
        if graded(name):
            (o.sum() + state.sum()).backward()
    per = 2 * b * H * M * 2 * n
    assert counter.get_total_flops() == per * (D + E) + (per * (3 * D + 2 * E) if graded(name) else 0)
