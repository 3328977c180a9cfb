"""A causal scan of a sequence whose tokens lie on several ranks, with states before and after: as if on one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ranks_helpers import Sharded
from torch import Tensor

import setformer_kernels.functional as SF
from setformer_kernels.distributed import Ranks, build_cp_context
from setformer_kernels.testing import ALL_CASES, CASES, measure

NAMES = [case.name for case in CASES if case.options.get("causal") and case.name != "causal_long"]
FEW = {"triton": ("causal_tensors",), "eager": ("causal_t1", "causal_tensors")}
B, H, N, M, D, E = 2, 2, 26, 5, 8, 6


def skip_most(native: str, dtype: torch.dtype, name: str) -> None:
    if native in FEW and (dtype != torch.float32 or name not in FEW[native]):
        pytest.skip("on a stand-in other cases stand for this one")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_scans_of_ranks_are_one_scan_within_the_error_budget(name: str, dtype: torch.dtype, native: str) -> None:
    skip_most(native, dtype, name)
    layout = "zigzag" if name in ("causal_mask", "causal_dropout", "causal_tensors") else "contiguous"
    call = Sharded(SF.set_attention, 3, layout)
    measure.attention(ALL_CASES[name], dtype, native, function=call).check(name)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_a_long_scan_keeps_the_budget(layout: str) -> None:
    call = Sharded(SF.set_attention, 8, layout)
    measure.attention(ALL_CASES["causal_long"], torch.float32, "cpu", function=call).check(layout)


def arguments(T: int, gates: bool, state: bool, grouped: int) -> dict[str, Any]:
    """Everything that a scan takes."""
    mask = torch.randn(B, H, N)
    mask[0, :, 4:9] = -math.inf
    given: dict[str, Any] = {
        "query": torch.randn(B, H * grouped, N, D), "key": torch.randn(B, N, H, D).transpose(1, 2),
        "value": torch.randn(B, H, N, E), "references": torch.randn(H, M, D), "key_mask": mask,
        "reference_log_mass": torch.randn(H, M), "epsilon": torch.rand(H) + 0.1,
        "key_relaxation": torch.rand(H), "reference_relaxation": torch.rand(H), "position_scale": torch.rand(H),
        "query_position": torch.randn(N, 2), "key_position": torch.randn(N, 2),
        "reference_position": torch.randn(H, M, 2),
    }  # fmt: skip
    if gates:
        given["log_decay"] = -torch.rand(B, H, N)
    if state:
        tokens = (torch.randn(B, H, 7, n) for n in (D, D, E))
        kept = SF.set_causal(*tokens, given["references"], num_iters=T, output_final_state=True)[1]
        assert kept is not None
        given["initial_state"] = kept.detach()
    fixed = ("query_position", "key_position")
    return {name: t.double().requires_grad_(name not in fixed) for name, t in given.items()}


def with_invariants(wanted: bool, **given: Any) -> Tensor:
    """o plus a number made of z and log C of the final state, which is the same on every rank."""
    o, state = SF.set_causal(**given, output_final_state=wanted)
    if state is None:
        return o
    e = state.shape[-1] // 2
    total = state[..., :e] + state[..., e : 2 * e]
    found = torch.cat((total[..., :-1] / total[..., -1:], total[..., -1:].log()), -1)
    return o + found.sum() / N


@pytest.mark.parametrize(("gates", "state"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("T", [0, 1])
@pytest.mark.parametrize(("ranks", "layout"), [(1, "contiguous"), (4, "contiguous"), (3, "zigzag")])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_argument_of_a_scan_in_float64(
    backend: str, ranks: int, layout: str, T: int, gates: bool, state: bool
) -> None:  # fmt: skip
    given = arguments(T, gates, state, grouped=2)
    options: dict[str, Any] = {"num_iters": T}
    if gates:
        options |= {"dropout_p": 0.2, "seed": torch.tensor(5)}
    call = Sharded(lambda **given: with_invariants(state, **given), ranks, layout)
    wanted = with_invariants(state, **given, **options, backend="reference")
    found = call(**given, **options, backend=backend)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    cotangent, leaves = torch.randn_like(wanted), {n: t for n, t in given.items() if t.requires_grad}
    grads = [
        torch.autograd.grad(o, [*leaves.values()], cotangent, allow_unused=True, materialize_grads=True)
        for o in (found, wanted)
    ]
    for name, one, other in zip(leaves, *grads, strict=True):
        if name == "initial_state":  # N' and C' are what rounding took, and k a scale
            one, other = one[..., : E + 1], other[..., : E + 1]
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("layout", "pieces"), [("contiguous", 1), ("zigzag", 2)])
@pytest.mark.parametrize("gated", [False, True])
def test_a_scan_sends_one_state_each_way(gated: bool, layout: str, pieces: int) -> None:
    """M(E + 1) numbers a head and piece, whatever the length; four more forward with gates."""
    for length in (8, 80):
        ranks = Ranks(3)
        y = torch.randn(H, M, D)

        def live(group: Any, length: int = length, y: Tensor = y) -> None:
            context = build_cp_context(group=group, layout=layout)
            q, k, v = (torch.randn(B, H, length, n, requires_grad=True) for n in (D, D, E))
            decay = -torch.rand(B, H, length) if gated else None
            o, _ = SF.set_causal(q, k, v, y, log_decay=decay, cp_context=context, backend="cpu")
            o.sum().backward()

        ranks.run(live)
        state = 4 * B * H * M * (E + 1) * pieces
        assert ranks.sent == [state + 4 * B * H * 4 * pieces * gated, state]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pieces_over_ranks_go_on_from_the_state_that_ranks_left(dtype: torch.dtype) -> None:
    """Two calls over ranks, one after the other, and a single token after them, are one call on one rank."""
    q, k, v = (torch.randn(1, H, 61, n, dtype=dtype) for n in (D, D, E))
    y, decay = torch.randn(H, M, D), -torch.rand(1, H, 61) / 8

    def live(group: Any) -> tuple[Tensor, Tensor]:
        context, state = build_cp_context(group=group), None
        for first in (0, 30):
            mine = slice(first + 10 * group.rank, first + 10 * group.rank + 10)
            o, state = SF.set_causal(
                q[:, :, mine], k[:, :, mine], v[:, :, mine], y, log_decay=decay[:, :, mine], initial_state=state,
                output_final_state=True, cp_context=context, backend="cpu",
            )  # fmt: skip
        assert state is not None
        return o, state

    found = Ranks(3).run(live)
    assert all(torch.equal(state, found[0][1]) for _, state in found)
    wanted, _ = SF.set_causal(q, k, v, y, log_decay=decay, backend="reference")
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(torch.cat([o for o, _ in found], 2), wanted[:, :, 30:60], **tolerance)
    state = found[0][1]
    o = SF.set_step(state, q[:, :, 60], k[:, :, 60], v[:, :, 60], y, log_decay=decay[:, :, 60], backend="cpu")
    torch.testing.assert_close(o, wanted[:, :, 60], **tolerance)


def test_what_a_scan_over_ranks_refuses_on_every_rank() -> None:
    def call(group: Any, function: Any, **options: Any) -> None:
        q, k, v = (torch.randn(1, H, 4, n) for n in (D, D, E))
        function(q, k, v, torch.ones(H, M, D), cp_context=build_cp_context(group=group), **options)

    state = torch.zeros(1, H, M, 2 * E + 3)
    cases: list[tuple[str, Any, Any]] = [
        ("num_iters", SF.set_attention, lambda r: {"causal": True, "num_iters": 2}),
        ("num_iters", SF.set_causal, lambda r: {"num_iters": 2}),
        ("initial_state", SF.set_causal, lambda r: {"initial_state": state[..., r:]}),
        ("initial_state", SF.set_causal, lambda r: {"initial_state": (None, state)[r]}),
        ("log_decay", SF.set_causal, lambda r: {"log_decay": torch.ones(1, H, 4) * (2 * r - 1)}),
        ("causal", SF.set_attention, lambda r: {"causal": r == 0}),
    ]
    for name, function, options in cases:
        errors = Ranks(2).run(
            lambda group, f=function, o=options: call(group, f, **o(group.rank)), raising=False
        )  # fmt: skip
        for error in errors:
            assert type(error) is ValueError, errors
            assert name in str(error), errors


@pytest.mark.exhaustive
def test_a_scan_over_ranks_is_one_graph() -> None:
    context = build_cp_context(group=Ranks(1).members[0])
    y = torch.randn(H, M, D, requires_grad=True)

    def call(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> tuple[Tensor, Tensor | None]:
        return SF.set_causal(q, k, v, y, log_decay=decay, output_final_state=True, cp_context=context, backend="cpu")

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (30, 41):
        q, k, v = (torch.randn(B, H, n, e, requires_grad=True) for e in (D, D, E))
        decay = -torch.rand(B, H, n)
        results = [f(q, k, v, decay) for f in (call, compiled)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(o.square().sum(), [q, k, v, y]) for o, _ in results))
