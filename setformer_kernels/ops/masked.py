"""The op of attention under a mask that depends on the query.

    set_masked        Operands, mask [B or 1, H or 1, L, S]?, Options, causal -> o [B, H, L, E]

The mask is bool (True takes part) or in the compute dtype (log masses), None where `causal` says all.  Saved for the
backward: the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import dispatch
from ..problem import Operands, Options
from .operands import N_OPERANDS, OPERANDS, OPTIONS, POSITIONS, backend_of, fake_output
from .registration import MASK, TOKEN, Spec, register


def _split(args: Sequence[Any]) -> tuple[Operands, Tensor | None, Options, bool]:
    return Operands(*args[:N_OPERANDS]), args[N_OPERANDS], Options(*args[N_OPERANDS + 1 : -1]), args[-1]


def _run(*args: Any) -> Tensor:
    x, mask, opt, causal = _split(args)
    return backend_of("masked", x, opt).masked(x, mask, opt, causal)


def _run_backward(d_o: Tensor, *args: Any) -> Sequence[Tensor | None]:
    x, mask, opt, causal = _split(args[:-1])
    return backend_of("masked", x, opt, backward=True).masked_backward(x, mask, opt, causal, d_o, args[-1])


set_masked = register(
    Spec(
        name="set_masked",
        tensors=OPERANDS | {"mask": (MASK, True)},
        constants=f"{OPTIONS}, bool causal",
        outputs={"o": TOKEN},
        differentiable=("o",),
        saved=(),
        no_grad=(*POSITIONS, "seed"),
        run=_run,
        run_backward=_run_backward,
        fake=lambda *args: fake_output(_split(args)[0]),
        decomposition=lambda *args: dispatch.EAGER.masked(*_split(args)),
    )
)


def _flops(skip: int) -> Any:
    """Products with κ for queries and keys, and for each pair of them with its weights; a mask's zeros count."""

    def formula(*args: Any, out_shape: Any = None, **_: Any) -> int:
        shapes, num_iters = Operands(*args[skip : skip + N_OPERANDS]), args[skip + N_OPERANDS + 3]
        assert shapes.query is not None
        (b, h, s, d), e, m, length = shapes.key, shapes.value[3], shapes.references[1], shapes.query[2]
        steps = max(num_iters, 1)
        tokens, by_references, by_values = (3, 6 * steps, 2) if skip else (1, 2 * steps, 1)
        return 2 * b * h * (tokens * (length + s) * m * d + length * s * (by_references * m + by_values * e))

    return formula


# Forward: V Exᵀ from the second iteration on and U Ex in each, A, and its product with v.  Backward: the iterations
# again, the products that lead to dU, dV and dEx in each, and those with v and do.
register_flop_formula(torch.ops.setformer_kernels.set_masked)(_flops(0))
register_flop_formula(torch.ops.setformer_kernels.set_masked_backward)(_flops(1))
