"""The op of attention together with the factors of its matrix A = W^q W^kᵀ.

    set_attention_weights   Operands, Options, by_token -> o [B, H, L, E], z [B, H, M, E], c [B, H, max(T, 1), M],
                            W^q [B, H, L, M], W^k [B, H, S, M]

`by_token`: the factors lie in memory as [B, N, H, M], so that the mean of A over heads is one product.  Saved for the
backward: the inputs, c and z.  It is that of `set_attention` where a gradient reached o; what reached the factors goes
through the reference besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import dispatch
from ..problem import Operands, Options, empty_factors
from .operands import OPERANDS, OPTIONS, POSITIONS, backend_of, fake_output, fake_state, flops, split
from .registration import TOKEN, Spec, register


def _split(args: Sequence[Any]) -> tuple[Operands, Options, bool]:
    return *split(args[:-1]), args[-1]


def _run(*args: Any) -> tuple[Tensor, ...]:
    x, opt, by_token = _split(args)
    backend = backend_of("attention", x, opt)
    if hasattr(backend, "attention_weights"):
        return backend.attention_weights(x, opt, by_token)
    o, z, c = backend.attention(x, opt)
    return o, z, c, *dispatch.EAGER.weight_factors(x, opt, c, by_token)


def _run_alone(*args: Any) -> tuple[Tensor | None, ...]:
    """As `_run`, and None for what only a backward reads, where the backend can leave that out."""
    x, opt, by_token = _split(args)
    alone = getattr(backend_of("attention", x, opt), "attention_weights_alone", None)
    return _run(*args) if alone is None else alone(x, opt, by_token)


def _run_backward(
    d_o: Tensor | None, d_w_q: Tensor | None, d_w_k: Tensor | None, z: Tensor, c: Tensor, *args: Any
) -> Sequence[Tensor | None]:
    (x, opt, _), needs = _split(args[:-1]), args[-1]
    grads: Sequence[Tensor | None] = [None] * len(x)
    if d_o is not None:
        grads = backend_of("attention", x, opt, backward=True).attention_backward(x, opt, z, c, d_o, needs)
    if d_w_q is None and d_w_k is None:
        return grads
    more = dispatch.EAGER.weight_factors_backward(x, opt, d_w_q, d_w_k, needs)
    return [b if a is None else a if b is None else a + b for a, b in zip(grads, more, strict=True)]


def _fake(*args: Any) -> tuple[Tensor, ...]:
    x, opt, by_token = _split(args)
    return fake_output(x), *fake_state(x, opt), *empty_factors(x, by_token)


set_attention_weights = register(
    Spec(
        name="set_attention_weights",
        tensors=OPERANDS,
        constants=f"{OPTIONS}, bool by_token",
        outputs={"o": TOKEN, "z": TOKEN, "c": TOKEN, "w_q": TOKEN, "w_k": TOKEN},
        differentiable=("o", "w_q", "w_k"),
        saved=("z", "c"),
        no_grad=(*POSITIONS, "seed"),
        run=_run,
        run_alone=_run_alone,
        run_backward=_run_backward,
        fake=_fake,
        decomposition=lambda *args: dispatch.EAGER.attention_weights(*_split(args)),
        apart=True,
    )
)

# As attention's, whose tiles the factors are; the backward of o, after five arguments.
register_flop_formula(torch.ops.setformer_kernels.set_attention_weights)(flops(1, 1, 0))
register_flop_formula(torch.ops.setformer_kernels.set_attention_weights_backward)(flops(3, 2, 5))
