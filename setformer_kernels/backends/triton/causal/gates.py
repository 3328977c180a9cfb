"""How log gates and states reach the kernels, and how their gradients come back."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ....problem import Stream
from .segments import Ends, Pack
from .state import Gates, chunks_of


def gates_of(stream: Stream, length: int, rows: int, follows: bool, pack: Pack | None = None) -> Gates:
    """What a scan in chunks of so many rows takes of `stream`; follows: whether the final state has a gradient."""
    chunks = math.ceil(length / rows) if pack is None else pack.lengths.shape[0]
    initial, sums, decay = stream.initial_state, None, None
    if stream.log_decay is not None:
        given = stream.log_decay.double()
        padded = (F.pad(given, (0, -length % rows)) if pack is None else in_places(given, pack.rows)).flatten(0, 1)
        gamma = padded.unflatten(1, (-1, rows)).cumsum(2)  # [BH, chunks, rows]
        own = gamma[..., -1]  # [BH, chunks]
        bundles = F.pad(own, (0, -chunks % chunks_of(rows))).unflatten(1, (-1, chunks_of(rows)))
        decay = torch.stack((own, bundles.cumsum(2).flatten(1)[:, :chunks]), -1).float()
        gamma = gamma.flatten(1) / math.log(2)
        first = gamma.float()
        sums = torch.stack((first, (gamma - first).float()), -1)
    initial = None if initial is None else initial.contiguous()
    return Gates(sums, decay, initial, chunks, int(follows))


def in_places(t: Tensor, at: Tensor) -> Tensor:
    """The entries `at` [n] of t [B, H, T]: [B, H, n]; 0 where `at` is negative."""
    return torch.where(at >= 0, t[..., at.clamp_min(0)], 0.0)


def gate_gradient(crossing: Tensor | None, incoming: Tensor | None, through: Tensor | None) -> Tensor:
    """d log γ [heads, chunks, BC]: the gradient that passes each key, of any earlier key and any later query.

    crossing, incoming [heads, chunks, BC]: to and from keys of the chunk, see `backward.Work`; through [heads, chunks,
    programs]: what passes the whole chunk.
    """
    assert crossing is not None
    assert incoming is not None
    assert through is not None
    return crossing + incoming.flip(2).cumsum(2).flip(2) + through.sum(2, keepdim=True)


def state_gradient(state: Tensor, back: tuple[Tensor, Tensor], out: Tensor) -> None:
    """Writes that of a state [heads, M, 2E + 3] from what reached it in units of C, [.., MP, EP] and [.., MP]."""
    m, e = state.shape[1], state.shape[2] // 2 - 1
    c = (state[..., e] + state[..., 2 * e + 1]).unsqueeze(-1)
    both = torch.cat((back[0][:, :m, :e], back[1][:, :m, None]), -1) / torch.where(c > 0, c, torch.inf)
    torch.cat((both, both, torch.zeros_like(c)), -1, out=out)


def initial_gradient(pack: Pack, initial: Tensor | None, ends: Ends, out: Tensor) -> None:
    """Writes that of a pack's initial states [N, H, M, 2E + 3]: a segment without tokens passes its state on."""
    assert initial is not None
    assert ends.left_o is not None
    assert ends.left_c is not None
    flat = [t.flatten(0, 1) for t in (initial, ends.left_o, ends.left_c, out)]
    state_gradient(flat[0], (flat[1], flat[2]), flat[3])
    empty = (pack.starts[1:] == pack.starts[:-1])[:, None, None, None]
    out.copy_(torch.where(empty, torch.zeros_like(out) if ends.d_final is None else ends.d_final, out))
