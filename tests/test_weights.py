"""Attention's matrix on every backend: the budget, and output and weights of one call from one transport."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import setformer_kernels as sk
import setformer_kernels.functional as SF
from setformer_kernels.backends._extension import MODULE
from setformer_kernels.testing import CASES, Case, measure

B, H, L, S, M, D = 2, 3, 7, 9, 5, 8
# Beside the CPU kernels, whose stage is their own: what PyTorch makes of any backend's c.
FEW = ("plain", "t0", "t10", "tensors", "bool_mask", "no_key", "dropout")
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "t0": {"num_iters": 0},
    "t3": {"num_iters": 3, "reference_relaxation": 0.6},
    "dropout": {"dropout": 0.4},
    "slots": {"add_bias_kv": True, "add_zero_attn": True},
    "rkhs": {"value_map": "rkhs"},
    "positions": {"position_dim": 2},
    "learned": {"learn_epsilon": True, "learn_log_mass": True, "num_iters": 2},
    "sequence_first": {"batch_first": False},
}


def tokens(dtype: torch.dtype = torch.float64, length: int = L, keys: int = S) -> tuple[Tensor, ...]:
    """query, key, value, references."""
    sizes = ((B, H, length, D), (B, H, keys, D), (B, H, keys, D), (H, M, D))
    return tuple(torch.randn(*size, dtype=dtype, requires_grad=True) for size in sizes)


def both(average: bool, *x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    given = {"kernel": "rbf", "num_iters": 2, "dropout_p": 0.0, "seed": None, "backend": "auto"}
    return SF.attention_and_weights(*x, average=average, **(given | options))


def module_of(call: str, dtype: torch.dtype = torch.float32) -> tuple[sk.SeTAttention, dict[str, Any]]:
    """A module in training mode, and the positions it wants."""
    options = {"batch_first": True, "num_iters": 1, "num_references": M} | CALLS[call]
    module = sk.SeTAttention(H * D, H, dtype=dtype, **options)
    position = torch.rand(B, L, 2, dtype=dtype)
    return module, {"query_position": position, "key_position": position} if module.position_dim else {}


class Calls(TorchDispatchMode):
    """The names of the package's ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "setformer_kernels":
            self.names.append(func.name().split("::")[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if not c.options.get("causal")], ids=lambda case: case.name)
