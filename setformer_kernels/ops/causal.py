"""The op of causal attention as a scan.

    set_causal        Operands, Stream, Options (T ≤ 1), with_state -> o [B, H, L, E], state [B, H, M, 2E + 3]

Without `with_state` the state is empty, [B, H, 0, 0].  Saved for the backward: the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import dispatch
from ..problem import Operands, Options, Stream
from ..reference.state import empty_like
from .operands import N_OPERANDS, OPERANDS, OPTIONS, POSITIONS, backend_of, fake_output, flops
from .registration import TOKEN, Spec, register

FIRST_OPTION = N_OPERANDS + len(Stream._fields)


def _split(args: Sequence[Any]) -> tuple[Operands, Options, Stream, bool]:
    stream, options = Stream(*args[N_OPERANDS:FIRST_OPTION]), Options(*args[FIRST_OPTION:-1])
    return Operands(*args[:N_OPERANDS]), options, stream, args[-1]


def _run_causal(*args: Any) -> tuple[Tensor, ...]:
    x, opt, stream, with_state = _split(args)
    return backend_of("causal", x, opt).causal(x, opt, stream, with_state)


def _run_causal_backward(d_o: Tensor | None, d_state: Tensor | None, *args: Any) -> Sequence[Tensor | None]:
    x, opt, stream, with_state = _split(args[:-1])
    d_o = fake_output(x).zero_() if d_o is None else d_o
    d_state = d_state if with_state else None
    return backend_of("causal", x, opt, backward=True).causal_backward(x, opt, d_o, args[-1], stream, d_state)


def _fake_causal(*args: Any) -> tuple[Tensor, ...]:
    x, _, _, with_state = _split(args)
    return fake_output(x), empty_like(x, with_state)


set_causal = register(
    Spec(
        name="set_causal",
        tensors=OPERANDS | {"log_decay": (TOKEN, True), "initial_state": (TOKEN, True)},
        constants=f"{OPTIONS}, bool with_state",
        outputs={"o": TOKEN, "state": TOKEN},
        differentiable=("o", "state"),
        saved=(),
        no_grad=(*POSITIONS, "seed"),
        run=_run_causal,
        run_backward=_run_causal_backward,
        fake=_fake_causal,
        decomposition=lambda *args: dispatch.EAGER.causal(*_split(args)),
        apart=True,
    )
)

# As attention's, but the backward has two arguments before the op's own.
register_flop_formula(torch.ops.setformer_kernels.set_causal)(flops(1, 1, 0))
register_flop_formula(torch.ops.setformer_kernels.set_causal_backward)(flops(3, 2, 2))
