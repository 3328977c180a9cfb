"""The op of causal attention as a scan.

    set_causal        Operands, Options (T ≤ 1) -> o [B, H, L, E]

Saved for the backward: the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import dispatch
from .operands import OPERANDS, OPTIONS, POSITIONS, backend_of, fake_output, flops, split
from .registration import TOKEN, Spec, register


def _run_causal(*args: Any) -> Tensor:
    x, opt = split(args)
    return backend_of("causal", x, opt).causal(x, opt)


def _run_causal_backward(d_o: Tensor, *args: Any) -> Sequence[Tensor | None]:
    x, opt = split(args[:-1])
    return backend_of("causal", x, opt, backward=True).causal_backward(x, opt, d_o, args[-1])


set_causal = register(
    Spec(
        name="set_causal",
        tensors=OPERANDS,
        constants=OPTIONS,
        outputs={"o": TOKEN},
        differentiable=("o",),
        saved=(),
        no_grad=(*POSITIONS, "seed"),
        run=_run_causal,
        run_backward=_run_causal_backward,
        fake=lambda *args: fake_output(split(args)[0]),
        decomposition=lambda *args: dispatch.EAGER.causal(*split(args)),
    )
)

# As attention's, but the backward has one argument before the op's own.
register_flop_formula(torch.ops.setformer_kernels.set_causal)(flops(1, 1, 0))
register_flop_formula(torch.ops.setformer_kernels.set_causal_backward)(flops(3, 2, 1))
