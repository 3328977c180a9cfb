"""What SeTAttention refuses: torch's exception types and key words, never an AttributeError, never a broadcast."""

from __future__ import annotations

import pytest
import torch
from nn_helpers import CONSTRUCTIONS, B, E, H, L, M, S, tokens, twins
from torch import nn

from setformer_kernels.nn import AttentionInputError, SeTAttention, SeTPooling

BAD_SIZES = [
    ({"embed_dim": 0}, "must be greater than 0"),
    ({"num_heads": 0}, "must be greater than 0"),
    ({"embed_dim": -8}, "must be greater than 0"),
    ({"num_heads": -1}, "must be greater than 0"),
    ({"num_heads": 3}, "embed_dim must be divisible by num_heads"),
]


@pytest.mark.parametrize(("change", "words"), BAD_SIZES, ids=str)
def test_sizes_fail_as_in_torch(change, words):
    arguments = {"embed_dim": E, "num_heads": H} | change
    with pytest.raises((ValueError, AssertionError), match=words) as theirs:
        nn.MultiheadAttention(**arguments)
    for build in (SeTAttention, SeTPooling):
        with pytest.raises(AttentionInputError, match=words) as ours:
            build(**arguments)
        assert isinstance(ours.value, theirs.type)
        assert isinstance(ours.value, ValueError)
        assert str(next(iter(change.values()))) in str(ours.value)


@pytest.mark.parametrize("name", ["kdim", "vdim"])
def test_key_and_value_widths_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be greater than 0, got {name}=0"):
        SeTAttention(E, H, **{name: 0})


OWN = [
    ("num_references", 0, ValueError),
    ("num_references", 2.5, TypeError),
    ("num_iters", -1, ValueError),
    ("num_iters", True, TypeError),
    ("epsilon", 0.0, ValueError),
    ("epsilon", -0.1, ValueError),
    ("epsilon", float("nan"), ValueError),
    ("epsilon", float("inf"), ValueError),
    ("epsilon", "small", TypeError),
    ("epsilon", torch.ones(H), TypeError),
    ("bandwidth", 0.0, ValueError),
    ("kernel", "gauss", ValueError),
    ("value_map", "quadratic", ValueError),
    ("position_dim", -1, ValueError),
    ("key_relaxation", 1.5, ValueError),
    ("reference_relaxation", -0.5, ValueError),
    ("backend", "tpu", ValueError),
]


@pytest.mark.parametrize(("name", "value", "error"), OWN, ids=str)
@pytest.mark.parametrize("build", [SeTAttention, SeTPooling])
def test_own_arguments_are_checked_when_built(build, name, value, error):
    with pytest.raises(error, match=name):
        build(E, H, **{name: value})


def t(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape)


