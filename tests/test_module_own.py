"""What nn.MultiheadAttention does not have: positions, RKHS values, learned ε, placed references, pooling."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from nn_helpers import B, E, H, L, M, S, tokens, trainable, twins
from torch import Tensor
from torch.nn import functional as F

import setformer_kernels.functional as SF
from setformer_kernels.nn import SeTAttention, SeTPooling
from setformer_kernels.nn.kmeans import spherical_kmeans

D = E // H


def heads(module: SeTAttention, *x: torch.Tensor) -> list[torch.Tensor]:
    """q, k, v [B, H, N, D] of batch-first tokens, by torch alone."""
    rows, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    return [(y @ w.T + b).unflatten(-1, (H, D)).transpose(1, 2) for y, w, b in zip(x, rows, biases, strict=True)]


def merged(module: torch.nn.Module, z: torch.Tensor) -> torch.Tensor:
    return module.out_proj(z.transpose(1, 2).flatten(-2))


OWN = {
    "kernel": {"kernel": "dot", "epsilon": 0.5},
    "relaxed": {"key_relaxation": 0.6, "reference_relaxation": 0.3},
    "learned": {"learn_epsilon": True, "learn_log_mass": True},
    "references": {"num_references": 1},
    "iterations": {"num_iters": 7, "epsilon": 0.2, "bandwidth": 3.0},
}


@pytest.mark.parametrize("own", OWN)
def test_own_arguments_reach_the_kernel(own):
    module = trainable(SeTAttention(E, H, batch_first=True, **({"num_references": M} | OWN[own])))
    x = tokens(module, dtype=torch.float64)
    q, k, v = heads(module, *x)
    options = {name: OWN[own][name] for name in OWN[own] if not name.startswith("learn") and name != "num_references"}
    if own == "learned":
        options = {"epsilon": module.log_epsilon.exp(), "reference_log_mass": module.reference_log_mass}
    want = merged(module, SF.set_attention(q, k, v, module.references, **options))
    torch.testing.assert_close(module(*x)[0], want)
    default = merged(module, SF.set_attention(q, k, v, module.references))
    if own != "references":
        assert not torch.allclose(default, want)


def test_options_are_read_at_call_time():
    module = twins(batch_first=True)[0]
    x = tokens(module)
    before = module(*x)[0]
    module.epsilon, module.num_iters, module.key_relaxation = 0.3, 1, 0.5
    want = SF.set_attention(*heads(module, *x), module.references, epsilon=0.3, num_iters=1, key_relaxation=0.5)
    torch.testing.assert_close(module(*x)[0], merged(module, want))
    assert not torch.allclose(module(*x)[0], before)


def test_rkhs_values_are_nystrom_features():
    module = trainable(SeTAttention(E, H, batch_first=True, num_references=M, value_map="rkhs", bandwidth=2.0))
    x = tokens(module, dtype=torch.float64)
    q, k, v = heads(module, *x)
    features = SF.nystrom_features(v, module.landmarks, bandwidth=2.0, center=True)
    assert features.shape == (B, H, S, D)
    want = SF.set_attention(q, k, features, module.references, bandwidth=2.0)
    torch.testing.assert_close(module(*x)[0], merged(module, want))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("slots", [True, False])
def test_positions_are_batch_first_and_slots_have_none(batch_first, slots):
    module = trainable(
        SeTAttention(
            E, H, num_references=M, position_dim=2, batch_first=batch_first, add_bias_kv=slots, add_zero_attn=slots
        )
    )
    x = tokens(module, dtype=torch.float64)
    p, r = torch.rand(B, L, 2), torch.rand(B, S, 2)
    output, A = module(*x, query_position=p, key_position=r, average_attn_weights=False)
    q, k, _ = heads(module, *(x if batch_first else [y.transpose(0, 1) for y in x]))
    scale = module.position_scale.double()[:, None, None]

    def logits(y, position):
        y, w = F.normalize(y, dim=-1), F.normalize(module.references, dim=-1)
        distance = (position.double()[:, None, :, None] - module.reference_position[:, None]).square().sum(-1)
        return ((y @ w.mT - 1).exp() - 1) / 0.05, scale.square() * distance

    kernel, distance = logits(k, r)
    if slots:
        extra = torch.stack([module.bias_k.view(H, D), torch.zeros(H, D)], 1).expand(B, H, 2, D)
        kernel = torch.cat([kernel, logits(extra, torch.zeros(B, 2, 2))[0]], 2)
        distance = F.pad(distance, (0, 0, 0, 2))
    l = kernel - distance
    n = l.shape[2]
    g = torch.full((M,), -float(torch.tensor(M).log()), dtype=torch.float64)
    for _ in range(module.num_iters):
        f = -float(torch.tensor(n).log()) - torch.logsumexp(l + g, -1, keepdim=True)
        c = torch.logsumexp(l + f, -2, keepdim=True)
        g = -float(torch.tensor(M).log()) - c
    kernel, distance = logits(q, p)
    want = torch.softmax(kernel - distance + g, -1) @ torch.exp(l + f - c).mT
    torch.testing.assert_close(A, want, rtol=1e-5, atol=1e-7)
    assert output.shape == x[0].shape


def test_shared_and_batched_positions_agree_and_unit_changes_with_scale():
    module = trainable(SeTAttention(E, H, num_references=M, position_dim=1, batch_first=True))
    x = tokens(module, dtype=torch.float64)
    p, r = torch.linspace(0, 1, L)[:, None], torch.linspace(0, 1, S)[:, None]
    shared = module(*x, query_position=p, key_position=r)[0]
    batched = module(*x, query_position=p.expand(B, L, 1), key_position=r.expand(B, S, 1))[0]
    torch.testing.assert_close(shared, batched)
    with torch.no_grad():
        module.reference_position.mul_(1000)
        module.position_scale.div_(1000)
    metres = module(*x, query_position=1000 * p, key_position=1000 * r)[0]
    torch.testing.assert_close(metres, shared, rtol=1e-5, atol=1e-7)
    alone = module(*(y[0] for y in x), query_position=p * 1000, key_position=r * 1000)[0]
    torch.testing.assert_close(alone, metres[0])


def test_integer_positions_are_numbers_too():
    module = SeTAttention(E, H, 0.0, True, True, num_references=M, position_dim=1)
    x = tokens(module)
    p, r = torch.arange(L)[:, None], torch.arange(S)[:, None]
    want = module(*x, query_position=p.float(), key_position=r.float())[0]
    torch.testing.assert_close(module(*x, query_position=p, key_position=r)[0], want)
    module.initialize_references(x[1], key_position=r)
    assert ((module.reference_position >= 0) & (module.reference_position < S)).all()


def test_padding_keeps_positions_and_outputs():
    """Padding to another length changes nothing, positions included: none is derived from the length."""
    module = SeTAttention(E, H, num_references=M, position_dim=1, batch_first=True)
    x = tokens(module)
    p, r = torch.rand(B, L, 1), torch.rand(B, S, 1)
    want = module(*x, query_position=p, key_position=r)[0]
    key, value, position = (F.pad(y, (0, 0, 0, 4), value=3.0) for y in (x[1], x[2], r))
    pad = (torch.arange(S + 4) >= S).expand(B, -1)
    got = module(x[0], key, value, pad, query_position=p, key_position=position)[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_half_precision_keeps_learned_epsilon_usable():
    module = SeTAttention(E, H, num_references=M, learn_epsilon=True, dtype=torch.bfloat16)
    module(*tokens(module, dtype=torch.bfloat16))[0].float().square().sum().backward()
    assert torch.isfinite(module.log_epsilon.grad).all()
    assert module.log_epsilon.grad.abs().sum() > 0


def blobs(n: int, centres: torch.Tensor, noise: float = 0.05) -> torch.Tensor:
    """n tokens around each row of centres [K, D'], in random order, of random lengths."""
    x = centres.repeat_interleave(n, 0) + noise * torch.randn(n * len(centres), centres.shape[1])
    x = F.normalize(x, dim=-1) * (0.5 + torch.rand(len(x), 1))
    return x[torch.randperm(len(x))]


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_kmeans_never_gets_worse_and_returns_unit_centres(init):
    torch.manual_seed(0)
    x = torch.randn(3, 200, 6)
    x[:, :5] = 0.0
    fits = []
    for n in (0, 1, 3, 10, 30):
        centres, labels = spherical_kmeans(x, 8, num_iters=n, init=init, generator=torch.Generator().manual_seed(1))
        assert labels.shape == (3, 200)
        similarity = F.normalize(x, dim=-1) @ centres.mT
        assert torch.equal(similarity.argmax(-1), labels)
        fits.append(similarity.amax(-1).mean())
        if n:
            torch.testing.assert_close(centres.norm(dim=-1), torch.ones(3, 8))
    assert all(b >= a - 1e-5 for a, b in itertools.pairwise(fits))
    assert fits[-1] > fits[0] + 0.02


def test_kmeans_finds_the_clusters_of_every_head():
    torch.manual_seed(0)
    truth = [F.normalize(torch.randn(4, 8), dim=-1) for _ in range(2)]
    x = torch.stack([blobs(50, t) for t in truth])
    centres, labels = spherical_kmeans(x, 4, generator=torch.Generator().manual_seed(0))
    for h in range(2):
        match = truth[h] @ centres[h].T
        assert sorted(match.argmax(1).tolist()) == [0, 1, 2, 3]
        assert match.amax(1).min() > 0.99
        assert labels[h].bincount().tolist() == [50] * 4


def test_kmeans_on_identical_tokens_and_as_many_clusters_as_tokens():
    same = torch.ones(2, 9, 3)
    centres, _ = spherical_kmeans(same, 4)
    torch.testing.assert_close(centres, F.normalize(torch.ones(2, 4, 3), dim=-1))
    x = torch.randn(1, 6, 3)
    centres, labels = spherical_kmeans(x, 6)
    assert sorted(labels[0].tolist()) == list(range(6))
    torch.testing.assert_close(centres[0, labels[0]], F.normalize(x[0], dim=-1))


def test_kmeans_restarts_empty_clusters():
    """Random seeds that are copies of one token leave clusters empty: these must go where the fit is worst."""
    x = torch.cat([torch.eye(3)[:1].expand(97, 3), torch.eye(3)[1:]])[None]
    for seed in range(3):
        centres, _ = spherical_kmeans(x, 3, init="random", generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close((centres[0] @ torch.eye(3)).amax(0), torch.ones(3))


@pytest.mark.parametrize("batch_first", [True, False])
def test_references_move_to_the_projected_keys(batch_first):
    torch.manual_seed(0)
    module = SeTAttention(E, H, num_references=3, batch_first=batch_first)
    directions = 3 * torch.randn(3, E)
    x = torch.stack([blobs(10, directions, 0.02) for _ in range(4)])
    pad = torch.zeros(4, 30, dtype=torch.bool)
    pad[0, 20:] = True
    spoilt = x.clone()
    spoilt[0, 20:] = 99.0
    given = spoilt if batch_first else spoilt.transpose(0, 1)
    before = copy.deepcopy(module).state_dict()
    module.initialize_references(given, pad, generator=torch.Generator().manual_seed(2))
    keys = F.normalize((x @ module.in_proj_weight[E : 2 * E].T).unflatten(-1, (H, D)), dim=-1)
    similarity = torch.einsum("bnhd,hmd->bnhm", keys, module.references)
    assert similarity.amax(-1)[~pad].min() > 0.98
    assert module.references.requires_grad
    assert [n for n, t in module.state_dict().items() if not torch.equal(t, before[n])] == ["references"]
    again = copy.deepcopy(module)
    mask = torch.zeros(4, 30).masked_fill(pad, -torch.inf)
    again.initialize_references(given, mask, generator=torch.Generator().manual_seed(2))
    assert torch.equal(again.references, module.references)


def test_landmarks_and_reference_positions_are_placed_too():
    torch.manual_seed(0)
    module = SeTAttention(E, H, num_references=M, value_map="rkhs", position_dim=2, kdim=10, vdim=12)
    before = copy.deepcopy(module)
    corner = 100 + torch.rand(30, B, 2)
    corner[:3] = torch.nan  # tokens without a position
    module.initialize_references(
        torch.randn(30, B, 10), value=torch.randn(30, B, 12), key_position=corner.transpose(0, 1)
    )
    assert not torch.equal(module.landmarks, before.landmarks)
    torch.testing.assert_close(module.landmarks.norm(dim=-1), torch.ones(H, D))
    assert ((module.reference_position >= 100) & (module.reference_position <= 101)).all()
    unbatched = copy.deepcopy(before)
    unbatched.initialize_references(torch.randn(30, 10), value=torch.randn(30, 12))
    assert torch.equal(unbatched.reference_position, before.reference_position)
    assert not torch.equal(unbatched.references, before.references)


def test_placed_references_transport_better_than_random_ones():
    """The point of it: the mean distance from a key to its nearest reference falls."""
    torch.manual_seed(0)
    module = SeTAttention(E, H, num_references=8, batch_first=True)
    x = torch.randn(4, 100, E)
    keys = F.normalize((x @ module.in_proj_weight[E : 2 * E].T).unflatten(-1, (H, D)), dim=-1)

    def fit() -> float:
        return torch.einsum("bnhd,hmd->bnhm", keys, module.references).amax(-1).mean().item()

    before = fit()
    module.initialize_references(x)
    assert fit() > before + 0.02


@pytest.mark.parametrize("own", [{}, {"value_map": "rkhs"}, {"learn_epsilon": True, "learn_log_mass": True}], ids=str)
def test_pooling_is_set_pool(own):
    module = trainable(SeTPooling(E, H, num_references=M, **own))
    x = torch.randn(B, S, E, dtype=torch.float64)
    mask = torch.randn(B, S, dtype=torch.float64)
    k, v = (y.unflatten(-1, (H, D)).transpose(1, 2) for y in module.kv_proj(x).chunk(2, -1))
    if module.landmarks is not None:
        v = SF.nystrom_features(v, module.landmarks, center=True)
    options = {"key_mask": mask, "reference_log_mass": module.reference_log_mass}
    if module.log_epsilon is not None:
        options["epsilon"] = module.log_epsilon.exp()
    want = merged(module, SF.set_pool(k, v, module.references, **options))
    got = module(x, mask)
    assert got.shape == (B, M, E)
    torch.testing.assert_close(got, want)


def test_pooling_ignores_padding_and_order():
    module = SeTPooling(E, H, num_references=M, position_dim=2)
    x, p = torch.randn(B, S, E), torch.rand(B, S, 2)
    want = module(x, key_position=p)
    order = torch.randperm(S)
    torch.testing.assert_close(module(x[:, order], key_position=p[:, order]), want, rtol=1e-5, atol=1e-6)
    longer, position = (F.pad(y, (0, 0, 0, 3), value=5.0) for y in (x, p))
    pad = (torch.arange(S + 3) >= S).expand(B, -1)
    torch.testing.assert_close(module(longer, pad, position), want, rtol=1e-5, atol=1e-6)
    nothing = module(x, torch.ones(B, S, dtype=torch.bool), p)
    torch.testing.assert_close(nothing, module.out_proj.bias.expand_as(nothing))


@pytest.mark.parametrize("value_map", ["linear", "rkhs"])
@pytest.mark.parametrize("content", [torch.nan, torch.inf])
def test_pooling_has_no_gradient_of_what_padding_holds(value_map, content):
    module = SeTPooling(E, H, num_references=M, value_map=value_map)
    pad = torch.arange(S).expand(B, S) >= S - 2
    x = torch.randn(B, S, E)

    def run(x: Tensor, mask: Tensor) -> list[Tensor]:
        x = x.requires_grad_()
        z = module(x, mask)
        return [z, *torch.autograd.grad(z.square().sum(), [x, *module.parameters()])]

    want = run(x.clone(), pad)
    for mask in (pad, torch.zeros(B, S).masked_fill(pad, -torch.inf)):
        torch.testing.assert_close(run(x.masked_fill(pad[..., None], content), mask), want)


def test_pooling_learns_places_references_and_pickles():
    module = SeTPooling(E, H, num_references=M, value_map="rkhs", position_dim=2)
    x, p = torch.randn(B, S, E), torch.rand(B, S, 2)
    before = module.references.clone()
    module.initialize_references(x, key_position=p)
    assert not torch.equal(module.references, before)
    module(x, key_position=p).square().sum().backward()
    assert all(q.grad is not None and torch.isfinite(q.grad).all() for q in module.parameters())
    other = pickle.loads(pickle.dumps(module))
    assert torch.equal(other(x, key_position=p), module(x, key_position=p))
    assert SeTPooling(E, H, bias=False).kv_proj.bias is None
    assert "num_references=5" in repr(module)
