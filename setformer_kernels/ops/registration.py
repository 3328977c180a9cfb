"""How an op is registered with torch.library: schema, fake kernel and ONE autograd registration for all backends.

Each op `f` comes with `f_backward`; an autograd.Function with `setup_context` and a vmap rule stands
behind the Autograd key of both, so that eager autograd, torch.compile, torch.export, torch.func.grad and vmap (and
their compositions) take one path.  Differentiating a backward, and forward AD, raise: the reference backend does both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import new_class
from typing import Any

import torch
from torch import Tensor
from torch._decomp import register_decomposition
from torch._functorch.utils import unwrap_dead_wrappers

from ..dispatch import Chosen, asked_for
from ..problem import empty_in_order
from .direct import differentiated, unwatched
from .inductor import called_by_inductor

NAMESPACE = "setformer_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")

# How a tensor batches: TOKEN is [B, H, ...], HEAD is [H, ...] (or any leading group), MASK is [B or 1, H or 1, ...],
# SEED has neither.  A call with one of the last two is made once an element under vmap.
TOKEN, HEAD, MASK, SEED = "token", "head", "mask", "seed"
ALONE = (MASK, SEED)
HEADS_AT = {TOKEN: 1, HEAD: 0, MASK: 1}
# Called before an op goes to the dispatcher; sharding.py needs to know of tensors that only the dispatcher knows.
before_dispatch: list[Callable[[], None]] = []


@dataclass(frozen=True)
class Spec:
    """One op: its tensors, constants and outputs, and the functions on a backend that run it."""

    name: str
    tensors: dict[str, tuple[str, bool]]  # name -> (how it batches, optional)
    constants: str  # the rest of the schema
    outputs: dict[str, str]  # name -> how it batches
    differentiable: tuple[str, ...]  # outputs that carry gradients
    saved: tuple[str, ...]  # outputs the backward reads
    no_grad: tuple[str, ...]  # tensors that never get a gradient
    run: Callable[..., Any]
    run_backward: Callable[..., Sequence[Tensor | None]]
    fake: Callable[..., Any]
    decomposition: Callable[..., Any] | None  # the op as PyTorch operations
    run_alone: Callable[..., Any] | None = None  # `run` of this package's calls that no backward follows
    apart: bool = False  # whether the backward gets None, not zeros, for an output that no gradient reached

    @property
    def schema(self) -> str:
        tensors = ", ".join(f"Tensor{'?' if optional else ''} {name}" for name, (_, optional) in self.tensors.items())
        return f"{tensors}, {self.constants}"

    @property
    def graded(self) -> tuple[str, ...]:
        return tuple(name for name in self.tensors if name not in self.no_grad)

    @property
    def backend_at(self) -> int:
        """Where the name of the backend stands among the arguments."""
        return len(self.tensors) + [constant.split()[-1] for constant in self.constants.split(", ")].index("backend")

    @property
    def backward_tensors(self) -> dict[str, str]:
        """Inputs of the backward: cotangents, saved outputs, then the op's own tensors -> how they batch."""
        extra = {f"d_{name}": self.outputs[name] for name in self.differentiable}
        extra |= {f"saved_{name}": self.outputs[name] for name in self.saved}
        return extra | {name: kind for name, (kind, _) in self.tensors.items()}