# name: (query, key, value, call arguments, key words of torch's message)
BAD_CALLS = {
    "query 1-D": (t(E), t(S, E), t(S, E), {}, "query should be unbatched 2D or batched 3D tensor"),
    "query 4-D": (t(1, L, B, E), t(S, B, E), t(S, B, E), {}, "query should be unbatched 2D or batched 3D"),
    "key 2-D": (t(L, B, E), t(S, E), t(S, B, E), {}, "For batched .3-D. `query`, expected `key` and `value` to be 3-D"),
    "value 2-D": (t(L, B, E), t(S, B, E), t(S, E), {}, "For batched .3-D. `query`, expected `key` and `value`"),
    "key 3-D": (t(L, E), t(S, B, E), t(S, E), {}, "For unbatched .2-D. `query`, expected `key` and `value` to be 2-D"),
    "query width": (t(L, B, E + 1), t(S, B, E), t(S, B, E), {}, "was expecting embedding dimension of 16, but got 17"),
    "lengths": (t(L, B, E), t(S, B, E), t(S + 1, B, E), {}, "does not match value|do not match value's"),
    "key batch": (t(L, B, E), t(S, B + 1, E), t(S, B, E), {}, "does not match value|do not match value's"),
    "padding 1-D": (
        t(L, B, E), t(S, B, E), t(S, B, E), {"key_padding_mask": t(S)},
        "For batched .3-D. `query`, expected `key_padding_mask` to be `None` or 2-D but found 1-D",
    ),
    "padding 2-D": (
        t(L, E), t(S, E), t(S, E), {"key_padding_mask": t(1, S)},
        "For unbatched .2-D. `query`, expected `key_padding_mask` to be `None` or 1-D but found 2-D",
    ),
    "padding batch": (
        t(L, B, E), t(S, B, E), t(S, B, E), {"key_padding_mask": t(1, S)},
        "Expected .?key_padded_mask.shape\\[0\\].? to be 3, but got 1",
    ),
    "padding length": (
        t(L, B, E), t(S, B, E), t(S, B, E), {"key_padding_mask": t(B, 1)},
        "Expected .?key_padded_mask.shape\\[1\\].? to be 7, but got 1",
    ),
    "padding dtype": (
        t(L, B, E), t(S, B, E), t(S, B, E), {"key_padding_mask": t(B, S).long()},
        "only bool and floating types of key_padding_mask are supported",
    ),
    "mask 1-D": (
        t(L, B, E), t(S, B, E), t(S, B, E), {"attn_mask": t(S)},
        "For batched .3-D. `query`, expected `attn_mask` to be `None`, 2-D or 3-D but found 1-D",
    ),
    "mask 4-D": (
        t(L, E), t(S, E), t(S, E), {"attn_mask": t(1, H, L, S)},
        "For unbatched .2-D. `query`, expected `attn_mask` to be `None`, 2-D or 3-D but found 4-D",
    ),
    "mask 2D shape": (
        t(L, B, E), t(S, B, E), t(S, B, E), {"attn_mask": t(S, L)}, "The shape of the 2D attn_mask is .*but should be",
    ),
    "mask broadcast": (
        t(L, B, E), t(S, B, E), t(S, B, E), {"attn_mask": t(1, S)}, "The shape of the 2D attn_mask is .*but should be",
    ),
    "mask 3D shape": (
        t(L, B, E), t(S, B, E), t(S, B, E), {"attn_mask": t(B, L, S)},
        "The shape of the 3D attn_mask is .*but should be \\(12, 6, 7\\)",
    ),
    "unbatched mask 3D shape": (
        t(L, E), t(S, E), t(S, E), {"attn_mask": t(1, L, S)}, "Expected `attn_mask` shape to be \\(4, 6, 7\\) but got",
    ),
    "mask dtype": (
        t(L, B, E), t(S, B, E), t(S, B, E), {"attn_mask": t(L, S).int()},
        "only bool and floating types of attn_mask are supported",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
@pytest.mark.parametrize("kdim", [None, E + 2])
def test_calls_fail_as_in_torch(case, kdim):
    query, key, value, arguments, words = BAD_CALLS[case]
    if kdim is not None:
        key = torch.zeros(*key.shape[:-1], kdim)
    module, twin = twins(kdim=kdim)
    with pytest.raises((AssertionError, RuntimeError), match=words) as theirs:
        twin(query, key, value, **arguments)
    with pytest.raises(AttentionInputError, match=words) as ours:
        module(query, key, value, **arguments)
    assert isinstance(ours.value, theirs.type)
    assert isinstance(ours.value, ValueError)


@pytest.mark.parametrize("batch_first", [True, False])
def test_query_batch_must_be_the_keys(batch_first):
    """torch fails on a view here; a batch of 1 must not broadcast either."""
    module = twins(batch_first=batch_first)[0]
    query, key, value = tokens(module)
    one = query.narrow(0 if batch_first else 1, 0, 1)
    with pytest.raises(ValueError, match="same batch size"):
        module(one, key, value)
    with pytest.raises(ValueError, match="same batch size"):
        module(query, *(y.narrow(0 if batch_first else 1, 0, 1) for y in (key, value)))


def test_separate_widths_are_checked_by_name():
    module = twins(kdim=10, vdim=12)[0]
    query, key, value = tokens(module)
    with pytest.raises(ValueError, match="embedding dimension of 10, but got 11 in key"):
        module(query, torch.zeros(S, B, 11), value)
    with pytest.raises(ValueError, match="embedding dimension of 12, but got 10 in value"):
        module(query, key, key)


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("wrong", [None, [1.0], "long"])
def test_inputs_must_be_floating_tensors(name, wrong):
    module = twins()[0]
    arguments = dict(zip(("query", "key", "value"), tokens(module), strict=True))
    arguments[name] = arguments[name].long() if wrong == "long" else wrong
    with pytest.raises(TypeError, match=f"`{name}` must be a"):
        module(**arguments)


@pytest.mark.parametrize("construction", CONSTRUCTIONS, ids=str)
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_inputs_have_the_dtype_of_the_weights(construction, name):
    """A RuntimeError, as torch's, which names matrices."""
    module = twins(**construction)[0]
    arguments = dict(zip(("query", "key", "value"), tokens(module), strict=True))
    arguments[name] = arguments[name].double()
    message = f"`{name}` must have the dtype of the weights, torch.float32, got torch.float64"
    for error in (TypeError, RuntimeError):
        with pytest.raises(error, match=message):
            module(**arguments)
    with pytest.raises(TypeError, match="`query` must have the dtype"):
        module(arguments["query"].bfloat16(), memory=module.memory(*tokens(module)[1:]))
    with pytest.raises(TypeError, match="`x` must have the dtype of the weights"):
        SeTPooling(E, H, num_references=M)(torch.zeros(B, S, E).half())


@pytest.mark.parametrize("name", ["key_padding_mask", "attn_mask", "query_position", "key_position"])
def test_masks_and_positions_must_be_tensors(name):
    module = twins(own={"position_dim": 2})[0]
    with pytest.raises(TypeError, match=f"`{name}` must be a tensor or None, got list"):
        module(*tokens(module), **{name: [[False] * S] * B})


@pytest.mark.parametrize("name", ["key_padding_mask", "attn_mask"])
def test_masks_are_where_the_tokens_are(name):
    mask = torch.zeros((B, S) if name == "key_padding_mask" else (L, S), dtype=torch.bool, device="meta")
    module = twins()[0]
    with pytest.raises(ValueError, match=f"{name} must be on the device of the tokens, cpu, got meta"):
        module(*tokens(module), **{name: mask})


def test_positions_exactly_when_asked_for():
    with_positions, without = twins(own={"position_dim": 2})[0], twins()[0]
    x = tokens(without)
    p = {"query_position": torch.rand(L, 2), "key_position": torch.rand(S, 2)}
    with pytest.raises(ValueError, match="position_dim=2 needs query_position and key_position"):
        with_positions(*x)
    with pytest.raises(ValueError, match="position_dim=2 needs key_position"):
        with_positions(*x, query_position=p["query_position"])
    with pytest.raises(ValueError, match=r"query_position, key_position given, but .* position_dim=0"):
        without(*x, **p)
    for wrong in (torch.rand(S, 3), torch.rand(S + 1, 2), torch.rand(1, S, 2), torch.rand(2)):
        with pytest.raises(ValueError, match="key_position must have shape"):
            with_positions(*x, query_position=p["query_position"], key_position=wrong)
    with pytest.raises(ValueError, match="requires_grad"):
        with_positions(*x, query_position=p["query_position"], key_position=p["key_position"].requires_grad_())


def test_half_removed_bias_rows():
    module = twins(add_bias_kv=True)[0]
    module.bias_v = None
    with pytest.raises(AssertionError, match="bias_k and bias_v go together"):
        module(*tokens(module))


def test_pooling_refuses_by_name():
    module = SeTPooling(E, H, num_references=M)
    x = torch.randn(B, S, E)
    for wrong in (x[0], x[..., 1:], x[None]):
        with pytest.raises(ValueError, match=r"x must be \[B, S, 16\]"):
            module(wrong)
    with pytest.raises(TypeError, match="`x` must be a tensor"):
        module(None)
    with pytest.raises(ValueError, match="key_padded_mask"):
        module(x, torch.zeros(B, S + 1))
    with pytest.raises(ValueError, match="`key_padding_mask` to be `None` or 2-D"):
        module(x, torch.zeros(S))
    with pytest.raises(TypeError, match="only bool and floating"):
        module(x, torch.zeros(B, S, dtype=torch.int8))
    with pytest.raises(ValueError, match="position_dim=0"):
        module(x, key_position=torch.rand(S, 2))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_calls_refuse_by_name():
    module = twins(batch_first=True)[0]
    nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    other = torch.nested.nested_tensor([torch.randn(5, E), torch.randn(3, E)])
    padded = torch.randn(2, 5, E)
    with pytest.raises(AssertionError, match="must all be nested"):
        module(nested, padded, padded)
    with pytest.raises(AssertionError, match="must be None"):
        module(nested, nested, nested, key_padding_mask=torch.zeros(2, 5))
    with pytest.raises(AssertionError, match="do not match value lengths"):
        module(nested, nested, other)
    with pytest.raises(AssertionError, match="batch_first=True"):
        twins()[0](nested, nested, nested)


REFERENCE_CALLS = {
    "few tokens": (torch.randn(M - 1, E), {}, "clusters need at least as many tokens that are not zero, got 4"),
    "zeros": (torch.zeros(S, E), {}, "that are not zero, got 0"),
    "all masked": (torch.randn(S, E), {"key_padding_mask": torch.ones(S, dtype=torch.bool)}, "at least as many tokens"),
    "width": (torch.zeros(S, E + 1), {}, "embedding dimension of 16, but got 17 in tokens"),
    "init": (torch.zeros(S, E), {"init": "grid"}, "init must be one of"),
    "mask": (torch.zeros(S, E), {"key_padding_mask": torch.zeros(S + 1)}, "key_padded_mask"),
    "position": (torch.zeros(S, E), {"key_position": torch.zeros(S, 2)}, "position_dim=0"),
    "value length": (torch.zeros(S, E), {"value": torch.zeros(S + 1, E)}, "do not match"),
}


@pytest.mark.parametrize("case", REFERENCE_CALLS)
def test_initialize_references_refuses_by_name(case):
    module = twins()[0]
    before = module.references.clone()
    given, arguments, words = REFERENCE_CALLS[case]
    with pytest.raises(ValueError, match=words):
        module.initialize_references(given, **arguments)
    assert torch.equal(module.references, before)


def test_landmarks_need_values_of_their_width():
    module = twins(own={"value_map": "rkhs"}, kdim=10)[0]
    with pytest.raises(ValueError, match="pass `value`"):
        module.initialize_references(torch.randn(20, B, 10))
