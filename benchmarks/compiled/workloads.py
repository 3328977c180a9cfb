"""What the Triton backend launches for a named call, taken by its recorder: nothing runs, and no GPU is needed.

A `Call` is an op with its sizes and options; `launches(call, family)` runs the backend's host code on empty CPU
tensors.  Letters as in the package; for `sinkhorn`, B·H problems of L rows and M columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.compiled.gpus import AMD, GPUS
from setformer_kernels.problem import HYPER, SCALARS, Operands, Options, Sinkhorn, Stream

MULTIPROCESSORS = {gpu.family: gpu.multiprocessors for gpu in GPUS.values()}

# What a call may come with; a position is three operands, and a dropout a seed.
OPTIONAL = ("log_a", "log_b", *HYPER, "position", "dropout")
STREAM = ("log_decay", "initial_state")  # what a causal call may also come with; with the second it leaves a state


@dataclass(frozen=True)
class Call:
    """One call, forward or backward."""

    # "attention", "pool", "packed", "packed_pool", "packed_causal" (B segments of L), "read", "causal", "step",
    # "masked", "features", "sinkhorn"; of transport to convergence, forward alone: "linearised" and "iterated", a pass
    # at potentials and iterations over keys, "linearised_costs" and "started", the same on what `sinkhorn` takes
    op: str
    backward: bool = False
    T: int = 3
    dtype: torch.dtype = torch.bfloat16
    B: int = 1
    H: int = 16
    L: int = 4096  # = S
    D: int = 64
    E: int = 64
    M: int = 64
    rich: bool = False  # with everything of OPTIONAL and all its gradients
    kernel: str = "rbf"
    center: bool = False  # of features
    G: int = 1  # query heads that share a key head, of a step
    mask: str = "causal"  # of `masked`: "causal", or a mask [L, S] that is "bool" or "float"
    given: tuple[str, ...] | None = None  # of OPTIONAL and STREAM, if neither all nor nothing
    wanted: str = ""  # the operand whose gradient alone is asked for, if not that of each

    def __str__(self) -> str:
        parts = [self.op, "backward" if self.backward else "forward"]
        iterated = ("attention", "pool", "packed", "packed_pool", "packed_causal", "causal", "step", "masked")
        parts += [f"T={self.T}"] if self.op in iterated else []
        parts += [self.mask] if self.op == "masked" else []
        parts += [] if self.kernel == "rbf" else [self.kernel]
        parts += ["centred"] if self.center else []
        parts += ["rich"] if self.rich else []
        parts += [f"G={self.G}"] if self.G > 1 else []
        parts += [] if self.given is None else ["with", *(self.given or ["nothing"])]
        parts += ["for", self.wanted] if self.wanted else []
        return " ".join(parts)

    def has(self, name: str) -> bool:
        """Whether an operand of OPTIONAL or STREAM is there."""
        return name in self.given if self.given is not None else self.rich and name not in STREAM


def operands(call: Call) -> Operands:
    """The tensors of a call, not initialised."""
    B, H, L, D, E, M = call.B, call.H, call.L, call.D, call.E, call.M
    if call.op.startswith("packed"):
        B, L = 1, B * L

    def token(width: int) -> Tensor:
        return torch.empty(B, H, L, width, dtype=call.dtype)

    query = None if call.op.endswith("pool") or call.op in ("linearised", "iterated") else token(D)
    plain = Operands(query, token(D), token(E), torch.empty(H, M, D), *[None] * 11)
    position = torch.empty(1, 1, L, 2).expand(B, H, L, 2)
    optional: dict[str, dict[str, Tensor | None]] = {
        "log_a": {"log_a": torch.empty(B, 1, L).expand(B, H, L)},
        "log_b": {"log_b": torch.empty(H, M)},
        **{name: {name: torch.empty(H)} for name in HYPER},
        "position": {
            "query_position": None if query is None else position,
            "key_position": position,
            "reference_position": torch.empty(H, M, 2),
        },
        "dropout": {"seed": None if query is None else torch.empty((), dtype=torch.int64)},
    }
    return plain._replace(**{n: t for name in OPTIONAL if call.has(name) for n, t in optional[name].items()})


def _run_attention(backend: Any, call: Call) -> None:
    x = operands(call)
    dropped = 0.1 if call.has("dropout") and x.query is not None else 0.0
    opt = Options(SCALARS, call.kernel, call.T, dropped)
    learned = _learned(x, call)[:-1]
    shape = (call.B, call.H, max(call.T, 1), call.M)
    d_o, z, c = torch.empty_like(x.value), torch.empty(*shape[:2], call.M, call.E), torch.empty(shape)
    if call.op == "attention":
        backend.attention_backward(x, opt, z, c, d_o, learned) if call.backward else backend.attention(x, opt)
    elif call.op == "packed":
        cu = _offsets(call)
        if call.backward:
            backend.packed_backward(x, opt, cu, cu, z, c, d_o, learned)
        else:
            backend.packed(x, opt, cu, cu)
    elif call.op == "packed_pool":
        cu = _offsets(call)
        if call.backward:
            backend.packed_pool_backward(x, opt, cu, z, c, torch.empty_like(z), learned)
        else:
            backend.packed_pool(x, opt, cu)
    elif call.op in ("causal", "packed_causal"):
        _run_causal(backend, call, x, opt, d_o, learned)
    elif call.backward:
        backend.pool_backward(x, opt, z, c, torch.empty_like(z), torch.empty_like(c), learned)
    else:
        backend.pool(x, opt)


def _run_causal(backend: Any, call: Call, x: Operands, opt: Options, d_o: Tensor, learned: list[bool]) -> None:
    decay, state = torch.empty(x.key.shape[:3]), torch.empty(call.B, call.H, call.M, 2 * call.E + 3)
    stream = Stream(*(t if call.has(name) else None for name, t in zip(STREAM, (decay, state), strict=True)))
    streamed = stream.initial_state is not None
    needs = [*learned, *(t is not None and call.wanted == "" for t in stream)]
    if call.op == "packed_causal":
        cu, d_state = _offsets(call), torch.empty_like(state) if streamed else None
        if call.backward:
            backend.packed_causal_backward(x, opt, cu, d_o, needs, stream, streamed, d_state)
        else:
            backend.packed_causal(x, opt, cu, stream, streamed)
    elif call.backward:
        backend.causal_backward(x, opt, d_o, needs, stream, torch.empty_like(state) if streamed else None)
    else:
        backend.causal(x, opt, stream, streamed)


def _run_step(backend: Any, call: Call) -> None:
    x, states = operands(replace(call, L=1)), torch.empty(call.B, call.H, call.M, 2 * call.E + 3)
    decay = torch.empty(call.B, call.H, 1) if call.has("log_decay") else None
    rows = torch.empty(call.B, dtype=torch.int32) if call.has("initial_state") else None
    if call.G > 1 and x.query is not None:
        places = None if x.query_position is None else x.query_position.expand(-1, -1, call.G, -1)
        x = x._replace(query=x.query.expand(-1, -1, call.G, -1).contiguous(), query_position=places)
    backend.step(x._replace(seed=None), Options(SCALARS, call.kernel, call.T), states, decay, rows)


def _run_masked(backend: Any, call: Call) -> None:
    x, causal = operands(call), call.mask == "causal"
    opt = Options(SCALARS, call.kernel, call.T, 0.1 if call.has("dropout") else 0.0)
    mask = None if causal else torch.empty(1, 1, call.L, call.L, dtype=MASKS[call.mask])
    if call.backward:
        backend.masked_backward(x, mask, opt, causal, torch.empty_like(x.value), _learned(x, call, mask))
    else:
        backend.masked(x, mask, opt, causal)


MASKS = {"bool": torch.bool, "float": torch.float32}


def _learned(x: Operands, call: Call, mask: Tensor | None = None) -> list[bool]:
    """Which operands get a gradient, and whether a mask does."""
    given = [*zip(x._fields, x, strict=True), ("mask", mask if call.mask == "float" else None)]
    without = ("query_position", "key_position", "seed")
    return [t is not None and name not in without and call.wanted in ("", name) for name, t in given]


def _offsets(call: Call) -> Tensor:
    """Of B segments of L tokens each."""
    return torch.arange(call.B + 1) * call.L


def _run_read(backend: Any, call: Call) -> None:
    """The second half of attention, from z and g."""
    x, none = operands(call), dict.fromkeys(("log_a", "log_b", "key_relaxation", "reference_relaxation"))
    places = None if x.key_position is None else x.key_position[:, :, :0]
    x = x._replace(key=x.key[:, :, :0], value=x.value[:, :, :0], key_position=places, **none)
    opt = Options(SCALARS, call.kernel, 1, 0.1 if call.has("dropout") else 0.0)
    z, g = torch.empty(call.B, call.H, call.M, call.E), torch.empty(call.B, call.H, call.M)
    if not call.backward:
        backend.read(x, opt, z, g)
        return
    graded = ("query", "references", "bandwidth", "epsilon", "position_scale", "reference_position")
    learned = [
        name in graded and t is not None and call.wanted in ("", name) for name, t in zip(x._fields, x, strict=True)
    ]
    backend.read_backward(x, opt, z, g, torch.empty(call.B, call.H, call.L, call.E, dtype=call.dtype), learned)


def _run_features(backend: Any, call: Call) -> None:
    x, landmarks = torch.empty(call.B, call.H, call.L, call.D, dtype=call.dtype), torch.empty(call.H, call.M, call.D)
    bandwidth = torch.empty(call.H) if call.rich else None
    arguments = (x, landmarks, bandwidth, 1.0, 1e-3, call.center)
    if call.backward:
        d_psi = torch.empty(call.B, call.H, call.L, call.M, dtype=call.dtype)
        needs = [call.wanted in ("", name) for name in ("key", "references", "bandwidth")]
        backend.features_backward(*arguments, d_psi, (*needs[:2], needs[2] and call.rich))
    else:
        backend.features(*arguments)


def _run_keys_to_convergence(backend: Any, call: Call) -> None:
    x, opt = operands(call), Options(SCALARS, call.kernel, call.T)
    x, heads = x._replace(value=x.value[..., :1]), call.B * call.H
    g = torch.empty(heads, call.M)
    if call.op == "linearised":
        backend.linearised_keys(x, opt, g, torch.empty(heads, dtype=torch.int32) if call.rich else None)
    else:
        backend.iterated_keys(x, opt, g, 1e-3)


def _run_costs_to_convergence(backend: Any, call: Call) -> None:
    problems, rows, columns = call.B * call.H, call.L, call.M
    l, g, lam = torch.empty(problems, rows, columns), torch.empty(problems, columns), torch.empty(problems)
    if call.op == "linearised_costs":
        running = torch.empty(problems, dtype=torch.int32) if call.rich else None
        backend.linearised(l, torch.empty(problems, rows), lam, g, running)
    else:
        backend.started(Sinkhorn(l, num_iters=call.T, tol=1e-3 if call.rich else None), g)


def _run_sinkhorn(backend: Any, call: Call) -> None:
    problems, rows, columns = call.B * call.H, call.L, call.M
    rich = [torch.empty(problems, n) for n in (rows, columns)] + [torch.empty(problems) for _ in range(2)]
    names = ("log_a", "log_b", "key_relaxation", "reference_relaxation")
    masses = [t if call.has(name) else None for name, t in zip(names, rich, strict=True)]
    x = Sinkhorn(torch.empty(problems, rows, columns), *masses, num_iters=call.T, tol=1e-3 if call.rich else None)
    if call.backward:
        c, iters = torch.empty(problems, max(call.T, 1), columns), torch.empty(problems, dtype=torch.int64)
        cotangents = torch.empty(problems, rows), torch.empty(problems, columns)
        tensors = zip(("key", *names), x.tensors, strict=True)
        needs = [t is not None and call.wanted in ("", name) for name, t in tensors]
        backend.sinkhorn_backward(x, c, iters, *cotangents, needs)
    else:
        backend.sinkhorn(x)


RUN: dict[str, Callable[[Any, Call], None]] = {
    "attention": _run_attention,
    "pool": _run_attention,
    "packed": _run_attention,
    "packed_pool": _run_attention,
    "read": _run_read,
    "causal": _run_attention,
    "packed_causal": _run_attention,
    "step": _run_step,
    "masked": _run_masked,
    "features": _run_features,
    "sinkhorn": _run_sinkhorn,
    "linearised": _run_keys_to_convergence,
    "iterated": _run_keys_to_convergence,
    "linearised_costs": _run_costs_to_convergence,
    "started": _run_costs_to_convergence,
}


def launches(call: Call, family: str, multiprocessors: int | None = None) -> list[Any]:
    """The launches of a call on a GPU of a family, in order."""
    from setformer_kernels.backends.triton import face
    from setformer_kernels.backends.triton.host.launch import Device, recorded

    if family in AMD:
        device = Device("amd", AMD[family].compute_units, "ieee")
    else:
        device = Device(family, multiprocessors or MULTIPROCESSORS[family], "tf32x3")
    with recorded(device) as taken:
        RUN[call.op](face, call)
    return taken
