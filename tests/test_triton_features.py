"""Whitening of the Triton backend, forward and backward, against float64 up to the worst condition (R + δ)/δ.

The features themselves are tested with those of the other backends.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from conftest import device_of
from torch import Tensor

import setformer_kernels.functional as SF

pytest.importorskip("triton")
RIDGE = 1e-3
DEVICE = device_of("triton")


@pytest.fixture
def whitening() -> ModuleType:
    from setformer_kernels.backends.triton.features import whitening

    return whitening


def drawn_landmarks(kind: str, r: int) -> Tensor:
    """[1, R, 16]: equal, twice the same, or independent."""
    w = torch.randn(1, r, 16)
    if kind == "equal":
        return w[:, :1].repeat(1, r, 1)
    return torch.cat([w[:, : r - r // 2], 1.5 * w[:, : r // 2]], 1) if kind == "pairs" else w


def gram(w: Tensor, ridge: float = RIDGE) -> Tensor:
    """K_ww + δI of [H, R, D], β = 1."""
    unit = w / w.norm(dim=-1, keepdim=True)
    return (unit @ unit.mT - 1).exp() + ridge * torch.eye(w.shape[1], dtype=w.dtype)


def by_eigenvalues(a: Tensor, d_whitening: Tensor | None = None) -> Tensor:
    """A^{−1/2}, or dA from its gradient by the Sylvester equation in the eigenbasis."""
    values, u = torch.linalg.eigh(a)
    root = values.clamp_min(RIDGE).sqrt()
    if d_whitening is None:
        return (u / root.unsqueeze(-2)) @ u.mT
    pairs = root.unsqueeze(-1) * root.unsqueeze(-2) * (root.unsqueeze(-1) + root.unsqueeze(-2))
    return -u @ ((u.mT @ d_whitening @ u) / pairs) @ u.mT


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def prepared_for(w: Tensor, center: bool = False) -> tuple[Tensor, ModuleType]:
    from setformer_kernels.backends.triton.features import problem

    w = w.to(DEVICE)
    return w, problem.prepared_landmarks(w[None], w, None, 1.0, center)


@pytest.mark.parametrize(("r", "kind"), [(7, "pairs"), (64, "equal"), (64, "pairs"), (64, "random"), (100, "pairs")])
def test_whitening_is_no_worse_than_float32_eigh(
    r: int, kind: str, whitening: ModuleType, poisoned_memory: None
) -> None:
    w = drawn_landmarks(kind, r)
    on_device, prepared = prepared_for(w)
    found = whitening.whitening(on_device, prepared, RIDGE, torch.float32)[:, :r, :r].cpu()
    exact = by_eigenvalues(gram(w.double()))
    assert error(found, exact) <= error(by_eigenvalues(gram(w)), exact)


@pytest.mark.parametrize(("r", "kind"), [(64, "equal"), (64, "pairs"), (64, "random"), (100, "pairs")])
def test_backward_of_whitening_is_no_worse_than_float32_eigh(
    r: int, kind: str, whitening: ModuleType, poisoned_memory: None
) -> None:
    w = drawn_landmarks(kind, r)
    on_device, prepared = prepared_for(w)
    side = prepared.y.shape[1]
    d_whitening = torch.randn(1, r, r)
    padded = torch.nn.functional.pad(d_whitening, (0, side - r, 0, side - r), value=float("nan"))  # padding is not read
    given = padded.flatten(1).to(DEVICE)
    found = whitening.whitening_backward(on_device, prepared, RIDGE, given)[:, :r, :r].cpu()
    exact = by_eigenvalues(gram(w.double()), d_whitening.double())
    assert error(found, exact) <= error(by_eigenvalues(gram(w), d_whitening), exact)


def test_a_ridge_below_rounding_stays_finite(whitening: ModuleType) -> None:
    w = drawn_landmarks("pairs", 64)
    on_device, prepared = prepared_for(w)
    found = whitening.whitening(on_device, prepared, 1e-9, torch.float32).cpu()
    assert found.isfinite().all()
    assert found.abs().max() <= 1.1 * whitening.SMALLEST_RIDGE**-0.5


def test_steps_are_few_at_any_size_and_ridge(whitening: ModuleType) -> None:
    steps = [whitening.schedule(r, ridge)[0] for r in (1, 16, 256) for ridge in (1.0, 1e-3, whitening.SMALLEST_RIDGE)]
    assert max(steps) <= 18


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 1, 3, 2)])
def test_features_and_their_gradients_keep_the_memory_order_of_the_tokens(order: tuple[int, ...]) -> None:
    shape = (1, 2, 9, 16)
    inverse = [order.index(i) for i in range(4)]
    x = torch.randn([shape[i] for i in order], device=DEVICE).permute(inverse).requires_grad_()
    w = torch.randn(2, 16, 5, device=DEVICE).mT.requires_grad_()
    psi = SF.nystrom_features(x, w, backend="triton")
    d_x, d_w = torch.autograd.grad(psi.square().sum(), (x, w))
    assert psi.permute(order).is_contiguous()
    assert (d_x.stride(), d_w.stride()) == (x.stride(), w.stride())
    x_, w_ = (t.detach().double().cpu().requires_grad_() for t in (x, w))
    exact = SF.nystrom_features(x_, w_, backend="reference")
    torch.testing.assert_close(psi.double().cpu(), exact, rtol=1e-4, atol=1e-5)
    for found, wanted in zip((d_x, d_w), torch.autograd.grad(exact.square().sum(), (x_, w_)), strict=True):
        torch.testing.assert_close(found.double().cpu(), wanted, rtol=1e-3, atol=1e-4)
