"""The Triton causal scan where the shared cases do not reach: ragged chunks, ranges too wide for products, parts."""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
import torch
from torch import Tensor

import setformer_kernels.functional as SF
from setformer_kernels.testing import assert_within_budget, gradients, model_inputs
from setformer_kernels.testing.budget import cast

pytest.importorskip("triton")
from setformer_kernels.backends.triton import causal_state

causal = functools.partial(SF.set_attention, causal=True, num_iters=1)


@pytest.fixture(autouse=True)
def on_device() -> Any:
    with torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"):
        yield


def inputs(length: int, heads: int = 2, d: int = 16, e: int = 16, m: int = 8) -> dict[str, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    tokens = (normal(1, heads, length, d), normal(1, heads, length, d), normal(1, heads, length, e))
    return dict(zip(("query", "key", "value", "references"), (*tokens, normal(heads, m, d)), strict=True))


def check(given: dict[str, Any], dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Tensor]:
    """The Triton results, held to the error budget."""
    cotangent = torch.randn(given["value"].shape, dtype=torch.float64)
    exact, model = model_inputs(functools.partial(causal, backend="reference", **options), given, dtype, cotangent)
    fast = gradients(
        functools.partial(causal, backend="triton", **options), cast(given, torch.float32, dtype), cotangent
    )
    assert_within_budget(fast, exact, model)
    return fast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [17, 63, 64, 65, 130])
def test_lengths_around_a_chunk(length: int, dtype: torch.dtype, poisoned_memory: None) -> None:
    check(inputs(length), dtype)


def test_one_key(poisoned_memory: None) -> None:
    given = cast(inputs(1), torch.float32)
    found = gradients(functools.partial(causal, backend="triton"), given, torch.randn(given["value"].shape))
    torch.testing.assert_close(found["output"], given["value"].detach())
    assert all((found[name] == 0).all() for name in ("query", "key", "references"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_of_any_range_in_any_chunk(dtype: torch.dtype) -> None:
    """Masses from 1e-80 up, in the second chunk e^150 above all before: no product of two exponentials holds them."""
    given: dict[str, Any] = inputs(140)
    mask = 30 * torch.randn(1, 140, dtype=torch.float64)
    mask[:, 100:] += 150
    check(given | {"key_mask": mask}, dtype)


def test_wide_head_dims_in_blocks() -> None:
    check(inputs(70, heads=1, d=80, e=72, m=20))


def test_parts_of_the_heads_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    given = cast({k: v.repeat(2, 1, 1, 1) if v.ndim == 4 else v for k, v in inputs(70, heads=3).items()}, torch.float32)
    cotangent, call = torch.randn(given["value"].shape), functools.partial(causal, backend="triton", dropout_p=0.2)
    call = functools.partial(call, seed=torch.tensor(5))
    whole = gradients(call, given, cotangent)
    monkeypatch.setattr(causal_state, "WORKSPACE_SHARE", 0.0)
    in_parts = gradients(call, given, cotangent)
    assert all(torch.equal(whole[name], in_parts[name]) for name in whole)


def test_nothing_depends_on_later_keys() -> None:
    given, cut = cast(inputs(130), torch.float32), 70
    cotangent = torch.randn(given["value"].shape)
    cotangent[:, :, cut:] = 0
    call = functools.partial(causal, backend="triton")
    before = gradients(call, given, cotangent)
    changed = {n: t.detach().clone() for n, t in given.items()}
    for name in ("query", "key", "value"):
        changed[name][:, :, cut:] = torch.randn_like(changed[name][:, :, cut:])
    after = gradients(call, {n: t.requires_grad_() for n, t in changed.items()}, cotangent)
    assert torch.equal(before["output"][:, :, :cut], after["output"][:, :, :cut])
    assert all((before[name][:, :, cut:] == 0).all() for name in ("query", "key", "value"))
    assert all(torch.equal(before[n][:, :, :cut], after[n][:, :, :cut]) for n in ("query", "key", "value"))
