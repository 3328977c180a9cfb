"""From nn.MultiheadAttention's masks (True = ignore) to SeT attention's (True = takes part; floats are log masses)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def takes_part(mask: Tensor) -> Tensor:
    """A bool mask inverted; a float mask is additive in both conventions and stays as it is."""
    return ~mask if mask.dtype == torch.bool else mask


def key_mask_of(key_padding_mask: Tensor | None, slots: int) -> Tensor | None:
    """[B, S] -> [B, S + slots]; the appended slots (bias_k, zero_attn) are seen by everyone."""
    if key_padding_mask is None:
        return None
    return takes_part(F.pad(key_padding_mask, (0, slots)))


def present_of(key_padding_mask: Tensor) -> Tensor:
    """Bool of the same shape, True where the key has any mass."""
    mask = takes_part(key_padding_mask)
    return mask if mask.dtype == torch.bool else mask.float().exp() > 0.0


def blank_padding(key: Tensor, value: Tensor, key_padding_mask: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """key and value [B, S, ·] (batch_first), [S, B, ·] or [S, ·] with zeros where the mask forbids (bool, or −inf).

    The kernels never read these rows, but the gradient of a projection weight is a sum over all of them, in which
    0 · NaN would be NaN: without gradients they stay.  One tensor given twice stays one tensor.
    """
    if not torch.is_grad_enabled() and not _is_traced():
        return key, value
    mask = takes_part(key_padding_mask)
    present = mask if mask.dtype == torch.bool else mask > -torch.inf
    present = (present if batch_first or present.dim() == 1 else present.T).unsqueeze(-1)
    blank = torch.where(present, key, 0.0)
    return blank, blank if value is key else torch.where(present, value, 0.0)


def _is_traced() -> bool:
    """By torch.jit.trace, which compares the graphs of two runs, one of them without gradients."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def attention_mask_of(
    attn_mask: Tensor | None, is_causal: bool, slots: int, B: int, H: int, L: int, S: int, device: torch.device
) -> tuple[Tensor | None, bool]:
    """attn_mask [L, S] or [B·H, L, S] -> ([L, S + slots], [B, H, L, S + slots] or None, causal).

    is_causal beside a square attn_mask is believed, as in torch; a mask that wants a gradient is more than causal, so
    it is kept.  Where the causal path cannot be taken (L != S, or appended slots) the mask itself is the truth.
    """
    if is_causal and slots == 0 and L == S and (attn_mask is None or not attn_mask.requires_grad):
        return None, True
    if is_causal and attn_mask is None:
        attn_mask = causal_ban(L, S, device)
    if attn_mask is None:
        return None, False
    if attn_mask.dim() == 3:
        attn_mask = attn_mask.view(B, H, L, S)
    return takes_part(F.pad(attn_mask, (0, slots))), False


def causal_ban(L: int, S: int, device: torch.device) -> Tensor:
    """[L, S] bool, True where key s comes after query i (both counted from the start)."""
    return torch.ones(L, S, dtype=torch.bool, device=device).triu(1)
