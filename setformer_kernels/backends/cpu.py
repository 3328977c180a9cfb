"""The C++ CPU backend: hands tensors to `_C` as (pointer, sizes, strides, dtype code), and sums parameters over B.

Called below autograd on real CPU tensors; any strides.  The kernels are in csrc/cpu.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..problem import (
    DTYPES,
    NO_STREAM,
    Operands,
    Options,
    Problem,
    Sinkhorn,
    Stream,
    beyond,
    compute_dtype,
    empty_factors,
    empty_in_order,
    in_order,
)
from ..reference.state import empty_like as empty_state_like
from . import _extension
from ._cpu_packed import (  # noqa: F401  (parts of this backend's face)
    packed,
    packed_backward,
    packed_causal,
    packed_causal_backward,
    packed_pool,
    packed_pool_backward,
)
from ._extension import MODULE, REASON, stream_gradients, views
from ._extension import on_cpu as _common

NAME = "cpu"
ABSENT = REASON  # what keeps the whole backend away; empty where it is there
STEPS_GROUPS = True  # a step answers all queries that share a key
_C: Any = MODULE
# A thread keeps an [M, E] state and [96, max(M, D, E)] tiles: beyond this they would leave the second-level cache.
MAX_REFERENCES = 1024
MAX_HEAD_DIM = 1024
# Columns up to which a thread keeps A [M, M] while rows go by, 1 MB; beyond, A is a product of what the rows become.
MAX_GRAM = 512


def unsupported_reasons(p: Problem) -> list[str]:
    """Why this backend cannot run `p`; empty when it can."""
    reasons = [ABSENT] if ABSENT else []
    if p.device != "cpu":
        reasons.append(f"runs on cpu tensors, not on {p.device}")
    return reasons + beyond(p, DTYPES, MAX_REFERENCES, MAX_HEAD_DIM)


def _new_state(x: Operands, opt: Options) -> tuple[Tensor, Tensor]:
    """Empty z [B, H, M, E] and c [B, H, max(T, 1), M]."""
    b, h, _, e = x.value.shape
    m, dtype = x.references.shape[1], compute_dtype(x.key.dtype)
    return x.key.new_empty((b, h, m, e), dtype=dtype), x.key.new_empty((b, h, max(opt.num_iters, 1), m), dtype=dtype)


def attention(x: Operands, opt: Options) -> tuple[Tensor, Tensor, Tensor]:
    """o [B, H, L, E], z [B, H, M, E], c [B, H, max(T, 1), M]."""
    assert x.query is not None
    o = empty_in_order(x.query, (*x.query.shape[:-1], x.value.shape[-1]))
    z, c = _new_state(x, opt)
    _C.attention(*_common(x, opt), *views((o, z, c)))
    return o, z, c


def attention_alone(x: Operands, opt: Options) -> Tensor:
    """o of `attention`, where nobody asks for z and c: of few tokens a head, writing them costs as much as the rest."""
    assert x.query is not None
    o = empty_in_order(x.query, (*x.query.shape[:-1], x.value.shape[-1]))
    _C.attention(*_common(x, opt), *views((o, None, None)))
    return o


def prepared_attention(x: Operands, opt: Options, o: Tensor) -> Callable[..., None]:
    """`attention_alone` of tensors that differ from these in values and addresses alone: a function of addresses.

    Those of query, key, value, references and o, and of how many threads.
    """
    return _C.PreparedAttention(*_common(x, opt), *views((o,))).run


def attention_weights(x: Operands, opt: Options, by_token: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, z and c of `attention`, and the factors of A of `empty_factors`: W^q [B, H, L, M], W^k [B, H, S, M]."""
    return _weights(x, opt, by_token, _new_state(x, opt))


def attention_weights_alone(x: Operands, opt: Options, by_token: bool) -> tuple[Tensor | None, ...]:
    """`attention_weights`, where nobody asks for z and c: None in their places."""
    return _weights(x, opt, by_token, (None, None))


def _weights(x: Operands, opt: Options, by_token: bool, state: tuple[Any, Any]) -> tuple[Any, ...]:
    assert x.query is not None
    o = empty_in_order(x.query, (*x.query.shape[:-1], x.value.shape[-1]))
    outputs = (o, *state, *empty_factors(x, by_token))
    _C.attention_weights(*_common(x, opt), *views(outputs))
    return outputs


def pool(x: Operands, opt: Options) -> tuple[Tensor, Tensor]:
    """z [B, H, M, E], c [B, H, max(T, 1), M]."""
    x = x._replace(query=None, query_position=None)
    z, c = _new_state(x, opt)
    _C.attention(*_common(x, opt), *views((None, z, c)))
    return z, c


