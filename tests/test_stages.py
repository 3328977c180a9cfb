"""Transport one pass at a time over shares of the keys is transport."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import setformer_kernels.functional as SF
from setformer_kernels import stages
from setformer_kernels.arguments import normalise
from setformer_kernels.problem import Operands, Options

B, H, S, M, D, E, P = 2, 2, 23, 5, 16, 8, 2
CUTS = ((0, 9), (9, 10), (10, S))


def call(backend: str, dtype: torch.dtype, T: int) -> tuple[Operands, Options]:
    """A transport with everything that a pass reads."""
    k, v, y = torch.randn(B, H, S, D), torch.randn(B, S, H, E).transpose(1, 2), torch.randn(H, M, D)
    mask = torch.randn(B, S)
    mask[0, 4:12] = -torch.inf
    hyper = (1.0, torch.rand(H) + 0.1, 0.8, torch.rand(H), torch.rand(H))
    places = None, torch.randn(S, P), torch.randn(H, M, P)
    wide = [t.to(dtype) if isinstance(t, Tensor) else t for t in (k, v, y, mask, *places[1:])]
    return normalise(
        None, *wide[:3], hyper, wide[3], torch.randn(H, M), None, *wide[4:], kernel="rbf", num_iters=T, dropout_p=0.0,
        seed=None, backend=backend,
    )  # fmt: skip


def share(x: Operands, first: int, last: int) -> Operands:
    cut = {name: getattr(x, name)[:, :, first:last] for name in ("key", "value", "log_a", "key_position")}
    return x._replace(**cut)


@pytest.mark.parametrize("T", [1, 3])
def test_shares_of_the_keys_merge_to_the_transport(T: int, native: str) -> None:
    dtype = torch.float32 if native == "triton" else torch.float64
    x, opt = call(native, dtype, T)
    assert x.log_b is not None
    assert x.reference_relaxation is not None
    shares = [share(x, *cut) for cut in CUTS]
    g = x.log_b.expand(B, H, M)
    for _ in range(T - 1):
        c = torch.stack([stages.column_pass(one, opt, g) for one in shares]).logsumexp(0)
        g = x.log_b - x.reference_relaxation[:, None] * c
    parts = [stages.pool_pass(one, opt, g) for one in shares]
    c = torch.stack([c for _, c in parts]).logsumexp(0)
    z = torch.stack([z * (own - c).exp().unsqueeze(-1) for z, own in parts]).sum(0)
    wanted = SF.ops.memory.set_transport(*x, *opt)
    found = z, x.log_b - x.reference_relaxation[:, None] * c
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(found, tuple(wanted[:2]), **tolerance)


@pytest.mark.parametrize("pools", [True, False])
def test_gradients_of_a_pass(pools: bool, native: str) -> None:
    dtype = torch.float32 if native == "triton" else torch.float64
    x, opt = call(native, dtype, 1)
    g, needs = torch.randn(B, H, M, dtype=dtype), [n not in ("key_position", "seed") for n in Operands._fields]
    z, c = stages.pool_pass(x, opt, g)
    d_z, d_c = torch.randn_like(z), torch.randn_like(c)
    if pools:
        grads, d_g = stages.pool_backward(x, opt, g, z, c, d_z, d_c, needs)
    else:
        grads, d_g = stages.column_backward(x, opt, g, c, d_c, needs)
    assert torch.equal(stages.column_pass(x, opt, g), c) or not pools
    names = [n for n, t in zip(Operands._fields, grads, strict=True) if t is not None]
    leaves = {n: getattr(x, n).detach().double().requires_grad_() for n in names}
    potentials = g.detach().double().requires_grad_()
    wide = x._replace(**{n: t.double() for n in x._fields if isinstance(t := getattr(x, n), Tensor)} | leaves)
    outputs = []
    for b in range(B):  # the definition, a batch element at a time, whose log b are its potentials
        one = wide._replace(**{n: getattr(wide, n)[b : b + 1] for n in ("key", "value", "log_a", "key_position")})
        outputs.append(SF.reference.transport(one._replace(log_b=potentials[b]), opt))
    loss = sum((d_c[b].double() * outputs[b][2][0, :, 0]).sum() for b in range(B))
    if pools:
        loss = loss + sum((d_z[b].double() * outputs[b][0][0]).sum() for b in range(B))
    found = [*(t for t in grads if t is not None), d_g]
    wanted = torch.autograd.grad(loss, [*leaves.values(), potentials], materialize_grads=True, allow_unused=True)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    for name, one, other in zip([*names, "g"], found, wanted, strict=True):
        assert (one.double() - other).norm() <= tolerance * (1 + other.norm()), name
