"""Nyström features of the homogeneous kernel: ψ(x) = ‖x‖ (K_ww + δI)^{−1/2} κ(w, x̂).

Source: CKN (Mairal, NeurIPS 2016), OTKE (Mialon et al., ICLR 2021).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .logits import kernel_matrix, norm


def inverse_sqrt(a: Tensor, largest: float, smallest: float) -> Tensor:
    """A^{−1/2} of symmetric positive definite A [..., R, R] with eigenvalues in [smallest, largest], in float64.

    Coupled Newton–Schulz: Y₀ = A/c, Z₀ = I; W = (3I − Z Y)/2; Y ← Y W, Z ← W Z; Z → (A/c)^{−1/2}.  Matrix products
    only, so it differentiates to any order also where eigenvalues coincide.  Each step multiplies a small eigenvalue
    by 9/4 until it is of order one, and six more converge quadratically to rounding.
    """
    steps = math.ceil(math.log(largest / smallest) / math.log(2.25)) + 6
    eye = torch.eye(a.shape[-1], dtype=torch.float64, device=a.device)
    y, z = a.double() / largest, eye.expand(a.shape)
    for _ in range(steps):
        w = 1.5 * eye - 0.5 * (z @ y)
        y, z = y @ w, w @ z
    return (z / math.sqrt(largest)).to(a.dtype)


def nystrom_features(x: Tensor, w: Tensor, bandwidth: Tensor, ridge: float) -> Tensor:
    """x [B, H, N, D], landmarks w [H, R, D], β [H, 1, 1] -> ψ [B, H, N, R], in the dtype of x."""
    r = w.shape[-2]
    wide = w.double()
    k_ww = kernel_matrix(wide, wide, bandwidth.double(), "rbf") + ridge * torch.eye(
        r, dtype=torch.float64, device=w.device
    )
    whitening = inverse_sqrt(k_ww, r + ridge, ridge).to(x.dtype)
    return norm(x) * (kernel_matrix(x, w, bandwidth, "rbf") @ whitening)
