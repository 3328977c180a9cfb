"""The Triton backend: streaming kernels for every GPU that Triton compiles for, forward and backward.

Triton and the kernels are imported at the first call: a machine without Triton or without a GPU pays nothing.  Under
TRITON_INTERPRET=1 the kernels run on CPU tensors, in Python, to be tested without a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ...problem import NO_STREAM, Operands, Options, Problem, Sinkhorn, Stream, beyond, is_plain
from .host.tiles import INTERPRETED, MAX_HEAD_DIM, MAX_REFERENCES, RELEASE

NAME = "triton"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STEPS_GROUPS = True  # a step answers all queries that share a key
OLDEST = (3, 6)  # the oldest release that the tests run with
# What the kernels are compiled for ahead of time, and where they ran: as `info` says it.
TARGETS = {
    "NVIDIA sm_90": "tested on an H100 with Triton 3.6",
    "NVIDIA sm_80, sm_100": "compiled, never run",
    "AMD gfx90a, gfx942 (ROCm)": "compiled, never run",
}

Gradients = Sequence[Tensor | None]


def _trouble() -> str:
    """What is wrong with the installed Triton, without importing it; empty when nothing is."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not RELEASE or RELEASE >= OLDEST:
        return ""
    wanted, found = (".".join(map(str, release)) for release in (OLDEST, RELEASE))
    return f"needs triton >= {wanted}, found {found}"


# What keeps the whole backend away, found once: `unsupported_reasons` is traced by torch.compile.
ABSENT = _trouble()


def unsupported_reasons(p: Problem) -> list[str]:
    """Why this backend cannot run `p`; empty when it can."""
    reasons = [ABSENT] if ABSENT else []
    if p.device != "cuda" and not (p.device == "cpu" and INTERPRETED):
        reasons.append(f"runs on cuda tensors (on cpu tensors only under TRITON_INTERPRET=1), not on {p.device}")
    return reasons + beyond(p, DTYPES, MAX_REFERENCES, MAX_HEAD_DIM)


_HERE: AbstractContextManager[Any] = nullcontext()


def _on_device(t: Tensor) -> AbstractContextManager[Any]:
    """Launches go to the device of the tensors, whatever the current one is."""
    return _HERE if not t.is_cuda or t.get_device() == torch._C._cuda_getDevice() else torch.cuda.device(t.device)


def attention(x: Operands, opt: Options) -> tuple[Tensor, Tensor, Tensor]:
    """o [B, H, L, E], z [B, H, M, E], c [B, H, max(T, 1), M]."""
    from .attention import forward

    with _on_device(x.key):
        return forward.attention(x, opt)


def attention_backward(x: Operands, opt: Options, z: Tensor, c: Tensor, d_o: Tensor, needs: Sequence[bool]) -> Operands:
    """Gradients in the order of `Operands`, None where not needed."""
    from .attention import backward

    with _on_device(x.key):
        return backward.attention_backward(x, opt, z, c, d_o, needs)


def pool(x: Operands, opt: Options) -> tuple[Tensor, Tensor]:
    """z [B, H, M, E], c [B, H, max(T, 1), M]."""
    from .attention import forward

    with _on_device(x.key):
        return forward.pool(x, opt)


def pool_backward(
    x: Operands, opt: Options, z: Tensor, c: Tensor, d_z: Tensor, d_c: Tensor | None, needs: Sequence[bool]
) -> Operands:
    """As `attention_backward`, from the gradients of z and (where given) c."""
    from .attention import backward

    with _on_device(x.key):
        return backward.pool_backward(x, opt, z, c, d_z, d_c, needs)


