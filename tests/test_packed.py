"""Packed batches: a segment is answered as if it were alone, whatever stands beside it and behind it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import setformer_kernels.functional as SF
from setformer_kernels.testing import assert_within_budget, measure

OP = "packed"
H, M, D, E, P = 3, 7, 16, 8, 2
LENGTHS = (5, 0, 100, 1, 37, 0)  # of keys
QUERIES = (3, 4, 60, 0, 37, 0)
FEW, FEW_QUERIES = (20, 0, 3), (7, 2, 0)  # on Triton's interpreter, where a program takes a tenth of a second
SLACK = 4

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"num_iters": 3},
    "t0": {"num_iters": 0},
    "t1": {"num_iters": 1},
    "causal": {"num_iters": 1, "causal": True},
    "causal_t0": {"num_iters": 0, "causal": True},
    "relaxed": {"num_iters": 2, "key_relaxation": 0.5, "reference_relaxation": 0.7},
    "small_epsilon": {"num_iters": 2, "epsilon": 0.005},
}


def sides(native: str, causal: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths of queries and of keys."""
    queries, keys = (FEW_QUERIES, FEW) if native == "triton" else (QUERIES, LENGTHS)
    return keys if causal else queries, keys


def offsets(lengths: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def tokens(queries: tuple[int, ...], keys: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v [T, H, C] with SLACK rows of NaN behind them, and references; all want gradients."""
    q, k, v = (torch.randn(sum(n) + SLACK, H, c) for n, c in ((queries, D), (keys, D), (keys, E)))
    for t in (q, k, v):
        t[-SLACK:] = math.nan
    return [*(t.to(dtype).requires_grad_() for t in (q, k, v)), torch.randn(H, M, D, requires_grad=True)]


def segments(lengths: tuple[int, ...]) -> list[slice]:
    return [slice(a, b) for a, b in itertools.pairwise(offsets(lengths).tolist())]


def heads_first(t: Tensor) -> Tensor:
    return t.transpose(0, 1).unsqueeze(0)


def positions(queries: tuple[int, ...], keys: tuple[int, ...]) -> dict[str, Tensor]:
    at = {"query_position": torch.randn(sum(queries) + SLACK, P), "key_position": torch.randn(sum(keys) + SLACK, P)}
    return {**at, "reference_position": torch.randn(H, M, P)}


def alone(x: list[Tensor], queries: slice, keys: slice, options: dict[str, Any]) -> Tensor:
    """`set_attention` of one segment [n, H, E]."""
    own = dict(options)
    for name, rows in (("query_position", queries), ("key_position", keys)):
        if name in own:
            own[name] = own[name][rows]
    if "key_mask" in own:
        own["key_mask"] = own["key_mask"][keys].unsqueeze(0)
    if own.get("seed") is not None:
        own["seed"] = own["seed"] + queries.start
    q, k, v = (heads_first(t[rows]) for t, rows in zip(x[:3], (queries, keys, keys), strict=True))
    return SF.set_attention(q, k, v, x[3], **own).squeeze(0).transpose(0, 1)


def packed_and_looped(
    x: list[Tensor], queries: tuple[int, ...], keys: tuple[int, ...], options: dict[str, Any]
) -> list[tuple[Tensor, Tensor]]:
    """The output and the gradients of q, k, v, y: of the pack, and of its segments one after another."""
    o = SF.set_attention_varlen(*x, offsets(queries), offsets(keys), **options)
    weight = torch.randn(o.shape)
    weight[-SLACK:] = math.nan
    pairs = zip(segments(queries), segments(keys), strict=True)
    parts = [alone(x, at, of, options) for at, of in pairs]
    looped = torch.cat([*parts, o.new_zeros(SLACK, H, E)])
    found = torch.autograd.grad(o, x, weight)
    wanted = torch.autograd.grad(torch.cat(parts), x, weight[:-SLACK])
    return [(o, looped), *zip(found, wanted, strict=True)]


@pytest.fixture
def one_thread() -> Any:
    """A dense call of few heads shares them among threads; where a segment is cut is a matter of its own length."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.usefixtures("one_thread", "poisoned_memory")
def test_a_pack_is_its_segments_one_after_another(name: str, dtype: torch.dtype, native: str) -> None:
    options = {**OPTIONS[name], "backend": native}
    queries, keys = sides(native, options.get("causal", False))
    pairs = packed_and_looped(tokens(queries, keys, dtype), queries, keys, options)
    for found, wanted in pairs[:-1]:
        assert torch.equal(found, wanted)
    torch.testing.assert_close(*pairs[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float", "positions", "dropout"])
@pytest.mark.usefixtures("one_thread")
def test_what_comes_with_the_tokens_is_cut_with_them(kind: str, causal: bool, native: str) -> None:
    options: dict[str, Any] = {"num_iters": 1, "backend": native, "causal": causal}
    queries, keys = sides(native, causal)
    total = sum(keys) + SLACK
    if kind == "bool":
        options["key_mask"] = torch.rand(total) < 0.6
    elif kind == "float":
        options["key_mask"] = torch.randn(total).masked_fill(torch.rand(total) < 0.3, -math.inf)
    elif kind == "positions":
        options |= positions(queries, keys)
    else:
        options |= {"dropout_p": 0.4, "seed": torch.tensor(7)}
    pairs = packed_and_looped(tokens(queries, keys), queries, keys, options)
    for found, wanted in pairs[:-1]:
        if native == "triton" and "key_mask" in options:  # normalised by the largest mass alone
            torch.testing.assert_close(found, wanted)
        else:
            assert torch.equal(found, wanted)
    torch.testing.assert_close(*pairs[-1], rtol=1e-5, atol=1e-5)


def test_masks_of_every_head(native: str) -> None:
    _, keys = sides(native)
    x, cu, total = tokens(keys, keys), offsets(keys), sum(keys) + SLACK
    mask = torch.randn(total, H).masked_fill(torch.rand(total, H) < 0.3, -math.inf)
    o = SF.set_attention_varlen(*x, cu, key_mask=mask, backend=native)
    for h in range(H):
        one = [*(t[:, h : h + 1] for t in x[:3]), x[3][h : h + 1]]
        wanted = SF.set_attention_varlen(*one, cu, key_mask=mask[:, h], backend=native)
        torch.testing.assert_close(o[:, h : h + 1], wanted)


def test_gradient_of_a_float_mask(native: str) -> None:
    _, keys = sides(native)
    *x, y = (t.detach() for t in tokens(keys, keys))
    x, cu = [*(t[:-SLACK] for t in x), y], offsets(keys)
    weight = torch.randn(sum(keys), H, E)
    grads = []
    for backend in (native, "reference"):
        mask = torch.linspace(-2, 1, sum(keys)).requires_grad_()
        o = SF.set_attention_varlen(*x, cu, key_mask=mask, backend=backend, num_iters=2)
        grads.append(torch.autograd.grad(o, mask, weight)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("causal", [False, True])
def test_neighbours_change_no_bit(causal: bool, native: str) -> None:
    options: dict[str, Any] = {"causal": causal, "num_iters": 1, "backend": native}
    mine = [t.detach() for t in tokens((40,), (40,))]
    results = []
    for before, after in (((), ()), ((9, 0), (3,)), ((200,), (1, 1, 1))):
        lengths = (*before, 40, *after)
        others = [t.detach() for t in tokens(lengths, lengths)]
        at = sum(before)
        for t, own in zip(others[:3], mine[:3], strict=True):
            t[at : at + 40] = own[:40]
        leaves = [*(t.requires_grad_() for t in others[:3]), mine[3]]
        o = SF.set_attention_varlen(*leaves, offsets(lengths), **options)
        weight = torch.zeros_like(o)
        weight[at : at + 40] = torch.linspace(-1, 1, 40)[:, None, None]
        grads = torch.autograd.grad(o, leaves[:3], weight)
        results.append([t[at : at + 40] for t in (o, *grads)])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def pooled_alone(x: list[Tensor], rows: slice, backend: str) -> Tensor:
    return SF.set_pool(heads_first(x[1][rows]), heads_first(x[2][rows]), x[3], backend=backend)


@pytest.mark.usefixtures("one_thread", "poisoned_memory")
def test_pooling_is_that_of_every_segment(native: str) -> None:
    _, keys = sides(native)
    x = tokens(keys, keys)
    z = SF.set_pool_varlen(*x[1:], offsets(keys, torch.int32), backend=native)
    looped = torch.cat([pooled_alone(x, rows, native) for rows in segments(keys)])
    assert torch.equal(z, looped)
    assert z.shape == (len(keys), H, M, E)
    weight = torch.randn(z.shape)
    found, wanted = (torch.autograd.grad(t, x[1:], weight) for t in (z, looped))
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    torch.testing.assert_close(found[2], wanted[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["plain", "causal", "relaxed"])
def test_packs_within_the_error_budget(name: str, dtype: torch.dtype, native: str) -> None:
    """Parameters' gradients, which are sums over segments, too."""
    if native == "triton" and dtype == torch.float64:
        pytest.skip("no kernels for float64")
    queries, keys = sides(native, "causal" in name)
    q, k, v = (torch.randn(sum(n), H, c, dtype=torch.float64) for n, c in ((queries, D), (keys, D), (keys, E)))
    inputs: dict[str, Any] = {
        "query": q, "key": k, "value": v, "references": torch.randn(H, M, D, dtype=torch.float64),
        "reference_log_mass": torch.randn(H, M, dtype=torch.float64), "cu_seqlens_q": offsets(queries),
        "cu_seqlens_k": offsets(keys), **OPTIONS[name],
    }  # fmt: skip
    cotangent = torch.randn(sum(queries), H, E, dtype=torch.float64)
    found = measure.beside(SF.set_attention_varlen, inputs, dtype, cotangent, native)
    assert_within_budget(*found.only(measure.large), name)


def test_no_segment_and_no_row(native: str) -> None:
    x = tokens((), ())
    for cu in (offsets(()), offsets((0, 0))):
        o = SF.set_attention_varlen(*x, cu, backend=native)
        z = SF.set_pool_varlen(*x[1:], cu, backend=native)
        assert o.shape == (SLACK, H, E)
        assert not o.any()
        assert z.shape == (len(cu) - 1, H, M, E)
        assert not z.any()
        assert not any(g.any() for g in torch.autograd.grad(o.sum() + z.sum(), x))
    nothing = [t[:0] for t in x[:3]]
    assert SF.set_attention_varlen(*nothing, x[3], offsets((0,)), backend=native).shape == (0, H, E)


def test_keys_without_queries_change_nothing(native: str) -> None:
    x = [t.detach() for t in tokens((5, 0), (5, 30))]
    o = SF.set_attention_varlen(*x, offsets((5, 0)), offsets((5, 30)), backend=native)
    wanted = SF.set_attention_varlen(x[0], *(t[:5] for t in x[1:3]), x[3], offsets((5,)), backend=native)
    assert torch.equal(o, wanted)


@pytest.mark.parametrize("heads", [1, 2])
def test_long_segments_are_shared_by_threads(heads: int) -> None:
    """As the dense kernels share a head: the same bits at the same number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        lengths = (2000, 30, 1700)
        x = [torch.randn(sum(lengths), heads, 64, requires_grad=True) for _ in range(3)]
        x.append(torch.randn(heads, 64, 64))
        o = SF.set_attention_varlen(*x, offsets(lengths), backend="cpu")
        grads = torch.autograd.grad(o.square().sum(), x[:3])
        for rows in (slice(0, 2000), slice(2030, 3730)):
            wanted = alone(x, rows, rows, {"backend": "cpu"})
            assert torch.equal(o[rows], wanted)
            for g, w in zip(grads, torch.autograd.grad(wanted.square().sum(), x[:3]), strict=True):
                assert torch.equal(g[rows], w[rows])
    finally:
        torch.set_num_threads(before)


def call(**changes: Any) -> Tensor:
    arguments: dict[str, Any] = {
        "query": torch.randn(9, H, D), "key": torch.randn(9, H, D), "value": torch.randn(9, H, E),
        "references": torch.randn(H, M, D), "cu_seqlens_q": torch.tensor([0, 4, 9]), **changes,
    }  # fmt: skip
    return SF.set_attention_varlen(**arguments)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a list": ({"cu_seqlens_q": [0, 9]}, TypeError, "cu_seqlens_q must be an int32 or int64 Tensor"),
    "floats": ({"cu_seqlens_q": torch.tensor([0.0, 9.0])}, TypeError, "cu_seqlens_q .* got torch.float32"),
    "two dimensions": ({"cu_seqlens_q": torch.zeros(1, 2).long()}, ValueError, r"cu_seqlens_q must have shape"),
    "nothing": ({"cu_seqlens_q": torch.zeros(0).long()}, ValueError, r"cu_seqlens_q must have shape \[N \+ 1\]"),
    "elsewhere": (
        {"cu_seqlens_q": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError,
        "cu_seqlens_q must be on the device of key, cpu, got meta",
    ),
    "decreasing": ({"cu_seqlens_q": torch.tensor([0, 5, 4, 9])}, ValueError, r"must not decrease, got \[0, 5, 4, 9\]"),
    "late": ({"cu_seqlens_q": torch.tensor([1, 9])}, ValueError, "must begin with 0, got 1"),
    "far": ({"cu_seqlens_q": torch.tensor([0, 10])}, ValueError, "end at most at the 9 rows of the query, got 10"),
    "far keys": (
        {"cu_seqlens_k": torch.tensor([0, 4, 12])}, ValueError,
        "cu_seqlens_k must end at most at the 9 rows of the key, got 12",
    ),
    "other number": ({"cu_seqlens_k": torch.tensor([0, 9])}, ValueError, r"shape of cu_seqlens_q, \[3\], got \[2\]"),
    "a batch": ({"query": torch.randn(1, 9, H, D)}, ValueError, r"query must have shape \[T, H, D\], got 4-D"),
    "heads": ({"query": torch.randn(9, H + 1, D)}, ValueError, "query must have H, a multiple of the 3 heads"),
    "values": ({"value": torch.randn(8, H, E)}, ValueError, r"value must .* \[9, 3, \*\] \(T and H of the key\)"),
    "mask": ({"key_mask": torch.ones(2, 9).bool()}, ValueError, r"key_mask must have shape \[9\] or \[9, 3\]"),
    "dense causal": ({"causal": True, "num_iters": 2}, ValueError, "num_iters must be at most 1 for a causal packed"),
    "unequal causal": (
        {"causal": True, "cu_seqlens_k": torch.tensor([0, 5, 9])}, ValueError, "cu_seqlens_k must be cu_seqlens_q",
    ),
    "fewer queries": (
        {"causal": True, "query": torch.randn(7, H, D), "cu_seqlens_q": torch.tensor([0, 7])}, ValueError,
        "query must have the T of the key, 9, where causal is set, got 7",
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_before_any_kernel_runs(name: str, backend: str) -> None:
    changes, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call(**changes, backend=backend)


LENGTHS_SEEN = ((5, 0, 12), (1, 2, 3, 4, 5), (0, 0), (9, 30))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"key_mask": True}], ids=["plain", "causal", "mask"])
def test_one_graph_serves_every_pack(options: dict[str, Any]) -> None:
    """Of any number of segments and tokens: nothing reads the offsets while tracing."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()

    def f(q: Tensor, k: Tensor, v: Tensor, y: Tensor, cu: Tensor, mask: Tensor) -> Tensor:
        own = {**options, "key_mask": mask} if "key_mask" in options else options
        return SF.set_attention_varlen(q.sin(), k, v, y, cu, **own).cos()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    for lengths in LENGTHS_SEEN:
        *x, y = (t.detach().nan_to_num().requires_grad_() for t in tokens(lengths, lengths))
        cu, mask = offsets(lengths, torch.int32), torch.rand(len(x[0])) < 0.8
        found, wanted = compiled(*x, y, cu, mask), f(*x, y, cu, mask)
        torch.testing.assert_close(found, wanted)
        grads = [torch.autograd.grad(o.sum(), [*x, y]) for o in (found, wanted)]
        torch.testing.assert_close(*grads)
    assert counter.frame_count == 1


def test_a_graph_whose_offsets_nobody_checks_refuses_them_when_it_runs() -> None:
    compiled = torch.compile(SF.set_attention_varlen, fullgraph=True, backend="eager")
    *x, y = (t.detach() for t in tokens((5,), (5,)))
    with pytest.raises(ValueError, match="cu_seqlens_q must end at most at the 9 rows"):
        compiled(*x, y, torch.tensor([0, 11]))


def test_lengths_that_others_want_are_accepted() -> None:
    torch.manual_seed(1)
    first = call(max_seqlen_q=5, max_seqlen_k=torch.tensor(5))
    torch.manual_seed(1)
    assert torch.equal(first, call())
