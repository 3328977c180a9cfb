"""What nvcc makes of the CUDA kernels for GPUs that are not there: `python -m benchmarks.compiled.cuda_resources`.

Writes benchmarks/results/cuda_resources.csv: registers, stack, spills and instructions of every kernel and
architecture.  A test compiles again and compares.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import entry_point

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks" / "results" / "cuda_resources.csv"
TOOLS = ("nvcc", "c++filt")
ARCHITECTURES = ("80", "90", "100", "120")
FUNCTION = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SYMBOLS, FUNCTIONS = 2, 2  # of ELF: a section's type, a symbol's
INSTRUCTION = 16  # bytes


class Row(NamedTuple):
    """One kernel on one architecture; bytes of a thread's stack and spills, of the functions too that it calls; its own
    instructions, and those of functions that stand apart from it."""

    kernel: str
    arch: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    instructions: int
    apart: int

    @property
    def key(self) -> tuple[str, int]:
        return self.kernel, self.arch


def available() -> bool:
    return all(shutil.which(tool) for tool in TOOLS)


def demangled(name: str) -> str:
    """The kernel and its template arguments, without namespaces and parameters."""
    full = subprocess.run(["c++filt", name], check=True, capture_output=True, text=True).stdout.strip()
    full = re.sub(r"\(anonymous namespace\)::|sfk::(\w+::)?", "", full).removeprefix("void ")
    return full[: full.rindex("(")]


def instructions(cubin: bytes) -> dict[str, tuple[int, int]]:
    """Kernel -> its instructions and those of functions beside it, from the table of symbols."""
    start, size, count = struct.unpack_from("<Q10xHH", cubin, 0x28)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, start + n * size) for n in range(count)]
    kernels: dict[int, str] = {}
    total: Counter[int] = Counter()
    own: dict[int, int] = {}
    for _, kind, _, _, at, length, names, *_ in sections:
        for entry in range(at, at + length, 24) if kind == SYMBOLS else ():
            name, info, _, section, _, bytes_of = struct.unpack_from("<IBBHQQ", cubin, entry)
            if info % 16 != FUNCTIONS or not section:
                continue
            text = sections[names][4] + name
            called = cubin[text : cubin.index(b"\0", text)].decode()
            total[section] += bytes_of // INSTRUCTION
            if not called.startswith("$"):
                kernels[section], own[section] = called, bytes_of // INSTRUCTION
    return {name: (2 * own[n] - total[n], total[n] - own[n]) for n, name in kernels.items()}


def compiled(source: Path, arch: str) -> list[Row]:
    """The rows of one file for one architecture."""
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    options = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", target, "-Xptxas", "-v"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.cubin")
        command = ["nvcc", *options, "-cubin", str(source), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        code = instructions(out.read_bytes())
    found: list[Row] = []
    for line in done.stderr.splitlines():
        if entry := FUNCTION.search(line):
            found.append(Row(demangled(entry[1]), int(arch), 0, 0, 0, 0, *code[entry[1]]))
        elif spilled := STACK.search(line):
            stack, *spills = (int(n) for n in spilled.groups())
            last = found[-1]
            found[-1] = last._replace(
                stack=max(last.stack, stack),
                spill_stores=last.spill_stores + spills[0],
                spill_loads=last.spill_loads + spills[1],
            )
        elif used := USED.search(line):
            found[-1] = found[-1]._replace(registers=int(used[1]))
    return found


def architectures() -> tuple[str, ...]:
    """Those of the variable that the build reads, else all that the package is built for."""
    return tuple(re.findall(r"\d+", os.environ.get("SETFORMER_KERNELS_CUDA_ARCHS", ""))) or ARCHITECTURES


def rows() -> list[Row]:
    """The rows of all files and `architectures`, as many at a time as there are processors."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        jobs = [pool.submit(compiled, source, arch) for source in sources for arch in architectures()]
        return sorted(row for job in jobs for row in job.result())


def committed() -> list[Row]:
    with TABLE.open() as file:
        return [Row(row["kernel"], *(int(row[name]) for name in Row._fields[1:])) for row in csv.DictReader(file)]


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled.cuda_resources", description=__doc__)
    parser.add_argument("--out", type=Path, default=TABLE, help="file to write (default: the committed table)")
    arguments = parser.parse_args(argv)
    if not available():
        raise entry_point.NotHereError(f"needs {' and '.join(TOOLS)} on PATH")
    found = rows()
    with arguments.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(found)
    for row in found:
        memory = f"{row.stack} stack, {row.spill_stores + row.spill_loads} spilled"
        code = f"{row.instructions} + {row.apart} instructions"
        print(f"{row.kernel:<60} sm_{row.arch:<4} {row.registers:>4} registers, {memory}, {code}")
    return 0


if __name__ == "__main__":
    entry_point.run("benchmarks.compiled.cuda_resources", main)
