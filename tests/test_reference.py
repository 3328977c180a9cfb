"""The properties of the definition, POT as an outside oracle, and gradcheck of the reference, all in float64."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import setformer_kernels.functional as SF
from setformer_kernels import reference
from setformer_kernels.arguments import normalise

ot = pytest.importorskip("ot")

B, H, L, S, M, D, E = 2, 2, 9, 11, 5, 6, 4
attention = functools.partial(SF.set_attention, backend="reference")
weights = functools.partial(SF.set_attention_weights, backend="reference")


def close(a: Tensor, b: Tensor, tolerance: float = 1e-13) -> None:
    assert (a - b).abs().max().item() <= tolerance * max(1.0, b.abs().max().item())


def tokens(length: int = L, keys: int = S) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = ((B, H, length, D), (B, H, keys, D), (B, H, keys, E), (H, M, D))
    q, k, v, y = (torch.randn(*s, dtype=torch.float64) for s in shapes)
    return q, k, v, y


def literal(q: Tensor, k: Tensor, v: Tensor, y: Tensor, log_a: Tensor, T: int, lam_a: float, lam_b: float) -> Tensor:
    """One query, one head, with loops: q [D], k [S, D], v [S, E], y [M, D] -> o [E]; β = 1, ε = 0.05."""

    def logit(x: Tensor, r: Tensor) -> Tensor:
        return (torch.exp(x @ r / (x.norm() * r.norm()) - 1) - 1) / 0.05

    s, m = len(k), len(y)
    l = torch.stack([torch.stack([logit(k[i], y[j]) for j in range(m)]) for i in range(s)])
    f, g = log_a, torch.full((m,), -math.log(m), dtype=l.dtype)
    c = torch.stack([torch.logsumexp(l[:, j] + f, 0) for j in range(m)])
    for _ in range(T):
        f = torch.stack([log_a[i] - lam_a * torch.logsumexp(l[i] + g, 0) for i in range(s)])
        c = torch.stack([torch.logsumexp(l[:, j] + f, 0) for j in range(m)])
        g = -math.log(m) - lam_b * c
    z = torch.stack([sum(torch.exp(l[i, j] + f[i] - c[j]) * v[i] for i in range(s)) for j in range(m)])
    w = torch.softmax(torch.stack([logit(q, y[j]) for j in range(m)]) + g, 0)
    return w @ z


@pytest.mark.parametrize("T", [0, 1, 3])
@pytest.mark.parametrize("lam", [(1.0, 1.0), (0.3, 0.8)])
def test_matches_the_definition_written_with_loops(T: int, lam: tuple[float, float]) -> None:
    q, k, v, y = tokens()
    o = attention(q, k, v, y, num_iters=T, key_relaxation=lam[0], reference_relaxation=lam[1])
    log_a = torch.full((S,), -math.log(S), dtype=torch.float64)
    for b, h, i in ((0, 0, 0), (1, 1, L - 1)):
        close(o[b, h, i], literal(q[b, h, i], k[b, h], v[b, h], y[h], log_a, T, *lam))


@pytest.mark.parametrize("T", [0, 1, 4])
@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_weights_are_nonnegative_with_rows_of_sum_one_and_give_the_output(T: int, lam: float) -> None:
    q, k, v, y = tokens()
    options: dict[str, Any] = {"num_iters": T, "key_relaxation": lam, "reference_relaxation": lam}
    a = weights(q, k, y, **options)
    assert (a >= 0).all()
    close(a.sum(-1), torch.ones(B, H, L, dtype=torch.float64))
    close(a @ v, attention(q, k, v, y, **options))


def test_queries_do_not_see_each_other_and_permutations_act_as_they_should() -> None:
    q, k, v, y = tokens()
    o = attention(q, k, v, y)
    close(attention(q[:, :, 3:4], k, v, y), o[:, :, 3:4])
    keys, queries = torch.randperm(S), torch.randperm(L)
    close(attention(q, k[:, :, keys], v[:, :, keys], y), o)
    close(attention(q[:, :, queries], k, v, y), o[:, :, queries])


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("T", [0, 1, 3])
def test_a_masked_key_equals_a_removed_key_and_is_never_read(kind: str, T: int) -> None:
    q, k, v, y = tokens()
    keep = torch.tensor([i % 3 != 0 for i in range(S)])
    mask = keep.expand(B, S)
    removed = attention(q, k[:, :, keep], v[:, :, keep], y, num_iters=T)
    k, v = k.clone(), v.clone()
    k[:, :, ~keep], v[:, :, ~keep] = math.nan, math.inf
    if kind == "float":
        mask = torch.where(mask, 0.25, -math.inf)
    k.requires_grad_(), v.requires_grad_()
    o = attention(q, k, v, y, num_iters=T, key_mask=mask)
    close(o, removed)
    for grad in torch.autograd.grad(o.sum(), (k, v)):
        assert grad.isfinite().all()
        assert (grad[:, :, ~keep] == 0).all()


def test_self_transport_at_convergence_is_symmetric_and_doubly_stochastic() -> None:
    q, _, _, y = tokens()
    a = weights(q, q, y, num_iters=2000, epsilon=0.3)
    close(a, a.mT, 1e-9)
    close(a.sum(-2), torch.ones(B, H, L, dtype=torch.float64), 1e-9)


def plan_of(k: Tensor, y: Tensor, log_a: Tensor, log_b: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """(cost/ε [S, M], plan [S, M]) of head 0."""
    x, opt = normalise(
        None, k, k, y, (1.0, options["epsilon"], options["lam_a"], options["lam_b"], 1.0), log_a, log_b, None, None,
        None, kernel="rbf", num_iters=options["T"], dropout_p=0.0, seed=None, backend="reference",
    )  # fmt: skip
    l, p = reference.plan(x, opt)
    return -l[0, 0], (l + p.f.unsqueeze(-1) + p.g.unsqueeze(-2)).exp()[0, 0]


def test_the_plan_equals_pot_sinkhorn_log() -> None:
    _, k, _, y = tokens()
    mask, log_mass = torch.randn(B, S, dtype=torch.float64), torch.randn(H, M, dtype=torch.float64)
    cost, plan = plan_of(k, y, mask, log_mass, epsilon=0.2, T=3000, lam_a=1.0, lam_b=1.0)
    a, b = mask[0].softmax(-1), log_mass[0].softmax(-1)
    close(plan, ot.bregman.sinkhorn_log(a, b, cost, 1.0, numItermax=5000, stopThr=1e-14), 1e-9)


@pytest.mark.parametrize("lam", [(0.5, 0.7), (0.9, 1.0)])
def test_the_plan_equals_pot_sinkhorn_unbalanced(lam: tuple[float, float]) -> None:
    _, k, _, y = tokens()
    mask, log_mass = torch.randn(B, S, dtype=torch.float64), torch.randn(H, M, dtype=torch.float64)
    cost, plan = plan_of(k, y, mask, log_mass, epsilon=0.2, T=3000, lam_a=lam[0], lam_b=lam[1])
    rho = tuple(math.inf if x == 1.0 else x / (1 - x) for x in lam)  # λ = ρ/(ρ + ε), with ε = 1 on cost/ε
    expected = ot.unbalanced.sinkhorn_unbalanced(
        mask[0].softmax(-1), log_mass[0].softmax(-1), cost, 1.0, rho, reg_type="kl", numItermax=5000, stopThr=1e-14,
    )  # fmt: skip
    close(plan, expected, 1e-8)


@pytest.mark.parametrize("lam", [(1.0, 1.0), (0.6, 0.8)])
def test_sinkhorn_equals_pot_on_any_cost(lam: tuple[float, float]) -> None:
    l = torch.randn(3, S, M, dtype=torch.float64) * 2
    log_a, log_b = (
        torch.randn(3, S, dtype=torch.float64).log_softmax(-1),
        torch.randn(M, dtype=torch.float64).log_softmax(-1),
    )
    f, g = SF.sinkhorn(
        l, log_a, log_b, num_iters=2000, key_relaxation=lam[0], reference_relaxation=lam[1], backend="reference"
    )
    plan = (l + f.unsqueeze(-1) + g.unsqueeze(-2)).exp()
    rho = tuple(math.inf if x == 1.0 else x / (1 - x) for x in lam)
    for i in range(3):
        expected = ot.unbalanced.sinkhorn_unbalanced(
            log_a[i].exp(), log_b.exp(), -l[i], 1.0, rho, reg_type="kl", numItermax=5000, stopThr=1e-14,
        )  # fmt: skip
        close(plan[i], expected, 1e-8)


def test_sinkhorn_tolerance_stops_each_problem_by_itself() -> None:
    l = torch.stack([torch.zeros(S, M), torch.randn(S, M)]).double()
    f, g = SF.sinkhorn(l, num_iters=500, tol=1e-6, backend="reference")
    close(f[0], SF.sinkhorn(l[0], num_iters=1, backend="reference")[0])
    plan = (l + f.unsqueeze(-1) + g.unsqueeze(-2)).exp()
    close(plan.sum(-1), torch.full((2, S), 1 / S, dtype=torch.float64), 1e-5)


def test_sinkhorn_with_minus_infinity_anywhere_has_no_nan() -> None:
    l = torch.randn(2, S, M, dtype=torch.float64)
    l[0, 2], l[0, :, 1], l[1, 0, 0] = -math.inf, -math.inf, -math.inf
    log_a = torch.zeros(2, S, dtype=torch.float64)
    log_a[1, 3] = -math.inf
    l.requires_grad_()
    f, g = SF.sinkhorn(l, log_a.log_softmax(-1), num_iters=5, backend="reference")
    plan = (l + f.unsqueeze(-1) + g.unsqueeze(-2)).exp()
    assert plan.isfinite().all()
    assert (plan[0, 2] == 0).all()
    assert (plan[0, :, 1] == 0).all()
    assert (plan[1, 3] == 0).all()
    assert torch.autograd.grad(plan.square().sum(), l)[0].isfinite().all()


def per_query(q: Tensor, k: Tensor, v: Tensor, y: Tensor, mask: Tensor, **options: Any) -> Tensor:
    """Query-dependent masks by the definition: one call a query, its mask row [B, H, S] as the key mask of a head."""
    o = q.new_zeros(B, H, q.shape[2], E)
    for b in range(B):
        for h in range(H):
            for i in range(q.shape[2]):
                one = slice(h, h + 1)
                o[b, h, i] = attention(
                    q[b : b + 1, one, i : i + 1], k[b : b + 1, one], v[b : b + 1, one], y[one],
                    key_mask=mask[b, h, i : i + 1], **options,
                )[0, 0, 0]  # fmt: skip
    return o


@pytest.mark.parametrize("epsilon", [0.05, 0.02, 0.001])  # products in the dtype, in float64, and the log domain
@pytest.mark.parametrize(("T", "lam"), [(0, 1.0), (1, 1.0), (3, 1.0), (3, 0.6), (2, 0.0)])
def test_a_query_dependent_mask_equals_one_call_per_query(epsilon: float, T: int, lam: float) -> None:
    q, k, v, y = tokens()
    mask = torch.randn(B, H, L, S, dtype=torch.float64)
    mask[torch.rand(B, H, L, S) < 0.3] = -math.inf
    mask[1, 0, 2] = -math.inf
    options: dict[str, Any] = {"num_iters": T, "key_relaxation": lam, "reference_relaxation": lam, "epsilon": epsilon}
    o = attention(q, k, v, y, attn_mask=mask, **options)
    close(o, per_query(q, k, v, y, mask, **options), 1e-11)
    assert (o[1, 0, 2] == 0).all()
    close(weights(q, k, y, attn_mask=mask, **options) @ v, o)


@pytest.mark.parametrize("T", [0, 1, 3])
def test_causal_equals_one_call_per_query_and_never_looks_ahead(T: int) -> None:
    q, k, v, y = tokens(40, 40)
    key_mask = torch.randn(B, 40, dtype=torch.float64)
    key_mask[:, :3] = -math.inf
    mask = (
        key_mask[:, None, None]
        .expand(B, H, 40, 40)
        .masked_fill(torch.ones(40, 40, dtype=torch.bool).triu(1), -math.inf)
    )
    o = attention(q, k, v, y, causal=True, num_iters=T, key_mask=key_mask)
    close(o, per_query(q, k, v, y, mask, num_iters=T), 1e-12)
    close(weights(q, k, y, causal=True, num_iters=T, key_mask=key_mask) @ v, o, 1e-12)
    k[:, :, 20:], v[:, :, 20:] = 1.0, 5.0
    close(attention(q, k, v, y, causal=True, num_iters=T, key_mask=key_mask)[:, :, :20], o[:, :, :20])


def test_dense_products_and_logs_agree_where_the_bound_is_read_off_or_unknown() -> None:
    q, k, v, y = tokens()
    mask = torch.randn(L, S, dtype=torch.float64)
    options: dict[str, Any] = {"attn_mask": mask, "epsilon": torch.full((H,), 0.05, dtype=torch.float64)}
    read = attention(q, k, v, y, **options)
    unknown = torch.vmap(lambda q: attention(q, k, v, y, **options))(q[None])[0]
    close(read, unknown, 1e-12)
    close(read, attention(q, k, v, y, attn_mask=mask, epsilon=0.05), 1e-12)


def test_an_all_zero_mask_equals_no_mask() -> None:
    q, k, v, y = tokens()
    o = attention(q, k, v, y)
    close(attention(q, k, v, y, attn_mask=torch.zeros(L, S)), o)
    close(attention(q, k, v, y, attn_mask=torch.ones(B, L, S, dtype=torch.bool)), o)
    close(attention(q, k, v, y, key_mask=torch.zeros(B, S)), o)


def test_a_query_that_sees_no_key_gives_zero_with_zero_gradients() -> None:
    q, k, v, y = (t.requires_grad_() for t in tokens())
    key_mask = torch.ones(B, S, dtype=torch.bool)
    key_mask[0] = False
    o = attention(q, k, v, y, key_mask=key_mask)
    assert (o[0] == 0).all()
    assert (weights(q, k, y, key_mask=key_mask)[0] == 0).all()
    grads = torch.autograd.grad(o.sum(), (q, k, v, y))
    assert all(g.isfinite().all() for g in grads)
    assert all((g[0] == 0).all() for g in grads[:3])


def test_positions_move_the_logits_and_a_token_without_position_has_no_term() -> None:
    q, k, v, y = tokens()
    kp, qp, rp = torch.randn(B, S, 2).double(), torch.randn(L, 2).double(), torch.randn(H, M, 2).double()
    kappa = reference.kernel_matrix(k, y, torch.ones(()), "rbf")
    distance = torch.cdist(kp.unsqueeze(1), rp).square()
    l = (kappa - 1) / 0.05 - 0.25 * distance
    x, opt = normalise(
        q, k, v, y, (1.0, 0.05, 1.0, 1.0, 0.5), None, None, qp, kp, rp, kernel="rbf", num_iters=3, dropout_p=0.0,
        seed=None, backend="reference",
    )  # fmt: skip
    close(reference.plan(x, opt)[0], l, 1e-12)
    kp[:, 0] = math.nan
    x, opt = normalise(
        q, k, v, y, (1.0, 0.05, 1.0, 1.0, 0.5), None, None, qp, kp, rp, kernel="rbf", num_iters=3, dropout_p=0.0,
        seed=None, backend="reference",
    )  # fmt: skip
    close(reference.plan(x, opt)[0][:, :, 0], ((kappa - 1) / 0.05)[:, :, 0], 1e-12)


def test_nystrom_features_reproduce_the_kernel_on_the_landmarks() -> None:
    w = torch.randn(H, 7, D, dtype=torch.float64)
    psi = SF.nystrom_features(3 * w.expand(B, H, 7, D), w, ridge=1e-12, backend="reference")
    close(
        psi @ psi.mT,
        9
        * w.norm(dim=-1, keepdim=True)
        * w.norm(dim=-1).unsqueeze(-2)
        * reference.kernel_matrix(w, w, torch.ones(()), "rbf"),
        1e-6,
    )


@pytest.mark.parametrize("center", [False, True])
def test_nystrom_features_of_the_smallest_ridge(center: bool) -> None:
    x, w = torch.randn(B, H, 7, D, dtype=torch.float64), torch.eye(4, D, dtype=torch.float64).expand(H, 4, D)
    want, got = (
        SF.nystrom_features(x, w, ridge=ridge, center=center, backend="reference") for ridge in (1e-30, 5e-324)
    )
    close(got, want, 1e-12)


@pytest.mark.parametrize("condition", [1e1, 1e5, 1e9])
def test_inverse_sqrt_by_products_matches_eigh(condition: float) -> None:
    q, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))
    eigenvalues = torch.logspace(0, -math.log10(condition), 12, dtype=torch.float64)
    found = reference.inverse_sqrt(q * eigenvalues @ q.mT, 1.0, 1 / condition)
    close(
        found / math.sqrt(condition), q * eigenvalues.rsqrt() @ q.mT / math.sqrt(condition), 1e-15 * condition + 1e-12
    )


def test_dropout_follows_philox4x32_10() -> None:
    from setformer_kernels.reference.dropout import dropout, philox

    # Random123's known answers: counter and key all zero, and all ones (the counters here end in two zero words).
    assert philox(torch.tensor(0), torch.tensor(0)).item() == 0x6627E8D5
    w = torch.rand(2, 3, 50, 20, dtype=torch.float64) + 0.5
    kept = dropout(w, 0.3, torch.tensor(7))
    share = (kept > 0).double().mean().item()
    assert abs(share - 0.7) < 0.02
    close(kept[kept > 0], w[kept > 0] / 0.7)


GRADCHECK: dict[str, dict[str, Any]] = {
    "plain": {},
    "t0": {"num_iters": 0},
    "relaxed": {"key_relaxation": 0.5, "reference_relaxation": 0.7},
    "dot": {"kernel": "dot", "epsilon": 1.0},
    "causal": {"causal": True, "num_iters": 1},
    "dense": {"causal": True, "num_iters": 2},
    "dense_logs": {"causal": True, "num_iters": 2, "epsilon": 0.003},
    "dropout": {"dropout_p": 0.4, "seed": torch.tensor(3)},
}


@pytest.mark.parametrize("name", GRADCHECK)
def test_gradcheck_to_second_order(name: str) -> None:
    q, k, v, y = (t[..., :3, :].detach().requires_grad_() for t in tokens())
    q, k, v = (t[:1, :, :, :3].detach().requires_grad_() for t in (q, k, v))
    y = y[..., :3].detach().requires_grad_()
    mask = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    log_mass = torch.randn(H, 3, dtype=torch.float64, requires_grad=True)

    def f(*t: Tensor) -> Tensor:
        return attention(*t[:4], key_mask=t[4], reference_log_mass=t[5], **{"epsilon": 0.3} | GRADCHECK[name])

    assert torch.autograd.gradcheck(f, (q, k, v, y, mask, log_mass), atol=1e-6)
    assert torch.autograd.gradgradcheck(f, (q, k, v, y, mask, log_mass), atol=1e-5)


def test_gradcheck_of_pool_features_and_sinkhorn() -> None:
    _, k, v, y = (t[:1, :, :4].detach().requires_grad_() if t.ndim == 4 else t.requires_grad_() for t in tokens())
    hyper = [torch.full((H,), x, dtype=torch.float64, requires_grad=True) for x in (1.2, 0.3, 0.8, 0.7)]

    def pool(k: Tensor, v: Tensor, y: Tensor, *h: Tensor) -> Tensor:
        names = ("bandwidth", "epsilon", "key_relaxation", "reference_relaxation")
        return SF.set_pool(k, v, y, **dict(zip(names, h, strict=True)), backend="reference")

    assert torch.autograd.gradcheck(pool, (k, v, y, *hyper))
    for center in (False, True):
        features = functools.partial(SF.nystrom_features, backend="reference", center=center)
        assert torch.autograd.gradcheck(lambda x, w, b: features(x, w, bandwidth=b), (k, y, hyper[0]))  # noqa: B023
    assert torch.autograd.gradgradcheck(lambda b: features(k, y, bandwidth=b), (hyper[0],))
    l = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda l: SF.sinkhorn(l, num_iters=3, backend="reference"), (l,))


def test_forward_mode_and_vmap_work_on_the_reference() -> None:
    q, k, v, y = tokens()
    tangent = torch.randn_like(k)
    _, moved = torch.func.jvp(lambda k: attention(q, k, v, y), (k,), (tangent,))
    step = 1e-6
    close(moved, (attention(q, k + step * tangent, v, y) - attention(q, k - step * tangent, v, y)) / (2 * step), 1e-7)
    batched = torch.vmap(lambda q, k, v: attention(q[None], k[None], v[None], y)[0])(q, k, v)
    close(batched, attention(q, k, v, y))
