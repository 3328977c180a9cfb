"""What nvcc makes of the CUDA kernels for GPUs that are not there: `python -m benchmarks.cuda_resources`.

Writes benchmarks/results/cuda_resources.csv: registers, stack, spills and static shared memory of every kernel and
architecture.  A test compiles again and compares.
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks" / "results" / "cuda_resources.csv"
ARCHITECTURES = ("80", "90", "100", "120")
FUNCTION = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")


class Row(NamedTuple):
    """One kernel on one architecture; bytes of a thread's stack and spills."""

    kernel: str
    arch: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def key(self) -> tuple[str, int]:
        return self.kernel, self.arch


def available() -> bool:
    return shutil.which("nvcc") is not None and shutil.which("c++filt") is not None


def demangled(name: str) -> str:
    """The kernel and its template arguments, without namespaces and parameters."""
    full = subprocess.run(["c++filt", name], check=True, capture_output=True, text=True).stdout.strip()
    full = re.sub(r"\(anonymous namespace\)::|sfk::(\w+::)?", "", full).removeprefix("void ")
    return full[: full.rindex("(")]


def compiled(source: Path) -> Iterator[Row]:
    """The rows of one file, every architecture in one run of nvcc."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "nvcc",
            "-std=c++17",
            "-O3",
            "--expt-relaxed-constexpr",
            *targets,
            "-Xptxas",
            "-v",
            "-c",
            str(source),
        ]
        done = subprocess.run([*command, "-o", str(Path(folder, "out.o"))], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    name, arch, stack = "", 0, (0, 0, 0)
    for line in done.stderr.splitlines():
        if found := FUNCTION.search(line):
            name, arch = demangled(found[1]), int(found[2])
        elif found := STACK.search(line):
            stack = (int(found[1]), int(found[2]), int(found[3]))
        elif (found := USED.search(line)) and name:
            yield Row(name, arch, int(found[1]), *stack)


def rows() -> list[Row]:
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    return sorted(row for source in sources for row in compiled(source))


def committed() -> list[Row]:
    with TABLE.open() as file:
        return [Row(row["kernel"], *(int(row[name]) for name in Row._fields[1:])) for row in csv.DictReader(file)]


def main() -> None:
    found = rows()
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(found)
    for row in found:
        print(f"{row.kernel:<60} sm_{row.arch:<4} {row.registers:>4} registers, {row.stack} stack, "
              f"{row.spill_stores + row.spill_loads} spilled")  # fmt: skip


if __name__ == "__main__":
    main()
