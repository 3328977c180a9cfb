"""The op of Nyström features.

nystrom_features  x [B, H, N, D], landmarks [H, R, D], bandwidth [H]? -> ψ [B, H, N, R]; `center` as in features.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import dispatch
from ..problem import Problem, empty_in_order
from .registration import HEAD, TOKEN, Spec, register


def features_problem(x: Tensor, landmarks: Tensor) -> Problem:
    return Problem("features", x.device.type, x.dtype, D=x.shape[-1], M=landmarks.shape[-2])


def _run_features(
    x: Tensor, w: Tensor, bandwidth: Tensor | None, scalar: float, ridge: float, center: bool, backend: str
) -> Tensor:
    return dispatch.implementation(features_problem(x, w), backend).features(x, w, bandwidth, scalar, ridge, center)


def _run_features_backward(
    d_psi: Tensor,
    x: Tensor,
    w: Tensor,
    bandwidth: Tensor | None,
    scalar: float,
    ridge: float,
    center: bool,
    backend: str,
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    module = dispatch.implementation(features_problem(x, w), backend)
    return module.features_backward(x, w, bandwidth, scalar, ridge, center, d_psi, needs)


def _fake_features(x: Tensor, w: Tensor, *_: Any) -> Tensor:
    return empty_in_order(x, (*x.shape[:-1], w.shape[-2]))


nystrom_features = register(
    Spec(
        name="nystrom_features",
        tensors={"x": (TOKEN, False), "landmarks": (HEAD, False), "bandwidth": (HEAD, True)},
        constants="float scalar_bandwidth, float ridge, bool center, str backend",
        outputs={"psi": TOKEN},
        differentiable=("psi",),
        saved=(),
        no_grad=(),
        run=_run_features,
        run_backward=_run_features_backward,
        fake=_fake_features,
        decomposition=lambda *args: dispatch.EAGER.features(*args[:-1]),
    )
)


def _feature_flops(products: int, skip: int) -> Any:
    """2·B·H·N·R·products·(D + R): the κ tile and the whitening product; the R³ of the landmarks is left out."""

    def formula(*args: Any, out_shape: Any = None, **_: Any) -> int:
        (b, h, n, d), (_, r, _) = args[skip], args[skip + 1]
        return 2 * b * h * n * r * products * (d + r)

    return formula


register_flop_formula(torch.ops.setformer_kernels.nystrom_features)(_feature_flops(1, 0))
register_flop_formula(torch.ops.setformer_kernels.nystrom_features_backward)(_feature_flops(3, 1))
