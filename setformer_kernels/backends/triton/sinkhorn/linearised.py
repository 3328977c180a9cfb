"""A pass over the rows of given costs (`device/linearised.py`) where columns fit a tile; beyond, PyTorch's products.

As in `forward.py` ℓ is carried in natural units.

Defined by `reference.converged.system.passed`.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ....reference.converged.system import Marginals, passed
from ..device.linearised import add_rows, empty_parts, finish_linearised, gram_width, store_linearised, without_rows
from ..device.primitives import INF, LOG2E
from ..device.rows import wide
from ..host.launch import device_of, kernel, launch, split_tokens
from ..host.rows import unit_rows
from ..host.tiles import padded, tile
from .problem import WIDEST, load_tile, spanned


@kernel
def sinkhorn_linearised_kernel(
    log_kernel, stride_lg, stride_ln,  # [G, N, M]
    log_a, stride_ag, stride_an,  # [G, N]
    lam_a, stride_rg,  # [G]
    running, g, s, f, parts,  # [G] int32 or None, [G, M], [G, N] twice, Parts
    N, M, stretch, splits,
    MP: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`stretch` rows of one problem, and WIDTH columns of its A."""
    blocks: tl.constexpr = MP // WIDTH
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks % splits
    group = (tl.program_id(0) // (blocks * splits)).to(tl.int64)
    j = tl.arange(0, MP)
    log_kernel += group * wide(stride_lg)
    dual = tl.load(g + group * M + j, mask=j < M, other=-INF)
    relaxation = tl.load(lam_a + group * wide(stride_rg))
    start, end = split * stretch, tl.minimum(N, (split + 1) * stretch)
    if running is not None:
        end = tl.where(tl.load(running + group) != 0, end, start)
    sums = without_rows(MP, WIDTH)
    for first in range(start, end, BN):
        rows = first + tl.arange(0, BN)
        mass = tl.load(log_a + group * wide(stride_ag) + rows * wide(stride_an), mask=rows < end, other=-INF)
        l = load_tile(log_kernel, rows, mass > -INF, stride_ln, j, M)
        own_s, own_f, sums = add_rows(sums, l, dual, mass, relaxation, block, LOG2E, WIDTH, PRECISION)
        if block == 0:
            tl.store(s + group * N + rows, own_s, mask=rows < end)
            tl.store(f + group * N + rows, own_f, mask=rows < end)
    store_linearised(parts, group * splits + split, block, sums, MP, WIDTH)


def linearised(
    log_kernel: Tensor, log_a: Tensor, lam_a: Tensor, g: Tensor, running: Tensor | None
) -> tuple[Tensor, ...]:  # fmt: skip
    """s and f [G, N], c and D [G, M], A [G, M, M] from g [G, M]; nothing of problems that do not run [G]."""
    (groups, n, m), mp = log_kernel.shape, padded(log_kernel.shape[2])
    if m > WIDEST:
        return _by_products(log_kernel, log_a, lam_a, g)
    l, device, width = unit_rows(log_kernel), device_of(log_kernel), gram_width(mp)
    t = tile("linearised", device.family, mp, l.element_size())
    split = split_tokens(n, t, groups * mp // width, device.multiprocessors)
    s, f, parts = g.new_empty((groups, n)), g.new_empty((groups, n)), empty_parts(g, mp, split)
    flags = None if running is None else running.reshape(-1).to(torch.int32)
    given = (*spanned(l), *spanned(log_a), lam_a, lam_a.stride(0))
    args = (*given, flags, g.contiguous(), s, f, parts, n, m, *split)
    constants = {"MP": mp, "WIDTH": width, "BN": t.rows, "PRECISION": device.precision}
    launch(sinkhorn_linearised_kernel, groups * split.programs * mp // width, args, constants, t)
    return s, f, *finish_linearised(parts, m, LOG2E.value)


def _by_products(log_kernel: Tensor, log_a: Tensor, lam_a: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Of rows that no tile holds: A is most of the work there, and a product of matrices."""
    there = (log_a > -torch.inf).unsqueeze(-1)
    l, lam = torch.where(there, log_kernel, -torch.inf), lam_a.unsqueeze(-1)
    found = passed(Marginals(l, log_a, g, lam, lam), g)
    return found.s, found.f, found.c, found.mass, found.gram
