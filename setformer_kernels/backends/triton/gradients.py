"""What every backward pass shares: from dℓ to the gradients of tokens and parameters, and the final sums over programs.

With ĉ_ij = ⟨x̂_i, ŷ_j⟩, dĉ = β κ dℓ/ε (rbf) or dκ = dℓ/ε (dot):

    dx_i = (Σ_j dĉ_ij ŷ_j − x̂_i Σ_j dĉ_ij ĉ_ij)/‖x_i‖,   dŷ_j = Σ_i dĉ_ij x̂_i,   dy_j = (dŷ_j − ŷ_j⟨ŷ_j, dŷ_j⟩)/‖y_j‖
    dβ = Σ dℓ κ (ĉ − 1)/ε,   dε = −Σ dℓ (κ − 1)/ε²,   dτ = −2τ Σ dℓ ‖p − π‖²,   dπ_j = 2τ² Σ_i dℓ_ij (p_i − π_j)

A program leaves its part of every sum in its own slot of `Partials`; `parameter_kernel` adds the slots of all passes
and of the batch in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...problem import HYPER, Operands, Options, empty_in_order
from .config import Tile, padded, tile
from .launch import Device, device_of, launch
from .logits import squared_distance
from .plan import range_known
from .prepare import Prepared
from .primitives import INF, dot, exact_scale, inverse_norm, rounded

SUMS = 8  # numbers a slot holds for the hyperparameters; the first five in the order of HYPER
# What the sums of a slot are:    Σ dℓ κ (ĉ − 1),  Σ dℓ (κ − 1),  Σ df LSE_j(ℓ + g),  Σ dg c,  Σ dℓ ‖p − π‖²
PARAMETERS = ("references", "log_b", *HYPER, "reference_position")
BLOCK = 256  # numbers of [M, D] that one program adds over the slots
TILE = Tile(rows=16, depth=BLOCK, warps=4, stages=1)  # a [16 slots, 256] tile is 32 numbers a thread


class Partials(NamedTuple):
    """The sums that programs leave for the parameters; a head has one slot per program that walks its tokens."""

    log_b: Tensor  # [BH, slots, MP] parts of d log b
    y: Tensor | None  # [BH, slots, MP, DP] parts of dŷ; this and the others are None where not needed
    sums: Tensor | None  # [BH, slots, SUMS]
    position: Tensor | None  # [BH, slots, MP, PP] Σ_i dℓ_ij (p_i − π_j)


def power_of_two(n: int) -> int:
    """The next power of two, the padded side of something that enters no product."""
    return 1 << max(0, n - 1).bit_length()


def new_partials(x: Operands, prepared: Prepared, slots: int, needs: Sequence[bool]) -> Partials:
    """Empty slots for `slots` programs per head, of the sums that the needed gradients take."""
    need = {name for name, n in zip(Operands._fields, needs, strict=True) if n and getattr(x, name) is not None}
    heads, (_, mp, dp) = x.key.shape[0] * x.key.shape[1], prepared.y.shape
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
    return any(need[name] and getattr(x, name) is not None for name in PARAMETERS)


def gradient_tile(x: Operands, opt: Options) -> Tile:
    """The tile of the passes over queries and keys."""
    m, d, e = x.references.shape[1], x.key.shape[-1], x.value.shape[-1]
    kind = "gradient" if range_known(x, opt) == "always" else "gradient_log"
    return tile(kind, device_of(x.key).family, padded(max(m, d, e)), x.key.element_size())


def across(device: Device, tokens: Tensor) -> bool:
    """Whether warps share the references (see `tokens_by`): with few tokens a tile, sharing these would repeat work.

    Not for float32 on Hopper and Blackwell, whose wide products would hold three parts of the references in registers.
    """
    return tokens.element_size() == 2 or device.family not in ("sm_90", "sm_100")


@triton.jit
def tokens_by(a, b, PRECISION: tl.constexpr, ACROSS: tl.constexpr):
    """a [BN, K] · b [K, J] with a tokens' row per row of a; ACROSS: as (bᵀ aᵀ)ᵀ, so that warps share the columns."""
    return tl.trans(dot(tl.trans(b), tl.trans(a), PRECISION)) if ACROSS else dot(a, b, PRECISION)


@triton.jit
def token_gradient(
    dl, kappa, cosine, inverse, x, y, factor,
    WHOLE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, ACROSS: tl.constexpr = False,
):  # fmt: skip
    """(dĉ [BN, MP], x̂ [BN, depth] as operands of dŷ = dĉᵀ x̂, dx [BN, depth]) for columns x, y of the head dim.

    `factor` is β/ε (dot: 1/ε).  x̂ is never rounded: 1/‖x‖ moves into dĉ, in float16 but for a power of two that x can
    take.  dĉ is rounded once, and ĉ came from the rounded ŷ: so dx is orthogonal to x̂ to float32, whether x holds the
    WHOLE head dim and ⟨x̂, dx̂⟩ can be taken from it, or a part of it.
    """
    rest, scaled = inverse, x
    if x.dtype == tl.float16:
        scaled, rest = exact_scale(x, inverse)
    d = dl * (factor * rest)[:, None]
    if not DOT:
        d *= kappa
    operand = rounded(d, x.dtype)
    dx = tokens_by(operand, y, PRECISION, ACROSS)
    if not DOT:
        wide = x.to(tl.float32)
        along = tl.sum(wide * dx, 1) * inverse if WHOLE else tl.sum(operand.to(tl.float32) * cosine, 1)
        dx -= wide * (along * inverse)[:, None]
        if x.dtype == tl.float16:
            dx *= tl.where(rest > 0, inverse / tl.where(rest > 0, rest, 1.0), 0.0)[:, None]
    return operand, scaled, dx


