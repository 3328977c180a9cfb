"""Masks of nn.MultiheadAttention in SeTAttention: what is banned never matters, and the rest is the definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from nn_helpers import CONSTRUCTIONS, B, E, H, L, S, additive, definition, slots, tokens, trainable, twins
from torch import Tensor, nn
from torch.nn import functional as F

FEW = [CONSTRUCTIONS[0], CONSTRUCTIONS[4], CONSTRUCTIONS[7]]
BANS = [True, -torch.inf, torch.finfo(torch.float32).min, -1e9]


def ban(where: Tensor, how: bool | float) -> Tensor:
    """A bool mask, or a float one that holds `how` where the bool one is True."""
    return where if how is True else torch.zeros(where.shape).masked_fill(where, how)


def padding() -> Tensor:
    """[B, S]: element 1 has two padded keys at the end, element 2 one at the start."""
    pad = torch.zeros(B, S, dtype=torch.bool)
    pad[1, -2:] = pad[2, 0] = True
    return pad


def random_ban() -> Tensor:
    """[B·H, L, S]: about half banned, key 3 never."""
    mask = torch.rand(B * H, L, S, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., 3] = False
    return mask


def causal_mask(n: int) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(n)


def check_definition(module, x, kpm=None, attn_mask=None, causal=False, **call):
    """The module's output and weights against the definition, query by query."""
    output, weights = module(*x, key_padding_mask=kpm, attn_mask=attn_mask, average_attn_weights=False, **call)
    total = torch.zeros(B, H, L, S, dtype=torch.float64)
    if kpm is not None:
        total = total + additive(kpm).view(B, 1, 1, S)
    if attn_mask is not None:
        mask = additive(attn_mask)
        total = total + (mask if mask.dim() == 2 else mask.view(B, H, L, S))
    if causal:
        total = total + causal_mask(L)
    total = F.pad(total, (0, slots(module)))
    rows = [y if module.batch_first else y.transpose(0, 1) for y in (*x, output)]
    for b in range(B):
        want, A = definition(module, *(y[b] for y in rows[:3]), total[b])
        torch.testing.assert_close(rows[3][b], want, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(weights[b], A, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("construction", FEW, ids=str)
@pytest.mark.parametrize("num_iters", [0, 1, 3])
def test_masks_are_the_definition(construction, num_iters):
    module = trainable(twins(own={"num_iters": num_iters}, **construction)[0])
    x = tokens(module, dtype=torch.float64)
    bias = torch.randn(B * H, L, S, dtype=torch.float64)
    check_definition(module, x, kpm=padding())
    check_definition(module, x, kpm=torch.randn(B, S, dtype=torch.float64))
    check_definition(module, x, attn_mask=random_ban()[0])
    check_definition(module, x, attn_mask=bias)
    check_definition(module, x, kpm=padding(), attn_mask=ban(random_ban(), -torch.inf).double())


@pytest.mark.parametrize("construction", CONSTRUCTIONS, ids=str)
@pytest.mark.parametrize("num_iters", [0, 1, 3])
def test_causal_calls_are_the_definition(construction, num_iters):
    module = trainable(twins(own={"num_iters": num_iters}, **construction)[0])
    x = tokens(module, sizes=(B, L, L), dtype=torch.float64)
    for call in (
        {"is_causal": True},
        {"is_causal": True, "attn_mask": causal_mask(L)},
        {"attn_mask": causal_mask(L)},
        {"attn_mask": causal_mask(L) < 0},
    ):
        output, weights = module(*x, average_attn_weights=False, **call)
        assert (weights[..., :L].triu(1) == 0).all()
        if call == {"is_causal": True}:
            first = output, weights
        torch.testing.assert_close(output, first[0])
        torch.testing.assert_close(weights, first[1])
    rows = [y if module.batch_first else y.transpose(0, 1) for y in (*x, first[0])]
    total = F.pad(causal_mask(L).double().expand(H, L, L), (0, slots(module)))
    want, A = definition(module, *(y[1] for y in rows[:3]), total)
    torch.testing.assert_close(rows[3][1], want, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(first[1][1], A, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("how", BANS, ids=str)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("construction", FEW, ids=str)
def test_padding_content_and_length_never_matter(construction, how, need_weights):
    module = twins(**construction)[0]
    query, key, value = tokens(module)
    pad = padding()
    at = pad if module.batch_first else pad.T

    def call(k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return module(query, k, v, key_padding_mask=ban(mask, how), need_weights=need_weights)[0]

    want = call(key, value, pad)
    garbage = [torch.where(at[..., None], 1e4 * torch.randn_like(y), y) for y in (key, value)]
    got = call(*garbage, pad)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    parameters = list(module.parameters())
    wanted = torch.autograd.grad(want.square().sum(), parameters, retain_graph=True)
    for g, w in zip(torch.autograd.grad(got.square().sum(), parameters), wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4 * w.abs().max().item())
    length_dim = 1 if module.batch_first else 0
    longer = [torch.cat([y, 7 * torch.randn_like(y)], length_dim) for y in (key, value)]
    torch.testing.assert_close(call(*longer, F.pad(pad, (0, S), value=True)), want, rtol=1e-5, atol=1e-6)
    element = 1
    shorter = [y.select(1 - length_dim, element).unsqueeze(1 - length_dim) for y in (query, key, value)]
    kept = [shorter[0], *(y.narrow(length_dim, 0, S - 2) for y in shorter[1:])]
    alone = module(*kept, need_weights=need_weights)[0]
    torch.testing.assert_close(
        alone.select(1 - length_dim, 0), want.select(1 - length_dim, element), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("how", BANS[:2], ids=str)
@pytest.mark.parametrize(
    ("construction", "shared"),
    # key and value of different widths are never one tensor
    [(c, s) for c in CONSTRUCTIONS for s in (True, False) if not (s and "vdim" in c)],
    ids=str,
)
def test_not_even_nan_in_the_padding_matters(construction, shared, how):
    """Nor in any gradient, those of the projection weights included."""
    module = twins(**({"vdim": construction["kdim"]} if "kdim" in construction else {}) | construction)[0]
    query, key, value = (y.requires_grad_() for y in tokens(module))
    at = (padding() if module.batch_first else padding().T)[..., None]
    mask, parameters = ban(padding(), how), list(module.parameters())

    def run(k: Tensor, v: Tensor) -> list[Tensor]:
        output, weights = module(query, k, k if shared else v, key_padding_mask=mask)
        return [output, weights, *torch.autograd.grad(output.square().sum(), [query, k, *parameters])]

    want = run(key, value)
    got = run(*(torch.where(at, torch.nan, y.detach()).requires_grad_() for y in (key, value)))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
    with torch.no_grad():
        torch.testing.assert_close(module(query, key, key if shared else value, key_padding_mask=mask)[0], want[0])


@pytest.mark.parametrize("how", BANS, ids=str)
@pytest.mark.parametrize("three_d", [True, False])
def test_a_banned_pair_never_matters(how, three_d):
    """Perturbing key s changes exactly the outputs of the (n·H + h, i) that may see it."""
    module = twins(batch_first=True, bias=False)[0].double()
    with torch.no_grad():
        module.out_proj.weight.copy_(torch.eye(E))  # so that head h is features 4h..4h+3 of the output
    query, key, value = tokens(module, dtype=torch.float64)
    where = random_ban() if three_d else random_ban()[0]
    mask = ban(where, how)
    want = module(query, key, value, attn_mask=mask)[0].unflatten(-1, (H, -1))
    for s in range(S):
        moved = [y.clone() for y in (key, value)]
        for y in moved:
            y[:, s] += 1.0
        changed = (module(query, *moved, attn_mask=mask)[0].unflatten(-1, (H, -1)) - want).abs().amax(-1) > 1e-9
        allowed = ~(where.view(B, H, L, S) if three_d else where.expand(B, H, L, S))[..., s].transpose(1, 2)
        assert torch.equal(changed, allowed), s  # [B, L, H]


@pytest.mark.parametrize("construction", CONSTRUCTIONS, ids=str)
def test_bool_and_float_masks_agree_in_every_pairing(construction):
    module = twins(**construction)[0]
    x = tokens(module)
    pad, pairs = padding(), random_ban()
    outputs = [
        module(*x, key_padding_mask=ban(pad, a), attn_mask=ban(pairs, b))[0]
        for a, b in itertools.product((True, -torch.inf), repeat=2)
    ]
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0])


@pytest.mark.parametrize("construction", CONSTRUCTIONS, ids=str)
def test_zero_masks_equal_none(construction):
    module = twins(**construction)[0]
    x = tokens(module)
    want = module(*x)
    for call in (
        {"attn_mask": torch.zeros(L, S)},
        {"attn_mask": torch.zeros(B * H, L, S, dtype=torch.bool)},
        {"key_padding_mask": torch.zeros(B, S)},
        {"key_padding_mask": torch.zeros(B, S, dtype=torch.bool), "attn_mask": torch.zeros(L, S, dtype=torch.bool)},
    ):
        for got, wanted in zip(module(*x, **call), want, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_unbatched_masks(kind):
    module = twins()[0]
    x = tokens(module)
    pad, pairs = ban(padding(), True if kind == "bool" else -torch.inf), random_ban().view(B, H, L, S)
    want, want_weights = module(*x, key_padding_mask=pad, attn_mask=pairs.flatten(0, 1))
    for b in range(B):
        got, weights = module(*(y[:, b] for y in x), key_padding_mask=pad[b], attn_mask=pairs[b])
        torch.testing.assert_close(got, want[:, b])
        torch.testing.assert_close(weights, want_weights[b])
    plain = module(*(y[:, 0] for y in x), attn_mask=pairs[0, 0])[0]
    torch.testing.assert_close(plain, module(*x, attn_mask=pairs[0, 0])[0][:, 0])


def test_float_masks_get_their_gradient():
    module = trainable(twins(own={"num_iters": 2})[0])
    x = tokens(module, dtype=torch.float64)
    pad = torch.randn(B, S, dtype=torch.float64, requires_grad=True)
    pairs = torch.randn(L, S, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda p, a: module(*x, key_padding_mask=p, attn_mask=a, need_weights=False)[0][:2, 0], (pad, pairs)
    )


def test_a_causal_hint_does_not_swallow_a_learned_bias():
    module = twins()[0]
    x = tokens(module, sizes=(B, L, L))
    bias = (causal_mask(L) + torch.randn(L, L)).requires_grad_()
    module(*x, attn_mask=bias, is_causal=True)[0].sum().backward()
    assert bias.grad.tril().abs().sum() > 0


@pytest.mark.parametrize("num_iters", [1, 3])
@pytest.mark.parametrize("hint", [True, False])
@pytest.mark.parametrize("construction", FEW, ids=str)
def test_causal_outputs_never_depend_on_later_tokens(construction, hint, num_iters):
    module = twins(own={"num_iters": num_iters}, **construction)[0]
    x = tokens(module, sizes=(B, L, L))
    call = {"is_causal": True} if hint else {"attn_mask": causal_mask(L)}
    length_dim = 1 if module.batch_first else 0
    want = module(*x, **call)[0].narrow(length_dim, 0, L - 2)
    for y in x:
        y.narrow(length_dim, L - 2, 2).normal_().mul_(100)
    torch.testing.assert_close(module(*x, **call)[0].narrow(length_dim, 0, L - 2), want)


def test_causal_with_padding_and_rectangular_causal():
    module = trainable(twins(own={"num_iters": 1})[0])
    square = tokens(module, sizes=(B, S, S), dtype=torch.float64)
    hinted = module(*square, key_padding_mask=padding(), attn_mask=causal_mask(S), is_causal=True)
    unhinted = module(*square, key_padding_mask=padding(), attn_mask=causal_mask(S))
    for got, want in zip(hinted, unhinted, strict=True):
        torch.testing.assert_close(got, want)
    x = tokens(module, dtype=torch.float64)
    triangle = torch.ones(L, S, dtype=torch.bool).triu(1)
    for got, want in zip(module(*x, is_causal=True), module(*x, attn_mask=triangle), strict=True):
        torch.testing.assert_close(got, want)


def test_elements_and_queries_are_independent():
    module = twins(batch_first=True)[0]
    query, key, value = tokens(module)
    want = module(query, key, value)[0]
    moved = [y.clone() for y in (query, key, value)]
    for y in moved:
        y[1] += 1
    got = module(*moved)[0]
    assert torch.equal((got - want).abs().amax((1, 2)) > 1e-4, torch.tensor([False, True, False]))
    moved_query = query.clone()
    moved_query[:, 2] += 1
    changed = (module(moved_query, key, value)[0] - want).abs().amax((0, 2)) > 1e-4
    assert changed.tolist() == [i == 2 for i in range(L)]


@pytest.mark.parametrize("how", BANS, ids=str)
@pytest.mark.parametrize("construction", FEW, ids=str)
def test_fully_masked_rows_are_finite(construction, how):
    module = twins(**construction)[0]
    x = [y.requires_grad_() for y in tokens(module)]
    pad = padding()
    pad[0] = True
    pairs = random_ban()
    pairs[:, 1] = True
    for call in (
        {"key_padding_mask": ban(pad, how)},
        {"attn_mask": ban(pairs, how)},
        {"key_padding_mask": ban(pad, how), "attn_mask": ban(pairs, how)},
    ):
        output, weights = module(*x, **call)
        gradients = torch.autograd.grad(output.square().sum() + weights.square().sum(), [*x, *module.parameters()])
        assert all(torch.isfinite(t).all() for t in (output, weights, *gradients))
        if how in (True, -torch.inf) and not slots(module) and "key_padding_mask" in call:
            assert (weights[0] == 0).all()


def test_no_branch_on_mask_content():
    """A meta tensor has no content: the call still traces."""
    module = twins(device="meta")[0]
    x = [y.to("meta") for y in tokens(module)]
    for call in (
        {"key_padding_mask": padding().to("meta"), "attn_mask": random_ban().to("meta")},
        {"attn_mask": torch.zeros(L, S, device="meta")},
        {"is_causal": True},
    ):
        output, weights = module(*x, **call)
        assert output.shape == (L, B, E)
        assert weights.shape == (B, L, S)
