"""Random shapes, strides, masks and dtypes on every backend against the reference: finite, right, in bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import GPU_BACKENDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import setformer_kernels.functional as SF
from setformer_kernels.backends.triton.host.tiles import INTERPRETED

SETTINGS = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


@st.composite
def strided(draw: Any, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A tensor of `shape` cut out of a larger one: permuted, stepped over, offset, or expanded along a dimension."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.integers(1, 2)) for _ in shape]
    kept = [1 if s > 0 and draw(st.integers(0, 7)) == 0 else s for s in shape]
    large = [kept[d] * steps[d] + draw(st.integers(0, 1)) for d in order]
    base = torch.randn(*large, generator=generator, dtype=torch.float64).to(dtype)
    t = base.permute([order.index(d) for d in range(len(shape))])
    t = t[tuple(slice(t.shape[d] - kept[d] * steps[d], None, steps[d]) for d in range(len(shape)))]
    return t.expand(shape)


@st.composite
def query_masks(
    draw: Any, b: int, h: int, length: int, s: int, dtype: torch.dtype, g: torch.Generator
) -> dict[str, Any]:
    """A mask of every query: of any shape, dense or in blocks, rows that ban everything among them."""
    shape = draw(st.sampled_from([(length, s), (b, length, s), (b, h, length, s)]))
    mask = draw(strided(shape, torch.float32, g))
    keep = mask > draw(st.sampled_from([-10.0, 0.0, 1.0]))
    if draw(st.booleans()):
        near = (torch.arange(s) - torch.arange(length).unsqueeze(1)).abs() < draw(st.sampled_from([1, 5, 70]))
        keep = keep & near
    if draw(st.booleans()):
        return {"attn_mask": keep}
    spread = draw(st.sampled_from([1.0, 30.0]))
    return {"attn_mask": (spread * mask).to(dtype).masked_fill(~keep, -torch.inf)}


@st.composite
def calls(draw: Any, dtypes: list[torch.dtype]) -> tuple[dict[str, Any], torch.dtype]:
    g = torch.Generator(torch.get_default_device()).manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes))
    b, h, m = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7, 16, 33, 64, 130]))
    d, e = draw(st.sampled_from([1, 3, 16, 40])), draw(st.sampled_from([1, 5, 16, 40]))
    s = draw(st.sampled_from([1, 2, 17, 64, 65, 150]))
    causal = draw(st.booleans())
    length = s if causal and draw(st.booleans()) else draw(st.sampled_from([0, 1, 5, 64, 97]))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    call: dict[str, Any] = {
        "query": draw(strided((b, h, length, d), dtype, g)),
        "key": draw(strided((b, h, s, d), dtype, g)),
        "value": draw(strided((b, h, s, e), dtype, g)),
        "references": draw(strided((h, m, d), wide, g)),
        "num_iters": draw(st.integers(0, 1 if causal else 4)),
        "causal": causal,
        "epsilon": draw(st.sampled_from([0.02, 0.05, 1.0])),
        "key_relaxation": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "reference_relaxation": draw(st.sampled_from([0.0, 0.5, 1.0])),
    }
    if draw(st.booleans()):
        call |= draw(query_masks(b, h, length, s, wide, g))
        call["num_iters"] = draw(st.integers(0, 3))
    mask = draw(st.sampled_from(["none", "bool", "padding", "float"]))
    if mask == "bool":
        call["key_mask"] = draw(strided((b, s), torch.float32, g)) > 0
    if mask == "padding":
        call["key_mask"] = torch.arange(s) < torch.randint(s + 1, (b, 1), generator=g)
    if mask == "float":
        call["key_mask"] = draw(strided((b, s), wide, g))
    if draw(st.booleans()):
        p = draw(st.integers(1, 3))
        call |= {
            "query_position": draw(strided((length, p), wide, g)),
            "key_position": draw(strided((b, s, p), wide, g)),
        }
        call |= {"reference_position": draw(strided((h, m, p), wide, g)), "position_scale": 0.5}
    return call, dtype


def run(call: dict[str, Any], names: list[str], backend: str, cotangent: Tensor) -> list[Tensor]:
    leaves = {n: call[n].detach().requires_grad_() for n in names}
    o = SF.set_attention(**call | leaves, backend=backend)
    return [o.detach(), *torch.autograd.grad(o, list(leaves.values()), cotangent.to(o.dtype))]


def check(call: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    names = ["query", "key", "value", "references"]
    cotangent = torch.randn(*call["query"].shape[:3], call["value"].shape[3])
    exact = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in call.items()}
    for found, wanted in zip(
        run(call, names, backend, cotangent), run(exact, names, "reference", cotangent), strict=True
    ):
        assert found.isfinite().all()
        if wanted.numel():
            scale = max(1.0, wanted.abs().max().item())
            assert (found.double() - wanted).abs().max().item() <= TOLERANCE[dtype] * scale


def test_random_calls_match_the_reference(native: str) -> None:
    on_gpu = native in GPU_BACKENDS
    dtypes = [dtype for dtype in TOLERANCE if dtype != torch.float64 or not on_gpu]

    @settings(SETTINGS, max_examples=20 if on_gpu and INTERPRETED else 60)
    @given(drawn=calls(dtypes))
    def match(drawn: tuple[dict[str, Any], torch.dtype]) -> None:
        check(*drawn, native)

    match()


@pytest.mark.parametrize("scale", [1e-20, 1e-12, 1e-6, 1e6, 1e15])
@pytest.mark.parametrize("kernel", ["rbf", "dot"])
@pytest.mark.parametrize("causal", [False, True])
def test_extreme_scales_stay_finite(scale: float, kernel: str, causal: bool, native: str) -> None:
    q, k, v = (torch.randn(2, 2, 50, 16) * scale for _ in range(3))
    q[:, :, 0], k[:, :, 3] = 0, 0
    y = torch.randn(2, 9, 16) * scale
    leaves = [t.requires_grad_() for t in (q, k, v, y)]
    for epsilon in (0.005, 0.5):
        o = SF.set_attention(*leaves, kernel=kernel, causal=causal, num_iters=1, epsilon=epsilon, backend=native)
        assert o.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(o.mean() / scale, leaves))
