"""The short way to a launch: what Triton compiled for one serves every launch that it would read alike.

Triton reads each launch anew: the type, value and alignment of every argument, its options, its knobs.  A kernel of
this package depends on little of that (`kernel` in launch.py sees to it): on what is known at compile time, and on the
dtypes of its tensors and which are None.  Whatever else could matter sends a launch Triton's way: a pointer that is no
multiple of 16, a count beyond 31 bits, hooks that profilers set, knobs, a GPU of AMD, a launcher of another form.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel

from .tiles import Tile

# What a compiled kernel is started with before its own arguments; Triton 3.6 takes what follows the function unnamed.
LAUNCHER = (
    *("gridX", "gridY", "gridZ", "stream", "function"),
    *("kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook", "args"),
)
LAUNCHERS = (LAUNCHER, (*LAUNCHER[:5], LAUNCHER[-1]))
# A build of torch without CUDA has neither, and nothing to launch on.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)

# The arguments of a launch -> (all that its binary depends on, they as the launcher takes them), or None: Triton's way.
Read = Callable[[Sequence[Any]], "tuple[tuple[Any, ...], tuple[Any, ...]] | None"]


class Ready(NamedTuple):
    """A loaded binary, and what it is started with."""

    run: Callable[..., Any]
    function: Any
    metadata: Any
    constants: tuple[Any, ...]  # the launcher counts them, and reads none


class Known(NamedTuple):
    """What is known of a kernel, from its first launch on."""

    kernel: Any
    read: Read
    ready: dict[tuple[Any, ...], Ready]


_known: dict[int, Known] = {}  # by the identity of the kernel: Triton hashes one by its source, under a lock


def launch(kernel: Any, programs: int, args: Sequence[Any], constants: dict[str, Any], tile: Tile) -> None:
    """Runs `programs` instances of a kernel on the current stream of the current device."""
    known = _known.get(id(kernel))
    if known is None:
        known = _known[id(kernel)] = Known(kernel, _reader(kernel, args), {})
    read = None if _watched(kernel) else known.read(args)
    if read is None:
        _launch_by_triton(kernel, programs, args, constants, tile)
        return
    facts, given = read
    device = current_device()
    # Groups of constants are made once and kept, by `groups.Group` and by what is ready.
    values = [id(value) if isinstance(value, tuple) else value for value in constants.values()]
    key = (device, tile, facts, *constants, *values)
    ready = known.ready.get(key)
    if ready is None:
        compiled = _launch_by_triton(kernel, programs, args, constants, tile)
        if _takes_the_short_way(compiled):
            last = tuple(constants[name] for name in kernel.arg_names[len(args) :])
            known.ready[key] = Ready(compiled.run, compiled.function, compiled.packed_metadata, last)
        return
    ready.run(
        programs, 1, 1, current_stream(device), ready.function, ready.metadata, None, None, None, *given,
        *ready.constants,
    )  # fmt: skip


def _launch_by_triton(kernel: Any, programs: int, args: Sequence[Any], constants: dict[str, Any], tile: Tile) -> Any:
    with products_of(tile):
        return kernel[(programs,)](*args, **constants, **options_of(tile))


def options_of(tile: Tile) -> dict[str, Any]:
    """What Triton compiles a tile with."""
    # Products and sums are fused by default; Triton 3.9 warns where it is left out, 3.10 turns it off.
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    bounded = tile.registers and not torch.version.hip  # whose compiler has no such option
    return options | {"maxnreg": tile.registers} if bounded else options


NO_WGMMA = "DISABLE_MMA_V3"  # Triton's, and part of what its caches know a binary by; a launch has no such option
_one_at_a_time = threading.Lock()


@contextmanager
def products_of(tile: Tile) -> Iterator[None]:
    """Inside the block Triton compiles with the products that a tile asks for."""
    with _one_at_a_time:
        changed = not tile.wgmma and NO_WGMMA not in os.environ
        if changed:
            os.environ[NO_WGMMA] = "1"
        try:
            yield
        finally:
            if changed:
                del os.environ[NO_WGMMA]


def _watched(kernel: Any) -> bool:
    """Whether somebody wants to see launches, or to have kernels compiled otherwise than Triton's defaults say."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or kernel.pre_run_hooks
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or any(knobs.compilation.__dict__.values())
    )


def _takes_the_short_way(compiled: Any) -> bool:
    """Whether what Triton launched can be started without it; not so where a hook has kept it from compiling."""
    if torch.version.hip or not isinstance(compiled, CompiledKernel):
        return False
    return tuple(inspect.signature(compiled.run).parameters) in LAUNCHERS


def _reader(kernel: Any, args: Sequence[Any]) -> Read:
    """What reads the arguments of a kernel, written for the form that those of its first launch have."""
    try:
        names: list[str] = []
        pattern, kinds = _pattern(args, names), _kinds(kernel, args)
    except TypeError:
        return lambda args: None
    pointers = [name for name, kind in zip(names, kinds, strict=True) if kind is Tensor]
    counts = [name for name, kind in zip(names, kinds, strict=True) if kind is int]
    facts = [
        f"{name} if {name} is None else {name}.dtype" if kind is Tensor else f"{name}.__class__"
        for name, kind in zip(names, kinds, strict=True)
        if kind is not int
    ]
    lines = [
        f"{pattern} = args",
        f"facts = ({', '.join(facts)},)",
        *(f"{name} = {name} if {name} is None else {name}.data_ptr()" for name in pointers),
        f"unaligned = ({' | '.join([f'({name} or 0)' for name in pointers])}) & 15",
        f"wide = ({' | '.join(counts) or 0}) >> 31",  # of all bits: negative where a count is
        f"return None if unaligned or wide else (facts, {pattern})",
    ]
    namespace: dict[str, Any] = {}
    exec("def read(args):\n    " + "\n    ".join(lines), namespace)
    return namespace["read"]


def _pattern(args: Sequence[Any], names: list[str]) -> str:
    """The arguments as a tuple of variables, each tuple among them as one of its own; its variables into `names`."""
    parts = []
    for value in args:
        if isinstance(value, tuple):
            parts.append(_pattern(value, names))
        else:
            parts.append(f"a{len(names)}")
            names.append(parts[-1])
    return f"({', '.join(parts)},)"


def _kinds(kernel: Any, args: Sequence[Any]) -> list[type]:
    """Of each argument, tuples flattened: a tensor (or None in its place), an int or a float.

    TypeError where a kernel is specialised on more: on another kind of argument, or on the value of an int.
    """
    found: list[type] = []
    for value, parameter in zip(args, kernel.params, strict=False):
        members = _flat(value)
        found += [_kind(member) for member in members]
        if int in found[-len(members) :] and not parameter.do_not_specialize:
            raise TypeError(f"{parameter.name} is specialised on")
    return found


def _flat(value: Any) -> list[Any]:
    return [member for part in value for member in _flat(part)] if isinstance(value, tuple) else [value]


def _kind(value: Any) -> type:
    if value is None or isinstance(value, Tensor):
        return Tensor
    if type(value) in (int, float):
        return type(value)
    raise TypeError(f"{type(value).__name__} is of no known kind")
