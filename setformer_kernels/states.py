"""The state that a causal call begins with, and the gates by which it forgets: checked, in the form of `Stream`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .ops.direct import unwatched
from .problem import NO_STREAM, Operands, Stream, compute_dtype
from .reference import state as layout

FORGOTTEN = -1000.0  # e^−1000 of a key is nothing beside any other, and sums of this keep a float32's digits


def check_state(
    name: str, state: Tensor, sizes: Sequence[int | None], dtype: torch.dtype, wants: str = "[B, Hk, M, 2E + 3]"
) -> None:
    checks.tensor(name, state, "BHMC" if len(sizes) == 4 else "." * len(sizes))
    checks.shape(name, state, sizes, wants)
    wide = dtype in (torch.float32, torch.float64)
    if state.dtype != dtype or not wide:
        wanted = dtype if wide else "torch.float32 or torch.float64"
        raise ValueError(f"{name} must be {wanted}, got {state.dtype}: sums in fewer digits drift")


def stream_of(x: Operands, tokens: tuple[int, ...], initial_state: Tensor | None, log_decay: Tensor | None) -> Stream:
    """Of a state for each batch element, and gates [B, H, S], the sizes of the caller's keys."""
    if log_decay is not None:
        checks.tensor("log_decay", log_decay, "BHS")
        checks.shape("log_decay", log_decay, tokens, "B, H and S of the key")
    return _stream(x, x.key.shape[0], initial_state, log_decay, None, "[B, Hk, M, 2E + 3]")


def packed_stream(x: Operands, cu: Tensor, initial_state: Tensor | None, log_decay: Tensor | None) -> Stream:
    """Of a pack of keys [1, H, T]: a state for each segment, and gates [T, H], of which slack is not looked at."""
    if log_decay is not None:
        checks.tensor("log_decay", log_decay, "TH")
        checks.shape("log_decay", log_decay, (x.key.shape[2], x.key.shape[1]), "T and H of the key")
        log_decay = log_decay.mT.unsqueeze(0)
    return _stream(x, cu.shape[0] - 1, initial_state, log_decay, cu, "N of cu_seqlens, [N, Hk, M, 2E + 3]")


def _within(log_decay: Tensor) -> bool:
    """Whether all of these gates are already in the range that they are clamped to; ValueError if one is above it."""
    if log_decay.numel() == 0:
        return False
    low, high = (t.item() for t in torch.aminmax(log_decay))  # one pass: a step has no time for more
    if math.isnan(high):
        high = log_decay.nan_to_num(0.0).max().item()
    if high > 0.0:
        raise ValueError(f"log_decay must be ≤ 0, got {high}: a gate fades what came before")
    return low >= FORGOTTEN


def _stream(
    x: Operands, n: int, initial_state: Tensor | None, log_decay: Tensor | None, cu: Tensor | None, wants: str
) -> Stream:
    dtype = compute_dtype(x.key.dtype)
    if initial_state is not None:
        sizes = (n, x.key.shape[1], x.references.shape[1], layout.width(x.value.shape[-1]))
        check_state("initial_state", initial_state, sizes, dtype, wants)
    checks.same_device("key", x.key, initial_state=initial_state, log_decay=log_decay)
    if log_decay is None:
        return NO_STREAM if initial_state is None else Stream(None, initial_state)
    gates = log_decay if log_decay.dtype == dtype else log_decay.to(dtype)
    within = False
    if log_decay.device.type == "cpu" and unwatched((log_decay,)):
        seen = log_decay if cu is None else log_decay[:, :, : max(int(cu[-1]), 0)]
        within = _within(seen) and cu is None  # nobody knows what is in slack
    if not within:
        gates = gates.clamp(FORGOTTEN, 0.0)
    if x.log_a is not None:
        gates = torch.where(x.log_a > -torch.inf, gates, 0.0)
    return Stream(gates, initial_state)
