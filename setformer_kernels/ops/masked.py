"""The op of attention under a mask that depends on the query.

    set_masked        Operands, mask [B or 1, H or 1, L, S]?, Options, causal, save -> o [B, H, L, E],
                      c [B, H, max(T, 1)·L, M]

The mask is bool (True takes part) or in the compute dtype (log masses), None where `causal` says all.  c, log C^t of
every query in a form that belongs to the backend, is empty unless `save` asks for it.  Saved for the backward: the
inputs and c; nothing of size L·S but the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import dispatch
from ..problem import Operands, Options, compute_dtype
from .operands import N_OPERANDS, OPERANDS, OPTIONS, POSITIONS, backend_of, fake_output
from .registration import MASK, TOKEN, Spec, register


def _split(args: Sequence[Any]) -> tuple[Operands, Tensor | None, Options, bool, bool]:
    return Operands(*args[:N_OPERANDS]), args[N_OPERANDS], Options(*args[N_OPERANDS + 1 : -2]), args[-2], args[-1]


def _run(*args: Any) -> tuple[Tensor, Tensor]:
    x, mask, opt, causal, save = _split(args)
    return backend_of("masked", x, opt).masked(x, mask, opt, causal, save)


def _run_backward(d_o: Tensor, c: Tensor, *args: Any) -> Sequence[Tensor | None]:
    x, mask, opt, causal, _ = _split(args[:-1])
    return backend_of("masked", x, opt, backward=True).masked_backward(x, mask, opt, causal, c, d_o, args[-1])


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    x, _, opt, _, save = _split(args)
    assert x.query is not None
    b, h, length, _ = x.query.shape
    rows = max(opt.num_iters, 1) * length if save else 0
    c = x.query.new_empty((b, h, rows, x.references.shape[1]), dtype=compute_dtype(x.key.dtype))
    return fake_output(x), c


set_masked = register(
    Spec(
        name="set_masked",
        tensors=OPERANDS | {"mask": (MASK, True)},
        constants=f"{OPTIONS}, bool causal, bool save",
        outputs={"o": TOKEN, "c": TOKEN},
        differentiable=("o",),
        saved=("c",),
        no_grad=(*POSITIONS, "seed"),
        run=_run,
        run_backward=_run_backward,
        fake=_fake,
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
        tokens, by_references, by_values = (3, 5 * steps, 2) if skip else (1, 2 * steps, 1)
        return 2 * b * h * (tokens * (length + s) * m * d + length * s * (by_references * m + by_values * e))

    return formula


# Forward: V Exᵀ from the second iteration on and U Ex in each, A, and its product with v.  Backward: V Exᵀ again, the
# products that lead to dU, dV and dEx in each iteration, and those with v and do.
register_flop_formula(torch.ops.setformer_kernels.set_masked)(_flops(0))
register_flop_formula(torch.ops.setformer_kernels.set_masked_backward)(_flops(2))
