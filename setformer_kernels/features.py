"""Nyström features of the homogeneous RKHS map: validate, choose reference or native, call."""

from __future__ import annotations

import math

from torch import Tensor

from . import checks, dispatch, ops, reference
from .arguments import Hyper, autocast, hyper_tensors, numbers
from .problem import compute_dtype
from .tracing import leaf


@leaf
def nystrom_features(
    x: Tensor, landmarks: Tensor, *, bandwidth: Hyper = 1.0, ridge: float = 1e-3, center: bool = False,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """ψ(x) = ‖x‖ (K_ww + δI)^{−1/2} κ(w, x̂): [B, H, N, D], landmarks w [H, R, D] -> [B, H, N, R], in the dtype of x.

    The projection of the homogeneous RKHS map ‖x‖φ(x̂) of the Gaussian kernel κ on the landmarks; K_ww = κ(ŵ, ŵ),
    δ = `ridge` > 0, β = `bandwidth` > 0 (float, or tensor [H]).  Source: CKN (Mairal, NeurIPS 2016), OTKE.

    With `center` κ̃ = (κ − κ₀)/a₁ takes the place of κ in both, without unit: κ without the constant κ₀ that all
    directions share, in units of its linear part a₁⟨x̂, ŷ⟩ (κ₀ and a₁: the kernel's means over the directions of R^D).
    Its values lie in [−1, κ̃(1)], κ̃(1) ≥ 1, and κ̃(x, y) → ⟨x̂, ŷ⟩ as β → 0.  A zero landmark's are 0.

    Raises:
        ValueError: shapes, ridge, bandwidth; with `center` also a bandwidth (a number; tensors are not looked at) so
            large for D that κ̃(1) could exceed 1e10.
        TypeError: arguments of the wrong type or dtype.
    """
    checks.tensor("x", x, "BHND")
    checks.tensor("landmarks", landmarks, "HRD")
    h, d = x.shape[1], x.shape[3]
    checks.nonempty("landmarks", landmarks, "HRD", landmarks.shape)
    checks.shape("landmarks", landmarks, (h, None, d), "H and D of x")
    checks.same_device("x", x, landmarks=landmarks, bandwidth=bandwidth)
    bandwidth = checks.hyperparameter("bandwidth", bandwidth, h, 0.0, math.inf, open_low=True)
    ridge, backend = checks.number("ridge", ridge, 0.0, open_low=True), checks.text("backend", backend)
    center = checks.flag("center", center)
    if center and not isinstance(bandwidth, Tensor) and reference.log_bound(bandwidth, d) > math.log(reference.LARGEST):
        raise ValueError(
            f"bandwidth must be smaller for centred features of D = {d}, got {bandwidth}: the kernel has next to no "
            f"linear part left, and divided by it exceeds {reference.LARGEST:.0e}"
        )
    (x,) = autocast(x)
    dtype = compute_dtype(x.dtype)
    landmarks, tensors, scalars = landmarks.to(dtype), hyper_tensors((bandwidth,), h, dtype), numbers((bandwidth,))
    size = math.prod(x.shape[:3]) * landmarks.shape[1]
    if dispatch.choose(ops.features.features_problem(x, landmarks), backend, size) != dispatch.REFERENCE:
        return ops.features.nystrom_features(x, landmarks, tensors[0], scalars[0], ridge, center, backend)
    beta = landmarks.new_full((h,), scalars[0]) if tensors[0] is None else tensors[0]
    largest = reference.limit(tensors[0], scalars[0], d)
    return reference.nystrom_features(x.to(dtype), landmarks, beta[:, None, None], ridge, center, largest).to(x.dtype)
