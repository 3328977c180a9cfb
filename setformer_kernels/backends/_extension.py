"""Loads the C++ extension once, remembers why it could not be loaded, and says how tensors reach it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

# torch brings its own OpenMP runtime; loaded first, it is the one the extension's threads come from.
import torch
from torch import Tensor

from ..problem import HYPER, Operands, Options, Sinkhorn, Stream, compute_dtype, empty_in_order, in_order

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.int64: 4, torch.bool: 5}
View = tuple[int, tuple[int, ...], tuple[int, ...], int]


def view(t: Tensor | None) -> View | None:
    """A tensor as the extension takes it: (pointer, sizes, strides, dtype code)."""
    return None if t is None else (t.data_ptr(), t.shape, t.stride(), DTYPE_CODES[t.dtype])


Views = tuple[View | None, ...]


def views(tensors: Iterable[Tensor | None]) -> Views:
    """`view` of each."""
    return tuple([None if t is None else (t.data_ptr(), t.shape, t.stride(), DTYPE_CODES[t.dtype]) for t in tensors])


def on_cpu(x: Operands, opt: Options) -> tuple[Any, ...]:
    """The arguments every attention kernel for CPUs begins with."""
    seed = 0 if x.seed is None else int(x.seed) & 0xFFFFFFFFFFFFFFFF
    constants = tuple(opt.scalars), opt.kernel == "dot", opt.num_iters, opt.dropout_p
    return views(x[:-1]), *constants, seed, torch.get_num_threads()


def attention_backward(x: Operands, needs: Sequence[bool], parts: int, run: Callable[[Views], None]) -> Operands:
    """Gradients in the order of `Operands`, None where not needed; `run` fills views of them, parameters in parts."""
    h, d = x.key.shape[1], x.key.shape[3]
    m, wide = x.references.shape[1], compute_dtype(x.key.dtype)
    need = dict(zip(Operands._fields, needs, strict=True))

    def in_parts(wanted: bool, *shape: int) -> Tensor | None:
        return x.key.new_empty((parts, h, *shape), dtype=wide) if wanted else None

    tokens = [
        empty_in_order(t, t.shape) if n and t is not None else None for t, n in zip(x[:3], needs[:3], strict=True)
    ]
    d_log_a = empty_in_order(x.log_a, x.log_a.shape) if need["log_a"] and x.log_a is not None else None
    d_references = in_parts(need["references"], m, d)
    d_log_b = in_parts(need["log_b"] and x.log_b is not None, m, 1)
    first = Operands._fields.index(HYPER[0])
    hypers = [n and t is not None for t, n in zip(x[first : first + 5], needs[first : first + 5], strict=True)]
    d_hyper = in_parts(any(hypers), len(HYPER), 1)
    d_position = None
    if need["reference_position"] and x.reference_position is not None:
        d_position = in_parts(True, m, x.reference_position.shape[-1])
    run(views((*tokens, d_log_a, d_references, d_log_b, d_hyper, d_position)))

    hyper = _added_up(d_hyper)
    d_hypers = [_own(hyper[:, i, 0]) if hyper is not None and n else None for i, n in enumerate(hypers)]
    d_log_b = None if d_log_b is None else d_log_b.squeeze(-1)
    d_parameters = in_order(x.references, _added_up(d_references)), in_order(x.log_b, _added_up(d_log_b))
    d_position = in_order(x.reference_position, _added_up(d_position))
    return Operands._make((*tokens, d_parameters[0], d_log_a, d_parameters[1], *d_hypers, None, None, d_position, None))


def stream_gradients(stream: Stream, needs: Sequence[bool]) -> list[Tensor | None]:
    """Memory for those of `stream` that are needed; none where nothing is said of them."""
    wanted = needs or (False,) * len(stream)
    return [torch.empty_like(t) if n and t is not None else None for n, t in zip(wanted, stream, strict=True)]


def _added_up(t: Tensor | None) -> Tensor | None:
    """[parts, ...] -> [...], in a fixed order."""
    if t is None:
        return None
    return t.squeeze(0) if t.shape[0] == 1 else t.sum(0)


def _own(t: Tensor) -> Tensor:
    """Contiguous, in memory of its own, as outputs of an op lie: `contiguous` leaves one head's column where it is."""
    return t.clone(memory_format=torch.contiguous_format)


def sinkhorn(
    x: Sinkhorn, run: Callable[[Views], None], last: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """f [G, N], g [G, M], c [G, max(T, 1), M], iters [G]; if `last`, the c of the last iteration stands for all."""
    (groups, n, m), new, steps = x.log_kernel.shape, x.log_kernel.new_empty, max(x.num_iters, 1)
    f, g, c = new((groups, n)), new((groups, m)), new((groups, 1 if last else steps, m)).expand(-1, steps, -1)
    iters = new(groups, dtype=torch.int64)
    run(views((*x.tensors, f, g, c, iters, *[None] * 6)))
    return f, g, c, iters


def sinkhorn_backward(
    x: Sinkhorn, given: Sequence[Tensor], needs: Sequence[bool], run: Callable[[Views], None]
) -> tuple[Tensor | None, ...]:
    """Gradients of `sinkhorn`'s inputs, None where not needed; given: c, iters, d_f, d_g."""
    wanted = [t if n else None for t, n in zip(x.tensors, needs, strict=True)]
    grads = [None if t is None else empty_in_order(t, t.shape) for t in wanted[:3]]
    relaxed = any(t is not None for t in wanted[3:])
    d_lam = given[0].new_empty((given[0].shape[0], 2)) if relaxed else None
    run(views((*x.tensors, None, None, *given, *grads, d_lam)))
    return *grads, *(None if t is None or d_lam is None else _own(d_lam[:, i]) for i, t in enumerate(wanted[3:]))


MISSING = "_C.missing.txt"  # setup.py leaves it beside the extension that it could not build


def _absence(folder: Path) -> str:
    """Why the package in `folder` has no extension for this interpreter, and what to do about it."""
    note, others = folder / MISSING, [path.name for path in folder.glob("_C.*") if path.suffix in (".so", ".pyd")]
    if others:
        why = f"{others[0]} is for another interpreter: install the package into this one"
    elif note.exists():
        why = note.read_text(encoding="utf-8").strip()
    else:
        why = "it was never built in this source tree: pip install -e ."
    return f"the C++ extension setformer_kernels._C is missing: {why}"


def _load() -> tuple[ModuleType | None, str]:
    name, folder = "setformer_kernels._C", Path(__file__).parents[1]
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if any((folder / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
            return None, f"the C++ extension {name} cannot be loaded ({error})"
        return None, _absence(folder)
    of_this_version = all(
        hasattr(module, name) for name in ("read_backward", "packed", "linearised", "PreparedAttention")
    )
    if getattr(module, "OPERANDS", None) != Operands._fields[:-1] or not of_this_version:
        return None, f"the C++ extension {name} is of another version of this package: pip install -e . builds it again"
    return module, ""


MODULE, REASON = _load()
