"""Modules whose tokens are a shard of a sequence, and contexts of others that know nothing of them."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import setformer_kernels as sk
from setformer_kernels.distributed import Ranks, build_cp_context, context_parallel
from setformer_kernels.models.causal import CausalTransport
from setformer_kernels.nn import shards

WIDTH, N = 24, 21


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 3, 32, dropout=0.0, batch_first=True)
    layer.self_attn = sk.SeTAttention(WIDTH, 3, batch_first=True, num_references=4, num_iters=2, learn_epsilon=True)
    return nn.Sequential(layer, sk.SeTPooling(WIDTH, 3, num_references=5))


def test_a_model_over_ranks_is_the_model() -> None:
    """Outputs, gradients of tokens, and of parameters summed over the ranks; pooled, of the last rank's loss."""
    whole = encoder().train()
    x, cut = torch.randn(2, N, WIDTH), (0, 9, 9, N)
    leaf = x.clone().requires_grad_()
    wanted = whole(leaf)
    cotangent = torch.randn_like(wanted)
    wanted.backward(cotangent)

    def live(group: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        model = copy.deepcopy(whole)
        model.zero_grad()
        context_parallel(model, group, lengths=[9, 0, N - 9])
        mine = x[:, cut[group.rank] : cut[group.rank + 1]].clone().requires_grad_()
        pooled = model(mine)
        pooled.backward(cotangent if group.rank == 2 else torch.zeros_like(cotangent))
        assert mine.grad is not None
        return pooled.detach(), mine.grad, [p.grad for p in model.parameters() if p.grad is not None]

    found = Ranks(3).run(live)
    for pooled, _, _ in found:
        torch.testing.assert_close(pooled, wanted)
    torch.testing.assert_close(torch.cat([grad for _, grad, _ in found], 1), leaf.grad, rtol=1e-4, atol=1e-6)
    for parameter, *parts in zip(whole.parameters(), *(grads for _, _, grads in found), strict=True):
        torch.testing.assert_close(sum(parts), parameter.grad, rtol=1e-4, atol=1e-5)


def test_a_causal_transport_scans_shards_of_any_length() -> None:
    own = {"num_references": 4, "num_iters": 1}
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    whole = CausalTransport(2, 8, q, own)
    wanted = whole(q, k, v)[0]

    def live(group: Any) -> Tensor:
        model = context_parallel(nn.Sequential(copy.deepcopy(whole)), group)[0]
        mine, state = slice(4 * group.rank, 4 + group.rank), None
        with torch.no_grad():
            return model(*(t[:, :, mine] for t in (q, k, v)), state=state)[0]

    torch.testing.assert_close(torch.cat(Ranks(2).run(live), 2), wanted)


def test_copies_keep_the_context_and_what_is_saved_has_none() -> None:
    model = context_parallel(encoder(), Ranks(1).members[0])
    kept = copy.deepcopy(model)[1]
    assert kept.cp_context is model[1].cp_context
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    assert torch.load(saved, weights_only=False)[1].cp_context is None
    assert "cp_context" not in model.state_dict()
    assert context_parallel(model, None)[1].cp_context is None


def test_models_that_look_at_other_tokens_are_refused_on_every_rank() -> None:
    softmax = nn.Sequential(encoder(), nn.MultiheadAttention(WIDTH, 3))
    convolved = nn.Sequential(encoder(), nn.Conv1d(WIDTH, WIDTH, 3))
    slots = nn.Sequential(sk.SeTAttention(WIDTH, 3, add_bias_kv=True))
    converging = nn.Sequential(sk.SeTAttention(WIDTH, 3, num_iters=9, tol=1e-3))
    cases = [("no attention but SeT's", softmax), ("no convolution over tokens", convolved), ("add_bias_kv", slots),
             ("tol", converging), ("must have SeT attention", nn.Linear(2, 2))]  # fmt: skip
    for message, model in cases:
        good = encoder()
        errors = Ranks(2).run(
            lambda group, bad=model, good=good: context_parallel((good, bad)[group.rank], group), raising=False
        )
        for error in errors:
            assert type(error) is ValueError
            assert message in str(error)


@pytest.mark.parametrize(("name", "value"), [("num_iters", 5), ("kernel", "dot"), ("references", None)])
def test_settings_that_ranks_do_not_share_are_named(name: str, value: Any) -> None:
    def live(group: Any) -> None:
        model = encoder()
        if group.rank == 1 and name == "references":
            model = model.double()
        elif group.rank == 1:
            setattr(model[1], name, value)
        context_parallel(model, group)

    for error in Ranks(2).run(live, raising=False):
        assert type(error) is ValueError
        assert f"{name} must be the same on all ranks" in str(error)


def test_what_a_module_on_a_shard_refuses() -> None:
    group = Ranks(1).members[0]
    module = context_parallel(sk.SeTAttention(WIDTH, 3, batch_first=True), group)
    x = torch.randn(2, 4, WIDTH)
    with pytest.raises(ValueError, match="need_weights goes without cp_context"):
        module(x, x, x)
    nested = torch.nested.nested_tensor([torch.randn(n, WIDTH) for n in (2, 3)], layout=torch.jagged)
    with pytest.raises(ValueError, match="query goes without cp_context"):
        module(nested, nested, nested, need_weights=False)
    with pytest.raises(ValueError, match="x goes without cp_context"):
        context_parallel(sk.SeTPooling(WIDTH, 3), group)(nested)
    module(x, x, x, need_weights=False)


def test_inside_a_context_of_softmax_attention_modules_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's context_parallel leaves things: a function in the place of softmax attention, and a list of such."""
    from torch.distributed.tensor import experimental

    assert hasattr(experimental, "context_parallel")
    module, x = sk.SeTAttention(WIDTH, 3, batch_first=True), torch.randn(2, 4, WIDTH)
    patches = next(m for name in shards.PATCHES if (m := __import__("sys").modules.get(name)) is not None)

    def replacement(*args: Any, **options: Any) -> Any:
        raise AssertionError

    monkeypatch.setitem(patches._replaced_functions, replacement, ("scaled_dot_product_attention", None))
    module(x, x, x, need_weights=False)  # left over from a context that ended
    monkeypatch.setattr(F, "scaled_dot_product_attention", replacement)
    with pytest.raises(RuntimeError, match=r"distributed\.context_parallel"):
        module(x, x, x, need_weights=False)
    context_parallel(module, Ranks(1).members[0])(x, x, x, need_weights=False)


@pytest.mark.exhaustive
def test_a_module_on_a_shard_is_one_graph() -> None:
    model = context_parallel(encoder(), Ranks(1).members[0])
    compiled, x = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randn(2, N, WIDTH)
    torch.testing.assert_close(compiled(x), model(x))


def test_the_api_that_is_not_asked_for_is_not_imported() -> None:
    assert "build_cp_context" in sk.distributed.__all__
    assert sk.distributed.build_cp_context is build_cp_context
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sk.distributed.nothing  # noqa: B018
