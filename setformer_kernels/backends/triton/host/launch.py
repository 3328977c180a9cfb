"""The one door to every launch: facts of the device, how tokens are shared among programs, and a recorder.

The recorder takes launches instead of running them: so kernels are compiled ahead of time for a GPU that is not there,
with exactly the arguments and constants that the backend would launch.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton

from .tiles import INTERPRETED, Tile

if not INTERPRETED:
    from . import direct


class Device(NamedTuple):
    """What launches need to know of a device."""

    family: str  # a column of the tile table: "sm_80", "sm_90", "sm_100", "amd", "default" or "interpreter"
    multiprocessors: int
    precision: str  # of float32 products: "tf32x3" on NVIDIA's tensor cores, "ieee" elsewhere

    @property
    def in_parts(self) -> Device:
        """For factors in float32 beside tokens of 16 bits, which are not worth more; with tf32x3 much spills."""
        return self._replace(precision="bf16x3")


class Launch(NamedTuple):
    """One recorded launch."""

    kernel: Any
    programs: int
    args: tuple[Any, ...]
    constants: dict[str, Any]
    tile: Tile


# Few multiprocessors make the interpreter split lengths as a GPU does at sizes that an interpreter can run.
INTERPRETED_DEVICE = Device("interpreter", 4, "ieee")
_assumed: Device | None = None
_taken: list[Launch] | None = None


def device_of(t: torch.Tensor) -> Device:
    """The facts of the tensor's device, or the assumed ones while recording."""
    if _assumed is not None:
        return _assumed
    if t.device.type == "cpu":
        return INTERPRETED_DEVICE
    return _query(t.device.index)


@functools.cache
def _query(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:  # with wavefronts of 64 lanes, or of 32
        family = "amd" if getattr(properties, "warp_size", 64) == 64 else "default"
        return Device(family, properties.multi_processor_count, "ieee")
    # Only these three have the shared memory of a data-centre GPU; sm_86, sm_89 and sm_120 have 99 KiB.
    family = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100"}.get((properties.major, properties.minor), "default")
    return Device(family, properties.multi_processor_count, "tf32x3")


# What kernels count, under the names that their signatures use: never specialised on, as strides are not.
COUNTS = {
    *("B", "G", "H", "L", "M", "N", "S", "T"),
    *("blocks", "all_chunks", "chunks", "first_chunk", "first_head", "first_slot", "heads"),
    *("iteration", "iterations", "more", "slots", "splits", "splits_before"),
    *("step", "steps", "stretch", "stretches", "t", "threshold"),
}


def kernel(function: Callable[..., None]) -> Any:
    """A function that is launched, compiled for no particular length, stride or count, whatever its signature lists."""
    parameters = inspect.signature(function).parameters.values()
    runtime = [p.name for p in parameters if "constexpr" not in str(p.annotation)]
    return triton.jit(do_not_specialize=[n for n in runtime if n.startswith("stride_") or n in COUNTS])(function)


def launch(kernel: Any, programs: int, args: Sequence[Any], constants: dict[str, Any], tile: Tile) -> None:
    """Runs `programs` instances of a kernel, on the current stream of the device of its tensors."""
    if programs == 0:
        return
    if _taken is not None:
        _taken.append(Launch(kernel, programs, tuple(args), constants, tile))
        return
    start(kernel, programs, args, constants, tile)


def _interpret(kernel: Any, programs: int, args: Sequence[Any], constants: dict[str, Any], tile: Tile) -> None:
    kernel[(programs,)](*args, **constants)


# What a launch comes to; looked up at each, so that tools can put a stopwatch around it.
start: Callable[[Any, int, Sequence[Any], dict[str, Any], Tile], None] = _interpret if INTERPRETED else direct.launch


@contextmanager
def recorded(device: Device) -> Iterator[list[Launch]]:
    """Launches inside the block are collected and not run; tiles are those of `device`."""
    global _assumed, _taken
    before = _assumed, _taken
    _assumed, _taken = device, []
    try:
        yield _taken
    finally:
        _assumed, _taken = before


class Split(NamedTuple):
    """How the tokens of a head are shared among programs."""

    stretch: int  # tokens of one program
    programs: int  # of one head


BEGINNING = 4  # tiles that take as long as what every program does beside: load what all share, leave its sums


@functools.lru_cache(1024)
def split_tokens(length: int, tile: Tile, heads: int, multiprocessors: int) -> Split:
    """The split that takes least: programs run in waves, each as long as its tiles and its beginning."""
    tiles, slots = max(1, math.ceil(length / tile.rows)), max(1, tile.resident * multiprocessors)

    def time(count: int) -> int:
        return math.ceil(heads * count / slots) * (math.ceil(tiles / count) + BEGINNING)

    turns = range(1, 4 * math.ceil(heads / slots) + 6)  # as many programs as these hold: fewer would be longer
    counts = [1, *(min(tiles, n * slots // max(1, heads)) or 1 for n in turns)]
    stretch = math.ceil(tiles / min(counts, key=time)) * tile.rows
    return Split(stretch, max(1, math.ceil(length / stretch)))
