"""Every backend behind the ops against the float64 reference, forward and every gradient, on the shared case list."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import setformer_kernels.functional as SF
from setformer_kernels.backends.triton.host.tiles import INTERPRETED
from setformer_kernels.testing import CASES, Case, assert_within_budget, gradients, make, model_inputs
from setformer_kernels.testing.budget import cast

reference = functools.partial(SF.set_attention, backend="reference")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# A tensor operation takes 0.1 ms on Triton's interpreter.  A GPU runs everything; there float16, which shares its code
# with bfloat16 but for the range of its weights, runs these, and small gradients are averaged over fewer draws.
HALF_CASES = (
    "plain",
    "length_63",
    "tensors",
    "float_mask",
    "dot",
    "small_epsilon",
    "dropout",
    "causal_t1",
    "causal_mask",
)


def too_long(native: str, dtype: torch.dtype, case: Case, fewer: tuple[torch.dtype, ...] = (torch.float16,)) -> bool:
    """Whether other cases stand for this one on the interpreter: of the dtypes `fewer`, only HALF_CASES run."""
    return native == "triton" and INTERPRETED and dtype in fewer and case.name not in HALF_CASES


def fits(case: Case, dtype: torch.dtype) -> bool:
    """float16 holds no value above 65504 and none below 6e-8."""
    return dtype != torch.float16 or 1e-3 <= case.scale <= 10


@functools.cache
def expected(
    case_name: str, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Any], Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """(inputs, cotangent, float64 result, float32 model) on the default device, which `device` names for the cache."""
    case = next(c for c in CASES if c.name == case_name)
    tokens, keywords = make(case)
    inputs = tokens | keywords
    cotangent = torch.randn(case.B, case.H, case.L, case.E, dtype=torch.float64)
    return (inputs, cotangent, *model_inputs(reference, inputs, dtype, cotangent))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_output_and_every_gradient_within_the_error_budget(
    case: Case, dtype: torch.dtype, native: str, poisoned_memory: None
) -> None:
    if not fits(case, dtype):
        pytest.skip("out of float16's range")
    if too_long(native, dtype, case):
        pytest.skip("float16 on the interpreter: other cases stand for this one")
    inputs, cotangent, exact, model = expected(case.name, dtype, torch.get_default_device())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    fast = gradients(functools.partial(SF.set_attention, backend=native), cast(inputs, wide, dtype), cotangent)
    assert_within_budget(large(fast), exact, model, case.name)


LARGE = 64  # entries
DRAWS = 12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.P or case.tensors or case.log_mass], ids=lambda case: case.name
)
def test_small_gradients_within_the_error_budget(case: Case, dtype: torch.dtype, native: str) -> None:
    """[H] or [H, M] numbers are too few for a norm of rounding errors to mean much: many draws make one norm."""
    if too_long(native, dtype, case, fewer=(torch.float16, torch.bfloat16)):
        pytest.skip("half precision on the interpreter: other cases stand for this one")
    tokens, keywords = make(case)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    draws: list[tuple[dict[str, Tensor], ...]] = []
    for _ in range(4 if native == "triton" and INTERPRETED else DRAWS):
        drawn = {name: torch.randn_like(tokens[name]) for name in ("query", "value")}
        inputs = tokens | drawn | keywords
        cotangent = torch.randn(case.B, case.H, case.L, case.E, dtype=torch.float64)
        fast = gradients(functools.partial(SF.set_attention, backend=native), cast(inputs, wide, dtype), cotangent)
        draws.append((fast, *model_inputs(reference, inputs, dtype, cotangent)))
    found, exact, model = (
        {name: torch.stack([d[name] for d in results]) for name in draws[0][0] if draws[0][0][name].numel() < LARGE}
        for results in zip(*draws, strict=True)
    )
    if dtype == torch.float64 and case.position_spread > 1:  # float32 is no model of float64 at logits of −1000
        for name, value in found.items():
            torch.testing.assert_close(value, exact[name], rtol=1e-11, atol=1e-11 * exact[name].abs().max().item())
    else:
        assert_within_budget(found, exact, model, case.name)


def large(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results with enough entries that the norm of their rounding errors is a property of the code, not of the draw."""
    return {name: value for name, value in results.items() if value.numel() >= LARGE or name == "output"}


