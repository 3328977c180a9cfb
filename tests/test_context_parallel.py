"""Attention and pooling of a sequence whose tokens lie on several ranks: as if they lay on one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from ranks_helpers import Sharded, rows_of, uneven
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import setformer_kernels.functional as SF
from setformer_kernels.arguments import normalise
from setformer_kernels.distributed import Ranks, build_cp_context
from setformer_kernels.distributed.places import starts
from setformer_kernels.problem import SCALARS
from setformer_kernels.testing import CASES, Case, assert_typically_within_budget, measure
from setformer_kernels.testing.cases import make

PLAIN = {case.name: case for case in CASES if not case.options.get("causal")}
LONG = ("length_1000", "many_references", "wide", "medium", "length_63")
NAMES = [name for name in PLAIN if name not in LONG]
FEW = {"triton": ("tensors",), "eager": ("plain", "tensors", "no_key")}  # on stand-ins
B, H, N, M, D, E = 2, 3, 22, 5, 8, 6


def skip_most(native: str, dtype: torch.dtype, name: str, ranks: int) -> None:
    if native in FEW and (dtype != torch.float32 or name not in FEW[native] or ranks > 3):
        pytest.skip("on a stand-in other cases stand for this one")


def check(case: Case, dtype: torch.dtype, native: str, call: Sharded) -> None:
    measure.attention(case, dtype, native, function=call).check(case.name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_ranks_are_one_rank_within_the_error_budget(name: str, dtype: torch.dtype, native: str) -> None:
    skip_most(native, dtype, name, 3)
    if dtype in (torch.float64, torch.float16) and name not in FEW["eager"]:
        pytest.skip("other dtypes, and all arguments in float64, stand for this one")
    check(PLAIN[name], dtype, native, Sharded(SF.set_attention, 3))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("name", ["plain", "dropout", "tensors"])
def test_any_number_of_ranks_in_both_layouts(name: str, ranks: int, layout: str, native: str) -> None:
    skip_most(native, torch.float32, name, ranks)
    if native == "triton" and (ranks, layout) != (2, "zigzag"):
        pytest.skip("on a stand-in another case stands for this one")
    case = PLAIN[name]
    even = Case(name, S=96, L=66, P=case.P, mask=case.mask, tensors=case.tensors, options=case.options)
    tokens, keywords = make(even)
    cotangent = torch.randn(even.B, even.H, even.L, even.E, dtype=torch.float64)
    call = Sharded(SF.set_attention, ranks, layout)

    def function(backend: str, **given: Any) -> Tensor:
        return SF.set_attention(**given, backend=backend) if backend == "reference" else call(**given, backend=backend)

    measure.beside(function, tokens | keywords, torch.float32, cotangent, native).check(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["log_mass", "tensors"])
def test_small_gradients_of_ranks_within_the_error_budget(name: str, dtype: torch.dtype) -> None:
    call = Sharded(SF.set_attention, 3)

    def function(backend: str, **given: Any) -> Tensor:
        return (SF.set_attention if backend == "reference" else call)(**given, backend=backend)

    found = measure.small_gradients(PLAIN[name], dtype, "cpu", draws=2, function=function)
    assert_typically_within_budget(*found, name)


def arguments(dtype: torch.dtype = torch.float64, grouped: int = 1) -> dict[str, Any]:
    """Everything that a call takes, as many queries as keys."""
    mask = torch.randn(B, N, dtype=dtype)
    mask[0, 4:9] = -math.inf
    given: dict[str, Any] = {
        "query": torch.randn(B, H * grouped, N, D), "key": torch.randn(B, N, H, D).transpose(1, 2),
        "value": torch.randn(B, H, N, E), "references": torch.randn(H, M, D), "key_mask": mask,
        "reference_log_mass": torch.randn(H, M), "epsilon": torch.rand(H) + 0.1, "bandwidth": torch.rand(H) + 0.5,
        "key_relaxation": torch.rand(H), "reference_relaxation": torch.rand(H), "position_scale": torch.rand(H),
        "query_position": torch.randn(N, 2), "key_position": torch.randn(N, 2),
        "reference_position": torch.randn(H, M, 2),
    }  # fmt: skip
    fixed = ("query_position", "key_position")
    return {name: t.to(dtype).requires_grad_(name not in fixed) for name, t in given.items()}


def compared(function: Any, call: Sharded, given: dict[str, Any], options: dict[str, Any], backend: str) -> None:
    """Results and gradients of ranks are those of the reference on one, in float64."""
    leaves = [t for t in given.values() if t.requires_grad]
    wanted = function(**given, **options, backend="reference")
    found = call(**given, **options, backend=backend)
    cotangent = torch.randn_like(wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(o, leaves, cotangent, allow_unused=True, materialize_grads=True)
             for o in (found, wanted)]  # fmt: skip
    for name, one, other in zip((n for n, t in given.items() if t.requires_grad), *grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("T", [0, 1, 2, 6])
@pytest.mark.parametrize("ranks", [1, 4, 8])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_argument_at_once_in_float64(backend: str, ranks: int, T: int) -> None:
    given = arguments(grouped=2)
    options = {"num_iters": T, "dropout_p": 0.2, "seed": torch.tensor(3)}
    layout = "zigzag" if ranks == 4 else "contiguous"
    compared(SF.set_attention, Sharded(SF.set_attention, ranks, layout), given, options, backend)


@pytest.mark.parametrize("T", [0, 1, 3])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_pooling_is_that_of_the_keys_of_all_ranks(backend: str, T: int) -> None:
    given = {n: t for n, t in arguments().items() if not n.startswith("query")}
    call = Sharded(SF.set_pool, 4, replicated=True)
    compared(SF.set_pool, call, given, {"num_iters": T}, backend)
    memory = call.ranks.run(
        lambda group: SF.set_transport(
            **{n: call.cut(n, t, group.rank) for n, t in given.items()},
            num_iters=T, backend=backend, cp_context=build_cp_context(group=group),
        )
    )  # fmt: skip
    whole = SF.set_transport(**given, num_iters=T, backend="reference")
    shifts = memory[0].g - whole.g  # masses that nobody normalised: a constant of all references
    torch.testing.assert_close(memory[0].z, whole.z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shifts, shifts[..., :1].expand_as(shifts), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("T", [0, 1, 3])
@pytest.mark.parametrize("length", [16, 160])
def test_what_is_sent_does_not_depend_on_the_length(length: int, T: int) -> None:
    """max(T, 1) collectives of M(T + E) numbers a head each way, T = 0: M(1 + E)."""
    ranks = Ranks(4)
    y = torch.randn(H, M, D)

    def live(group: Any) -> None:
        q, k, v = (torch.randn(B, H, length, n, requires_grad=True) for n in (D, D, E))
        SF.set_attention(q, k, v, y, num_iters=T, backend="cpu",
                         cp_context=build_cp_context(group=group)).sum().backward()  # fmt: skip

    ranks.run(live)
    one, last = 4 * B * H * M, 4 * B * H * M * (1 + E)
    there = [one] * (T - 1) + [last]
    assert ranks.sent == there + there[::-1]
    assert sum(there) == 4 * B * H * M * (max(T, 1) + E)


def test_all_ranks_hold_the_same_bits_and_repeat_them() -> None:
    given = arguments(torch.float32)
    calls = [Sharded(SF.set_pool, 3, replicated=True) for _ in range(2)]  # which compares the ranks
    keys = {n: t for n, t in given.items() if not n.startswith("query")}
    assert torch.equal(*(call(**keys, num_iters=3, backend="cpu") for call in calls))


def test_second_derivatives_of_the_reference() -> None:
    """A penalty on gradients, as one rank and as three have it."""
    given = {n: t for n, t in arguments().items() if n in ("query", "key", "value", "references", "key_mask")}

    def penalty(context: Any, **tensors: Tensor) -> Tensor:
        o = SF.set_attention(**tensors, num_iters=2, backend="reference", cp_context=context)
        keys = tensors["key"]
        return torch.autograd.grad(o.square().sum(), keys, create_graph=True)[0].square().sum()

    leaves = list(given.values())
    wanted = torch.autograd.grad(penalty(None, **given), leaves)
    call = Sharded(SF.set_attention, 3)
    call.plan(given)

    def live(group: Any) -> list[Tensor]:
        own = {n: call.cut(n, t, group.rank).requires_grad_() for n, t in given.items()}
        loss = penalty(build_cp_context(group=group), **own)
        return list(torch.autograd.grad(loss, list(own.values()), allow_unused=True, materialize_grads=True))

    parts = call.ranks.run(live)
    for i, name in enumerate(given):
        torch.testing.assert_close(call.joined(name, [p[i] for p in parts]), wanted[i], rtol=1e-9, atol=1e-11)


def test_kernels_refuse_second_derivatives() -> None:
    q, k, v, y = (torch.randn(*s, requires_grad=True) for s in ((1, H, 4, D), (1, H, 4, D), (1, H, 4, E), (H, M, D)))
    context = build_cp_context(group=Ranks(1).members[0])
    o = SF.set_attention(q, k, v, y, backend="cpu", cp_context=context)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.grad(torch.autograd.grad(o.sum(), k, create_graph=True)[0].sum(), y)


def test_no_batch_and_no_token() -> None:
    context = build_cp_context(group=Ranks(1).members[0])
    for b, n in ((0, 4), (2, 0)):
        q, k, v = (torch.randn(b, H, n, e, requires_grad=True) for e in (D, D, E))
        for backend in ("cpu", "reference"):
            o = SF.set_attention(q, k, v, torch.randn(H, M, D), cp_context=context, backend=backend)
            o.sum().backward()
            assert o.shape == (b, H, n, E)
            assert k.grad is not None
            assert not k.grad.any()


def test_the_ops_are_what_torch_library_wants() -> None:
    group = Ranks(1).members[0]
    x = normalise(
        None, torch.randn(B, H, 9, D, requires_grad=True), torch.randn(B, H, 9, E), torch.randn(H, M, D), SCALARS,
        torch.randn(B, 9), None, None, None, None, kernel="rbf", num_iters=1, dropout_p=0.0, seed=None, backend="cpu",
    )[0]  # fmt: skip
    constants = (list(SCALARS), "rbf", 1, 0.0, "cpu", 0.5, True)
    ops = torch.ops.setformer_kernels
    g, z = torch.randn(B, H, M, requires_grad=True), torch.randn(B, H, M, E, requires_grad=True)
    checked = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.set_pass.default, (*x, g, *constants), test_utils=checked)
    torch.library.opcheck(ops.set_merge.default, (z, g, group.name, [], "cpu"), test_utils=checked)
    own = torch.randn(B, H, M * (E + 1))
    form = (M, E, 1, False, 0.0, [], [], True)
    torch.library.opcheck(ops.set_prefix.default, (own, None, *form, group.name, "cpu"), test_utils=checked)


@pytest.mark.exhaustive
def test_one_graph_serves_every_length() -> None:
    context = build_cp_context(group=Ranks(1).members[0])
    y = torch.randn(H, M, D, requires_grad=True)

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return SF.set_attention(q, k, v, y, num_iters=2, key_mask=mask, cp_context=context, backend="cpu")

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    graphs = set()
    for n in (30, 41, 52):
        q, k, v = (torch.randn(B, H, n, e, requires_grad=True) for e in (D, D, E))
        results = [f(q, k, v, torch.randn(B, n).zero_()) for f in (call, compiled)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(o.square().sum(), [q, k, v, y]) for o in results))
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


def refused(function: Any, kind: type = ValueError) -> list[str]:
    """What each rank is told of a bad call, all of which end."""
    errors = Ranks(2).run(function, raising=False)
    assert all(type(error) is kind for error in errors), errors
    return [str(error) for error in errors]


def call_of(group: Any, context: Any = None, n: int = 4, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    context = build_cp_context(group=group) if context is None else context
    q, k, v = (torch.randn(1, H, n, e, dtype=dtype) for e in (D, D, E))
    return SF.set_attention(q, k, v, torch.ones(H, M, D), cp_context=context, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("num_iters", lambda r: {"num_iters": 1 + r}), ("key", lambda r: {"dtype": (torch.float32, torch.float64)[r]}),
        ("epsilon", lambda r: {"epsilon": 0.1 * (1 + r)}), ("dropout_p", lambda r: {"dropout_p": 0.1 * r}),
        ("epsilon", lambda r: {"epsilon": (0.1, -1.0)[r]}), ("attn_mask", lambda r: {"attn_mask": torch.ones(4, 4)}),
        ("tol", lambda r: {"tol": (None, 1e-3)[r]}),
    ],
)  # fmt: skip
def test_ranks_that_disagree_are_told_all_alike(name: str, options: Any) -> None:
    """On the first rank as on the second, and with the ranks and values where two differ."""
    for message in refused(lambda group: call_of(group, **options(group.rank))):
        assert name in message


def test_a_wrong_type_on_one_rank_is_one_on_all() -> None:
    for message in refused(lambda group: call_of(group, seed=(None, 3)[group.rank], dropout_p=0.1), TypeError):
        assert "seed must be an int64 scalar Tensor" in message


def test_lengths_that_are_not_those_of_the_context() -> None:
    def live(group: Any) -> None:
        context = build_cp_context(group=group, lengths=(4, 5))
        call_of(group, context, n=4)  # right on the first rank only

    first, second = refused(live)
    assert "query must have the 5 tokens that lengths of the cp_context has for rank 1, got 4" in second
    assert second in first


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("layout", lambda r: {"layout": ("contiguous", "zigzag")[r]}), ("layout", lambda r: {"layout": "round"}),
        ("lengths", lambda r: {"lengths": (4, 4 + r)}), ("lengths", lambda r: {"lengths": (4, 4, 4)}),
        ("lengths", lambda r: {"lengths": (4, 5), "layout": "zigzag"}), ("lengths", lambda r: {"lengths": (4, -1)}),
        ("lengths", lambda r: {"cu_seqlens": torch.tensor([0, 3, 7])}),
        ("lengths", lambda r: {"cu_seqlens": torch.tensor([0, 3, 8]), "lengths": (4, 5)}),
        ("cu_seqlens", lambda r: {"cu_seqlens": torch.tensor([0, 3 + r, 8])}),
        ("cu_seqlens", lambda r: {"cu_seqlens": torch.tensor([0, 9, 8])}),
    ],
)  # fmt: skip
def test_a_bad_context_is_refused_on_every_rank(name: str, options: Any) -> None:
    for message in refused(lambda group: build_cp_context(group=group, **options(group.rank))):
        assert name in message


def test_generators_that_differ_are_named() -> None:
    def live(group: Any) -> None:
        torch.manual_seed(group.rank)
        build_cp_context(group=group)

    assert all("seed must be the same on all ranks" in message for message in refused(live))


def test_what_goes_without_a_context() -> None:
    context = build_cp_context(group=Ranks(1).members[0])
    given = {"tol": 1e-3, "grad": "implicit", "return_info": True, "method": "newton"}
    for name, value in given.items():
        with pytest.raises(ValueError, match=f"{name} goes without cp_context"):
            call_of(None, context, **{name: value})
    assert call_of(None, context, return_info=np.False_).shape == (1, H, 4, E)
    with pytest.raises(TypeError, match="cp_context must be what"):
        call_of(None, object())
    for group in (None, 3):
        with pytest.raises(ValueError, match="group must be"):
            build_cp_context(group=group)


def test_a_rank_that_ends_ends_the_others() -> None:
    def live(group: Any) -> None:
        context = build_cp_context(group=group)
        if group.rank == 1:
            raise KeyError("gone")
        call_of(group, context)

    first, second, third = Ranks(3).run(live, raising=False)
    assert isinstance(second, KeyError)
    for error in (first, third):
        assert "rank 1 ended" in str(error)


def test_zigzag_holds_the_parts_from_both_ends() -> None:
    assert starts((4, 4)) == [(0, 6), (2, 4)]
    rows = rows_of([2, 6, 0], "zigzag")
    assert rows[0].tolist() == [0, 7]
    assert rows[1].tolist() == [1, 2, 3, 4, 5, 6]
    assert sorted(torch.cat(rows_of(uneven(30, 4, 2), "zigzag")).tolist()) == list(range(30))
