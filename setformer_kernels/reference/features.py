"""Nyström features of the homogeneous kernel: ψ(x) = ‖x‖ (K_ww + δI)^{−1/2} κ(w, x̂); centred: κ̃ in place of κ.

Source: CKN (Mairal, NeurIPS 2016), OTKE (Mialon et al., ICLR 2021).
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from .centring import LARGEST, Centring, centred, centring
from .logits import kernel_matrix, norm, normalise


def inverse_sqrt(a: Tensor, largest: float, smallest: float) -> Tensor:
    """A^{−1/2} of symmetric positive definite A [..., R, R] with eigenvalues in [smallest, largest], in float64.

    Coupled Newton–Schulz: Y₀ = A/c, Z₀ = I; W = (3I − Z Y)/2; Y ← Y W, Z ← W Z; Z → (A/c)^{−1/2}.  Matrix products
    only, so it differentiates to any order also where eigenvalues coincide.  Each step multiplies a small eigenvalue
    by 9/4 until it is of order one, and six more converge quadratically to rounding.
    """
    steps = math.ceil((math.log(largest) - math.log(smallest)) / math.log(2.25)) + 6
    eye = torch.eye(a.shape[-1], dtype=torch.float64, device=a.device)
    y, z = a.double() / largest, eye.expand(a.shape)
    for _ in range(steps):
        w = 1.5 * eye - 0.5 * (z @ y)
        y, z = y @ w, w @ z
    return (z / math.sqrt(largest)).to(a.dtype)


def feature_kernel(x: Tensor, w: Tensor, bandwidth: Tensor, found: Centring | None) -> Tensor:
    """κ(x_i, w_j), or κ̃ where `found` is given: [..., N, D], [..., R, D] -> [..., N, R]; β of shape [..., 1, 1].

    κ̃ of a zero vector is 0: it has no direction, and the mean over all directions is what κ̃ is centred at.
    """
    if found is None:
        return kernel_matrix(x, w, bandwidth, "rbf")
    directed = torch.logical_and(norm(x) > 0, (norm(w) > 0).transpose(-1, -2))
    return torch.where(directed, centred(normalise(x) @ normalise(w).transpose(-1, -2), bandwidth, found), 0.0)


def nystrom_features(
    x: Tensor, w: Tensor, bandwidth: Tensor, ridge: float, center: bool = False, largest: float = LARGEST
) -> Tensor:
    """x [B, H, N, D], landmarks w [H, R, D], β [H, 1, 1] -> ψ [B, H, N, R], in the dtype of x.

    Centred, κ̃(1) ≤ `largest` says how many steps the inverse root takes: it is that of K̃_ww/κ̃(1), of diagonal 1.
    """
    r, wide, beta = w.shape[-2], w.double(), bandwidth.double()
    found = centring(bandwidth, x.shape[-1]) if center else None
    k_ww = feature_kernel(wide, wide, beta, found)
    eye = torch.eye(r, dtype=torch.float64, device=w.device)
    if found is None:
        whitening = inverse_sqrt(k_ww + ridge * eye, r + ridge, ridge)
    else:
        top = centred(torch.ones_like(beta), beta, found)  # κ̃(1) ≥ 1
        whitening = (
            inverse_sqrt((k_ww + ridge * eye) / top, r + ridge, max(ridge / largest, sys.float_info.min)) / top.sqrt()
        )
        found = Centring(*[number.to(x.dtype) for number in found])
    return norm(x) * (feature_kernel(x, w, bandwidth, found) @ whitening.to(x.dtype))
