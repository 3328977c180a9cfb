"""How the ops run on DTensors: each batch element and each head is a problem of its own, a sequence is one problem.

Along a dimension of a mesh a call is sharded by batch (tokens Shard(0), references replicated, their gradients
Partial), by heads (tokens Shard(1), references Shard(0)), or not at all; what lies otherwise is brought to one of
these.  With dropout it is not sharded: its mask is that of a place in the whole.  A sequence that is sharded raises.

torch.distributed is imported by whoever has a DTensor: the rules are registered when the first op after that is called.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from . import registration
from .operands import OPERANDS
from .registration import HEAD, MASK, NAMESPACE, SEED, TOKEN, Spec

OF = "torch.distributed.tensor"
SEQUENCE = {TOKEN: 2, HEAD: 1, MASK: 2}  # from here on, no dimension may be sharded
PACKED = "_varlen"  # ops without a batch
_known = False


def know_dtensors() -> None:
    """Registers the rules, once there can be a DTensor."""
    global _known
    if not _known and OF in sys.modules:
        _known = True
        register = importlib.import_module(f"{OF}.experimental").register_sharding
        ops = getattr(torch.ops, NAMESPACE)
        for spec in registration.SPECS:
            kinds = {name: kind for name, (kind, _) in spec.tensors.items()}
            register(getattr(ops, spec.name).default)(partial(_forward, spec, kinds))
            register(getattr(ops, f"{spec.name}_backward").default)(partial(_backward, spec))
        register(ops.set_step.default)(_step)


def _forward(spec: Spec, kinds: dict[str, str], *args: Any) -> list[tuple[list[Any], list[Any]]]:
    tensors, others = dict(zip(kinds, args, strict=False)), len(args) - len(kinds)
    _refuse_sequences(spec.name, kinds, tensors)
    options = []
    for by in _ways(spec, kinds, tensors):
        inputs = [None if t is None else by(kinds[name], t, False) for name, t in tensors.items()]
        outputs = [by(kind, None, False) for kind in spec.outputs.values()]
        options.append((outputs, [*inputs, *[None] * others]))
    return options


def _backward(spec: Spec, *args: Any) -> list[tuple[list[Any], list[Any]]]:
    kinds, needs = spec.backward_tensors, args[-1]
    tensors, others = dict(zip(kinds, args, strict=False)), len(args) - len(kinds)
    _refuse_sequences(spec.name, kinds, tensors)
    replicate, options = _replicated(TOKEN, None, False), []
    needed = dict(zip(spec.tensors, needs, strict=True))
    for by in _ways(spec, kinds, tensors):
        inputs = [None if t is None else by(kinds[name], t, False) for name, t in tensors.items()]
        # what is not needed is an empty tensor
        gradients = [
            by(kinds[name], tensors[name], True) if needed[name] and tensors[name] is not None else replicate
            for name in spec.graded
        ]
        options.append((gradients, [*inputs, *[None] * others]))
    return options


def _step(*args: Any) -> list[tuple[list[Any], list[Any]]]:
    """States are written where they lie."""
    kinds = {"states": TOKEN, **{name: kind for name, (kind, _) in OPERANDS.items()}, "log_decay": TOKEN, "rows": SEED}
    tensors, others = dict(zip(kinds, args, strict=False)), len(args) - len(kinds)
    _refuse_sequences("set_step", kinds, tensors)
    ways = (_replicated, _by_heads) if tensors["rows"] is not None else (_replicated, _by_batch, _by_heads)
    options = [[None if t is None else by(kinds[name], t, False) for name, t in tensors.items()] for by in ways]
    return [([o[0]], [*o, *[None] * others]) for o in options if o[0] in tensors["states"].placements]


def _ways(spec: Spec, kinds: dict[str, str], tensors: dict[str, Any]) -> Sequence[Callable[..., Any]]:
    """Functions of (how a tensor batches, what it is, whether it is a gradient): its placement."""
    if tensors.get("seed") is not None:
        return (_replicated,)
    with_batch = TOKEN in kinds.values() and not spec.name.endswith(PACKED)
    return (_replicated, _by_batch, _by_heads) if with_batch else (_replicated, _by_heads)


def _replicated(kind: str, t: Any, gradient: bool) -> Any:
    return torch.distributed.tensor.Replicate()


def _by_batch(kind: str, t: Any, gradient: bool) -> Any:
    tensor = torch.distributed.tensor
    if kind == TOKEN or (kind == MASK and t.shape[0] > 1):
        return tensor.Shard(0)
    return tensor.Partial() if gradient else tensor.Replicate()


def _by_heads(kind: str, t: Any, gradient: bool) -> Any:
    tensor = torch.distributed.tensor
    if kind == HEAD:
        return tensor.Shard(0)
    if kind == TOKEN or (kind == MASK and t.shape[1] > 1):
        return tensor.Shard(1)
    return tensor.Partial() if gradient else tensor.Replicate()


def _refuse_sequences(op: str, kinds: dict[str, str], tensors: dict[str, Any]) -> None:
    for name, t in tensors.items():
        if t is None or kinds[name] == SEED:
            continue
        for placement in t.placements:
            at = getattr(placement, "dim", None)
            if at is not None and at >= SEQUENCE[kinds[name]]:
                raise ValueError(
                    f"{op}: {name} must be sharded by batch or heads, got {placement}; a sequence that is"
                    " sharded over ranks takes cp_context (setformer_kernels.distributed.build_cp_context)"
                )


registration.before_dispatch.append(know_dtensors)