SPECS: list[Spec] = []  # of the registered ops


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def one_or_tuple(outputs: Sequence[Any]) -> Any:
    """What an op returns: a schema with one output has no tuple."""
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _below_autograd(op: Any, args: Sequence[Any]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _forward(op: Any, kernel: Callable[..., Any], tensors: int) -> Callable[..., Any]:
    """The forward of an autograd.Function, whose first so many arguments are tensors: the backend."""

    def forward(*args: Any) -> Any:
        return kernel(*args) if unwatched(args[:tensors]) else _below_autograd(op, args)

    return forward


def _led(t: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The tensor with its vmapped dimension first; expanded where it has none."""
    if t is None:
        return None
    return t.movedim(dim, 0) if dim is not None else t.expand((size, *t.shape))


def _fold(kind: str, t: Tensor | None) -> Tensor | None:
    """[V, ...] with V folded into H: TOKEN [B, V·H, ...], HEAD [V·H, ...]."""
    if t is None or kind == SEED:
        return None
    at = HEADS_AT[kind]
    return t.movedim(0, at).flatten(at, at + 1)


def _unfold(kind: str | None, t: Tensor, size: int, heads: int) -> tuple[Tensor, int]:
    """Undo `_fold`: the tensor and where its vmapped dimension lies.  Without a kind: a gradient that nobody needs."""
    if kind is None:
        return t.expand(size, *t.shape), 0
    return t.unflatten(HEADS_AT[kind], (size, heads)), HEADS_AT[kind]


def _vmap(
    op: Any, tensors: dict[str, str], outputs: Sequence[str | None], info: Any, in_dims: Any, args: Sequence[Any]
) -> Any:
    """One call with V folded into H; one call per element where dropout counts elements or a mask is broadcast."""
    n, size = len(tensors), info.batch_size
    alone = any(kind in ALONE and t is not None for kind, t in zip(tensors.values(), args[:n], strict=True))
    if alone and size > 0:
        return _vmap_loop(op, n, size, in_dims, args)
    led = {name: _led(t, d, size) for name, t, d in zip(tensors, args[:n], in_dims, strict=False)}
    # Not read off the results: 0 of them have any number of heads.
    heads: dict[str | None, int] = {
        kind: t.shape[1 + HEADS_AT[kind]]
        for kind, t in zip(tensors.values(), led.values(), strict=True)
        if t is not None and kind != SEED
    }
    folded = [_fold(kind, led[name]) for name, kind in tensors.items()]
    results = [
        _unfold(kind, r, size, heads.get(kind, 0))
        for kind, r in zip(outputs, as_tuple(op(*folded, *args[n:])), strict=True)
    ]
    return one_or_tuple([r for r, _ in results]), one_or_tuple([d for _, d in results])


def _vmap_loop(op: Any, n: int, size: int, in_dims: Any, args: Sequence[Any]) -> Any:
    rows = [
        as_tuple(op(*(t if d is None else t.select(d, v) for t, d in zip(args[:n], in_dims, strict=False)), *args[n:]))
        for v in range(size)
    ]
    stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
    return one_or_tuple(stacked), one_or_tuple((0,) * len(stacked))


def _materialise(cotangents: Sequence[Tensor | None], shapes: Sequence[torch.Size]) -> list[Tensor | None]:
    """Zeros for the outputs that no gradient reached; at least one was."""
    some = next(c for c in cotangents if c is not None)
    return [some.new_zeros(shape) if c is None else c for c, shape in zip(cotangents, shapes, strict=True)]


def _function(name: str, **methods: Callable[..., Any]) -> type:
    """An autograd.Function called `name` from the start: that is when torch names its node."""
    body = {"__module__": __name__, **{key: staticmethod(method) for key, method in methods.items()}}
    return new_class(name, (torch.autograd.Function,), exec_body=lambda namespace: namespace.update(body))


def _refuse(what: str, name: str) -> Callable[..., Any]:
    """The method of an autograd.Function that has no such derivative."""

    def method(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{NAMESPACE}::{name} has no {what}: pass backend='reference', which differentiates to any order"
        )

    return method


def _setup_context(spec: Spec) -> Callable[..., None]:
    """Saves the op's tensors, then those of its outputs that the backward reads."""
    n, at, positions = len(spec.tensors), spec.backend_at, {name: i for i, name in enumerate(spec.outputs)}
    saved, differentiable = [positions[o] for o in spec.saved], [positions[o] for o in spec.differentiable]
    others = [i for i in positions.values() if i not in differentiable]

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        outputs = as_tuple(output)
        ctx.save_for_backward(*inputs[:n], *[outputs[i] for i in saved])
        ctx.constants = (*inputs[n:at], asked_for(inputs[at]), *inputs[at + 1 :])  # a backward chooses for itself
        ctx.shapes = [outputs[i].shape for i in differentiable]
        ctx.set_materialize_grads(False)  # made by autograd, zero tangents trip functorch before jvp can refuse
        ctx.mark_non_differentiable(*[outputs[i] for i in others])

    return setup_context


def _backward(spec: Spec, call_backward: Callable[..., Any]) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward op on the cotangents and what `_setup_context` saved."""
    n, positions = len(spec.tensors), {name: i for i, name in enumerate(spec.outputs)}
    differentiable = [positions[name] for name in spec.differentiable]
    graded = [i for i, name in enumerate(spec.tensors) if name in spec.graded]

    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * (n + len(ctx.constants))
        given = [cotangents[i] for i in differentiable]
        missing = sum([c is None for c in given])
        if missing == len(given):
            return tuple(grads)
        if missing and not spec.apart:
            given = _materialise(given, ctx.shapes)
        kept = ctx.saved_tensors  # read once: non-reentrant checkpointing recomputes at each read
        tensors, saved = kept[:n], kept[n:]
        needs = [False] * n
        for i in graded:
            needs[i] = bool(ctx.needs_input_grad[i])
        for i, found in zip(graded, call_backward(*given, *saved, *tensors, *ctx.constants, needs), strict=True):
            grads[i] = found if needs[i] else None
        return tuple(grads)

    return backward


def _forward_function(spec: Spec, op: Any, forward: Callable[..., Any], call_backward: Callable[..., Any]) -> type:
    """The autograd.Function of `f`."""
    kinds = {name: kind for name, (kind, _) in spec.tensors.items()}

    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _vmap(op, kinds, list(spec.outputs.values()), info, in_dims, args)

    return _function(
        spec.name,
        forward=forward,
        setup_context=_setup_context(spec),
        backward=_backward(spec, call_backward),
        vmap=vmap,
        jvp=_refuse("forward-mode derivative", spec.name),
    )


def _backward_function(spec: Spec, op_backward: Any) -> type:
    """The autograd.Function of `f_backward`."""
    first = len(spec.backward_tensors) - len(spec.tensors)

    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        tensors = zip(spec.tensors.items(), args[first:], args[-1], strict=False)
        wanted = {name: kind if need and t is not None else None for (name, (kind, _)), t, need in tensors}
        outputs = [wanted[name] for name in spec.graded]
        return _vmap(op_backward, spec.backward_tensors, outputs, info, in_dims, args)

    return _function(
        f"{spec.name}_backward",
        forward=_forward(op_backward, _kernel_backward(spec), len(spec.backward_tensors)),
        setup_context=lambda ctx, inputs, output: None,
        backward=_refuse("second derivative", spec.name),
        vmap=vmap,
        jvp=_refuse("forward-mode derivative of its backward", spec.name),
    )


def _applied(function: type) -> Callable[..., Any]:
    """`function.apply` without `inspect.signature`, which binds its arguments: 15 of its 20 µs, for 20 arguments."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def _prepare() -> None:
    for prepare in before_dispatch:
        prepare()


def _through(function: type, op: Any) -> Callable[..., Any]:
    """The kernel of the Autograd and FuncTorchBatched keys."""
    front = torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode
    apply = _applied(function)

    def kernel(*args: Any) -> Any:
        _prepare()
        if torch._C._are_functorch_transforms_active():
            # The dispatcher has switched functorch's front key off on the way here; apply() needs it to find its level.
            with torch._C._SetExcludeDispatchKeyGuard(front, False), torch._C._IncludeDispatchKeyGuard(front):
                return function.apply(*args)  # type: ignore[attr-defined]
        if not differentiated(args):
            return function.forward(*args)  # type: ignore[attr-defined]
        return apply(*unwrap_dead_wrappers(args))

    return kernel


def _called(
    function: type, op: Any, kernel: Callable[..., Any], tensors: int, backend_at: int
) -> Callable[..., Any]:  # fmt: skip
    """The op as this package calls it: through the dispatcher where anybody has to see it."""
    apply = _applied(function)

    def call(*args: Any) -> Any:
        if type(args[backend_at]) is not Chosen and not unwatched(args[:tensors]):
            if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():  # which has no autograd key
                _prepare()
            return op(*args)
        return apply(*args) if differentiated(args) else kernel(*args)

    return call


def _fake_backward(spec: Spec) -> Callable[..., tuple[Tensor, ...]]:
    skip = len(spec.differentiable) + len(spec.saved)

    def fake(*args: Any) -> tuple[Tensor, ...]:
        tensors, needs = args[skip : skip + len(spec.tensors)], args[-1]
        by_name = dict(zip(spec.tensors, zip(tensors, needs, strict=True), strict=True))
        return tuple(_gradient_like(*by_name[name], _first(args)) for name in spec.graded)

    return fake


def _first(args: Sequence[Any]) -> Tensor:
    """Of the arguments of a backward, a tensor that says where all of them are."""
    return next(a for a in args if isinstance(a, Tensor))


def _gradient_like(t: Tensor | None, need: bool, device_of: Tensor) -> Tensor:
    if t is None or not need:
        return device_of.new_empty(0)
    return empty_in_order(t, t.shape)


def _kernel_backward(spec: Spec) -> Callable[..., tuple[Tensor, ...]]:
    """The backend's gradients, with an empty tensor for each that is not needed: op outputs are never None.

    What the forward saved reaches a backend as a forward writes it, contiguous, also where vmap expanded it.
    """
    first, last = len(spec.differentiable), len(spec.differentiable) + len(spec.saved)
    graded = [i for i, name in enumerate(spec.tensors) if name in spec.graded]

    def kernel(*args: Any) -> tuple[Tensor, ...]:
        saved = [t.contiguous() for t in args[first:last]]
        grads: Sequence[Any] = spec.run_backward(*args[:first], *saved, *args[last:])
        place = _first(args)
        return tuple([place.new_empty(0) if grads[i] is None else grads[i] for i in graded])

    return kernel


def register(spec: Spec) -> Callable[..., Any]:
    """Define `spec.name` and its backward; returns the call of the op."""
    SPECS.append(spec)
    cotangents = ", ".join(
        f"Tensor{'?' if spec.apart and i < len(spec.differentiable) else ''} {name}"
        for i, name in enumerate(list(spec.backward_tensors)[: -len(spec.tensors)])
    )
    _library.define(f"{spec.name}({spec.schema}) -> ({', '.join(['Tensor'] * len(spec.outputs))})")
    _library.define(
        f"{spec.name}_backward({cotangents}, {spec.schema}, bool[] needs) -> "
        f"({', '.join(['Tensor'] * len(spec.graded))})"
    )
    op, op_backward = (getattr(getattr(torch.ops, NAMESPACE), spec.name + s).default for s in ("", "_backward"))
    kernel_backward, function_backward = _kernel_backward(spec), _backward_function(spec, op_backward)
    n, at, skipped = len(spec.tensors), spec.backend_at, len(spec.backward_tensors)
    call_backward = _called(function_backward, op_backward, kernel_backward, skipped, skipped - n + at)
    function = _forward_function(spec, op, _forward(op, spec.run, n), call_backward)
    fake = called_by_inductor(op, spec.fake)
    _implement(op, function, spec.run, fake)
    _implement(op_backward, function_backward, kernel_backward, _fake_backward(spec))
    _decompose(op, spec.decomposition, fake)
    return _called(_forward_function(spec, op, spec.run, call_backward), op, spec.run_alone or spec.run, n, at)


def define(
    name: str,
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: Callable[..., Any],
    mapped: Callable[..., Any],
) -> Any:
    """An op of one output without a backward; `autograd` stands behind the Autograd key, `mapped` is its vmap rule."""
    _library.define(f"{name}({schema}) -> Tensor")
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(op.name(), fake, lib=_library)
    _library.impl(name, autograd, "Autograd")
    torch.library.register_vmap(op.name(), mapped, lib=_library)
    return op


def _implement(op: Any, function: type, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = op.name().split("::")[1]
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(op.name(), fake, lib=_library)
    for key in ("Autograd", "FuncTorchBatched"):
        _library.impl(name, _through(function, op), key)


def _decompose(op: Any, decomposition: Callable[..., Any] | None, fake: Callable[..., Any]) -> None:
    """PyTorch operations for `ExportedProgram.run_decompositions` with a table of everything, as torch.onnx does.

    Fake tensors with unknown lengths would take them too, in place of the fake kernel, but for a second table.
    """
    if decomposition is not None:
        register_decomposition(op)(decomposition)
    register_decomposition(op, type="meta")(fake)
