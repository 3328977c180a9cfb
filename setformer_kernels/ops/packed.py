"""The ops of packed batches: the tokens of N segments one after another, in operands of B = 1.

    set_attention_varlen   Operands, cu_seqlens_q, cu_seqlens_k, Options -> o [1, H, L, E], z [N, H, M, E],
                           c [N, H, max(T, 1), M]
    set_pool_varlen        Operands (no query), cu_seqlens, Options -> z, c
    set_causal_varlen      Operands (T ≤ 1), Stream, cu_seqlens, Options, with_state -> o, states [N, H, M, 2E + 3]

cu_seqlens [N + 1] int64; a Stream's states are [N, H, M, 2E + 3]; without `with_state` they are empty, [N, H, 0, 0].
log_a holds unnormalised log masses, as only a backend knows where its segments end.  Nothing
outside the backends reads the offsets of a device.  There is no decomposition: PyTorch's operations would have to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import checks, dispatch
from ..problem import Operands, Options, Stream, compute_dtype
from ..reference.state import empty_like
from .operands import N_OPERANDS, OPERANDS, OPTIONS, POSITIONS, attention_problem, fake_output, flops, logits
from .registration import SEED, TOKEN, Spec, register

BOTH, ONE = ("cu_seqlens_q", "cu_seqlens_k"), ("cu_seqlens",)
FIRST_OPTION = N_OPERANDS + len(Stream._fields) + 1  # of the causal op


def _split(args: Sequence[Any], names: tuple[str, ...]) -> tuple[Operands, list[Tensor], Options]:
    """What an op is given.  Where vmap has no element to call it for, offsets are missing: there are no segments."""
    x, behind = Operands(*args[:N_OPERANDS]), N_OPERANDS + len(names)
    given = args[N_OPERANDS:behind]
    return x, [_offsets(x, name, cu) for name, cu in zip(names, given, strict=True)], Options(*args[behind:])


def _offsets(x: Operands, name: str, cu: Tensor | None) -> Tensor:
    if cu is None:
        return torch.zeros(1, dtype=torch.int64, device=x.key.device)
    query = name == "cu_seqlens_q" and x.query is not None
    total = x.query.shape[2] if query and x.query is not None else x.key.shape[2]
    checks.offsets_within(name, cu, total, "rows of the query" if query else "rows of the key")
    return cu


def _backend(op: str, x: Operands, opt: Options, segments: int, backward: bool = False) -> ModuleType:
    _, h, s, _ = x.key.shape
    length = 0 if x.query is None else x.query.shape[-2]
    problem = attention_problem(op, x, opt, (s, backward, segments, h, length))
    return dispatch.implementation(problem, opt.backend, logits(x))


def _run(op: str, names: tuple[str, ...]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        x, offsets, opt = _split(args, names)
        return getattr(_backend(op, x, opt, offsets[-1].shape[0] - 1), op)(x, opt, *offsets)

    return run


def _run_backward(op: str, names: tuple[str, ...], saved: int) -> Callable[..., Sequence[Tensor | None]]:
    """Arguments: the gradient of the output, what was saved, those of the op, which gradients are needed."""

    def run(*args: Any) -> Sequence[Tensor | None]:
        before, needs = args[: 1 + saved], args[-1]
        x, offsets, opt = _split(args[1 + saved : -1], names)
        backend = _backend(op, x, opt, offsets[-1].shape[0] - 1, backward=True)
        grads = getattr(backend, f"{op}_backward")(x, opt, *offsets, *before[1:], before[0], needs[:N_OPERANDS])
        return *grads, *(None for _ in names)

    return run


def _fake_state(*args: Any) -> tuple[Tensor, Tensor]:
    x, opt = Operands(*args[:N_OPERANDS]), Options(*args[-len(Options._fields) :])
    cu = args[-len(Options._fields) - 1]
    (h, m, _), n, dtype = x.references.shape, 0 if cu is None else cu.shape[0] - 1, compute_dtype(x.key.dtype)
    z = x.key.new_empty((n, h, m, x.value.shape[3]), dtype=dtype)
    return z, x.key.new_empty((n, h, max(opt.num_iters, 1), m), dtype=dtype)


def _spec(name: str, op: str, names: tuple[str, ...], outputs: tuple[str, ...], fake: Callable[..., Any]) -> Spec:
    saved = tuple(output for output in outputs if output != "o")
    no_grad = (*POSITIONS, "seed", *names) if "o" in outputs else ("query", *POSITIONS, "seed", *names)
    return Spec(
        name=name,
        tensors={**OPERANDS, **dict.fromkeys(names, (SEED, True))},
        constants=OPTIONS,
        outputs=dict.fromkeys(outputs, TOKEN),
        differentiable=outputs[:1],
        saved=saved,
        no_grad=no_grad,
        run=_run(op, names),
        run_backward=_run_backward(op, names, len(saved)),
        fake=fake,
        decomposition=None,
    )


set_attention_varlen = register(
    _spec(
        "set_attention_varlen", "packed", BOTH, ("o", "z", "c"),
        lambda *args: (fake_output(Operands(*args[:N_OPERANDS])), *_fake_state(*args)),
    )
)  # fmt: skip
set_pool_varlen = register(_spec("set_pool_varlen", "packed_pool", ONE, ("z", "c"), _fake_state))


def _split_causal(args: Sequence[Any]) -> tuple[Operands, Tensor, Options, Stream, bool]:
    x, (*stream, cu) = Operands(*args[:N_OPERANDS]), args[N_OPERANDS:FIRST_OPTION]
    return x, _offsets(x, "cu_seqlens_q", cu), Options(*args[FIRST_OPTION:-1]), Stream(*stream), args[-1]


def _run_causal(*args: Any) -> tuple[Tensor, ...]:
    x, cu, opt, stream, with_state = _split_causal(args)
    return _backend("packed_causal", x, opt, cu.shape[0] - 1).packed_causal(x, opt, cu, stream, with_state)


def _run_causal_backward(d_o: Tensor | None, d_states: Tensor | None, *args: Any) -> Sequence[Tensor | None]:
    x, cu, opt, stream, with_state = _split_causal(args[:-1])
    d_o = fake_output(x).zero_() if d_o is None else d_o
    run = _backend("packed_causal", x, opt, cu.shape[0] - 1, backward=True).packed_causal_backward
    needs = args[-1][: N_OPERANDS + len(Stream._fields)]
    return *run(x, opt, cu, d_o, needs, stream, with_state, d_states if with_state else None), None


def _fake_causal(*args: Any) -> tuple[Tensor, ...]:
    x, cu = Operands(*args[:N_OPERANDS]), args[FIRST_OPTION - 1]
    return fake_output(x), empty_like(x, args[-1], 0 if cu is None else cu.shape[0] - 1)


set_causal_varlen = register(
    Spec(
        name="set_causal_varlen",
        tensors={**OPERANDS, **dict.fromkeys(Stream._fields, (TOKEN, True)), "cu_seqlens": (SEED, True)},
        constants=f"{OPTIONS}, bool with_state",
        outputs={"o": TOKEN, "states": TOKEN},
        differentiable=("o", "states"),
        saved=(),
        no_grad=(*POSITIONS, "seed", "cu_seqlens"),
        run=_run_causal,
        run_backward=_run_causal_backward,
        fake=_fake_causal,
        decomposition=None,
        apart=True,
    )
)

# As of a batch of one that is as long as all segments together.
for _name, _skip in (("set_attention_varlen", 3), ("set_pool_varlen", 3), ("set_causal_varlen", 2)):
    register_flop_formula(getattr(torch.ops.setformer_kernels, _name))(flops(1, 1, 0))
    register_flop_formula(getattr(torch.ops.setformer_kernels, _name + "_backward"))(flops(3, 2, _skip))