def packed(x: Operands, opt: Options, cu_q: Tensor, cu_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """o [1, H, L, E], z [N, H, M, E], c [N, H, max(T, 1), M] of a packed batch; x.log_a: unnormalised log masses."""
    from .attention import forward

    with _on_device(x.key):
        return forward.packed(*_of_segments(x, opt, cu_q, cu_k))


def packed_backward(
    x: Operands, opt: Options, cu_q: Tensor, cu_k: Tensor, z: Tensor, c: Tensor, d_o: Tensor, needs: Sequence[bool]
) -> Operands:
    """As `attention_backward`, of a packed batch."""
    from .attention import backward

    with _on_device(x.key):
        return backward.packed_backward(*_of_segments(x, opt, cu_q, cu_k), (z, c), (d_o, None, None), needs)


def packed_pool(x: Operands, opt: Options, cu: Tensor) -> tuple[Tensor, Tensor]:
    """z [N, H, M, E], c [N, H, max(T, 1), M]."""
    from .attention import forward

    with _on_device(x.key):
        x, opt, (_, keys_at) = _of_segments(x, opt, cu, cu)
        return forward.packed_pool(x, opt, keys_at)


def packed_pool_backward(
    x: Operands, opt: Options, cu: Tensor, z: Tensor, c: Tensor, d_z: Tensor, needs: Sequence[bool]
) -> Operands:
    """As `pool_backward`, of a packed batch."""
    from .attention import backward

    x = x._replace(query=None, query_position=None)
    with _on_device(x.key):
        return backward.packed_backward(*_of_segments(x, opt, cu, cu), (z, c), (None, d_z, None), needs)


def packed_causal(
    x: Operands, opt: Options, cu: Tensor, stream: Stream = NO_STREAM, with_state: bool = False
) -> tuple[Tensor, Tensor]:
    """o [1, H, L, E] for T <= 1, and the states [N, H, M, 2E + 3] after the last keys; x.log_a as in `packed`."""
    from .causal import forward
    from .host.packed import beside_the_largest

    with _on_device(x.key):
        # With states masses are taken as they are: a piece does not know those before it.
        x = beside_the_largest(x, cu) if is_plain(stream, with_state) else x
        return forward.causal(x, opt, stream, with_state, cu)


def packed_causal_backward(
    x: Operands,
    opt: Options,
    cu: Tensor,
    d_o: Tensor,
    needs: Sequence[bool],
    stream: Stream = NO_STREAM,
    with_state: bool = False,
    d_state: Tensor | None = None,
) -> Gradients:
    """As `causal_backward`, of a packed batch."""
    from .causal import backward
    from .host.packed import beside_the_largest

    with _on_device(x.key):
        x = beside_the_largest(x, cu) if is_plain(stream, with_state) else x
        return backward.causal_backward(x, opt, d_o, needs, stream, d_state, cu)


def _of_segments(x: Operands, opt: Options, cu_q: Tensor, cu_k: Tensor) -> tuple[Operands, Options, Any]:
    """The operands with masses that float32 holds in every segment, and the tables of queries' and keys' segments."""
    from .host.packed import beside_the_largest, segments_of

    length = 0 if x.query is None else x.query.shape[2]
    return beside_the_largest(x, cu_k), opt, (segments_of(cu_q, length), segments_of(cu_k, x.key.shape[2]))


def transport(x: Operands, opt: Options) -> tuple[Tensor, Tensor, Tensor]:
    """z [B, H, M, E], g [B, H, M], c [B, H, max(T, 1), M]."""
    from .attention import forward

    with _on_device(x.key):
        return forward.transport(x, opt)


def read(x: Operands, opt: Options, z: Tensor, g: Tensor) -> Tensor:
    """o [B, H, L, E]."""
    from .attention import forward

    with _on_device(x.key):
        return forward.read(x, opt, z, g)


def read_backward(
    x: Operands, opt: Options, z: Tensor, g: Tensor, d_o: Tensor, needs: Sequence[bool]
) -> tuple[Operands, Tensor, Tensor]:
    """Gradients in the order of `Operands`, None where not needed; dz and dg."""
    from .attention import backward

    with _on_device(x.key):
        return backward.read_backward(x, opt, z, g, d_o, needs)


def causal(x: Operands, opt: Options, stream: Stream = NO_STREAM, with_state: bool = False) -> tuple[Tensor, Tensor]:
    """o [B, H, L, E] for T <= 1, and the state after the last key."""
    from .causal import forward

    with _on_device(x.key):
        return forward.causal(x, opt, stream, with_state)


def causal_backward(
    x: Operands,
    opt: Options,
    d_o: Tensor,
    needs: Sequence[bool],
    stream: Stream = NO_STREAM,
    d_state: Tensor | None = None,
) -> Gradients:
    """As `attention_backward`, for the causal scan; then the gradients of `stream`."""
    from .causal import backward

    with _on_device(x.key):
        return backward.causal_backward(x, opt, d_o, needs, stream, d_state)


def step(x: Operands, opt: Options, states: Tensor, log_decay: Tensor | None, rows: Tensor | None) -> Tensor:
    """o [B, H, G, E] of one token each and the queries that share its key; in place on `states` [N, H, M, 2E + 3]."""
    from .causal import step

    with _on_device(x.key):
        return step.step(x, opt, states, log_decay, rows)


def masked(x: Operands, mask: Tensor | None, opt: Options, causal: bool) -> Tensor:
    """o [B, H, L, E]; mask [B or 1, H or 1, L, S], bool or log masses in float32."""
    from .masked import forward

    with _on_device(x.key):
        return forward.masked(x, mask, opt, causal)


def masked_backward(
    x: Operands, mask: Tensor | None, opt: Options, causal: bool, d_o: Tensor, needs: Sequence[bool]
) -> Gradients:
    """As `attention_backward`, and the gradient of the mask."""
    from .masked import backward

    with _on_device(x.key):
        return backward.masked_backward(x, mask, opt, causal, d_o, needs)


def features(
    x: Tensor, landmarks: Tensor, bandwidth: Tensor | None, scalar: float, ridge: float, center: bool
) -> Tensor:
    """x [B, H, N, D], landmarks [H, R, D] -> ψ [B, H, N, R]."""
    from .features import forward

    with _on_device(x):
        return forward.features(x, landmarks, bandwidth, scalar, ridge, center)


def features_backward(x: Tensor, landmarks: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    """(dx, d landmarks, d bandwidth), None where not needed."""
    from .features import backward

    with _on_device(x):
        return backward.features_backward(x, landmarks, *args)


def sinkhorn(x: Sinkhorn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f [G, N], g [G, M], c [G, max(T, 1), M], iters [G]."""
    from .sinkhorn import forward

    with _on_device(x.log_kernel):
        return forward.sinkhorn(x)


def sinkhorn_backward(
    x: Sinkhorn, c: Tensor, iters: Tensor, d_f: Tensor, d_g: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """(d log_kernel, d log_a, d log_b, dλ_a, dλ_b), None where not needed."""
    from .sinkhorn import backward

    with _on_device(x.log_kernel):
        return backward.sinkhorn_backward(x, c, iters, d_f, d_g, needs)


def started(x: Sinkhorn, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `sinkhorn`, from g⁰ = start [G, M] where that is finite and there is mass; of c the last alone."""
    from .sinkhorn import forward

    with _on_device(x.log_kernel):
        return forward.started(x, start)


def linearised(
    log_kernel: Tensor, log_a: Tensor, lam_a: Tensor, g: Tensor, running: Tensor | None = None
) -> tuple[Tensor, ...]:  # fmt: skip
    """One pass over the rows from g [G, M]: s and f [G, N], c and the column sums D of P [G, M], A = PᵀR [G, M, M].

    Where `running` [G] is given, what is found of the other problems means nothing.
    """
    from .sinkhorn import linearised

    with _on_device(log_kernel):
        return linearised.linearised(log_kernel, log_a, lam_a, g, running)


def linearised_keys(x: Operands, opt: Options, g: Tensor, running: Tensor | None = None) -> tuple[Tensor, ...]:
    """`linearised` of the problems [BH] of the keys, whose logits are nowhere but in the kernel; g [BH, M]."""
    from .attention import converged

    with _on_device(x.key):
        return converged.linearised(x, opt, g, running)


def iterated_keys(x: Operands, opt: Options, g: Tensor, tol: float | None) -> tuple[Tensor, Tensor]:
    """g [BH, M] after at most T iterations from g, and how many each head ran [BH]: it stops once g moves by no more
    than tol."""
    from .attention import converged

    with _on_device(x.key):
        return converged.iterated(x, opt, g, tol)