def test_weights_within_the_error_budget(case: Case, dtype: torch.dtype, native: str, poisoned_memory: None) -> None:
    if not measure.fits(case, dtype):
        pytest.skip("out of float16's range")
    if native != "cpu" and (case.name not in FEW or dtype == torch.float16):
        pytest.skip("PyTorch on every backend but the CPU's: other cases stand for this one")
    measure.weights(case, dtype, native).check(case.name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_output_and_weights_come_from_one_transport(call: str, training: bool) -> None:
    module, where = module_of(call)
    x = torch.randn(B, L, H * D) if module.batch_first else torch.randn(L, B, H * D)
    module.train(training)
    with Calls() as calls:
        output, weights = module(x, x, x, **where)
        output.sum().backward()
    ran = [name for name in calls.names if not name.startswith("nystrom")]
    assert ran == ["set_attention_weights", "set_attention_weights_backward"]  # no gradient reached the weights
    assert weights.shape == (B, L, L + (2 if call == "slots" else 0))
    kept = module.training and module.dropout > 0
    assert kept or torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("padding", [None, "bool", "float"])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_weights_of_the_module_are_those_of_its_output(call: str, average: bool, padding: str | None) -> None:
    """A v = o, which only the matrix has that o was made by; the values are their own weights."""
    module, where = module_of(call, torch.float64)
    with torch.no_grad():
        module.out_proj.weight.copy_(torch.eye(H * D))
    x = torch.randn(B, L, H * D, dtype=torch.float64)
    x = x if module.batch_first else x.transpose(0, 1)
    mask = {None: None, "bool": torch.rand(B, L) < 0.4, "float": torch.randn(B, L, dtype=torch.float64)}[padding]
    torch.manual_seed(1)
    output, weights = module(x, x, x, key_padding_mask=mask, average_attn_weights=False, **where)
    torch.manual_seed(1)
    mean = module(x, x, x, key_padding_mask=mask, **where)[1]
    torch.testing.assert_close(mean, weights.mean(1))
    _, k, v = module._project(x, x, x)
    _, v, _ = module._append_slots(k, v)
    heads = weights @ module._map_values(v)  # [B, H, L, D]
    order = (0, 2, 1, 3) if module.batch_first else (2, 0, 1, 3)
    torch.testing.assert_close(heads.permute(order).flatten(-2), output)
    if average:
        module.backend = "reference"
        torch.manual_seed(1)
        torch.testing.assert_close(module(x, x, x, key_padding_mask=mask, **where)[1], mean)


def test_an_unbatched_call_has_unbatched_weights() -> None:
    module, _ = module_of("plain")
    x = torch.randn(L, H * D)
    for average in (True, False):
        weights = module(x, x, x, average_attn_weights=average)[1]
        batched = module(x[None], x[None], x[None], average_attn_weights=average)[1]
        torch.testing.assert_close(weights, batched[0])


@pytest.mark.parametrize("average", [True, False])
def test_gradients_through_output_and_weights_together(average: bool, native: str) -> None:
    x = tokens(torch.float32)
    mask, epsilon = torch.randn(B, S, requires_grad=True), torch.full((H,), 0.2, requires_grad=True)
    leaves = [*x, mask, epsilon]

    def gradients(backend: str) -> tuple[Tensor, ...]:
        o, a = both(average, *x, key_mask=mask, epsilon=epsilon, backend=backend)
        return torch.autograd.grad(o.square().sum() + (a * a).sum(), leaves)

    for found, wanted in zip(gradients(native), gradients("reference"), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("num_iters", [0, 1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_through_the_weights(masked: bool, num_iters: int) -> None:
    q, k, _, y = tokens()
    mask = torch.randn(B, S, dtype=torch.float64, requires_grad=True)
    log_mass = torch.randn(H, M, dtype=torch.float64, requires_grad=True)
    hyper = [torch.full((H,), x, dtype=torch.float64, requires_grad=True) for x in (1.2, 0.3, 0.8, 0.7)]
    names = ("bandwidth", "epsilon", "key_relaxation", "reference_relaxation")

    def weights(q: Tensor, k: Tensor, y: Tensor, mask: Tensor, log_mass: Tensor, *hyper: Tensor) -> Tensor:
        given = dict(zip(names, hyper, strict=True)) | {"reference_log_mass": log_mass}
        given |= {"key_mask": mask} if masked else {}
        return SF.set_attention_weights(q, k, y, num_iters=num_iters, **given)

    assert torch.autograd.gradcheck(weights, (q, k, y, mask, log_mass, *hyper), fast_mode=True, nondet_tol=0.0)


def test_opcheck_of_factors_that_lie_head_by_head() -> None:
    arguments = (*tokens(), *[None] * 11, [1.0] * 5, "rbf", 2, 0.0, "auto", False)
    torch.library.opcheck(torch.ops.setformer_kernels.set_attention_weights, arguments)


@pytest.mark.parametrize("average", [True, False])
def test_compile_fullgraph_serves_every_length(average: bool) -> None:
    torch._dynamo.reset()
    module, _ = module_of("learned")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (6, 11, 17):
        x = torch.randn(B, n, H * D, requires_grad=True)
        mask = torch.rand(B, n) < 0.3
        results = []
        for f in (compiled, module):
            o, a = f(x, x, x, key_padding_mask=mask, average_attn_weights=average)
            results.append((o, a, *torch.autograd.grad((o * o).sum() + (a * a).sum(), [x, module.references])))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("average", [True, False])
def test_export_with_a_dynamic_length(average: bool) -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = module_of("plain")[0].eval()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.attention(x, x, x, average_attn_weights=average)

    host, n = Host(), torch.export.Dim("n", min=2, max=500)
    exported = torch.export.export(host, (torch.randn(B, 12, H * D),), dynamic_shapes={"x": {1: n}})
    x = torch.randn(B, 21, H * D)
    torch.testing.assert_close(exported.module()(x), host(x))


@pytest.mark.parametrize("average", [True, False])
def test_vmap_and_vmap_of_grad(average: bool, native: str) -> None:
    q, k, v, y = (t.detach() for t in tokens())
    many = torch.stack([y, 2 * y + 1, y.flip(0)])

    def f(y: Tensor) -> Tensor:
        return both(average, q, k, v, y, backend=native)[1]

    for function in (f, torch.func.grad(lambda y: f(y).square().sum())):
        torch.testing.assert_close(torch.vmap(function)(many), torch.stack([function(y) for y in many]))


def test_dropout_of_the_weights_is_that_of_the_output(native: str) -> None:
    q, k, v, y = (t.detach() for t in tokens(torch.float32))
    options: dict[str, Any] = {"dropout_p": 0.4, "seed": torch.tensor(11), "backend": native}
    o, a = both(False, q, k, v, y, **options)
    torch.testing.assert_close(a @ v, o)
    torch.testing.assert_close(SF.set_attention_weights(q, k, y, num_iters=2, **options), a)
    assert not torch.allclose(a.sum(-1), torch.ones(()))


def test_masked_content_never_reaches_the_weights_or_their_gradients(native: str) -> None:
    q, k, _, y = (t.detach() for t in tokens(torch.float32))
    keep = torch.tensor([[True] * 4 + [False] * (S - 4), [False] * S])
    k[~keep[:, None].expand(B, H, S)] = math.nan
    leaves = [t.requires_grad_() for t in (q, k, y)]
    a = SF.set_attention_weights(*leaves, key_mask=keep, backend=native)
    assert (a[0, ..., 4:] == 0).all()
    assert (a[1] == 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(a.square().sum(), leaves))


def test_a_backend_that_cannot_run_says_why() -> None:
    q, k, _, y = tokens()
    with pytest.raises(ValueError, match="backend 'cuda' cannot run this call"):
        SF.set_attention_weights(q, k, y, backend="cuda")


@pytest.mark.skipif(MODULE is None, reason="needs the C++ extension")
@pytest.mark.parametrize("case", ["odd_sizes", "length_63", "many_references", "small_epsilon_wide", "t0", "tensors"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set_and_number_of_threads(isa: str, threads: int, case: str) -> None:
    before = MODULE.cpu_isa(), torch.get_num_threads()
    if not MODULE.set_cpu_isa(isa):
        pytest.skip(f"this machine or build has no {isa}")
    try:
        torch.set_num_threads(threads)
        measure.weights(next(c for c in CASES if c.name == case), torch.float32, "cpu").check(case)
    finally:
        MODULE.set_cpu_isa(before[0])
        torch.set_num_threads(before[1])


@pytest.mark.skipif(MODULE is None, reason="needs the C++ extension")
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_under_a_mask_come_with_the_output_in_one_call(
    dtype: torch.dtype, average: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sk.SeTAttention(32, 4, num_references=8, batch_first=True, dtype=dtype).eval()
    x, mask = torch.randn(2, 37, 32, dtype=dtype), torch.rand(37, 37) < 0.4
    mask[5] = True  # sees no key
    expected = module(x, x, x, attn_mask=mask, average_attn_weights=average)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(SF, "set_attention_weights", None)
        actual = module(x, x, x, attn_mask=mask, average_attn_weights=average)
    for one, other in zip(actual, expected, strict=True):
        assert one.is_contiguous()
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other.detach())
    assert (actual[1][:, ..., 5, :] == 0).all()
