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
from ..device.gradients import SUMS, sum_at, sum_slots
from ..device.head import plain_parameters
from ..device.primitives import inverse_norm
from ..device.rows import wide
from ..host.groups import sizes_of
from ..host.launch import kernel, launch
from ..host.rows import unit_rows
from ..host.tiles import Tile, power_of_two
from .prepare import References

BLOCK = 256  # numbers of [M, D] that one program adds over the slots
# A [16 slots, 256] tile is 32 numbers a thread; with a bound of its own, as many registers, ptxas spills 8 bytes (3.6).
TILE = Tile(rows=16, depth=BLOCK, warps=4, stages=1, registers=255)


class Partials(NamedTuple):
    """The sums that programs leave for the parameters; a head has one slot per program that walks its tokens."""

    log_b: Tensor  # [BH, slots, MP] parts of d log b
    y: Tensor | None  # [BH, slots, MP, DP] parts of dŷ; this and the others are None where not needed
    sums: Tensor | None  # [BH, slots, SUMS]
    position: Tensor | None  # [BH, slots, MP, PP] Σ_i dℓ_ij (p_i − π_j)


class ParameterGradients(NamedTuple):
    """What is delivered, None where not needed."""

    references: Tensor | None  # [H, M, D]
    log_b: Tensor | None  # [H, M]
    bandwidth: Tensor | None  # [H] and the following
    epsilon: Tensor | None
    key_relaxation: Tensor | None
    reference_relaxation: Tensor | None
    position_scale: Tensor | None
    reference_position: Tensor | None  # [H, M, P]


def new_partials(
    x: Operands, prepared: References, slots: int, needs: Sequence[bool], segments: int | None = None
) -> Partials:
    """Empty slots for `slots` programs per head, of the sums that the needed gradients take; segments: as B."""
    need = {name for name, n in zip(Operands._fields, needs, strict=True) if n and getattr(x, name) is not None}
    elements = x.key.shape[0] if segments is None else segments
    heads, (_, mp, dp) = elements * x.key.shape[1], prepared.y.shape
    new, pi = x.references.new_empty, prepared.position
    return Partials(
        new((heads, slots, mp)),
        new((heads, slots, mp, dp)) if "references" in need else None,
        new((heads, slots, SUMS)) if need & {*HYPER} else None,
        new((heads, slots, mp, power_of_two(pi.shape[-1])))
        if pi is not None and "reference_position" in need
        else None,
    )


def wants_parameters(x: Operands, needs: Sequence[bool]) -> bool:
    """Whether any gradient beyond those of tokens and key masses is needed."""
    need = dict(zip(Operands._fields, needs, strict=True))
    return any(need[name] and getattr(x, name) is not None for name in ParameterGradients._fields)


@triton.jit
def _store_reference(
    parts, references, h, stride_rh, stride_rm, d_references, H, B, slots, rows,
    M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dy of some references from the slots of dŷ."""
    flat = tl.arange(0, rows.shape[0] * DP)
    index = tl.min(rows) * DP + flat
    summed = sum_slots(parts.y, h, H, B, slots, slots, MP * DP, index, flat >= 0)
    d_hat = tl.reshape(summed, [rows.shape[0], DP])
    d = tl.arange(0, DP)
    inside = (rows < M)[:, None] & (d < D)[None, :]
    if not DOT:
        at = references + h * wide(stride_rh) + rows[:, None] * wide(stride_rm)
        raw = tl.load(at + d[None, :], mask=inside, other=0.0)
        inverse = inverse_norm(tl.sum(raw * raw, 1))
        unit = raw * inverse[:, None]
        d_hat = (d_hat - unit * tl.sum(unit * d_hat, 1)[:, None]) * inverse[:, None]
    tl.store(d_references + (h * M + rows)[:, None] * D + d[None, :], d_hat, mask=inside)


@triton.jit
def _store_hyper(sums, out, name: tl.constexpr, factor, h, H, B, slots, SUMS: tl.constexpr):
    """The gradient of one hyperparameter of head h, where it is wanted."""
    if out is not None:
        zero = tl.arange(0, 1)
        total = sum_slots(sum_at(sums, 0, name), h, H, B, slots, slots, SUMS, zero, zero == 0)
        tl.store(out + h + zero, total * factor)


@kernel
def parameters_backward_kernel(
    references, stride_rh, stride_rm,  # [H, M, D]
    parameters,  # [H, NUMBERS]
    parts, out,  # Partials, ParameterGradients
    H, B, slots,
    M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr,
    DOT: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """All parameter gradients of ROWS references of one head; the hyperparameters' in the head's first program."""
    blocks: tl.constexpr = MP // ROWS
    h = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    rows = block * ROWS + tl.arange(0, ROWS)
    beta, epsilon, tau = plain_parameters(parameters, h)
    if out.references is not None:
        _store_reference(
            parts, references, h, stride_rh, stride_rm, out.references, H, B, slots, rows, M, MP, D, DP, DOT
        )
    if out.log_b is not None:
        total = sum_slots(parts.log_b, h, H, B, slots, slots, MP, rows, rows < M)
        tl.store(out.log_b + h * M + rows, total, mask=rows < M)
    if out.reference_position is not None:
        index = block * ROWS * PP + tl.arange(0, ROWS * PP)
        j, axis = index // PP, index % PP
        inside = (j < M) & (axis < P)
        total = sum_slots(parts.position, h, H, B, slots, slots, MP * PP, index, inside)
        tl.store(out.reference_position + (h * M + j) * P + axis, 2.0 * tau * tau * total, mask=inside)
    if block == 0:
        _store_hyper(parts.sums, out.bandwidth, "beta", 1.0 / epsilon, h, H, B, slots, SUMS)
        _store_hyper(parts.sums, out.epsilon, "epsilon", -1.0 / (epsilon * epsilon), h, H, B, slots, SUMS)
        _store_hyper(parts.sums, out.key_relaxation, "key_relaxation", -1.0, h, H, B, slots, SUMS)
        _store_hyper(parts.sums, out.reference_relaxation, "reference_relaxation", -1.0, h, H, B, slots, SUMS)
        _store_hyper(parts.sums, out.position_scale, "tau", -2.0 * tau, h, H, B, slots, SUMS)


def parameter_gradients(
    x: Operands, opt: Options, prepared: References, parts: Partials, needs: Sequence[bool]
) -> dict[str, Tensor | None]:
    """The gradients of references, masses, hyperparameters and reference positions by name, None where not needed."""
    need = dict(zip(Operands._fields, needs, strict=True))
    given = {name: getattr(x, name) for name in ParameterGradients._fields}
    out = ParameterGradients(*(t.new_empty(t.shape) if need[n] and t is not None else None for n, t in given.items()))
    if all(t is None for t in out):
        return out._asdict()
    h, sizes = x.references.shape[0], sizes_of(x)
    references = unit_rows(x.references)
    b, slots = parts.log_b.shape[0] // max(h, 1), parts.log_b.shape[1]
    rows = max(1, min(sizes.MP, BLOCK // sizes.DP))
    args = (references, *references.stride()[:2], prepared.parameters, parts, out, h, b, slots)
    constants = {"DOT": opt.kernel == "dot", "SUMS": SUMS, "ROWS": rows}
    constants |= {"M": sizes.M, "MP": sizes.MP, "D": sizes.D, "DP": sizes.DP, "P": sizes.P, "PP": sizes.PP}
    launch(parameters_backward_kernel, h * sizes.MP // rows, args, constants, TILE)
    return {n: in_order(given[n], t) for n, t in out._asdict().items()}