def transport(x: Operands, opt: Options) -> tuple[Tensor, Tensor, Tensor]:
    """z [B, H, M, E], g [B, H, M], c [B, H, max(T, 1), M]."""
    z, c = _new_state(x, opt)
    g = z.new_empty(z.shape[:3])
    _C.transport(*_common(x, opt), *views((z, c, g)))
    return z, g, c


def _reading(x: Operands, opt: Options) -> tuple[Any, ...]:
    """`_common` without T: a memory is read as it is."""
    operands, scalars, dot, _, *rest = _common(x, opt)
    return operands, scalars, dot, *rest


def read(x: Operands, opt: Options, z: Tensor, g: Tensor) -> Tensor:
    """o [B, H, L, E]."""
    assert x.query is not None
    o = empty_in_order(x.query, (*x.query.shape[:-1], x.value.shape[-1]))
    _C.read(*_reading(x, opt), *views((z, g, o)))
    return o


def read_backward(
    x: Operands, opt: Options, z: Tensor, g: Tensor, d_o: Tensor, needs: Sequence[bool]
) -> tuple[Operands, Tensor, Tensor]:
    """Gradients in the order of `Operands`, None where not needed; dz and dg."""
    d_z, d_g = z.new_empty(z.shape), g.new_empty(g.shape)
    incoming, memory, (of_g,) = views((d_o, d_z, None)), views((z, g)), views((d_g,))
    grads = _extension.attention_backward(
        x,
        needs,
        x.key.shape[0],
        lambda grads: _C.read_backward(*_reading(x, opt), *memory, (*incoming, *grads), of_g),
    )
    return grads, d_z, d_g


def causal(x: Operands, opt: Options, stream: Stream = NO_STREAM, with_state: bool = False) -> tuple[Tensor, Tensor]:
    """o [B, H, L, E] for T <= 1, and the state after the last key."""
    assert x.query is not None
    o = empty_in_order(x.query, (*x.query.shape[:-1], x.value.shape[-1]))
    state = empty_state_like(x, with_state)
    _C.causal(*_common(x, opt), *views((*stream, o, state if with_state else None)))
    return o, state


def step(x: Operands, opt: Options, states: Tensor, log_decay: Tensor | None, rows: Tensor | None) -> Tensor:
    """o [B, H, L, E] of one token each, whose L queries share a key; in place on `states` [N, H, M, 2E + 3]."""
    assert x.query is not None
    o = empty_in_order(x.query, (*x.query.shape[:-1], x.value.shape[-1]))
    rows = None if rows is None else rows.contiguous()
    if o.numel() == 0:  # rows of nobody have no address, which would say that there are none
        return o
    gates, pool, found = views((log_decay, states, o))
    _C.step(*_common(x, opt), gates, pool, 0 if rows is None else rows.data_ptr(), found)
    return o


def prepared_step(
    x: Operands, opt: Options, states: Tensor, log_decay: Tensor | None, mask: Tensor | None, indexed: bool, o: Tensor
) -> Callable[..., bool]:
    """`step` of tokens that differ from these in values and addresses alone: a function of addresses.

    The addresses of states, query, key, value, references, rows, log_decay, mask [B, H, 1] (bool, or log masses in the
    place of those in `x`) and o, each 0 where there is none, and of how many threads.  False, with nothing done: values
    of log_decay or rows are not what `step` takes.
    """
    common = _common(x._replace(log_a=None), opt)
    gates, pool, found, masses = views((log_decay, states, o, mask))
    return _C.PreparedStep(*common, masses, gates, pool, indexed, found).run


def masked(x: Operands, mask: Tensor | None, opt: Options, causal: bool) -> Tensor:
    """o [B, H, L, E]; mask [B or 1, H or 1, L, S]."""
    assert x.query is not None
    o = empty_in_order(x.query, (*x.query.shape[:-1], x.value.shape[-1]))
    given, found = views((mask, o))
    _C.masked(*_common(x, opt), given, causal, found)
    return o


