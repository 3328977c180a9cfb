"""The CUDA C++ backend: solvers that keep a whole problem on the chip; what does not fit is left to Triton.

Called below autograd on real CUDA tensors, on the current stream of their device; any strides.  Nothing here waits for
the device or allocates on it but through torch, so calls can be captured into CUDA graphs.  The kernels are in
csrc/cuda.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..problem import Operands, Options, Problem, Sinkhorn, empty_in_order, unconverging
from . import _extension
from ._extension import DTYPE_CODES, MODULE, REASON, views

NAME = "cuda"
OPS = ("attention", "pool", "sinkhorn")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_C: Any = MODULE
_DEVICE = "cuda"  # tests run the kernels' source on the CPU
# What keeps the whole backend away; empty where it is there.
ABSENT = REASON or ("" if hasattr(MODULE, "cuda_sinkhorn") else "the C++ extension was built without CUDA")


def unsupported_reasons(p: Problem) -> list[str]:
    """Why this backend cannot run `p`; empty when it can."""
    reasons = [ABSENT] if ABSENT else []
    if p.op not in OPS:
        reasons.append(f"has no kernel for {p.op} yet")
    if p.device != _DEVICE:
        reasons.append(f"runs on {_DEVICE} tensors, not on {p.device}")
    if p.dtype not in (DTYPES if p.op != "sinkhorn" else DTYPES[:1]):
        reasons.append(f"has no kernels for {p.dtype}")
    if p.converged:
        reasons.append(unconverging(p))
    if not reasons and p.N and (reason := _refusal(p)):
        reasons.append(reason)
    return reasons


def _refusal(p: Problem) -> str:
    """Why the chip does not hold `p`; empty when it does."""
    if p.op == "sinkhorn":
        return _C.cuda_sinkhorn_refusal(p.N, p.M, p.backward)
    return _C.cuda_attention_refusal(_sizes(p), DTYPE_CODES[p.dtype], p.backward)


def _sizes(p: Problem) -> tuple[int, ...]:
    """All that a layout is made of: the same numbers that the launch has."""
    return p.B, p.H, p.L, p.N, p.M, p.D, p.E, p.P, p.num_iters


# On an H100 (bfloat16, M = D = 64) this backend's forward takes 0.46, 0.54, 0.61 and 0.93 of Triton's time at 128, 256,
# 512 and 1024 keys and queries of 128 heads (T = 1: to 1.12), 1.4 to 1.5 at 2048 and, of 16 heads, at 4096; with
# the backward pass 1.3 to 6 times as long: benchmarks/results/gpu_h100_2026-11-26.csv.
FEW_TOKENS = 1024


def yields(p: Problem) -> bool:
    """Whether `p`, which this backend can run, is faster where every head has the whole device."""
    if p.op == "sinkhorn" or p.N == 0:
        return False
    if p.backward or max(p.L, p.N) > FEW_TOKENS:
        return True
    return bool(_C.cuda_attention_leaves_idle(_sizes(p), DTYPE_CODES[p.dtype]))


def _where(t: Tensor) -> tuple[int, int]:
    """(device, its current stream)."""
    index = t.get_device()
    return (index, torch._C._cuda_getCurrentRawStream(index)) if t.is_cuda else (0, 0)


def _common(x: Operands, opt: Options) -> tuple[Any, ...]:
    """The arguments every attention kernel begins with; the seed by its address."""
    seed = 0 if x.seed is None else x.seed.data_ptr()
    return views(x[:-1]), tuple(opt.scalars), opt.kernel == "dot", opt.num_iters, opt.dropout_p, seed


def _run(x: Operands, opt: Options, o: Tensor | None) -> tuple[Tensor, Tensor]:
    """Fills o where there is one; z [B, H, M, E] and c [B, H, max(T, 1), M]."""
    b, h, _, e = x.value.shape
    m = x.references.shape[1]
    z = x.key.new_empty((b, h, m, e), dtype=torch.float32)
    c = x.key.new_empty((b, h, max(opt.num_iters, 1), m), dtype=torch.float32)
    _C.cuda_attention(*_common(x, opt), *views((o, z, c)), *_where(x.key), z.new_empty)
    return z, c


def attention(x: Operands, opt: Options) -> tuple[Tensor, Tensor, Tensor]:
    """o [B, H, L, E], z [B, H, M, E], c [B, H, max(T, 1), M]."""
    assert x.query is not None
    o = empty_in_order(x.query, (*x.query.shape[:-1], x.value.shape[-1]))
    return o, *_run(x, opt, o)


def pool(x: Operands, opt: Options) -> tuple[Tensor, Tensor]:
    """z [B, H, M, E], c [B, H, max(T, 1), M]."""
    return _run(x._replace(query=None, query_position=None), opt, None)


def attention_backward(x: Operands, opt: Options, z: Tensor, c: Tensor, d_o: Tensor, needs: Sequence[bool]) -> Operands:
    """Gradients in the order of `Operands`, None where not needed."""
    return _backward(x, opt, (z, c), (d_o, None, None), needs)


def pool_backward(
    x: Operands, opt: Options, z: Tensor, c: Tensor, d_z: Tensor, d_c: Tensor | None, needs: Sequence[bool]
) -> Operands:
    """As `attention_backward`, from the gradients of z and (where given) c."""
    return _backward(x._replace(query=None, query_position=None), opt, (z, c), (None, d_z, d_c), needs)


def _backward(
    x: Operands,
    opt: Options,
    state: tuple[Tensor, Tensor],
    incoming: tuple[Tensor | None, ...],
    needs: Sequence[bool],
) -> Operands:
    given, common, where = views(incoming), _common(x, opt), _where(x.key)
    parts = _C.cuda_gradient_parts(common[0], common[1], opt.num_iters, where[0])
    return _extension.attention_backward(
        x,
        needs,
        parts,
        lambda grads: _C.cuda_attention_backward(*common, *views(state), (*given, *grads), *where),
    )


def sinkhorn(x: Sinkhorn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f [G, N], g [G, M], c [G, max(T, 1), M], iters [G]."""
    limit, where = -1.0 if x.tol is None else x.tol, _where(x.log_kernel)
    return _extension.sinkhorn(
        x, lambda filled: _C.cuda_sinkhorn(filled, tuple(x.scalars), x.num_iters, limit, False, *where)
    )


def sinkhorn_backward(
    x: Sinkhorn, c: Tensor, iters: Tensor, d_f: Tensor, d_g: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """(d log_kernel, d log_a, d log_b, dλ_a, dλ_b), None where not needed."""
    where = _where(x.log_kernel)
    return _extension.sinkhorn_backward(
        x,
        (c, iters, d_f, d_g),
        needs,
        lambda filled: _C.cuda_sinkhorn(filled, tuple(x.scalars), c.shape[1], -1.0, True, *where),
    )
