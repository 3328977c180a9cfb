"""The parameters' gradients: the slots of all programs and of the batch, added in a fixed order.

What the sums are, and dy, dβ, dε, dτ and dπ from them, stands in `device.gradients`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ....problem import HYPER, Operands, Options, in_order
from ..device.gradients import (
    BETA_SUM,
    EPSILON_SUM,
    KEY_RELAXATION_SUM,
    REFERENCE_RELAXATION_SUM,
    SUMS,
    TAU_SUM,
    sum_slots,
)
from ..device.head import plain_parameters
from ..device.primitives import inverse_norm
from ..host.launch import kernel, launch
from ..host.rows import unit_rows
from ..host.tiles import Tile, power_of_two
from .prepare import Prepared

PARAMETERS = ("references", "log_b", *HYPER, "reference_position")
BLOCK = 256  # numbers of [M, D] that one program adds over the slots
TILE = Tile(rows=16, depth=BLOCK, warps=4, stages=1)  # a [16 slots, 256] tile is 32 numbers a thread


class Partials(NamedTuple):
    """The sums that programs leave for the parameters; a head has one slot per program that walks its tokens."""

    log_b: Tensor  # [BH, slots, MP] parts of d log b
    y: Tensor | None  # [BH, slots, MP, DP] parts of dŷ; this and the others are None where not needed
    sums: Tensor | None  # [BH, slots, SUMS]
    position: Tensor | None  # [BH, slots, MP, PP] Σ_i dℓ_ij (p_i − π_j)


def new_partials(x: Operands, prepared: Prepared, slots: int, needs: Sequence[bool]) -> Partials:
    """Empty slots for `slots` programs per head, of the sums that the needed gradients take."""
    need = {name for name, n in zip(Operands._fields, needs, strict=True) if n and getattr(x, name) is not None}
    heads, (_, mp, dp) = x.key.shape[0] * x.key.shape[1], prepared.y.shape
    new, pi = x.references.new_empty, prepared.position
    return Partials(
        new((heads, slots, mp)),
        new((heads, slots, mp, dp)) if "references" in need else None,
        new((heads, slots, SUMS.value)) if need & {*HYPER} else None,
        new((heads, slots, mp, power_of_two(pi.shape[-1])))
        if pi is not None and "reference_position" in need
        else None,
    )


def wants_parameters(x: Operands, needs: Sequence[bool]) -> bool:
    """Whether any gradient beyond those of tokens and key masses is needed."""
    need = dict(zip(Operands._fields, needs, strict=True))
    return any(need[name] and getattr(x, name) is not None for name in PARAMETERS)


@triton.jit
def _store_reference(
    part_y, references, d_references, h, H, B, slots, rows, stride_h, stride_m,
    M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dy of ROWS references from the slots of dŷ."""
    flat = tl.arange(0, ROWS * DP)
    index = tl.min(rows) * DP + flat
    d_hat = tl.reshape(sum_slots(part_y, h, H, B, slots, slots, MP * DP, index, flat >= 0), [ROWS, DP])
    d = tl.arange(0, DP)
    inside = (rows < M)[:, None] & (d < D)[None, :]
    if not DOT:
        raw = tl.load(references + h * stride_h + rows[:, None] * stride_m + d[None, :], mask=inside, other=0.0)
        inverse = inverse_norm(tl.sum(raw * raw, 1))
        unit = raw * inverse[:, None]
        d_hat = (d_hat - unit * tl.sum(unit * d_hat, 1)[:, None]) * inverse[:, None]
    tl.store(d_references + (h * M + rows)[:, None] * D + d[None, :], d_hat, mask=inside)


@triton.jit
def _store_hyper(sums, out, number: tl.constexpr, factor, h, H, B, slots):
    """The gradient of one hyperparameter of head h, where it is wanted."""
    if out is not None:
        zero = tl.arange(0, 1)
        total = sum_slots(sums + number, h, H, B, slots, slots, SUMS, zero, zero == 0)
        tl.store(out + h + zero, total * factor)


@kernel
def parameters_backward_kernel(
    part_log_b, part_y, sums, part_position, references, parameters,
    d_references, d_log_b, d_bandwidth, d_epsilon, d_key_relaxation, d_reference_relaxation, d_tau, d_position,
    stride_h, stride_m, H, B, slots,
    M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr,
    DOT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """All parameter gradients of ROWS references of one head; the hyperparameters' in the head's first program."""
    blocks: tl.constexpr = MP // ROWS
    h = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    rows = block * ROWS + tl.arange(0, ROWS)
    beta, epsilon, tau = plain_parameters(parameters, h)
    if d_references is not None:
        _store_reference(
            part_y, references, d_references, h, H, B, slots, rows, stride_h, stride_m, M, MP, D, DP, DOT, ROWS
        )
    if d_log_b is not None:
        total = sum_slots(part_log_b, h, H, B, slots, slots, MP, rows, rows < M)
        tl.store(d_log_b + h * M + rows, total, mask=rows < M)
    if d_position is not None:
        index = block * ROWS * PP + tl.arange(0, ROWS * PP)
        j, axis = index // PP, index % PP
        inside = (j < M) & (axis < P)
        total = sum_slots(part_position, h, H, B, slots, slots, MP * PP, index, inside)
        tl.store(d_position + (h * M + j) * P + axis, 2.0 * tau * tau * total, mask=inside)
    if block == 0:
        _store_hyper(sums, d_bandwidth, BETA_SUM, 1.0 / epsilon, h, H, B, slots)
        _store_hyper(sums, d_epsilon, EPSILON_SUM, -1.0 / (epsilon * epsilon), h, H, B, slots)
        _store_hyper(sums, d_key_relaxation, KEY_RELAXATION_SUM, -1.0, h, H, B, slots)
        _store_hyper(sums, d_reference_relaxation, REFERENCE_RELAXATION_SUM, -1.0, h, H, B, slots)
        _store_hyper(sums, d_tau, TAU_SUM, -2.0 * tau, h, H, B, slots)


def parameter_gradients(
    x: Operands, opt: Options, prepared: Prepared, parts: Partials, needs: Sequence[bool]
) -> dict[str, Tensor | None]:
    """The gradients of references, masses, hyperparameters and reference positions by name, None where not needed."""
    need = dict(zip(Operands._fields, needs, strict=True))
    given = {name: getattr(x, name) for name in PARAMETERS}
    out = {n: t.new_empty(t.shape) if need[n] and t is not None else None for n, t in given.items()}
    if all(t is None for t in out.values()):
        return out
    (h, m, d), (_, mp, dp) = x.references.shape, prepared.y.shape
    references = unit_rows(x.references)
    b, slots, rows = x.key.shape[0], parts.log_b.shape[1], max(1, min(mp, BLOCK // dp))
    p = 0 if prepared.position is None else prepared.position.shape[-1]
    constants = {
        "M": m, "MP": mp, "D": d, "DP": dp, "P": p, "PP": power_of_two(p), "DOT": opt.kernel == "dot", "ROWS": rows,
    }  # fmt: skip
    args = (*parts, references, prepared.parameters, *out.values(), *references.stride()[:2], h, b, slots)
    launch(parameters_backward_kernel, h * mp // rows, args, constants, TILE)
    return {n: in_order(given[n], t) for n, t in out.items()}
