"""Empty, single and expanded (stride-0) batches, queries and keys: what nn.MultiheadAttention answers is answered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nn_helpers import E, H, M, twins
from torch import Tensor
from torch.func import functional_call, grad, vmap

from setformer_kernels.nn import SeTPooling

SIZES = [(0, 3, 4), (2, 0, 4), (2, 3, 0), (1, 1, 1), (2, 1, 4), (2, 3, 1), (0, 0, 0), (2, 0, 0)]  # B, L, S
EXPANDED = [None, 0, 1, 2]  # the dim of the batch-first input that has stride 0
CALLS = [(None, True, True), (0, False, False), (1, True, False), (2, False, True)]  # expanded, training, need_weights
MASKS = ["none", "padding", "attn_mask", "per head", "both", "float", "causal"]
CONSTRUCTIONS: list[dict[str, Any]] = [
    {"batch_first": True},
    {},
    {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 6, "vdim": 5, "dropout": 0.3},
]


def draw(b: int, n: int, width: int, expanded: int | None) -> Tensor:
    shape = [b, n, width]
    x = torch.randn([1 if d == expanded else size for d, size in enumerate(shape)], requires_grad=True)
    return x.expand(shape)


def masks(kind: str, b: int, l: int, s: int) -> dict[str, Any]:
    """All of them expanded from one number, which bans nothing."""
    bans, zero = torch.zeros((), dtype=torch.bool), torch.zeros(())
    return {
        "none": {},
        "padding": {"key_padding_mask": bans.expand(b, s)},
        "attn_mask": {"attn_mask": bans.expand(l, s)},
        "per head": {"attn_mask": zero.expand(b * H, l, s)},
        "both": {"key_padding_mask": bans.expand(b, s), "attn_mask": bans.expand(l, s)},
        "float": {"key_padding_mask": zero.expand(b, s), "attn_mask": zero.expand(l, s)},
        "causal": {"attn_mask": torch.ones(l, s, dtype=torch.bool).triu(1), "is_causal": True},
    }[kind]


def answer(module: Any, x: tuple[Tensor, ...], call: dict[str, Any]) -> tuple[Any, Any]:
    """The shapes of output and weights, after a backward pass in which nothing was missing or not finite."""
    output, weights = module(*x, **call)
    output.sum().backward()
    grads = [p.grad for p in module.parameters()]
    for value in (output, *grads, *(() if weights is None else (weights,))):
        assert value is not None
        assert value.isfinite().all()
    return output.shape, None if weights is None else weights.shape


def assert_answered(module: Any, twin: Any, x: tuple[Tensor, ...], call: dict[str, Any]) -> None:
    """As by torch, where torch does not fail in a view of no elements."""
    ours = answer(module, x, call)
    assert ours[0] == x[0].shape
    try:
        theirs = answer(twin, x, call)
    except RuntimeError:
        assert 0 in x[1].shape
    else:
        assert ours == theirs


@pytest.mark.parametrize("construction", CONSTRUCTIONS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_module(construction, sizes, kind):
    b, l, s = sizes
    if kind == "causal" and l != s:
        pytest.skip("a causal mask is square")
    module, twin = twins(**construction)
    for expanded, training, need_weights in CALLS:
        q, k, v = draw(b, l, E, expanded), draw(b, s, module.kdim, expanded), draw(b, s, module.vdim, expanded)
        x = (q, k, v) if module.batch_first else tuple(y.transpose(0, 1) for y in (q, k, v))
        call = masks(kind, b, l, s) | {"need_weights": need_weights}
        assert_answered(module.train(training), twin.train(training), x, call)
        if b == 1:
            one = masks(kind, 1, l, s) | {"need_weights": need_weights}
            if "key_padding_mask" in one:
                one["key_padding_mask"] = one["key_padding_mask"][0]
            unbatched = tuple(y[0] for y in (q, k, v))
            assert_answered(module, twin, unbatched, one)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 1, 4), (3, 3, 1), (2, 0, 3), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("expanded", EXPANDED)
@pytest.mark.parametrize("batched", [True, False])
def test_per_sample_gradients(sizes, expanded, batched):
    """As the gradients of each sample alone; softmax's batching rule has none for lengths of 0."""
    b, l, s = sizes
    module, _ = twins(batch_first=True, own={"value_map": "rkhs", "learn_epsilon": True})
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    q, k, pad = draw(b, l, E, expanded), draw(b, s, E, expanded), torch.zeros(()).bool().expand(b, s)

    def loss(p, q, k, pad):
        q, k, pad = ((y.unsqueeze(0) if batched else y) for y in (q, k, pad))
        call = {"key_padding_mask": pad, "need_weights": False}
        return functional_call(module, p, (q, k, k), call)[0].square().sum()

    got = vmap(grad(loss), in_dims=(None, 0, 0, 0))(parameters, q, k, pad)
    for i in range(b):
        want = grad(loss)(parameters, q[i], k[i], pad[i])
        for name, gradient in want.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(got[name][i], gradient, rtol=1e-4, atol=1e-5 + 1e-5 * scale, msg=name)


@pytest.mark.parametrize("sizes", [(0, 3), (2, 0), (0, 0), (1, 1), (2, 1)], ids=str)
@pytest.mark.parametrize("own", [{}, {"value_map": "rkhs", "position_dim": 2, "learn_log_mass": True}], ids=str)
def test_pooling(sizes, own):
    b, s = sizes
    module = SeTPooling(E, H, num_references=M, **own)
    position = torch.rand(()).expand(s, 2) if own else None
    for expanded in EXPANDED:
        output = module(draw(b, s, E, expanded), torch.zeros(()).expand(b, s), position)
        assert output.shape == (b, M, E)
        output.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