@triton.jit
def kernel_sums(dl, kappa, cosine, beta, BALANCED: tl.constexpr, DOT: tl.constexpr):
    """(Σ_j dℓ κ (ĉ − 1), Σ_j dℓ (κ − 1)) [BN]: the rows' parts of dβ·ε and −dε·ε²; beta is β·log2 e.

    BALANCED: all dℓ of the queries, and all of the keys, sum to 0.  Moving κ by its value `middle` between orthogonal
    vectors then changes nothing but the weight of their rounding errors.
    """
    middle = 0.0 if DOT else tl.exp2(-beta)
    d_epsilon = tl.sum(dl * (kappa - (middle if BALANCED else 1.0)), 1)
    d_beta = d_epsilon * 0.0 if DOT else tl.sum(dl * (kappa * (cosine - 1.0) + (middle if BALANCED else 0.0)), 1)
    return d_beta, d_epsilon


@triton.jit
def position_sums(dl, total, p, rows, live, stride, pi, M_TRUE: tl.constexpr, P: tl.constexpr, PP: tl.constexpr):
    """(Σ_j dℓ ‖p_i − π_j‖² [BN], Σ_i dℓ_ij (p_i − π_j) [MP, PP]); a token whose position is NaN adds nothing.

    A row of dℓ sums to `total` [BN], but for rounding: a squared distance of thousands would multiply that error.  So
    squares count from the row's smallest on, and the smallest times the exact sum.
    """
    M: tl.constexpr = dl.shape[1]
    j, axes = tl.arange(0, M), tl.arange(0, PP)
    whole = tl.zeros([dl.shape[0]], tl.float32)
    for axis in tl.static_range(P):
        whole += tl.load(p + rows.to(tl.int64) * stride + axis, mask=live, other=0.0)
    placed = whole == whole
    distance = squared_distance(p, rows, live, stride, pi, M_TRUE, M, P)
    nearest = tl.min(tl.where((j < M_TRUE)[None, :], distance, INF), 1)
    squares = tl.sum(dl * (distance - nearest[:, None]), 1) + nearest * total
    sums = tl.zeros([M, PP], tl.float32)
    for axis in tl.static_range(P):
        at = tl.load(p + rows.to(tl.int64) * stride + axis, mask=live & placed, other=0.0)
        difference = at[:, None] - tl.load(pi + j * P + axis, mask=j < M_TRUE, other=0.0)[None, :]
        weighted = tl.where(placed[:, None], dl * difference, 0.0)
        sums += tl.where(axes[None, :] == axis, tl.sum(weighted, 0)[:, None], 0.0)
    return squares, sums


@triton.jit
def store_sums(sums, slot, d_beta, d_epsilon, d_key_relaxation, d_reference_relaxation, d_tau):
    """One program's sums for the hyperparameters."""
    at = sums + slot * 8
    tl.store(at, d_beta)
    tl.store(at + 1, d_epsilon)
    tl.store(at + 2, d_key_relaxation)
    tl.store(at + 3, d_reference_relaxation)
    tl.store(at + 4, d_tau)


@triton.jit
def sum_slots(parts, first, step, batch, slots, used, size, index, inside):
    """Σ parts [BH, slots, size] at `index` [BLOCK], over `used` slots of `batch` heads first, first + step, .."""
    i = tl.arange(0, 16)
    total = tl.zeros([index.shape[0]], tl.float32)
    for start in range(0, batch * used, 16):
        r = start + i
        slot = (first + (r // used) * step).to(tl.int64) * slots + r % used
        some = (r < batch * used)[:, None] & inside[None, :]
        total += tl.sum(tl.load(parts + slot[:, None] * size + index[None, :], mask=some, other=0.0), 0)
    return total


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
        total = sum_slots(sums + number, h, H, B, slots, slots, 8, zero, zero == 0)
        tl.store(out + h + zero, total * factor)


@triton.jit(do_not_specialize=["stride_h", "stride_m", "H", "B", "slots"])
def parameter_kernel(
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
    epsilon, tau = tl.load(parameters + h * 8 + 6), tl.load(parameters + h * 8 + 7)
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
        _store_hyper(sums, d_bandwidth, 0, 1.0 / epsilon, h, H, B, slots)
        _store_hyper(sums, d_epsilon, 1, -1.0 / (epsilon * epsilon), h, H, B, slots)
        _store_hyper(sums, d_key_relaxation, 2, -1.0, h, H, B, slots)
        _store_hyper(sums, d_reference_relaxation, 3, -1.0, h, H, B, slots)
        _store_hyper(sums, d_tau, 4, -2.0 * tau, h, H, B, slots)


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
    references = x.references if x.references.stride(-1) == 1 else x.references.contiguous()
    b, slots, rows = x.key.shape[0], parts.log_b.shape[1], max(1, min(mp, BLOCK // dp))
    p = 0 if prepared.position is None else prepared.position.shape[-1]
    constants = {
        "M": m, "MP": mp, "D": d, "DP": dp, "P": p, "PP": power_of_two(p), "DOT": opt.kernel == "dot", "ROWS": rows,
    }  # fmt: skip
    args = (*parts, references, prepared.parameters, *out.values(), *references.stride()[:2], h, b, slots)
    launch(parameter_kernel, h * mp // rows, args, constants, TILE)
    return {n: in_order(given[n], t) for n, t in out.items()}


def in_order(like: Tensor | None, t: Tensor | None) -> Tensor | None:
    """`t`, contiguous, in the memory order of `like`."""
    if t is None or like is None or like.is_contiguous():
        return t
    return empty_in_order(like, t.shape).copy_(t)
