"""Kernel and logits: ℓ_ij = (κ(x_i, y_j) − 1)/ε − τ²‖p_i − π_j‖²."""

from __future__ import annotations

import torch
from torch import Tensor

ZERO_NORM = 1e-12  # x̂ = 0, with zero gradient, where ‖x‖ is not above this


def norm(x: Tensor) -> Tensor:
    """‖x‖ over the last dimension, kept: [..., D] -> [..., 1]; 0 with zero gradient where ‖x‖ ≤ 1e-12."""
    squared = (x * x).sum(-1, keepdim=True)
    positive = squared > ZERO_NORM**2
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)


def normalise(x: Tensor) -> Tensor:
    """x̂ = x/‖x‖: [..., D] -> [..., D]; 0 with zero gradient where ‖x‖ ≤ 1e-12."""
    length = norm(x)
    return torch.where(length > 0, x / torch.where(length > 0, length, 1.0), 0.0)


def kernel_matrix(x: Tensor, y: Tensor, bandwidth: Tensor, kind: str) -> Tensor:
    """κ(x_i, y_j): [..., N, D], [..., M, D] -> [..., N, M]; β of shape [..., 1, 1]."""
    if kind == "dot":
        return x @ y.transpose(-1, -2)
    return (bandwidth * (normalise(x) @ normalise(y).transpose(-1, -2) - 1)).exp()


def squared_distance(p: Tensor, pi: Tensor) -> Tensor:
    """‖p_i − π_j‖²: [..., N, P], [..., M, P] -> [..., N, M]; 0 for a token whose position is NaN (it has none)."""
    placed = ~p.isnan().any(-1, keepdim=True)  # [..., N, 1]
    p = torch.where(placed, p, 0.0)
    distance = (p.unsqueeze(-2) - pi.unsqueeze(-3)).square().sum(-1)
    return torch.where(placed, distance, 0.0)


def logits(kappa: Tensor, epsilon: Tensor, tau: Tensor, p: Tensor | None, pi: Tensor | None) -> Tensor:
    """ℓ: κ [..., N, M], ε and τ [..., 1, 1], positions [..., N, P] and [..., M, P] or None -> [..., N, M]."""
    cost = (kappa - 1) / epsilon
    if p is None or pi is None:
        return cost
    return cost - tau.square() * squared_distance(p, pi)
