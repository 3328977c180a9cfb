"""Compiling for a GPU that is not there: Triton's own JIT, with a stand-in where it asks the driver.

`kernel.warmup` specialises and compiles without launching, so signatures, alignment hints and cache keys are those of
a real launch, whatever the Triton release.  Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from benchmarks.compiled.gpus import AMD, FAMILIES, target

WHY_NOT = "kernels cannot be compiled in a process with TRITON_INTERPRET=1"


class Pretended:
    """What the JIT asks of a driver: a device number and a target."""

    def __init__(self, family: str, asking: bool) -> None:
        self.family = family
        # Compiled kernels are kept by device: one device per family, and one whose cache stays empty.
        self.device = 2 * [*FAMILIES, *AMD].index(family) + asking

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*target(self.family))


@contextmanager
def pretending(family: str, asking: bool = False) -> Iterator[None]:
    """Inside the block the JIT compiles for `family`; where it is only asked for keys, nothing it has counts."""
    from triton.runtime import driver

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError(WHY_NOT)
    driver.set_active(Pretended(family, asking))
    try:
        yield
    finally:
        with suppress(RuntimeError):  # without a GPU there is no driver to return to
            driver.reset_active()


class _Hook:
    """Triton's hook before a compilation; its home moved between releases."""

    def __init__(self) -> None:
        import triton

        knobs = getattr(triton, "knobs", None)
        runtime = getattr(knobs, "runtime", None)
        if hasattr(runtime, "jit_cache_hook"):
            self.owner, self.name = runtime, "jit_cache_hook"
        else:
            self.owner, self.name = triton.runtime.jit.JITFunction, "cache_hook"

    @contextmanager
    def set(self, function: Any) -> Iterator[None]:
        before = getattr(self.owner, self.name)
        setattr(self.owner, self.name, function)
        try:
            yield
        finally:
            setattr(self.owner, self.name, before)


class Variant(NamedTuple):
    """One binary: a kernel with everything its compilation depends on but the target."""

    name: str
    key: str  # Triton's own specialisation key, tile included
    launch: Any  # setformer_kernels.backends.triton.host.launch.Launch


def _warm(launch: Any) -> Any:
    from setformer_kernels.backends.triton.host.direct import options_of, products_of

    tile, grid = launch.tile, (launch.programs,)
    with products_of(tile):
        return launch.kernel.warmup(*launch.args, grid=grid, **launch.constants, **options_of(tile))


def kernel_name(kernel: Any) -> str:
    """Room, module and name of a kernel: where it is found in the backend."""
    return ".".join([*kernel.fn.__module__.split(".")[-2:], kernel.fn.__name__])


def variants(launches: Sequence[Any], family: str) -> list[Variant]:
    """The distinct binaries a list of launches would compile, in order of first use; nothing is compiled."""
    keys: list[str] = []

    def capture(*args: Any, **about: Any) -> bool:
        keys.append(str(about["key"]))
        return True  # "already there": the JIT compiles nothing

    found: dict[tuple[str, str], Variant] = {}
    with pretending(family, asking=True), _Hook().set(capture):
        for launch in launches:
            if family in AMD:  # whose compiler takes no bound of registers, see `options_of`
                launch = launch._replace(tile=launch.tile._replace(registers=0))
            _warm(launch)
            variant = Variant(kernel_name(launch.kernel), keys[-1], launch)
            found.setdefault((variant.name, variant.key), variant)
    return list(found.values())


class _Front(Exception):
    """Ends a compilation after the front end, with what that made."""


def front_end(variant: Variant, family: str) -> str:
    """The variant in Triton's own IR: a tenth of the time, and where releases differ in what they accept."""
    from triton import knobs

    def stop(module: Any, metadata: Any) -> None:
        raise _Front(str(module))

    def stages(backend: Any = None, stages: Any = None, *about: Any) -> tuple[str, str]:
        if stages is not None:
            stages["ttgir"] = stop
        return "front", "front"  # what caches know this pipeline by

    before = knobs.runtime.add_stages_inspection_hook
    knobs.runtime.add_stages_inspection_hook = stages
    try:
        with pretending(family):
            _warm(variant.launch)
    except _Front as done:
        return str(done)
    finally:
        knobs.runtime.add_stages_inspection_hook = before
    raise RuntimeError("the compiler did not pass its front end")


def compiled(variant: Variant, family: str) -> Any:
    """The variant compiled for a family (Triton's CompiledKernel, never loaded)."""
    with pretending(family):
        return _warm(variant.launch)


def compiled_here(variant: Variant) -> Any:
    """The variant compiled for the GPU at hand, into Triton's cache; nothing is launched."""
    return _warm(variant.launch)