def pool_of(backend: str) -> Any:
    def pool(query: Tensor | None = None, query_position: Tensor | None = None, **kw: Any) -> Tensor:
        return SF.set_pool(**{k: v for k, v in kw.items() if k not in ("dropout_p", "seed", "causal")}, backend=backend)

    return pool


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if not c.options.get("causal")], ids=lambda case: case.name)
def test_pooling_within_the_error_budget(case: Case, dtype: torch.dtype, native: str) -> None:
    if too_long(native, dtype, case, fewer=(torch.bfloat16,)):
        pytest.skip("pooling's kernels are those of attention, whose cases all run in bfloat16")
    tokens, keywords = make(case)
    inputs = {k: v for k, v in (tokens | keywords).items() if not k.startswith("query")}
    cotangent = torch.randn(case.B, case.H, case.M, case.E, dtype=torch.float64)
    exact, model = model_inputs(pool_of("reference"), inputs, dtype, cotangent)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    fast = gradients(pool_of(native), cast(inputs, wide, dtype), cotangent)
    assert_within_budget(large(fast), exact, model, case.name)


FEATURES = {"plain": (100, 7, 16), "square": (65, 64, 64), "one": (1, 1, 5), "wide": (33, 16, 256)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tensor_bandwidth", [False, True])
@pytest.mark.parametrize("name", FEATURES)
def test_nystrom_features_within_the_error_budget(
    name: str, tensor_bandwidth: bool, dtype: torch.dtype, native: str
) -> None:
    torch.manual_seed(1)  # the [H]-sized gradient of the bandwidth is three rounding errors: a draw, not an average
    n, r, d = FEATURES[name]
    x, w = torch.randn(2, 3, n, d, dtype=torch.float64), torch.randn(3, r, d, dtype=torch.float64)
    x[0, 0, 0] = 0
    inputs = {"key": x, "landmarks": w}  # "key" is cast to the token dtype
    if tensor_bandwidth:
        inputs["bandwidth"] = torch.tensor([0.7, 1.0, 1.5], dtype=torch.float64)

    def features(key: Tensor, landmarks: Tensor, backend: str = "reference", **kw: Any) -> Tensor:
        return SF.nystrom_features(key, landmarks, backend=backend, **kw)

    cotangent = torch.randn(2, 3, n, r, dtype=torch.float64)
    exact, model = model_inputs(features, inputs, dtype, cotangent)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    fast = gradients(functools.partial(features, backend=native), cast(inputs, wide, dtype), cotangent)
    if dtype == torch.float64:  # both whiten in float64, two algorithms at condition (R + δ)/δ: no model of one's error
        for key, found in fast.items():
            torch.testing.assert_close(found, exact[key], rtol=1e-9, atol=1e-11 * exact[key].abs().max().item())
    else:
        assert_within_budget(fast, exact, model, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("T", [0, 1, 7])
@pytest.mark.parametrize("kind", ["plain", "masses", "minus_infinity", "wide", "relaxed", "tolerance"])
def test_sinkhorn_within_the_error_budget(kind: str, T: int, dtype: torch.dtype, native: str) -> None:
    l = 2 * torch.randn(16, 8, 37, 21, dtype=torch.float64)
    inputs: dict[str, Any] = {"log_kernel": l if kind != "wide" else 100 * l}
    if kind == "wide" and T == 0:
        pytest.skip("without an iteration exp(log_kernel) overflows")
    keywords: dict[str, Any] = {"num_iters": T}
    if kind in ("masses", "relaxed"):
        inputs |= {
            "log_a": torch.randn(16, 8, 37).double().log_softmax(-1),
            "log_b": torch.randn(16, 8, 21).double().log_softmax(-1),
        }
    if kind == "relaxed":
        inputs |= {"key_relaxation": torch.rand(16, 8).double(), "reference_relaxation": torch.rand(16, 8).double()}
    if kind == "minus_infinity":
        l[0, 0, 3], l[0, 1, :, 2], l[1, 0, 4, 5] = -math.inf, -math.inf, -math.inf
    if kind == "tolerance":
        keywords |= {"tol": 0.3}

    def plan(log_kernel: Tensor, backend: str = "reference", **kw: Any) -> Tensor:
        f, g = SF.sinkhorn(log_kernel, backend=backend, **kw, **keywords)
        return (log_kernel + f.unsqueeze(-1) + g.unsqueeze(-2)).exp()

    cotangent = torch.randn(l.shape, dtype=torch.float64)
    exact, model = model_inputs(plan, inputs, dtype, cotangent)
    assert_within_budget(
        gradients(functools.partial(plan, backend=native), cast(inputs, dtype), cotangent), exact, model
    )


@pytest.mark.parametrize("causal", [False, True])
def test_masked_content_never_reaches_an_output_or_a_gradient(causal: bool, native: str) -> None:
    q, k, v = (torch.randn(2, 3, 40, 16) for _ in range(3))
    y, keep = torch.randn(3, 8, 16), torch.rand(2, 40) < 0.5
    k[~keep[:, None].expand(2, 3, 40)], v[~keep[:, None].expand(2, 3, 40)] = math.nan, math.inf
    leaves = [t.requires_grad_() for t in (q, k, v, y)]
    o = SF.set_attention(*leaves, key_mask=keep, causal=causal, num_iters=1, backend=native)
    assert o.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(o.sum(), leaves))


def test_results_repeat_bit_for_bit(native: str) -> None:
    leaves = [torch.randn(2, 3, 200, 32, requires_grad=True) for _ in range(3)] + [
        torch.randn(3, 16, 32, requires_grad=True)
    ]
    runs = []
    for _ in range(2):
        o = SF.set_attention(*leaves, backend=native)
        runs.append([o, *torch.autograd.grad(o.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3)])
def test_output_and_gradients_keep_the_memory_order_of_the_inputs(order: tuple[int, ...], native: str) -> None:
    shape = (2, 3, 10, 16)
    inverse = [order.index(i) for i in range(4)]

    def token(e: int) -> Tensor:
        return torch.randn(*(([*shape[:3], e])[i] for i in order)).permute(inverse).requires_grad_()

    q, k, v, y = token(16), token(16), token(8), torch.randn(3, 5, 16)
    o = SF.set_attention(q, k, v, y, backend=native)
    grads = torch.autograd.grad(o.sum(), (q, k, v))
    assert o.permute(order).is_contiguous()
    assert all(g.stride() == t.stride() for g, t in zip(grads, (q, k, v), strict=True))


@pytest.mark.parametrize(("B", "L", "S"), [(0, 5, 5), (2, 0, 4), (0, 0, 3), (2, 3, 0), (2, 0, 0)])
@pytest.mark.parametrize("causal", [False, True])
def test_empty_batches_queries_and_keys(B: int, L: int, S: int, causal: bool, native: str) -> None:
    s = L if causal else S
    q, k, v = (torch.randn(B, 3, n, 8, requires_grad=True) for n in (L, s, s))
    y = torch.randn(3, 5, 8, requires_grad=True)
    o = SF.set_attention(q, k, v, y, causal=causal, num_iters=1, backend=native)
    assert o.shape == (B, 3, L, 8)
    assert s > 0 or (o == 0).all()
    assert SF.set_attention_weights(q, k, y, causal=causal).shape == (B, 3, L, s)
    assert all(g.isfinite().all() for g in torch.autograd.grad(o.sum(), (q, k, v, y)))
