"""The kernel without its constant harmonic: its numbers against quadrature, and the features made of it."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.special import ive, loggamma, roots_jacobi
from torch import Tensor

import setformer_kernels.functional as SF
from setformer_kernels import reference
from setformer_kernels.reference.centring import centred
from setformer_kernels.testing import measure
from setformer_kernels.testing.budget import assert_within_budget

OP = "features"  # of the backends that tests run on
DIMS = (1, 2, 3, 8, 32, 257)
BANDWIDTHS = (1e-7, 1e-3, 0.3, 1.0, 8.0, 30.0)


def cosines(d: int) -> tuple[Tensor, Tensor]:
    """Gauss quadrature over the cosine of a uniform direction of R^d with a fixed one: (c, weights that sum to 1)."""
    if d == 1:
        return torch.tensor([-1.0, 1.0], dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64)
    c, weights = (torch.from_numpy(x) for x in roots_jacobi(100, (d - 3) / 2, (d - 3) / 2))
    return c, weights / weights.sum()


def allowed(bandwidth: float, d: int) -> bool:
    return reference.log_bound(bandwidth, d) <= math.log(reference.LARGEST)


CASES = [(d, b) for d in DIMS for b in BANDWIDTHS if allowed(b, d)]


@pytest.mark.parametrize(("d", "bandwidth"), CASES)
def test_mean_and_linear_part_by_quadrature(d: int, bandwidth: float) -> None:
    beta = torch.tensor(bandwidth, dtype=torch.float64)
    c, weights = cosines(d)
    kernel, found = centred(c, beta, reference.centring(beta, d)), reference.centring(beta, d)
    top = centred(torch.ones_like(beta), beta, found).item()
    assert abs((weights * kernel).sum()) <= 1e-14 * top
    assert abs(d * (weights * c * kernel).sum() - 1) <= 1e-13 * d**0.5 * top
    # e^{β(c − 1)} = κ₀ + a₁ κ̃, with the same κ₀ and a₁ by quadrature
    plain = (beta * (c - 1)).exp()
    constant, linear = (weights * plain).sum(), beta * (weights * (1 - c * c) * plain).sum() * d / max(d - 1, 1)
    if d > 1:  # a₁ = D E c κ = βD/(D − 1) E (1 − c²) κ by parts: no cancellation
        torch.testing.assert_close(found.gain, constant / linear, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(1 + constant.log() / beta, found.offset, rtol=0.0, atol=3e-15 / bandwidth + 1e-14)
    assert 0 <= math.log(max(top, 1.0)) <= reference.log_bound(bandwidth, d) + 1e-9


@pytest.mark.parametrize("d", [2, 3, 32, 128])
def test_the_coefficients_are_bessel_functions(d: int) -> None:
    beta = torch.tensor([0.5, 1.0, 6.0], dtype=torch.float64)
    found, n = reference.centring(beta, d), d / 2 - 1
    low, high = (torch.from_numpy(ive(order, beta.numpy())) for order in (n, n + 1))  # e^{−β} I
    constant = low * math.exp(loggamma(d / 2)) * (2 / beta) ** n
    torch.testing.assert_close(found.mean, high / low, rtol=1e-12, atol=0.0)
    torch.testing.assert_close((beta * (found.offset - 1)).exp(), constant, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("d", [1, 2, 5, 64])
def test_derivatives_in_the_bandwidth(d: int) -> None:
    beta = torch.tensor([1e-3, 0.7, 4.0, 9.0], dtype=torch.float64, requires_grad=True)
    found = reference.centring(beta, d)
    (mean,) = torch.autograd.grad((beta * found.offset).sum(), beta, retain_graph=True)
    (growth,) = torch.autograd.grad(found.gain.log().sum(), beta)
    torch.testing.assert_close(mean, found.mean, rtol=1e-10, atol=0.0)
    torch.testing.assert_close(growth, found.growth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bandwidth", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("d", [1, 2, 16])
def test_it_stays_positive_semidefinite(d: int, bandwidth: float) -> None:
    w, beta = torch.randn(40, d, dtype=torch.float64), torch.tensor(bandwidth, dtype=torch.float64)
    w[:2] = 0
    kernel = reference.features.feature_kernel(w, w, beta, reference.centring(beta, d))
    assert kernel[0].eq(0).all()
    assert torch.linalg.eigvalsh(kernel).min() >= -1e-12 * kernel.max()


def test_features_share_no_constant() -> None:
    """At β = 1 and D = 32 two thirds of the energy of plain features is the mean of all."""
    x, w = torch.randn(1, 1, 4000, 32, dtype=torch.float64), torch.randn(1, 32, 32, dtype=torch.float64)
    shares = []
    for center in (False, True):
        psi = SF.nystrom_features(torch.nn.functional.normalize(x, dim=-1), w, center=center)[0, 0]
        shares.append((psi.mean(0).square().sum() / psi.square().sum(-1).mean()).item())
    assert shares[0] > 0.5
    assert shares[1] < 0.01


def test_a_narrow_bandwidth_gives_the_features_of_the_cosine(native: str) -> None:
    x, w = torch.randn(1, 2, 9, 6), torch.randn(2, 4, 6)
    w[0, 0] = 0
    psi = SF.nystrom_features(x, w, bandwidth=1e-5, ridge=0.1, center=True, backend=native)
    unit = torch.nn.functional.normalize(w.double(), dim=-1)
    values, u = torch.linalg.eigh(unit @ unit.mT + 0.1 * torch.eye(4, dtype=torch.float64))
    want = x.double() @ unit.mT @ (u * values.rsqrt().unsqueeze(-2)) @ u.mT
    torch.testing.assert_close(psi.double(), want, rtol=1e-4, atol=2e-5)
    assert psi[:, 0, :, 0].eq(0).all()


@pytest.mark.parametrize("bandwidth", [1e-2, 20.0])
def test_far_bandwidths_within_the_error_budget(bandwidth: float, native: str) -> None:
    inputs = {"key": measure._normal((1, 2, 40, 12), 0), "landmarks": measure._normal((2, 6, 12), 1)}
    options = {"bandwidth": bandwidth, "center": True}
    cotangent = measure._normal((1, 2, 40, 6), 2)
    found = measure.beside(measure._features, inputs | options, torch.float32, cotangent, native)
    assert_within_budget(*found)
