"""The reference behind the op interface: runs wherever PyTorch does, saves only inputs, recomputes in the backward.

No problem selects it by name.  It keeps an op callable where no native backend can run, as for a graph exported on
another machine, and lets every property of the ops be tested without a compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from .. import reference
from ..problem import (
    NO_STREAM,
    Operands,
    Options,
    Sinkhorn,
    Stream,
    compute_dtype,
    empty_in_order,
    is_plain,
    memory_order,
)
from ..reference.attention import attention_with_state, pool_with_state
from ..reference.packed import packed_pool_with_state, packed_with_state
from ..reference.state import empty_like as empty_state_like

NAME = "eager"
Gradients = Sequence[Tensor | None]  # in the order of the op's tensors, None where none is needed


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd inside an op's kernel, where the dispatcher has switched its keys off."""
    keys = torch._C.DispatchKey
    with ExitStack() as stack:
        for key in (keys.AutogradFunctionality, keys.ADInplaceOrView):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(torch.enable_grad())
        yield


def vjp(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of Σ ⟨cotangent, output⟩ for the tensors that need one, None for the others."""
    with _autograd():
        leaves = [t.detach().requires_grad_(n) if t is not None else None for t, n in zip(tensors, needs, strict=True)]
        outputs = function(*leaves)
        results = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(o, g) for o, g in zip(results, cotangents, strict=True) if g is not None and o.requires_grad]
        wanted = [t for t, n in zip(leaves, needs, strict=True) if n and t is not None]
        found: Sequence[Tensor] = [torch.zeros_like(t) for t in wanted]
        if pairs:
            found = torch.autograd.grad(
                [o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True, materialize_grads=True
            )
    grads = iter(found)
    return [
        empty_in_order(t, t.shape).copy_(next(grads)) if n and t is not None else None
        for t, n in zip(tensors, needs, strict=True)
    ]


def _in_order(like: Tensor, t: Tensor) -> Tensor:
    """A copy of `t` in the memory order of `like`: no view, and by operations that exported graphs may hold."""
    order = memory_order(like)
    return t.permute(order).contiguous().permute([order.index(d) for d in range(t.ndim)]).clone()


def attention(x: Operands, opt: Options) -> tuple[Tensor, Tensor, Tensor]:
    assert x.query is not None
    o, z, c = attention_with_state(x, opt)
    return _in_order(x.query, o), z, c


def attention_backward(
    x: Operands, opt: Options, z: Tensor, c: Tensor, d_o: Tensor, needs: Sequence[bool]
) -> Gradients:
    return vjp(lambda *t: reference.attention(Operands(*t), opt), x, needs, [d_o])


def pool(x: Operands, opt: Options) -> tuple[Tensor, Tensor]:
    return pool_with_state(x, opt)


def pool_backward(
    x: Operands, opt: Options, z: Tensor, c: Tensor, d_z: Tensor, d_c: Tensor | None, needs: Sequence[bool]
) -> Gradients:
    return vjp(lambda *t: pool_with_state(Operands(*t), opt), x, needs, [d_z, d_c])


def transport(x: Operands, opt: Options) -> tuple[Tensor, Tensor, Tensor]:
    # Without an iteration g may be log b itself, which no output of an op may be.
    z, g, c = (t.clone(memory_format=torch.contiguous_format) for t in reference.transport(x, opt))
    return z, g, c


def read(x: Operands, opt: Options, z: Tensor, g: Tensor) -> Tensor:
    assert x.query is not None
    return _in_order(x.query, reference.read(x, opt, z, g))


def read_backward(
    x: Operands, opt: Options, z: Tensor, g: Tensor, d_o: Tensor, needs: Sequence[bool]
) -> tuple[Gradients, Tensor | None, Tensor | None]:
    *grads, d_z, d_g = vjp(
        lambda *t: reference.read(Operands(*t[:-2]), opt, t[-2], t[-1]),
        (*x, z, g), (*needs, True, True), [d_o],
    )  # fmt: skip
    return grads, d_z, d_g


def attention_weights(x: Operands, opt: Options, by_token: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    o, z, c = attention(x, opt)
    return o, z, c, *weight_factors(x, opt, c, by_token)


def weight_factors(x: Operands, opt: Options, c: Tensor, by_token: bool) -> tuple[Tensor, Tensor]:
    """W^q and W^k as `problem.empty_factors` describes them, from the c [B, H, max(T, 1), M] of any backend."""
    found = reference.weight_factors(x, opt, c)
    w_q, w_k = (w.transpose(1, 2) if by_token else w for w in found)
    w_q, w_k = (w.clone(memory_format=torch.contiguous_format) for w in (w_q, w_k))
    return (w_q.transpose(1, 2), w_k.transpose(1, 2)) if by_token else (w_q, w_k)


def weight_factors_backward(
    x: Operands, opt: Options, d_w_q: Tensor | None, d_w_k: Tensor | None, needs: Sequence[bool]
) -> Gradients:
    """Through the whole transport, which is run again."""
    return vjp(lambda *t: reference.weight_factors(Operands(*t), opt), x, needs, [d_w_q, d_w_k])


def causal(x: Operands, opt: Options, stream: Stream = NO_STREAM, with_state: bool = False) -> tuple[Tensor, Tensor]:
    assert x.query is not None
    if is_plain(stream, with_state):
        return _in_order(x.query, reference.causal(x, opt)), empty_state_like(x, False)
    o, state = reference.causal_with_state(x, opt, stream)
    return _in_order(x.query, o), state.clone() if with_state else empty_state_like(x, False)


def causal_backward(
    x: Operands,
    opt: Options,
    d_o: Tensor,
    needs: Sequence[bool],
    stream: Stream = NO_STREAM,
    d_state: Tensor | None = None,
) -> Gradients:
    """In the order of `Operands`, then of `Stream`."""
    n = len(Operands._fields)

    def run(*t: Tensor | None) -> tuple[Tensor, Tensor]:
        return reference.causal_with_state(Operands(*t[:n]), opt, Stream(*t[n:]))  # type: ignore[arg-type]

    needs = (*needs, *[False] * (n + len(stream) - len(needs)))
    return vjp(run, (*x, *stream), needs, [d_o, d_state])


def step(x: Operands, opt: Options, states: Tensor, log_decay: Tensor | None, rows: Tensor | None) -> Tensor:
    assert x.query is not None
    return _in_order(x.query, reference.step(x, opt, states, log_decay, rows))


def packed(x: Operands, opt: Options, cu_q: Tensor, cu_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    assert x.query is not None
    o, z, c = packed_with_state(x, opt, cu_q, cu_k)
    return _in_order(x.query, o), z, c


def packed_backward(
    x: Operands, opt: Options, cu_q: Tensor, cu_k: Tensor, z: Tensor, c: Tensor, d_o: Tensor, needs: Sequence[bool]
) -> Gradients:
    return vjp(lambda *t: reference.packed(Operands(*t), opt, cu_q, cu_k), x, needs, [d_o])


def packed_pool(x: Operands, opt: Options, cu: Tensor) -> tuple[Tensor, Tensor]:
    return packed_pool_with_state(x, opt, cu)


def packed_pool_backward(
    x: Operands, opt: Options, cu: Tensor, z: Tensor, c: Tensor, d_z: Tensor, needs: Sequence[bool]
) -> Gradients:
    return vjp(lambda *t: packed_pool_with_state(Operands(*t), opt, cu), x, needs, [d_z, None])


def packed_causal(
    x: Operands, opt: Options, cu: Tensor, stream: Stream = NO_STREAM, with_state: bool = False
) -> tuple[Tensor, Tensor]:
    assert x.query is not None
    n = cu.shape[0] - 1
    if is_plain(stream, with_state):
        return _in_order(x.query, reference.packed_causal(x, opt, cu)), empty_state_like(x, False, n)
    o, state = reference.packed_causal_with_state(x, opt, cu, stream)
    return _in_order(x.query, o), state.clone() if with_state else empty_state_like(x, False, n)


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
    """In the order of `Operands`, then of `Stream`."""
    n = len(Operands._fields)
    if is_plain(stream, with_state):
        grads = vjp(lambda *t: reference.packed_causal(Operands(*t), opt, cu), x, needs[:n], [d_o])
        return *grads, None, None

    def run(*t: Tensor | None) -> tuple[Tensor, Tensor]:
        return reference.packed_causal_with_state(Operands(*t[:n]), opt, cu, Stream(*t[n:]))  # type: ignore[arg-type]

    return vjp(run, (*x, *stream), needs[: n + len(stream)], [d_o, d_state])


def masked(x: Operands, mask: Tensor | None, opt: Options, causal: bool) -> Tensor:
    assert x.query is not None
    return _in_order(x.query, reference.masked(x, opt, mask, causal))


def masked_backward(
    x: Operands, mask: Tensor | None, opt: Options, causal: bool, d_o: Tensor, needs: Sequence[bool]
) -> Gradients:
    return vjp(lambda *t: reference.masked(Operands(*t[:-1]), opt, t[-1], causal), (*x, mask), needs, [d_o])


def features(
    x: Tensor, landmarks: Tensor, bandwidth: Tensor | None, scalar: float, ridge: float, center: bool
) -> Tensor:
    return _in_order(x, _features(x, landmarks, bandwidth, scalar, ridge, center))


def _features(
    x: Tensor, landmarks: Tensor, bandwidth: Tensor | None, scalar: float, ridge: float, center: bool
) -> Tensor:
    beta = landmarks.new_full((landmarks.shape[0],), scalar) if bandwidth is None else bandwidth
    largest = reference.limit(bandwidth, scalar, x.shape[-1])
    wide = x.to(compute_dtype(x.dtype))
    return reference.nystrom_features(wide, landmarks, beta[:, None, None], ridge, center, largest).to(x.dtype)


def features_backward(
    x: Tensor,
    landmarks: Tensor,
    bandwidth: Tensor | None,
    scalar: float,
    ridge: float,
    center: bool,
    d_psi: Tensor,
    needs: Sequence[bool],
) -> Gradients:
    tensors = (x, landmarks, bandwidth)
    return vjp(lambda x, w, beta: _features(x, w, beta, scalar, ridge, center), tensors, needs, [d_psi])


def _sinkhorn(x: Sinkhorn) -> tuple[Tensor, ...]:
    lam_a, lam_b = (
        x.log_kernel.new_full((1, 1), scalar) if lam is None else lam.unsqueeze(-1)
        for lam, scalar in zip((x.lam_a, x.lam_b), x.scalars, strict=True)
    )
    n, m = x.log_kernel.shape[-2:]
    log_a = reference.uniform_mass(x.log_kernel, n) if x.log_a is None else x.log_a
    log_b = reference.uniform_mass(x.log_kernel, m) if x.log_b is None else x.log_b
    return reference.sinkhorn(x.log_kernel, log_a, log_b, x.num_iters, lam_a, lam_b, x.tol)


def sinkhorn(x: Sinkhorn) -> tuple[Tensor, ...]:
    """f [G, N], g [G, M], c [G, max(T, 1), M], iters [G]."""
    # Without an iteration f and g are log a and log b themselves, which no output of an op may be.
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in _sinkhorn(x))


def sinkhorn_backward(
    x: Sinkhorn, c: Tensor, iters: Tensor, d_f: Tensor, d_g: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Problems that ran equally long are replayed together, so that no tolerance is needed to repeat the stops."""
    groups = [(n, (iters == n).nonzero().squeeze(-1)) for n in iters.unique().tolist() or [0]]

    def replay(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        plans = []
        for n, rows in groups:
            some = [t if t is None else t[rows] for t in tensors]
            plans.append(_sinkhorn(Sinkhorn(*some)._replace(scalars=x.scalars, num_iters=n)))  # type: ignore[arg-type]
        return torch.cat([p[0] for p in plans]), torch.cat([p[1] for p in plans])

    order = torch.cat([rows for _, rows in groups])
    return tuple(vjp(replay, x.tensors, needs, [d_f[order], d_g[order]]))
