"""Transport to convergence behind attention, its halves, pooling and the modules."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import setformer_kernels.functional as SF
from setformer_kernels import SeTAttention, SeTPooling

F64 = torch.float64
B, H, L, S, M, D, E, P = 2, 2, 5, 9, 4, 6, 3, 2
NEWTON: dict[str, Any] = {"method": "newton", "grad": "implicit", "num_iters": 40, "tol": 1e-13}
SINKHORN: dict[str, Any] = {"grad": "implicit", "num_iters": 3000, "tol": 1e-14}
UNROLLED: dict[str, Any] = {"num_iters": 3000, "tol": 1e-14}
ON_PYTORCH = {"backend": "reference"}
PLAIN: dict[str, Any] = {"num_iters": 300, "backend": "reference"}


def tokens(dtype: torch.dtype = F64, keys: int = S) -> list[Tensor]:
    shapes = ((B, H, L, D), (B, H, keys, D), (B, H, keys, E), (H, M, D))
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


def rich() -> dict[str, Any]:
    mask = torch.randn(B, S, dtype=F64)
    mask[0, 3:] = -math.inf
    tensors = {
        "key_mask": mask.requires_grad_(),
        "reference_log_mass": torch.randn(H, M, dtype=F64, requires_grad=True),
        "key_relaxation": torch.tensor([0.9, 0.7], dtype=F64, requires_grad=True),
        "reference_position": torch.rand(H, M, P, dtype=F64, requires_grad=True),
        "epsilon": torch.tensor([0.1, 0.2], dtype=F64, requires_grad=True),
    }
    return tensors | {"reference_relaxation": 0.95, "key_position": torch.rand(S, P, dtype=F64)}


def gradients(out: Tensor | tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    outs = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(1)
    loss = sum((t * torch.randn(t.shape, dtype=t.dtype, generator=generator)).sum() for t in outs)
    assert isinstance(loss, Tensor)
    return torch.autograd.grad(loss, leaves)


def same(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    assert (a - b).norm() <= tolerance * max(b.norm(), torch.tensor(1e-3))


@pytest.mark.parametrize(
    "how", [NEWTON, SINKHORN, UNROLLED, NEWTON | ON_PYTORCH], ids=["newton", "sinkhorn", "unrolled", "pytorch"]
)
@pytest.mark.parametrize("given", ["plain", "rich"])
@pytest.mark.parametrize("name", ["set_attention", "set_pool", "set_transport"])
def test_converged_calls_are_those_of_many_iterations(name: str, given: str, how: dict[str, Any]) -> None:
    q, k, v, y = tokens()
    inputs = [q, k, v, y] if name == "set_attention" else [k, v, y]
    options: dict[str, Any] = rich() if given == "rich" else {"epsilon": 0.4}
    if given == "rich" and name == "set_attention":
        options["query_position"] = torch.rand(L, P, dtype=F64)
    leaves = inputs + [t for t in options.values() if isinstance(t, Tensor) and t.requires_grad]
    function = getattr(SF, name)
    found, want = function(*inputs, **options, **how), function(*inputs, **options, **PLAIN)
    if name == "set_transport" and given == "plain":
        found, want = (SF.SetMemory(t.z, t.g - t.g.mean(-1, keepdim=True)) for t in (found, want))  # up to a constant
    for a, b in zip(found, want, strict=True):
        same(a, b)
    for a, b in zip(gradients(found, leaves), gradients(want, leaves), strict=True):
        same(a, b)


@pytest.mark.parametrize("how", [NEWTON, SINKHORN], ids=["newton", "sinkhorn"])
def test_weights_halves_and_groups_agree(how: dict[str, Any]) -> None:
    q, k, v, y = tokens()
    o = SF.set_attention(q, k, v, y, **how)
    weights = SF.set_attention_weights(q, k, y, **how)
    same(weights @ v, o)
    same(SF.set_read(q, SF.set_transport(k, v, y, **how), y), o, 1e-12)
    grouped = torch.cat([q, q.flip(2)], 1)[:, [0, 2, 1, 3]]
    same(SF.set_attention(grouped, k, v, y, **how)[:, ::2], o, 1e-12)
    same(SF.set_attention_weights(grouped, k, y, **how)[:, ::2], weights, 1e-12)


def test_gradcheck_of_converged_attention() -> None:
    options = rich() | {"query_position": torch.rand(L, P, dtype=F64)}
    named = {name: t for name, t in options.items() if isinstance(t, Tensor) and t.requires_grad}

    def attention(q: Tensor, k: Tensor, v: Tensor, y: Tensor, *rest: Tensor) -> Tensor:
        return SF.set_attention(q, k, v, y, **options | dict(zip(named, rest, strict=True)), **NEWTON)

    assert torch.autograd.gradcheck(attention, (*tokens(), *named.values()), fast_mode=True)


def test_info_starts_the_next_call() -> None:
    q, k, v, y = tokens(torch.float32)
    how = NEWTON | {"tol": 1e-5, "epsilon": 0.01, "return_info": True}
    o, cold = SF.set_attention(q, k, v, y, **how)
    assert cold.iters.shape == (B, H)
    assert cold.potential.shape == (B, H, M)
    assert cold.converged.all()
    again, warm = SF.set_attention(q, k, v, y, **how, initial_potential=cold.potential)
    assert (warm.iters <= 3).all()
    assert (warm.iters < cold.iters).all()
    torch.testing.assert_close(again, o, rtol=1e-3, atol=1e-4)
    z, info = SF.set_pool(k, v, y, **how)
    assert z.shape == (B, H, M, E)
    assert torch.equal(info.iters, cold.iters)
    memory, info = SF.set_transport(k, v, y, **how)
    assert torch.equal(memory.z, z)
    assert torch.equal(memory.g, info.potential)


@pytest.mark.parametrize("how", [NEWTON, SINKHORN, UNROLLED], ids=["newton", "sinkhorn", "unrolled"])
def test_without_a_key_everything_is_zero_and_the_info_says_so(how: dict[str, Any]) -> None:
    q, k, v, y = tokens()
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[0] = False
    o, info = SF.set_attention(q, k, v, y, key_mask=mask, return_info=True, **how)
    assert (o[0] == 0).all()
    assert info.error.isfinite().all()
    assert info.converged.tolist() == [[False, False], [True, True]]
    found = gradients(o, [q, k, v, y])
    assert all(gradient.isfinite().all() for gradient in found)
    assert all((gradient[0] == 0).all() for gradient in found[:3])
    q, k, v, y = tokens(keys=0)
    assert (SF.set_attention(q, k, v, y, **how) == 0).all()


@pytest.mark.parametrize("how", [NEWTON, SINKHORN, UNROLLED], ids=["newton", "sinkhorn", "unrolled"])
def test_an_empty_batch(how: dict[str, Any]) -> None:
    q, k, v, y = (t.detach() for t in tokens())
    o, info = SF.set_attention(q[:0], k[:0], v[:0], y, **how, return_info=True)
    assert o.shape == (0, H, L, E)
    assert info.error.shape == info.iters.shape == (0, H)
    assert SF.set_pool(k[:0], v[:0], y, **how).shape == (0, H, M, E)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_solved_in_single(dtype: torch.dtype) -> None:
    q, k, v, y = tokens(torch.float32)
    how = NEWTON | {"tol": 1e-4}
    want = SF.set_attention(*[t.to(dtype).float() for t in (q, k, v)], y, **how)
    found = SF.set_attention(*[t.to(dtype) for t in (q, k, v)], y, **how)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), want, rtol=2e-2, atol=2e-2)
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype=dtype):
            cast, info = SF.set_attention(q, k, v, y, **how, return_info=True)
        assert cast.dtype == dtype
        assert info.converged.all()
        assert all(t.isfinite().all() for t in gradients(cast, [q, k, v, y]))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"causal": True}, ValueError, "all see the same keys: got causal=True as well"),
        ({"attn_mask": torch.ones(L, S, dtype=torch.bool)}, ValueError, "all see the same keys: got attn_mask as well"),
        ({"backend": "cuda"}, ValueError, "has no kernels for tol, grad='implicit', method='newton'"),
        ({"num_iters": 1}, ValueError, "num_iters must be ≥ 2 with grad='implicit'"),
        ({"tol": -1.0}, ValueError, "tol must be finite and ≥ 0"),
        ({"grad": "unrolled"}, ValueError, "grad must be 'implicit' with method='newton'"),
        ({"initial_potential": torch.zeros(B, M)}, ValueError, r"initial_potential must have shape \[2, 2, 4\]"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refusals(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SF.set_attention(*tokens(torch.float32), **NEWTON | given)


def test_nested_tensors_are_to_be_padded() -> None:
    nested = torch.nested.nested_tensor([torch.randn(n, H, D) for n in (3, 5)], layout=torch.jagged).transpose(1, 2)
    with pytest.raises(ValueError, match="nested tensors must be padded"):
        SF.set_pool(nested, nested, torch.randn(H, M, D), tol=1e-3)


def test_a_false_of_numpy_asks_for_nothing() -> None:
    """As False does: what cannot be solved to convergence is answered, by the same kernels."""
    q, k, v, y = (t.detach() for t in tokens(torch.float32))
    given = {"return_info": np.False_}
    assert torch.equal(SF.set_attention(q, k, v, y, causal=True, **given), SF.set_attention(q, k, v, y, causal=True))
    nested = torch.nested.nested_tensor([torch.randn(n, H, D) for n in (3, 5)], layout=torch.jagged).transpose(1, 2)
    assert torch.equal(SF.set_pool(nested, nested, y, **given), SF.set_pool(nested, nested, y))
    for found, want in zip(SF.set_transport(k, v, y, **given), SF.set_transport(k, v, y), strict=True):
        assert torch.equal(found, want)
    with torch.no_grad(), pytest.raises(TypeError, match="return_info must be a bool, got"):
        SF.set_attention(q, k, v, y, return_info=0)


@pytest.mark.parametrize("heads", [2, 4])
def test_modules_converge(heads: int) -> None:
    x = torch.randn(3, 11, 8, dtype=F64)
    padding = torch.zeros(3, 11, dtype=torch.bool)
    padding[1, 6:] = True
    sizes: dict[str, Any] = {"num_references": 5, "epsilon": 0.1, "dtype": F64}
    module = SeTAttention(8, 4, batch_first=True, num_kv_heads=heads, **sizes, **NEWTON)
    plain = SeTAttention(8, 4, batch_first=True, num_kv_heads=heads, **sizes, num_iters=500, backend="reference")
    plain.load_state_dict(module.state_dict())
    assert "method=newton" in repr(module)
    assert "method" not in repr(plain)
    found, weights = module(x, x, x, key_padding_mask=padding)
    want, expected = plain(x, x, x, key_padding_mask=padding)
    same(found, want)
    same(weights, expected)
    same(module(x, x, x, key_padding_mask=padding, need_weights=False)[0], found, 1e-12)
    same(module(x, memory=module.memory(x, x, padding))[0], found, 1e-12)
    for a, b in zip(gradients(found, [*module.parameters()]), gradients(want, [*plain.parameters()]), strict=True):
        same(a, b, 1e-9)
    with pytest.raises(ValueError, match="all see the same keys"):
        module(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match="num_iters must be ≥ 2"):
        SeTAttention(8, 4, grad="implicit")


def test_modules_pad_what_is_nested() -> None:
    rows = [torch.randn(n, 8, dtype=F64) for n in (3, 6)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    module = SeTAttention(8, 2, batch_first=True, num_references=3, dtype=F64, **NEWTON)
    pooling = SeTPooling(8, 2, num_references=3, dtype=F64, **NEWTON)
    found = module(nested, nested, nested, need_weights=False)[0]
    for row, out in zip(rows, found.unbind(), strict=True):
        same(out, module(row, row, row, need_weights=False)[0], 1e-12)
    for row, out in zip(rows, pooling(nested), strict=True):
        same(out, pooling(row[None])[0], 1e-12)
    many = SeTPooling(8, 2, num_references=3, dtype=F64, num_iters=800, backend="reference")
    many.load_state_dict(pooling.state_dict())
    same(pooling(rows[1][None]), many(rows[1][None]))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile itself does
def test_a_compiled_module_reads_nothing_back() -> None:
    module = SeTPooling(8, 2, num_references=3, num_iters=3, tol=1e-3, method="newton", grad="implicit", dtype=F64)
    x = torch.randn(2, 7, 8, dtype=F64)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), module(x))
    found, want = (torch.autograd.grad(f(x).square().sum(), [*module.parameters()]) for f in (compiled, module))
    torch.testing.assert_close(found, want)
