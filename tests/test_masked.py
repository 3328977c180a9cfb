"""Masks that depend on the query, on every backend behind the ops: results, bounds, and what users may pass."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import setformer_kernels.functional as SF
from setformer_kernels.testing import (
    ALL_CASES,
    MASKED_CASES,
    Case,
    assert_typically_within_budget,
    measure,
)

OP = "masked"
DTYPES = (torch.float64, torch.float32, torch.bfloat16)  # products of the model in float16 would underflow
B, H, L, S, M, D = 2, 3, 70, 90, 5, 8


def tokens(length: int = L, keys: int = S, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = ((B, H, length, D), (B, H, keys, D), (B, H, keys, D), (H, M, D))
    return [torch.randn(*s, dtype=dtype, requires_grad=True) for s in shapes]


def results(leaves: list[Tensor], backend: str, **options: Any) -> list[Tensor]:
    """Output and gradients of the leaves and of the masks that have one."""
    o = SF.set_attention(*leaves[:4], backend=backend, **options)
    wanted = [*leaves, *(t for t in options.values() if isinstance(t, Tensor) and t.requires_grad)]
    return [o.detach(), *torch.autograd.grad(o.sin().sum(), wanted)]


def agree(backend: str, leaves: list[Tensor], **options: Any) -> None:
    for found, wanted in zip(results(leaves, backend, **options), results(leaves, "reference", **options), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MASKED_CASES, ids=lambda case: case.name)
def test_masked_output_and_every_gradient_within_the_error_budget(
    case: Case, dtype: torch.dtype, native: str, poisoned_memory: None
) -> None:
    measure.attention(case, dtype, native).check(case.name)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", measure.MASKED_SMALL_CASES)
def test_masked_small_gradients_within_the_error_budget(name: str, dtype: torch.dtype, native: str) -> None:
    case = ALL_CASES[name]
    found, exact, model = measure.small_gradients(case, dtype, native)
    if dtype == torch.float64 and case.position_spread > 1:  # float32 is no model of float64 at logits of −1000
        for key, value in found.items():
            torch.testing.assert_close(value, exact[key], rtol=1e-10, atol=1e-10 * exact[key].abs().max().item())
    else:
        assert_typically_within_budget(found, exact, model, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_float32_rounded_once(dtype: torch.dtype, native: str) -> None:
    if native == "triton":
        pytest.skip("its products are of the tokens' dtype, as the budget allows")
    half = [t.detach().to(dtype).requires_grad_() for t in tokens()[:3]]
    whole, y = [t.detach().float().requires_grad_() for t in half], torch.randn(H, M, D)
    options: dict[str, Any] = {"attn_mask": torch.randn(L, S), "num_iters": 2, "backend": native}
    cotangent = torch.randn(B, H, L, D).to(dtype)
    found, wanted = (SF.set_attention(*t, y, **options) for t in (half, whole))
    grads = [torch.autograd.grad(o, t, cotangent.to(o.dtype)) for o, t in ((found, half), (wanted, whole))]
    for a, b in zip((found, *grads[0]), (wanted, *grads[1]), strict=True):
        torch.testing.assert_close(a, b.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("T", [0, 1, 3])
def test_a_mask_that_bans_nothing_equals_no_mask(T: int, native: str) -> None:
    q, k, v, y = (t.detach() for t in tokens())
    plain = SF.set_attention(q, k, v, y, num_iters=T, backend=native)
    for mask in (torch.ones(L, S, dtype=torch.bool), torch.full((B, 1, S), 3.0).expand(B, L, S)):
        torch.testing.assert_close(SF.set_attention(q, k, v, y, attn_mask=mask, num_iters=T, backend=native), plain)


@pytest.mark.parametrize("T", [0, 1, 3])
@pytest.mark.parametrize(("length", "keys"), [(1, 90), (70, 90), (64, 128), (90, 70), (5, 1)])
def test_causal_counts_from_the_last_query_and_key(T: int, length: int, keys: int, native: str) -> None:
    """Query i sees the keys s ≤ i + S − L, as a decoder's last queries do of what it has cached."""
    leaves = tokens(length, keys)
    seen = torch.arange(keys) <= torch.arange(length).unsqueeze(1) + keys - length
    for found, wanted in zip(
        results(leaves, native, causal=True, num_iters=T),
        results(leaves, "reference", attn_mask=seen, num_iters=T),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def masks() -> dict[str, Tensor]:
    """By name: every form a mask comes in."""
    keep, bias = torch.rand(L, S) < 0.5, torch.randn(L, S, dtype=torch.float64)
    keep[3] = False
    return {
        "LS bool": keep,
        "LS float": bias.masked_fill(~keep, -math.inf),
        "BLS": torch.rand(B, L, S) < 0.5,
        "BHLS": torch.randn(B, H, L, S, dtype=torch.float64),
        "expanded": bias.expand(B, H, L, S),
        "rows expanded": bias[:1].expand(L, S),
        "keys expanded": keep[:, :1].expand(L, S),
        "transposed": torch.randn(S, L, dtype=torch.float64).T,
        "every second": torch.randn(B, L, 2 * S, dtype=torch.float64)[..., ::2],
        "another dtype": bias.bfloat16(),
        "nothing": torch.zeros(L, S, dtype=torch.bool),
        "one block": torch.ones(L, S, dtype=torch.bool).tril(-64),
    }


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("causal", [False, True])
def test_masks_in_every_form(name: str, causal: bool, native: str) -> None:
    mask = masks()[name].to(torch.get_default_device())
    if mask.is_floating_point():
        mask = mask.detach().requires_grad_()
    options: dict[str, Any] = {"causal": causal, "num_iters": 2}
    if name == "another dtype":
        o = SF.set_attention(*tokens(), attn_mask=mask, backend=native, **options)
        assert torch.autograd.grad(o.sum(), mask)[0].dtype == torch.bfloat16
    else:
        agree(native, tokens(), attn_mask=mask, key_mask=torch.rand(B, S) < 0.8, **options)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_padding_behind_many_keys_is_no_matter_of_the_others(dtype: torch.dtype, native: str) -> None:
    keys, kept, width = 250, 230, 16  # tiles of keys all of which take part, before one of which some do
    q, k, v, y = (torch.randn(*n, width, dtype=dtype) for n in ((B, H, L), (B, H, keys), (B, H, keys), (H, M)))
    bias = torch.randn(L, keys, dtype=dtype)
    options: dict[str, Any] = {"num_iters": 2, "backend": native}
    padded = SF.set_attention(q, k, v, y, attn_mask=bias, key_mask=(torch.arange(keys) < kept).expand(B, -1), **options)
    cut = SF.set_attention(q, k[:, :, :kept], v[:, :, :kept], y, attn_mask=bias[:, :kept], **options)
    torch.testing.assert_close(padded, cut)


def test_what_no_query_may_see_is_never_read(native: str) -> None:
    q, k, v, y = (t.detach() for t in tokens(dtype=torch.float32))
    keep = torch.rand(L, S) < 0.5
    keep[:, ::5], keep[::7] = False, False
    k[:, :, ::5], v[:, :, ::5], q[:, :, ::7] = math.nan, math.inf, math.nan
    leaves = [t.requires_grad_() for t in (q, k, v, y)]
    o = SF.set_attention(*leaves, attn_mask=keep, num_iters=2, backend=native)
    assert (o[:, :, ::7] == 0).all()
    grads = torch.autograd.grad(o.sum(), leaves[1:])
    assert o.isfinite().all()
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][:, :, ::5] == 0).all()
    assert (grads[1][:, :, ::5] == 0).all()


