"""The ops of attention and of its first half, pooling.

    set_attention     Operands, Options -> o [B, H, L, E], z [B, H, M, E], c [B, H, max(T, 1), M]
    set_pool          Operands (no query), Options -> z, c

Saved for the backward: the inputs, c and z; nothing else of length L or S.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import dispatch
from ..dispatch import Chosen
from ..problem import Operands, Options
from .operands import OPERANDS, OPTIONS, POSITIONS, backend_of, fake_output, fake_state, flops, split
from .registration import TOKEN, Spec, register


def _run_attention(*args: Any) -> tuple[Tensor, ...]:
    x, opt = split(args)
    return backend_of("attention", x, opt).attention(x, opt)


def _run_attention_alone(*args: Any) -> tuple[Tensor | None, ...]:
    """o, and None for what only a backward reads, where the backend can leave that out."""
    x, opt = split(args)
    backend = backend_of("attention", x, opt)
    alone = getattr(backend, "attention_alone", None)
    return backend.attention(x, opt) if alone is None else (alone(x, opt), None, None)


def _run_attention_backward(d_o: Tensor, z: Tensor, c: Tensor, *args: Any) -> Sequence[Tensor | None]:
    x, opt = split(args[:-1])
    return backend_of("attention", x, opt, backward=True).attention_backward(x, opt, z, c, d_o, args[-1])


def _fake_attention(*args: Any) -> tuple[Tensor, ...]:
    x, opt = split(args)
    return fake_output(x), *fake_state(x, opt)


def _run_pool(*args: Any) -> tuple[Tensor, ...]:
    x, opt = split(args)
    return backend_of("pool", x, opt).pool(x, opt)


def _run_pool_backward(d_z: Tensor, z: Tensor, c: Tensor, *args: Any) -> Sequence[Tensor | None]:
    x, opt = split(args[:-1])
    return backend_of("pool", x, opt, backward=True).pool_backward(x, opt, z, c, d_z, None, args[-1])


set_attention = register(
    Spec(
        name="set_attention",
        tensors=OPERANDS,
        constants=OPTIONS,
        outputs={"o": TOKEN, "z": TOKEN, "c": TOKEN},
        differentiable=("o",),
        saved=("z", "c"),
        no_grad=(*POSITIONS, "seed"),
        run=_run_attention,
        run_alone=_run_attention_alone,
        run_backward=_run_attention_backward,
        fake=_fake_attention,
        decomposition=lambda *args: dispatch.EAGER.attention(*split(args)),
    )
)

set_pool = register(
    Spec(
        name="set_pool",
        tensors=OPERANDS,
        constants=OPTIONS,
        outputs={"z": TOKEN, "c": TOKEN},
        differentiable=("z",),
        saved=("z", "c"),
        no_grad=("query", *POSITIONS, "seed"),
        run=_run_pool,
        run_backward=_run_pool_backward,
        fake=lambda *args: fake_state(*split(args)),
        decomposition=lambda *args: dispatch.EAGER.pool(*split(args)),
    )
)


def again(opt: Options, x: Operands, o: Tensor) -> Callable[..., Tensor | None] | None:
    """How calls without a gradient are answered that look like one that gave o and that nobody has to see.

    A function of query, key, value and references; None where the backend has no such way, or the call more tensors.
    """
    registry = dispatch.NATIVE
    prepare = getattr(registry[opt.backend], "prepared_attention", None) if type(opt.backend) is Chosen else None
    if prepare is None or any(t is not None for t in x[4:]) or opt.dropout_p > 0:
        return None
    sizes, strides, dtype = o.shape, o.stride(), o.dtype
    run = prepare(x, opt, o)

    def answer(query: Tensor, key: Tensor, value: Tensor, references: Tensor) -> Tensor | None:
        if dispatch.NATIVE is not registry:  # other backends than those there were
            return None
        o = torch.empty_strided(sizes, strides, dtype=dtype)
        places = query.data_ptr(), key.data_ptr(), value.data_ptr(), references.data_ptr(), o.data_ptr()
        run(*places, torch.get_num_threads())
        return o

    return answer


# Forward: κ and pooling for keys, κ and reading for queries.  Backward, for queries and keys alike: κ again, the
# products with z and dz, and the gradients of tokens and references.
for _name in ("set_attention", "set_pool"):
    register_flop_formula(getattr(torch.ops.setformer_kernels, _name))(flops(1, 1, 0))
    register_flop_formula(getattr(torch.ops.setformer_kernels, _name + "_backward"))(flops(3, 2, 3))
