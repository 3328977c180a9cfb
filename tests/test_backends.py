"""Every backend behind the ops against the float64 reference, forward and every gradient, on the shared case list."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import setformer_kernels.functional as SF
from setformer_kernels.backends.triton.host.tiles import INTERPRETED
from setformer_kernels.testing import (
    ALL_CASES,
    CASES,
    Case,
    assert_typically_within_budget,
    assert_within_budget,
    measure,
)

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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_output_and_every_gradient_within_the_error_budget(
    case: Case, dtype: torch.dtype, native: str, poisoned_memory: None
) -> None:
    if not measure.fits(case, dtype):
        pytest.skip("out of float16's range")
    if too_long(native, dtype, case):
        pytest.skip("float16 on the interpreter: other cases stand for this one")
    measure.attention(case, dtype, native).check(case.name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", measure.SMALL_CASES)
def test_small_gradients_within_the_error_budget(name: str, dtype: torch.dtype, native: str) -> None:
    """[H] or [H, M] numbers are too few for a norm of their rounding errors: the typical error of many heads."""
    case = ALL_CASES[name]
    if too_long(native, dtype, case, fewer=(torch.float16, torch.bfloat16)):
        pytest.skip("half precision on the interpreter: other cases stand for this one")
    draws = 1 if native == "triton" and INTERPRETED else measure.DRAWS
    found, exact, model = measure.small_gradients(case, dtype, native, draws=draws)
    if dtype == torch.float64 and case.position_spread > 1:  # float32 is no model of float64 at logits of −1000
        for key, value in found.items():
            torch.testing.assert_close(value, exact[key], rtol=1e-11, atol=1e-11 * exact[key].abs().max().item())
    else:
        assert_typically_within_budget(found, exact, model, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if not c.options.get("causal")], ids=lambda case: case.name)
def test_pooling_within_the_error_budget(case: Case, dtype: torch.dtype, native: str) -> None:
    if too_long(native, dtype, case, fewer=(torch.bfloat16,)):
        pytest.skip("pooling's kernels are those of attention, whose cases all run in bfloat16")
    measure.pooling(case, dtype, native).check(case.name)


FEW_CENTRED = (
    ("centred_few", True, torch.float32),  # 24 heads for the gradient of the bandwidth
    ("centred_few", False, torch.float32),
    ("centred_few", False, torch.bfloat16),
    ("centred_square", False, torch.float32),  # landmarks in several blocks
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tensor_bandwidth", [False, True])
@pytest.mark.parametrize("name", measure.FEATURES)
def test_nystrom_features_within_the_error_budget(
    name: str, tensor_bandwidth: bool, dtype: torch.dtype, native: str
) -> None:
    if native == "triton" and INTERPRETED and "centred" in name and (name, tensor_bandwidth, dtype) not in FEW_CENTRED:
        pytest.skip("on the interpreter other cases stand for this one")
    found = measure.features(name, tensor_bandwidth, dtype, native)
    if dtype == torch.float64:  # both whiten in float64, two algorithms at condition (R + δ)/δ: no model of one's error
        for key, value in found.fast.items():
            exact = found.exact[key]
            torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-11 * exact.abs().max().item())
    else:
        assert_within_budget(*found.only(lambda key, value: not measure.single(key, value)), name)
        assert_typically_within_budget(*found.only(measure.single), name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("T", [0, 1, 7])
@pytest.mark.parametrize("kind", measure.SINKHORN)
def test_sinkhorn_within_the_error_budget(kind: str, T: int, dtype: torch.dtype, native: str) -> None:
    if kind == "wide" and T == 0:
        pytest.skip("without an iteration exp(log_kernel) overflows")
    found = measure.sinkhorn(kind, T, dtype, native)
    assert_within_budget(*found.only(lambda key, value: not measure.single(key, value)))
    assert_typically_within_budget(*found.only(measure.single))


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

    def token(e: int) -> torch.Tensor:
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


# Marginals of any relaxation, T, and whether keys have masses: relaxed, f and c of far positions are large as well.
RELAXED = {"exact": (1.0, 1.0, 3, False), "relaxed": (0.8, 0.6, 3, False), "masses": (0.6, 0.7, 1, True)}


@pytest.mark.parametrize("marginals", RELAXED)
def test_positions_far_from_every_reference_keep_the_budget(marginals: str, native: str) -> None:
    """ℓ of a row are all −100 to −400: what they share must not cost the digits in which they differ."""
    g, H = torch.Generator().manual_seed(0), 24

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64, device="cpu").to(torch.get_default_device())

    inputs = {name: normal(1, H, 32, 16) for name in ("query", "key", "value")}
    inputs |= {"references": normal(H, 7, 16), "reference_position": normal(H, 7, 2)}
    inputs |= {"query_position": 100 + normal(32, 2), "key_position": 100 + normal(1, 32, 2)}
    inputs |= {"position_scale": torch.linspace(0.1, 0.2, H, dtype=torch.float64)}
    cotangent, (key_relaxation, reference_relaxation, num_iters, masses) = normal(1, H, 32, 16), RELAXED[marginals]
    if masses:
        inputs |= {"key_mask": normal(1, 32)}
    relaxed = {"key_relaxation": key_relaxation, "reference_relaxation": reference_relaxation}
    inputs |= relaxed | {"num_iters": num_iters}
    assert_within_budget(*measure.beside(SF.set_attention, inputs, torch.float32, cotangent, native))


FAR_APART = ((0, 4), (2, 2))  # T, which draw


@pytest.mark.parametrize(("num_iters", "draw"), FAR_APART)
def test_the_scale_of_positions_far_apart_keeps_the_budget(num_iters: int, draw: int, native: str) -> None:
    """Its gradient cancels unless the plan's columns sum to 1: of relaxed marginals c is as large as the logits."""
    options = {"num_iters": num_iters, "key_relaxation": 0.6, "reference_relaxation": 0.7}
    case = replace(ALL_CASES["far_positions"], options=options)
    assert_typically_within_budget(*measure.small_gradients(case, torch.float32, native, draw=draw, draws=1))
