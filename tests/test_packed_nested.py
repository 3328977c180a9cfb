"""Jagged nested tensors are packed batches: in the functions and the modules, without padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import setformer_kernels.functional as SF
from setformer_kernels.nn import SeTAttention, SeTPooling, nested

H, M, D, E, P = 2, 5, 8, 6, 2
LENGTHS, OTHERS = (3, 0, 17), (20, 4, 1)


def jagged(lengths: tuple[int, ...], *sizes: int, like: Any = None) -> Any:
    """[N, *, ...sizes], with the offsets of `like`."""
    offsets = torch.tensor([0, *lengths]).cumsum(0) if like is None else like.offsets()
    return torch.nested.nested_tensor_from_jagged(torch.randn(sum(lengths), *sizes), offsets)


def heads(lengths: tuple[int, ...], size: int, like: Any = None) -> Any:
    """[N, H, *, size]."""
    return jagged(lengths, H, size, like=like).transpose(1, 2)


def rows(x: Any) -> list[Tensor]:
    return [one.unsqueeze(0) for one in x.unbind()]


@pytest.mark.parametrize("causal", [False, True])
def test_functions_answer_every_sequence(causal: bool) -> None:
    q = heads(LENGTHS, D)
    k = heads(LENGTHS, D, like=q) if causal else heads(OTHERS, D)
    v, y = heads(LENGTHS if causal else OTHERS, E, like=k), torch.randn(H, M, D, requires_grad=True)
    o = SF.set_attention(q, k, v, y, causal=causal)
    assert o.shape[2] == q.shape[2]
    for found, *alone in zip(o.unbind(), *(rows(x) for x in (q, k, v)), strict=True):
        torch.testing.assert_close(found, SF.set_attention(*alone, y, causal=causal).squeeze(0))
    z = SF.set_pool(k, v, y)
    torch.testing.assert_close(z, torch.cat([SF.set_pool(*one, y) for one in zip(rows(k), rows(v), strict=True)]))
    (o.values().sum() + z.sum()).backward()
    assert y.grad is not None
    assert y.grad.any()


def test_what_comes_with_the_tokens_is_jagged_too() -> None:
    q, k = heads(LENGTHS, D), heads(OTHERS, D)
    v, y, places = heads(OTHERS, E, like=k), torch.randn(H, M, D), torch.randn(H, M, P)
    mask, at, of = jagged(OTHERS, like=k), jagged(LENGTHS, P, like=q), jagged(OTHERS, P)
    o = SF.set_attention(
        q, k, v, y, key_mask=mask, query_position=at, key_position=of, reference_position=places, num_iters=2
    )
    parts = zip(*(rows(x) for x in (o, q, k, v, mask, at, of)), strict=True)
    for found, *alone, m, p, s in parts:
        options: dict[str, Any] = {"query_position": p, "key_position": s, "reference_position": places}
        torch.testing.assert_close(found, SF.set_attention(*alone, y, key_mask=m, num_iters=2, **options))


def test_what_does_not_fit_is_refused_by_name() -> None:
    q, k, y = heads(LENGTHS, D), heads(OTHERS, D), torch.randn(H, M, D)
    with pytest.raises(TypeError, match=r"key must be a jagged NestedTensor .* got Tensor"):
        SF.set_attention(q, torch.randn(3, H, 4, D), torch.randn(3, H, 4, D), y)
    with pytest.raises(ValueError, match=r"query must be a jagged .* got dimension 1"):
        SF.set_attention(q.transpose(1, 2), k, k, y)
    with pytest.raises(ValueError, match=r"value must have the lengths of the key"):
        SF.set_attention(q, k, heads(LENGTHS, E), y)
    with pytest.raises(ValueError, match=r"attn_mask must be None where the tokens are nested"):
        SF.set_attention(q, k, k, y, attn_mask=torch.ones(3, 3).bool())


@pytest.fixture
def nothing_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("padded")

    monkeypatch.setattr(nested, "pad", refuse)


@pytest.mark.usefixtures("nothing_is_padded")
@pytest.mark.parametrize("own", [{}, {"value_map": "rkhs", "learn_epsilon": True}, {"position_dim": P}], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_the_module_pads_nothing(own: dict[str, Any], causal: bool) -> None:
    module = SeTAttention(8, H, batch_first=True, num_references=M, **own)
    x = jagged(LENGTHS, 8).requires_grad_()
    places = {
        name: jagged(LENGTHS, P, like=x) for name in ("query_position", "key_position") if own.get("position_dim")
    }
    o, weights = module(x, x, x, need_weights=False, is_causal=causal, **places)
    assert weights is None
    torch.testing.assert_close((o + x).values().shape, x.values().shape)
    grad = torch.autograd.grad(o.values().sum(), module.references)[0]
    module.zero_grad()
    parts = []
    for i, one in enumerate(rows(x.detach())):
        at = {name: p.unbind()[i] for name, p in places.items()}
        parts.append(module(one, one, one, need_weights=False, is_causal=causal, **at)[0].squeeze(0))
        torch.testing.assert_close(o.unbind()[i], parts[-1])
    wanted = torch.autograd.grad(torch.cat(parts).sum(), module.references)[0]
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("nothing_is_padded")
def test_cross_attention_and_pooling_pad_nothing() -> None:
    module, pooling = SeTAttention(8, H, batch_first=True, num_references=M), SeTPooling(8, H, num_references=M)
    x, memory = jagged(LENGTHS, 8), jagged(OTHERS, 8)
    o, _ = module(x, memory, memory, need_weights=False)
    for found, one, other in zip(o.unbind(), rows(x), rows(memory), strict=True):
        torch.testing.assert_close(found, module(one, other, other, need_weights=False)[0].squeeze(0))
    torch.testing.assert_close(pooling(memory), torch.cat([pooling(one) for one in rows(memory)]))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_one_graph_serves_every_jagged_batch() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    module = SeTAttention(8, H, batch_first=True, num_references=M).requires_grad_(False)
    compiled = torch.compile(
        lambda x: module(x, x, x, need_weights=False)[0], fullgraph=True, dynamic=True, backend=counter
    )
    for lengths in ((3, 9), (5, 1, 7), (20, 2, 4, 8)):
        x = jagged(lengths, 8)
        torch.testing.assert_close(compiled(x).values(), module(x, x, x, need_weights=False)[0].values())
    assert counter.frame_count == 1
