"""SeTAttention called as nn.MultiheadAttention is: constructor, call forms, weights, and the values themselves."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from nn_helpers import CONSTRUCTIONS, B, E, H, L, M, S, definition, slots, tokens, trainable, twins
from torch import nn

from setformer_kernels.nn import SeTAttention

OWN = [{}, {"num_iters": 0}, {"num_iters": 1, "key_relaxation": 0.7}, {"bandwidth": 2.5}]


def test_constructor_has_torchs_arguments_first():
    ours = inspect.signature(SeTAttention).parameters
    torchs = inspect.signature(nn.MultiheadAttention).parameters
    assert list(ours)[: len(torchs)] == list(torchs)
    for name, parameter in torchs.items():
        assert ours[name].default == parameter.default, name
        assert ours[name].kind == parameter.kind, name
    own = list(ours.values())[len(torchs) :]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in own)


def test_forward_has_torchs_arguments_first():
    ours = inspect.signature(SeTAttention.forward).parameters
    torchs = inspect.signature(nn.MultiheadAttention.forward).parameters
    assert list(ours)[: len(torchs)] == list(torchs)
    for name, parameter in torchs.items():  # keys and values may be left out where there is a memory
        assert ours[name].default == (None if name in ("key", "value") else parameter.default), name


def test_every_constructor_argument_works_by_position():
    values = (E, H, 0.25, False, True, True, 10, 12, True, "cpu", torch.float64)
    module, twin = SeTAttention(*values, num_references=M), nn.MultiheadAttention(*values)
    for name in ("dropout", "add_zero_attn", "kdim", "vdim", "batch_first"):
        assert getattr(module, name) == getattr(twin, name)
    assert module.in_proj_bias is None
    assert module.bias_k.shape == twin.bias_k.shape
    assert {p.dtype for p in module.parameters()} == {torch.float64}


def test_own_defaults_are_the_documented_ones():
    module = SeTAttention(E, H)
    assert (module.num_iters, module.epsilon, module.bandwidth, module.kernel) == (1, 0.05, 1.0, "rbf")
    assert module.references.shape == (H, 64, E // H)
    assert (module.landmarks, module.log_epsilon, module.reference_log_mass) == (None, None, None)
    assert (module.reference_position, module.position_scale) == (None, None)


@pytest.mark.parametrize("construction", CONSTRUCTIONS, ids=str)
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_shapes_and_dtypes_are_torchs(construction, batched, need_weights, average):
    module, twin = twins(**construction)
    x = tokens(module, batched)
    got = module(*x, need_weights=need_weights, average_attn_weights=average)
    want = twin(*x, need_weights=need_weights, average_attn_weights=average)
    assert type(got) is tuple
    assert len(got) == 2
    assert (got[1] is None) == (want[1] is None) == (not need_weights)
    for ours, theirs in zip(got, want, strict=True):
        assert ours is None or (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


@pytest.mark.parametrize("own", OWN, ids=str)
@pytest.mark.parametrize("construction", CONSTRUCTIONS, ids=str)
def test_values_are_the_definition(construction, own):
    module = trainable(twins(own=own, **construction)[0])
    x = tokens(module, dtype=torch.float64)
    output, weights = module(*x, average_attn_weights=False)
    by_element = [y if module.batch_first else y.transpose(0, 1) for y in (*x, output)]
    log_mass = torch.zeros(H, L, S + slots(module), dtype=torch.float64)
    for b in range(B):
        want, A = definition(module, *(y[b] for y in by_element[:3]), log_mass)
        torch.testing.assert_close(by_element[3][b], want, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(weights[b], A, rtol=1e-9, atol=1e-11)


def test_packed_rows_are_q_k_v():
    """The same weights packed and separate give the same output."""
    packed = trainable(twins()[0])
    separate = trainable(twins(kdim=E, vdim=E)[0])
    separate._qkv_same_embed_dim = False
    rows = packed.in_proj_weight.chunk(3)
    separate.register_parameter("in_proj_weight", None)
    for name, weight in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), rows, strict=True):
        separate.register_parameter(name, nn.Parameter(weight.detach().clone()))
    separate.load_state_dict({k: v for k, v in packed.state_dict().items() if k != "in_proj_weight"}, strict=False)
    x = tokens(packed, dtype=torch.float64)
    torch.testing.assert_close(packed(*x)[0], separate(*x)[0])


@pytest.mark.parametrize("pattern", ["xxx", "xxy", "xyy", "xyx", "xyz"])
def test_shared_tensors_give_what_equal_copies_give(pattern):
    """One matmul projects tensors given twice; which ones are shared must not show."""
    module = trainable(twins()[0])
    pool = {letter: torch.randn(S, B, E, dtype=torch.float64) for letter in "xyz"}
    shared = [pool[letter] for letter in pattern]
    torch.testing.assert_close(module(*shared)[0], module(*(x.clone() for x in shared))[0])


def test_layouts_agree():
    first, last = (trainable(twins(batch_first=bf)[0]) for bf in (True, False))
    last.load_state_dict(first.state_dict())
    x = tokens(first, dtype=torch.float64)
    out, weights = first(*x)
    swapped, same_weights = last(*(y.transpose(0, 1) for y in x))
    torch.testing.assert_close(out, swapped.transpose(0, 1))
    torch.testing.assert_close(weights, same_weights)
    alone, alone_weights = first(*(y[1] for y in x))
    torch.testing.assert_close(alone, out[1])
    torch.testing.assert_close(alone_weights, weights[1])


def test_weights_reproduce_the_output():
    """o = A v with the returned A, whose rows sum to 1 and whose mean over heads is the averaged form."""
    module = trainable(twins(batch_first=True)[0])
    x = tokens(module, dtype=torch.float64)
    output, A = module(*x, average_attn_weights=False)
    v = (x[2] @ module.in_proj_weight[2 * E :].T + module.in_proj_bias[2 * E :]).unflatten(-1, (H, -1)).transpose(1, 2)
    torch.testing.assert_close(module.out_proj((A @ v).transpose(1, 2).flatten(-2)), output)
    torch.testing.assert_close(module(*x)[1], A.mean(1))
    assert (A >= 0).all()
    torch.testing.assert_close(A.sum(-1), torch.ones(B, H, L, dtype=torch.float64))


def test_weights_are_differentiable():
    module = twins()[0]
    module(*tokens(module))[1].square().sum().backward()
    assert module.in_proj_weight.grad[: 2 * E].abs().sum() > 0
    assert module.references.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference"])
@pytest.mark.parametrize("construction", CONSTRUCTIONS, ids=str)
def test_output_is_the_same_with_and_without_weights(construction, mode):
    module = twins(**construction)[0].train(mode == "train")
    x = tokens(module)
    guard = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(mode, torch.enable_grad)
    with guard():
        with_weights, without = module(*x)[0], module(*x, need_weights=False)[0]
    assert torch.equal(with_weights, without)
    assert torch.allclose(with_weights, twins(**construction)[0](*x)[0], atol=1e-6)


@pytest.mark.parametrize("sizes", [(0, L, S), (B, 0, S), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
def test_empty_batches_and_queries(sizes, batch_first):
    module, twin = twins(batch_first=batch_first)
    x = tokens(module, sizes=sizes)
    for got, want in zip(module(*x), twin(*x), strict=True):
        assert got.shape == want.shape
    module(*x)[0].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_expanded_queries():
    """DETR hands one query set to the whole batch, as a stride-0 view."""
    module = twins()[0]
    query, key, value = tokens(module)
    expanded = query[:, :1].expand(L, B, E)
    torch.testing.assert_close(module(expanded, key, value)[0], module(expanded.contiguous(), key, value)[0])


def test_strided_inputs():
    module = twins()[0]
    x = tokens(module, sizes=(2 * B, L, S))
    torch.testing.assert_close(module(*(y[:, ::2] for y in x))[0], module(*(y[:, ::2].contiguous() for y in x))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_output_and_weights_keep_the_input_dtype(dtype):
    module = twins()[0].to(dtype)
    output, weights = module(*tokens(module, dtype=dtype))
    assert (output.dtype, weights.dtype) == (dtype, dtype)


def test_float64_is_true_float64():
    module = trainable(twins()[0])
    x = tokens(module, dtype=torch.float64)
    exact = module(*x)[0]
    rounded = twins()[0]
    rounded.load_state_dict(module.state_dict())
    difference = (exact - rounded(*(y.float() for y in x))[0]).abs().max()
    assert 1e-9 < difference < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_at_input_scale_16(dtype):
    module = twins()[0].to(dtype)
    x = [(16 * y).requires_grad_() for y in tokens(module, dtype=dtype)]
    output, weights = module(*x)
    output.float().square().mean().backward()
    everything = [output, weights, *(y.grad for y in x), *(p.grad for p in module.parameters())]
    assert all(torch.isfinite(t).all() for t in everything)


def test_dropout_is_read_at_call_time_and_only_acts_in_training():
    module = twins(dropout=0.5)[0]
    x = tokens(module)
    still = module.eval()(*x)[0]
    module.train()
    assert not torch.equal(module(*x)[0], still)
    module.dropout = 0.0
    assert torch.equal(module(*x)[0], still)


def test_returned_weights_include_the_dropout_of_the_output():
    module = trainable(twins(dropout=0.5, batch_first=True, bias=False)[0])
    x = tokens(module, dtype=torch.float64)
    output, A = module(*x, average_attn_weights=False)
    v = (x[2] @ module.in_proj_weight[2 * E :].T).unflatten(-1, (H, -1)).transpose(1, 2)
    torch.testing.assert_close(module.out_proj((A @ v).transpose(1, 2).flatten(-2)), output)
    assert (A.sum(-1) - 1).abs().max() > 0.05
    assert not torch.equal(module(*x)[0], output)


def test_dropout_keeps_the_mean():
    """512 copies of one element in a batch are 512 independent masks."""
    module = twins(dropout=0.3)[0]
    x = [y.expand(-1, 512, -1) for y in tokens(module, sizes=(1, L, S))]
    with torch.no_grad():
        draws = module(*x)[0]
        exact = module.eval()(*(y[:, :1] for y in x))[0][:, 0]
    error = draws.std(1) / 512**0.5
    assert ((draws.mean(1) - exact).abs() < 5 * error + 1e-6).all()


def test_eval_draws_no_random_numbers():
    module = twins(dropout=0.5)[0].eval()
    x = tokens(module)
    before = torch.get_rng_state()
    module(*x)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_without_dropout_draws_no_random_numbers():
    module = twins()[0]
    x = tokens(module)
    before = torch.get_rng_state()
    module(*x)
    assert torch.equal(torch.get_rng_state(), before)


def test_forward_changes_no_state_and_no_argument():
    module = twins(dropout=0.5, add_bias_kv=True)[0]
    x: list[Any] = [*tokens(module)]
    kept = {name: t.clone() for name, t in module.state_dict().items()}, [y.clone() for y in x]
    module(*x)
    assert all(torch.equal(t, kept[0][name]) for name, t in module.state_dict().items())
    assert all(torch.equal(y, z) for y, z in zip(x, kept[1], strict=True))
