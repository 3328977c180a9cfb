"""What every attention kernel reads of the references and hyperparameters, brought once into the form it is used in.

Padded to [H, MP, DP] (a few kilobytes), normalised, in the tokens' dtype: kernels then read references without masks,
and the hyperparameters are one row of numbers however they were given.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ....problem import HYPER, Operands, Options
from ..device.head import NUMBERS, store_parameters
from ..device.primitives import INF, LOG2E, inverse_norm, rounded
from ..host.launch import kernel, launch
from ..host.rows import stride_step, unit_rows
from ..host.tiles import Tile, padded

ROWS = 16  # references per program: a few thousand numbers in all, so any tile does
TILE = Tile(rows=ROWS, depth=0, warps=4, stages=1)


class Prepared(NamedTuple):
    """The references of one call, in the form the kernels use."""

    y: Tensor  # [H, MP, DP] ŷ (rbf) or y (dot) in the tokens' dtype, zero where padded
    inverse_norm: Tensor  # [H, MP] 1/‖y‖, 0 where ‖y‖ ≤ 1e-12
    log_b: Tensor  # [H, MP] log2 b, −∞ where padded
    parameters: Tensor  # [H, NUMBERS] the hyperparameters, as device/head.py lays them out
    position: Tensor | None  # [H, M, P] contiguous


@triton.jit
def _value(tensor, scalar, h):
    """A hyperparameter given as a tensor [H] or as a number."""
    if tensor is None:
        return scalar
    else:
        return tl.load(tensor + h)


@kernel
def parameters_prepare_kernel(
    references, log_b, bandwidth, epsilon, key_relaxation, reference_relaxation, position_scale,
    y, inverse_norms, log_b_out, parameters,
    scalar_bandwidth, scalar_epsilon, scalar_key_relaxation, scalar_reference_relaxation, scalar_position_scale,
    stride_h, stride_m, stride_bh,
    M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DOT: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS references of one head; every program of a head writes its hyperparameters alike."""
    blocks: tl.constexpr = MP // ROWS
    h = tl.program_id(0) // blocks
    j = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    inside = (j < M)[:, None] & (d < D)[None, :]
    at = references + h * (stride_h * STEP)
    raw = tl.load(at + j[:, None] * (stride_m * STEP) + d[None, :], mask=inside, other=0.0)  # [ROWS, DP]
    inverse = inverse_norm(tl.sum(raw * raw, 1))
    scaled = raw if DOT else raw * inverse[:, None]
    tl.store(y + (h * MP + j)[:, None] * DP + d[None, :], rounded(scaled, y.dtype.element_ty))
    tl.store(inverse_norms + h * MP + j, inverse)
    if log_b is None:
        mass = tl.where(j < M, -tl.log2(M + 0.0), -INF)
    else:
        mass = tl.load(log_b + h * stride_bh + j, mask=j < M, other=-INF) * LOG2E
    tl.store(log_b_out + h * MP + j, mass)
    beta = _value(bandwidth, scalar_bandwidth, h)
    eps = _value(epsilon, scalar_epsilon, h)
    tau = _value(position_scale, scalar_position_scale, h)
    lam_a = _value(key_relaxation, scalar_key_relaxation, h)
    lam_b = _value(reference_relaxation, scalar_reference_relaxation, h)
    store_parameters(parameters, h, beta, eps, lam_a, lam_b, tau)


def prepare(x: Operands, opt: Options) -> Prepared:
    """Launches the preparation of one call's references."""
    h, m, d = x.references.shape
    mp, dp = padded(m), padded(d)
    references, log_b = unit_rows(x.references), None if x.log_b is None else unit_rows(x.log_b)
    new = x.references.new_empty
    out = Prepared(
        new((h, mp, dp), dtype=x.key.dtype),
        new((h, mp)),
        new((h, mp)),
        new((h, NUMBERS.value)),
        None if x.reference_position is None else x.reference_position.contiguous(),
    )
    hypers = [_unit(getattr(x, name)) for name in HYPER]
    step = stride_step(references)
    strides = (*(s // step for s in references.stride()[:2]), 0 if log_b is None else log_b.stride(0))
    args: tuple[Any, ...] = (references, log_b, *hypers, *out[:4], *map(float, opt.scalars), *strides)
    constants = {"M": m, "MP": mp, "D": d, "DP": dp, "DOT": opt.kernel == "dot", "STEP": step, "ROWS": ROWS}
    launch(parameters_prepare_kernel, h * mp // ROWS, args, constants, TILE)
    return out


def _unit(t: Tensor | None) -> Tensor | None:
    """A hyperparameter [H] with unit stride."""
    return t if t is None or t.stride(0) == 1 else t.contiguous()
