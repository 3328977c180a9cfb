"""The state of a causal scan: one tensor [..., M, 2E + 3] in the compute dtype, whose zeros mean that no key was seen.

    columns      0 .. E−1    E    E+1 .. 2E    2E+1    2E+2
    hold         N           C    N'           C'      k

    Σ_s e^{ω_sj + Γ − Γ_s} v_s = (N_j + N'_j) 2^{k_j},   Σ_s e^{ω_sj + Γ − Γ_s} = (C_j + C'_j) 2^{k_j},   1 ≤ C_j < 2

over all keys s seen so far, with log weights ω and log gates that sum to Γ.  N' and C' are what rounding took from N
and C: without them sums of a million terms stop growing.  k is an integer, so that changing it rounds nothing.  As a
scale it has no gradient.  Of a state that is passed in, N' has the gradient of N; of one that came out, none arrives.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import Operands, compute_dtype
from .transport import INF

# ln 2 in two parts, the first of ten bits: its products with integers are exact.
LN2_HIGH, LN2_LOW = 0.693359375, -2.121944400546905827679e-4


class Sums(NamedTuple):
    """A state, taken apart: N and C in one tensor, N' and C' in another, and k without gradient."""

    sums: Tensor  # [..., M, E + 1]
    lost: Tensor  # [..., M, E + 1]
    exponent: Tensor  # [..., M, 1]


def width(e: int) -> int:
    """Columns of a state for values of E numbers."""
    return 2 * e + 3


def empty_like(x: Operands, wanted: bool = True, segments: int | None = None) -> Tensor:
    """Memory for the state of a call [B, H, M, 2E + 3]; [B, H, 0, 0], which stands for none, where it is not wanted.
    Of a pack B = `segments`."""
    b, h, _, e = x.value.shape
    b = b if segments is None else segments
    shape = (b, h, x.references.shape[1], width(e)) if wanted else (b, h, 0, 0)
    return x.value.new_empty(shape, dtype=compute_dtype(x.key.dtype))


def split(state: Tensor) -> Sums:
    e = state.shape[-1] // 2
    return Sums(state[..., :e], state[..., e : 2 * e], state[..., 2 * e :].detach())


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(s, r): s = a + b as it is rounded, and s + r = a + b exactly."""
    s = a + b
    of_b = s - a
    return s, (a - (s - of_b)) + (b - of_b)


def units(x: Tensor, exponent: Tensor) -> Tensor:
    """x − k ln 2, which loses no digit where the two nearly cancel."""
    return (x - exponent * LN2_HIGH) - exponent * LN2_LOW


def log_sum(state: Tensor) -> Tensor:
    """log C [..., M], −∞ where no key was seen."""
    sums, lost, k = split(state)
    c = sums[..., -1] + lost[..., -1]
    seen = c > 0
    return torch.where(seen, units(torch.where(seen, c, 1.0).log(), -k.squeeze(-1)), -INF)


def means(state: Tensor) -> Tensor:
    """z [..., M, E], 0 where no key was seen."""
    sums, lost, _ = split(state)
    total = sums + lost
    c = total[..., -1:]
    return torch.where(c > 0, total[..., :-1] / torch.where(c > 0, c, 1.0), 0.0)


def _packed(sums: Tensor, lost: Tensor, exponent: Tensor) -> Tensor:
    """The state of sums in units of 2^exponent, brought to 1 ≤ C < 2."""
    c = sums[..., -1:].detach()
    shift = torch.where(c > 0, torch.where(c > 0, c, 1.0).log2().floor(), 0.0)
    unit = (-shift).exp2()
    return torch.cat((sums * unit, lost * unit, torch.where(c > 0, exponent + shift, 0.0)), -1)


def advance(state: Tensor, omega: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """The state after n keys of weights e^ω [..., n, M] and values v [..., n, E]; what it held fades by e^decay."""
    sums, lost, k = split(state)
    decay = decay[..., None, None]
    turns = (decay.detach() / math.log(2)).round()
    fade = torch.expm1(units(decay, turns))  # e^decay = 2^turns (1 + fade)
    old = torch.where(sums[..., -1:] > 0, k + turns, -INF)
    top = torch.maximum(old, (omega.detach().amax(-2).unsqueeze(-1) / math.log(2)).ceil())  # [..., M, 1]
    top = torch.where(top > -INF, top, 0.0)
    w = units(omega, top.mT).exp()  # [..., n, M]
    new = torch.cat((w.mT @ v, w.sum(-2).unsqueeze(-1)), -1)
    scale = (old - top).exp2()
    total, rest = two_sum(scale * sums, new + scale * (lost + (sums + lost) * fade))
    seen = (omega > -INF).any(-1).any(-1)[..., None, None]
    return torch.where(seen, _packed(total, rest, top), state)


def merge(a: Tensor, b: Tensor) -> Tensor:
    """The state of the keys of both states."""
    parts = split(a), split(b)
    seen = [torch.where(p.sums[..., -1:] > 0, p.exponent, -INF) for p in parts]
    top = torch.maximum(*seen)
    top = torch.where(top > -INF, top, 0.0)
    scales = [(k - top).exp2() for k in seen]
    total, rest = two_sum(*(p.sums * scale for p, scale in zip(parts, scales, strict=True)))
    rest = rest + sum(p.lost * scale for p, scale in zip(parts, scales, strict=True))
    return _packed(*two_sum(total, rest), top)