def test_a_query_does_not_depend_on_keys_it_may_not_see(native: str) -> None:
    q, k, v, y = (t.detach() for t in tokens(S, S))
    before = SF.set_attention(q, k, v, y, causal=True, num_iters=3, backend=native)
    k[:, :, 50:], v[:, :, 50:] = 1.0, 1e9
    after = SF.set_attention(q, k, v, y, causal=True, num_iters=3, backend=native)
    torch.testing.assert_close(after[:, :, :50], before[:, :, :50], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("epsilon", [0.05, 0.005])
def test_masked_results_repeat_bit_for_bit_on_any_number_of_threads(epsilon: float, native: str) -> None:
    leaves = [torch.randn(2, 3, 150, 16, requires_grad=True) for _ in range(3)] + [torch.randn(3, 8, 16)]
    mask, runs, before = torch.randn(150, 150, requires_grad=True), [], torch.get_num_threads()
    for threads in (1, 2, 2, 5):
        torch.set_num_threads(threads)
        o = SF.set_attention(*leaves, attn_mask=mask, causal=True, num_iters=2, epsilon=epsilon, backend=native)
        runs.append([o, *torch.autograd.grad(o.square().sum(), [*leaves[:3], mask])])
    torch.set_num_threads(before)
    assert native != "cpu" or all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(runs[1], runs[2], strict=True))


@pytest.mark.parametrize("spread", [30.0, 300.0, 3000.0])
def test_masks_of_any_size_stay_exact(spread: float, native: str) -> None:
    """Log masses that no float32 holds beside each other, and rows that see nothing else."""
    q, k, v, y = (t.detach().float() for t in tokens())
    mask = spread * torch.rand(B, H, L, S)
    mask[:, :, ::3, 1:] -= 10 * spread
    options: dict[str, Any] = {"num_iters": 3, "key_mask": 10 * spread * torch.rand(B, S)}
    found = SF.set_attention(q, k, v, y, attn_mask=mask, backend=native, **options)
    exact = [t.double() for t in (q, k, v, y)]
    wanted = SF.set_attention(*exact, attn_mask=mask.double(), backend="reference", **options)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(("b", "length", "keys"), [(0, 5, 5), (2, 0, 4), (0, 0, 3), (2, 3, 0), (2, 0, 0)])
@pytest.mark.parametrize("causal", [False, True])
def test_empty_masks(b: int, length: int, keys: int, causal: bool, native: str) -> None:
    q, k, v = (torch.randn(b, 3, n, 8, requires_grad=True) for n in (length, keys, keys))
    y, mask = torch.randn(3, 5, 8, requires_grad=True), torch.zeros(length, keys, requires_grad=True)
    o = SF.set_attention(q, k, v, y, attn_mask=mask, causal=causal, num_iters=2, backend=native)
    assert o.shape == (b, 3, length, 8)
    grads = torch.autograd.grad(o.sum(), (q, k, v, y, mask), allow_unused=True, materialize_grads=True)
    assert all((g == 0).all() for g in grads)


def test_nothing_but_the_inputs_is_saved(native: str) -> None:
    leaves, mask = tokens(dtype=torch.float32), torch.rand(L, S) < 0.5
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        SF.set_attention(*leaves, attn_mask=mask, num_iters=3, backend="auto")
    given = {t.data_ptr() for t in (*leaves, mask)}
    assert all(t.data_ptr() in given for t in saved)