def masked_backward(
    x: Operands, mask: Tensor | None, opt: Options, causal: bool, d_o: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """As `attention_backward`, and the gradient of the mask."""
    d_mask = empty_in_order(mask, mask.shape).zero_() if needs[-1] and mask is not None else None
    given, incoming, found = views((mask, d_o, d_mask))
    grads = _extension.attention_backward(
        x,
        needs[:-1],
        x.key.shape[0],
        lambda grads: _C.masked_backward(*_common(x, opt), given, causal, (incoming, None, None, *grads), found),
    )
    return *grads, d_mask


def attention_backward(x: Operands, opt: Options, z: Tensor, c: Tensor, d_o: Tensor, needs: Sequence[bool]) -> Operands:
    """Gradients in the order of `Operands`, None where not needed."""
    return _backward(x, opt, (z, c), (d_o, None, None), needs)


def pool_backward(
    x: Operands, opt: Options, z: Tensor, c: Tensor, d_z: Tensor, d_c: Tensor | None, needs: Sequence[bool]
) -> Operands:
    """As `attention_backward`, from the gradients of z and (where given) c."""
    return _backward(x._replace(query=None, query_position=None), opt, (z, c), (None, d_z, d_c), needs)


def causal_backward(
    x: Operands,
    opt: Options,
    d_o: Tensor,
    needs: Sequence[bool],
    stream: Stream = NO_STREAM,
    d_state: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """As `attention_backward`, for the causal scan; then the gradients of `stream`."""
    d_stream = stream_gradients(stream, needs[len(x) :])
    incoming, given, found = views((d_o,)), views(stream), views((d_state, *d_stream))
    grads = _extension.attention_backward(
        x,
        needs[: len(x)],
        x.key.shape[0],
        lambda grads: _C.causal_backward(*_common(x, opt), *given, (*incoming, None, None, *grads), *found),
    )
    return *grads, *d_stream


def _backward(
    x: Operands,
    opt: Options,
    state: tuple[Tensor | None, Tensor | None],
    incoming: tuple[Tensor | None, ...],
    needs: Sequence[bool],
) -> Operands:
    return _extension.attention_backward(
        x,
        needs,
        x.key.shape[0],
        lambda grads: _C.attention_backward(*_common(x, opt), *views(state), (*views(incoming), *grads)),
    )


class _Whitening:
    """(K_ww + δI)^{-1/2} [H, R, R] in float64, and its backward; centred, of K̃_ww."""

    def __init__(
        self, landmarks: Tensor, bandwidth: Tensor | None, scalar: float, ridge: float, center: bool
    ) -> None:  # fmt: skip
        w = landmarks.double()
        norm = w.norm(dim=-1, keepdim=True)
        self.inverse_norm = torch.where(norm > 1e-12, 1 / norm, 0.0)  # [H, R, 1]
        self.w_hat = w * self.inverse_norm  # [H, R, D]
        beta = w.new_full((w.shape[0],), scalar) if bandwidth is None else bandwidth.double()
        self.beta = beta[:, None, None]
        self.cosine = self.w_hat @ self.w_hat.mT
        self.centring = reference.centring(self.beta, w.shape[-1]) if center else None
        if self.centring is None:
            self.kernel = self.slope = (self.beta * (self.cosine - 1)).exp()  # [H, R, R]; slope: dκ/dĉ / β
        else:
            directed = self.inverse_norm > 0
            gain = self.centring.gain * (directed & directed.mT)
            self.kernel = gain * (self.beta * (self.cosine - self.centring.offset)).expm1()
            self.slope = self.kernel + gain
        eye = torch.eye(w.shape[1], dtype=torch.float64)
        self.values, self.vectors = torch.linalg.eigh(self.kernel + ridge * eye)
        self.values = self.values.clamp_min(ridge)  # rounding may leave an eigenvalue of K_ww just below 0
        self.matrix = (self.vectors * self.values.rsqrt().unsqueeze(-2)) @ self.vectors.mT

    def numbers(self, dtype: torch.dtype) -> Tensor | None:
        """The centring's [H, 1, 4], as the kernels take it."""
        return None if self.centring is None else torch.cat(self.centring, -1).to(dtype)

    def backward(self, d_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """(dw [H, R, D], dβ [H]).  √A X + X √A = −W dW W, solved in the eigenbasis of A = K_ww + δI."""
        u, root = self.vectors, self.values.sqrt()
        rotated = u.mT @ d_matrix.double() @ u
        pairs = root.unsqueeze(-1) * root.unsqueeze(-2) * (root.unsqueeze(-1) + root.unsqueeze(-2))
        d_kernel = u @ (-rotated / pairs) @ u.mT
        d_log = d_kernel * self.slope
        d_cosine = d_log * self.beta
        d_hat = (d_cosine + d_cosine.mT) @ self.w_hat
        along = (d_hat * self.w_hat).sum(-1, keepdim=True)
        d_w = (d_hat - self.w_hat * along) * self.inverse_norm
        if self.centring is None:
            return d_w, (d_log * (self.cosine - 1)).sum((-2, -1))
        d_beta = d_log * (self.cosine - self.centring.mean) + d_kernel * self.kernel * self.centring.growth
        return d_w, d_beta.sum((-2, -1))


def features(
    x: Tensor, landmarks: Tensor, bandwidth: Tensor | None, scalar: float, ridge: float, center: bool
) -> Tensor:
    """x [B, H, N, D], landmarks [H, R, D] -> ψ [B, H, N, R]."""
    whitening, wide = _Whitening(landmarks, bandwidth, scalar, ridge, center), landmarks.dtype
    psi = empty_in_order(x, (*x.shape[:-1], landmarks.shape[1]))
    given = (x, landmarks, bandwidth, whitening.matrix.to(wide), whitening.numbers(wide))
    _C.features(views((*given, psi, None, None, None, None, None)), scalar, torch.get_num_threads(), False)
    return psi


def features_backward(
    x: Tensor,
    landmarks: Tensor,
    bandwidth: Tensor | None,
    scalar: float,
    ridge: float,
    center: bool,
    d_psi: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """(dx, d landmarks, d bandwidth), None where not needed."""
    b, h, _, d = x.shape
    r, wide = landmarks.shape[1], landmarks.dtype
    whitening = _Whitening(landmarks, bandwidth, scalar, ridge, center)
    d_x = empty_in_order(x, x.shape) if needs[0] else None
    parameters = needs[1] or (needs[2] and bandwidth is not None)
    d_w, d_beta, d_whitening = (
        x.new_empty((b, h, *s), dtype=wide) if parameters else None for s in ((r, d), (1, 1), (r, r))
    )
    given = (x, landmarks, bandwidth, whitening.matrix.to(wide), whitening.numbers(wide), None, d_psi)
    tensors = (*given, d_x, d_w, d_beta, d_whitening)
    _C.features(views(tensors), scalar, torch.get_num_threads(), True)
    if d_w is None or d_beta is None or d_whitening is None:
        return d_x, None, None
    from_w, from_beta = whitening.backward(d_whitening.double().sum(0))
    d_landmarks = in_order(landmarks, (d_w.double().sum(0) + from_w).to(wide)) if needs[1] else None
    d_bandwidth = (
        (d_beta.double().sum(0).flatten() + from_beta).to(wide) if needs[2] and bandwidth is not None else None
    )
    return d_x, d_landmarks, d_bandwidth


def sinkhorn(x: Sinkhorn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f [G, N], g [G, M], c [G, max(T, 1), M], iters [G]."""
    limit, threads = -1.0 if x.tol is None else x.tol, torch.get_num_threads()
    return _extension.sinkhorn(
        x, lambda filled: _C.sinkhorn(filled, tuple(x.scalars), x.num_iters, limit, threads, False)
    )


def sinkhorn_backward(
    x: Sinkhorn, c: Tensor, iters: Tensor, d_f: Tensor, d_g: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """(d log_kernel, d log_a, d log_b, dλ_a, dλ_b), None where not needed."""
    threads = torch.get_num_threads()
    return _extension.sinkhorn_backward(
        x,
        (c, iters, d_f, d_g),
        needs,
        lambda filled: _C.sinkhorn(filled, tuple(x.scalars), c.shape[1], -1.0, threads, True),
    )


def started(x: Sinkhorn, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `sinkhorn`, from g⁰ = start [G, M] where that is finite and there is mass; of c the last alone."""
    limit, threads = -1.0 if x.tol is None else x.tol, torch.get_num_threads()
    first = _extension.view(start)
    return _extension.sinkhorn(
        x, lambda filled: _C.started(filled, tuple(x.scalars), x.num_iters, limit, threads, first), last=True
    )


def linearised(
    log_kernel: Tensor, log_a: Tensor, lam_a: Tensor, g: Tensor, running: Tensor | None = None
) -> tuple[Tensor, ...]:  # fmt: skip
    """One pass over the rows from g [G, M]: s and f [G, N], c and the column sums D of P [G, M], A = PᵀR [G, M, M].

    Of all problems, whichever of them are `running` [G].
    """
    (groups, n, m), new = log_kernel.shape, log_kernel.new_empty
    found = new((groups, n)), new((groups, n)), new((groups, m)), new((groups, m))
    kept = new((groups, m if m <= MAX_GRAM else n, m))
    gram, rows = (kept, None) if m <= MAX_GRAM else (None, kept)
    _C.linearised(views((log_kernel, log_a, lam_a, g, *found, gram, rows)), torch.get_num_threads())
    return *found, kept if rows is None else rows.mT @ rows
