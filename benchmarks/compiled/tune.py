"""`python -m benchmarks.compiled.tune`: what other tiles would do to the kernels of one kind, compiled without a GPU.

    python -m benchmarks.compiled.tune attention --backward --kind keys_backward --tile 32,64,8,1 --tile 32,32,8,1

compiles the launches once per tile (rows, depth, warps, stages) and prints registers, spills, shared memory and the
model's predicted time of each kernel whose code changes.  Nothing is written: numbers go into `tiles.py` by hand, each
with its reason.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.common import entry_point
from benchmarks.compiled import aot, model, sass, workloads
from benchmarks.compiled.gpus import FAMILIES, GPUS
from benchmarks.compiled.workloads import Call
from setformer_kernels.backends.triton.host import tiles


def _tiles(call: Call, kind: str, size: str, gpu: str, texts: list[str]) -> list[str]:
    """One markdown line per tile and kernel; the first line of a kernel is the shipped tile's."""
    family = GPUS[gpu].family
    key = (kind, size, "half" if call.dtype.itemsize == 2 else "single")
    shipped = tiles.shipped(family, key)
    lines, seen = [], set()
    cuts = [zip(("rows", "depth", "warps", "stages"), map(int, text.split(",")), strict=True) for text in texts]
    for tile in [shipped, *(shipped._replace(**dict(cut)) for cut in cuts)]:
        tiles.OVERRIDES[family][key] = tile
        for launch in workloads.launches(call, family, GPUS[gpu].multiprocessors):
            (variant,) = aot.variants([launch], family)
            if (variant.name, variant.key) in seen:
                continue
            seen.add((variant.name, variant.key))
            lines.append(_line(variant, tile, gpu))
    tiles.OVERRIDES[family][key] = shipped
    return sorted(lines)


def _line(variant: aot.Variant, tile: object, gpu: str) -> str:
    family = GPUS[gpu].family
    head = f"| {variant.name} | {','.join(map(str, tile))} "  # type: ignore[call-overload]
    try:
        kernel = aot.compiled(variant, family)
    except Exception as error:  # a tile the compiler cannot do is an answer too
        return f"{head}| {type(error).__name__} | | | | |"
    used = sass.usage(kernel.asm["cubin"])
    over = " (too much)" if kernel.metadata.shared > FAMILIES[family].shared_per_block else ""
    model.remember(family, variant)
    found = model.predict(variant.launch, variant.name, variant.key, GPUS[gpu])
    return (
        f"{head}| {used.registers} | {used.stack + used.local} | {kernel.metadata.shared}{over} | "
        f"{1e6 * found.seconds:.1f} | {found.bound} |"
    )


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled.tune", description="Other tiles, compiled and predicted."
    )
    parser.add_argument("op", choices=sorted(workloads.RUN))
    parser.add_argument("--tile", action="append", default=[], help="rows,depth,warps,stages (repeatable)")
    parser.add_argument("--kind", required=True, help="a kind of tiles.DEFAULT")
    parser.add_argument("--size", default="small", choices=("small", "medium", "large"))
    parser.add_argument("--gpu", default="H200", choices=sorted(GPUS))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--rich", action="store_true")
    for name, default in (("T", 3), ("L", 16384), ("D", 64), ("M", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args(argv)
    if a.kind not in (kinds := sorted({kind for kind, _, _ in tiles.DEFAULT} | {*tiles.LIKE})):
        parser.error(f"--kind must be one of {', '.join(kinds)}, got {a.kind!r}")
    call = Call(a.op, a.backward, a.T, getattr(torch, a.dtype), L=a.L, D=a.D, E=a.D, M=a.M, rich=a.rich)
    print("| kernel | tile | registers | spilled | shared | µs | bound |\n|---|---|---|---|---|---|---|")
    print("\n".join(_tiles(call, a.kind, a.size, a.gpu, a.tile)))
    return 0


if __name__ == "__main__":
    entry_point.run("benchmarks.compiled.tune", main)
