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
from ..device.rows import wide
from ..host.groups import sizes_of
from ..host.launch import kernel, launch
from ..host.rows import stride_step, unit_rows
from ..host.tiles import Tile

ROWS = 16  # references per program: a few thousand numbers in all, so any tile does
TILE = Tile(rows=ROWS, depth=0, warps=4, stages=1)


class References(NamedTuple):
    """The references of one call, in the form the kernels use."""

    y: Tensor  # [H, MP, DP] ŷ (rbf) or y (dot) in the tokens' dtype, zero where padded
    log_b: Tensor  # [H, MP] log2 b, −∞ where padded
    parameters: Tensor  # [H, NUMBERS] the hyperparameters, as device/head.py lays them out
    position: Tensor | None  # [H, M, P] contiguous


class Hyper(NamedTuple):
    """A value for each of `HYPER`: tensors [H], None where they are numbers, or the numbers."""

    bandwidth: Any
    epsilon: Any
    key_relaxation: Any
    reference_relaxation: Any
    position_scale: Any


@triton.jit
def _value(tensor, scalar, h):
    """A hyperparameter given as a tensor [H] or as a number."""
    if tensor is None:
        return scalar
    else:
        return tl.load(tensor + h)


@kernel
def parameters_prepare_kernel(
    references, stride_rh, stride_rm,  # [H, M, D], strides in units of STEP
    log_b, stride_bh,  # [H, M] or None
    given, scalars,  # Hyper of tensors or None, of numbers
    y, log_b_out, parameters,  # as in References
    inverse_norms,  # [H, MP]
    M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DOT: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS references of one head; every program of a head writes its hyperparameters alike."""
    blocks: tl.constexpr = MP // ROWS
    h = (tl.program_id(0) // blocks).to(tl.int64)
    j = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    inside = (j < M)[:, None] & (d < D)[None, :]
    at = references + h * wide(stride_rh, STEP) + j[:, None] * wide(stride_rm, STEP)
    raw = tl.load(at + d[None, :], mask=inside, other=0.0)  # [ROWS, DP]
    inverse = inverse_norm(tl.sum(raw * raw, 1))
    scaled = raw if DOT else raw * inverse[:, None]
    tl.store(y + (h * MP + j)[:, None] * DP + d[None, :], rounded(scaled, y.dtype.element_ty))
    tl.store(inverse_norms + h * MP + j, inverse)
    if log_b is None:
        mass = tl.where(j < M, -tl.log2(M + 0.0), -INF)
    else:
        mass = tl.load(log_b + h * stride_bh + j, mask=j < M, other=-INF) * LOG2E
    tl.store(log_b_out + h * MP + j, mass)
    beta = _value(given.bandwidth, scalars.bandwidth, h)
    eps = _value(given.epsilon, scalars.epsilon, h)
    tau = _value(given.position_scale, scalars.position_scale, h)
    lam_a = _value(given.key_relaxation, scalars.key_relaxation, h)
    lam_b = _value(given.reference_relaxation, scalars.reference_relaxation, h)
    store_parameters(parameters, h, beta, eps, lam_a, lam_b, tau)


def prepare(x: Operands, opt: Options) -> References:
    """The prepared references of one call."""
    return prepared_with_norms(x, opt)[0]


def prepared_with_norms(x: Operands, opt: Options) -> tuple[References, Tensor]:
    """Launches the preparation of one call's references; they, and 1/‖y‖ [H, MP], 0 where ‖y‖ ≤ 1e-12."""
    h, sizes, new = x.references.shape[0], sizes_of(x), x.references.new_empty
    references, log_b = unit_rows(x.references), unit_rows(x.log_b)
    out = References(
        new((h, sizes.MP, sizes.DP), dtype=x.key.dtype),
        new((h, sizes.MP)),
        new((h, NUMBERS)),
        None if x.reference_position is None else x.reference_position.contiguous(),
    )
    inverse_norms = new((h, sizes.MP))
    given, scalars = Hyper(*[unit_rows(getattr(x, name)) for name in HYPER]), Hyper(*map(float, opt.scalars))
    step = stride_step(references)
    tensors = (
        references,
        *(s // step for s in references.stride()[:2]),
        log_b,
        0 if log_b is None else log_b.stride(0),
    )
    constants = {"DOT": opt.kernel == "dot", "STEP": step, "ROWS": ROWS} | {
        "M": sizes.M,
        "MP": sizes.MP,
        "D": sizes.D,
        "DP": sizes.DP,
    }
    args = (*tensors, given, scalars, *out[:3], inverse_norms)
    launch(parameters_prepare_kernel, h * sizes.MP // ROWS, args, constants, TILE)
    return out, inverse_norms
