"""Instructions of the CUDA forward: `python -m benchmarks.compiled.cuda_instructions`.

Compiles csrc/cuda/attention_narrow.cu for sm_90 with lines, and counts what the loops over tokens issue for every 16
keys and 16 queries at T = 3, M = D = E = 64 in bfloat16, by the function that the kernel calls.  Writes
benchmarks/results/cuda_instructions.csv; needs nvcc and triton, whose disassembler it uses, and no GPU.

`seconds` is what the model makes of the loops and of what is around them: one warp alone needs `sass.loop_cycles` for a
turn, the schedulers issue one instruction a clock each, and every barrier of a cluster costs BARRIER_S.
"""

from __future__ import annotations

import argparse
import csv
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import entry_point
from benchmarks.compiled import sass
from benchmarks.compiled.gpus import SCHEDULERS, Gpu

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "csrc" / "cuda" / "attention_narrow.cu"
TABLE = ROOT / "benchmarks" / "results" / "cuda_instructions.csv"
# Kernels by what stands in their mangled names.
KERNEL, BACKWARD = "attention_narrow_kernel.*BF16.*ClusterPeers", "attention_backward_kernel.*BF16"
FUNCTION = re.compile(r"^\s*(?:SFK_\w+|constexpr) (?:.*?[ &*])?(\w+(?:::\w+)?|\w+<.*>::\w+)\(")
T, E, WARPS, VALUE_ROWS, TILE = 3, 64, 16, 128, 16
# From a launch to its first instruction; a barrier of a cluster and of a grid: assumptions.
LAUNCH_S, BARRIER_S, GRID_BARRIER_S = 1.5e-6, 1e-6, 2e-6

# Called by the kernel, the loop as it is written -> how often it turns for 16 keys and 16 queries, all warps together.
TURNS = {
    ("form_exponentials", "for (int row"): 1,
    ("solve_narrow", "for (int row"): T,
    ("form_narrow_plan", "for (int row"): 1,
    ("pool_values", "for (int first"): WARPS * TILE / VALUE_ROWS,
    ("pool_values", "for (int i"): WARPS * TILE / VALUE_ROWS,  # two rows a turn, which is what a thread has
    ("pool_values", "for (int k = task"): 2 * E / 32,  # pieces of 32 references and 32 columns
    ("answer_queries", "for (int row"): 1,
    ("answer_queries", "for (int e"): E / 32,
}


ITERATION, PROBLEM = "once an iteration", "once a problem"


class Line(NamedTuple):
    """An instruction's address and the lines it comes from, the innermost function first."""

    address: int
    text: str
    frames: tuple[tuple[str, int], ...]


class Row(NamedTuple):
    """A loop: its own instructions, without those of loops inside, and its turns (0: it is none, see `_around`)."""

    phase: str
    loop: str
    instructions: int
    turns: float
    cycles: int  # of one warp alone for one turn, without the loops inside

    @property
    def issued(self) -> float:
        return self.instructions * self.turns


class Work(NamedTuple):
    """What a block has to do: times 16 keys and 16 queries, by so many warps; blocks that share a processor; turns that
    the device takes with all of them; problems that it solves one after another; whether its blocks meet as a grid."""

    tiles: float
    warps: int
    blocks: int
    waves: int
    cluster: int
    iterations: int
    problems: int
    in_grid: bool = False


def available() -> bool:
    return shutil.which("nvcc") is not None


@functools.cache
def compiled() -> bytes:
    """The kernel's machine code for sm_90."""
    return _compiled(SOURCE)


@functools.cache
def backward(plain: bool) -> bytes:
    """The same of the backward's kernel for M = 64 in bfloat16 alone; plain: without positions and dropout."""
    kernel = f"attention_backward_kernel<BF16, 64, {str(plain).lower()}>"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "backward.cu")
        source.write_text(
            f'#include "attention_backward.cuh"\nnamespace sfk {{ void* f() {{ return (void*)&{kernel}; }} }}\n'
        )
        return _compiled(source)


def _compiled(source: Path) -> bytes:
    options = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-gencode=arch=compute_90,code=sm_90", "-lineinfo"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "kernel.cubin")
        command = ["nvcc", *options, f"-I{SOURCE.parent}", "-cubin", str(source), "-o", str(out)]
        subprocess.run(command, check=True, timeout=600)
        return out.read_bytes()


def functions(code: Iterable[Line]) -> set[str]:
    """The functions of csrc that instructions come from, those too that are inlined into others.

    One counts where the line that it is inlined at names it: the compiler gives lines of a lambda to the file of the
    function that calls it.
    """
    found = set()
    for each in code:
        for frame, site in zip(each.frames, (*each.frames[1:], None), strict=True):
            name = _function(Path(frame[0]).name, frame[1])
            if site is None or _names(Path(site[0]).name, site[1], name):
                found.add(name)
    return found


@functools.cache
def _names(file: str, line: int, function: str) -> bool:
    """Whether a line of csrc, or one that its statement may have begun or gone on with, names a function."""
    text = "\n".join(_source(file)[max(0, line - 3) : line + 2])
    return re.search(rf"\b{re.escape(function.split('::')[-1])}\b", text) is not None


@functools.cache
def _function(name: str, line: int) -> str:
    for text in reversed(_source(name)[:line]):
        if found := FUNCTION.search(text):
            return found[1]
    return ""


def product_loops(code: Sequence[Line], labels: dict[str, int]) -> list[list[Line]]:
    """The innermost loops that go over the depth of products of tensor cores."""
    spans = [(low, line) for line in code if (low := _target(line, labels)) is not None and low < line.address]
    found = []
    for low, end in spans:
        own = [line for line in code if low <= line.address <= end.address]
        inner = any((a, b) != (low, end) and low <= a and b.address <= end.address for a, b in spans)
        written = _written(end.frames[0]).startswith("for (int k")
        if written and not inner and any(_opcode(line) in sass.TENSOR for line in own):
            found.append(own)
    return found


def _opcode(line: Line) -> str:
    return re.sub(r"^@!?\w+\s+", "", line.text).split()[0].split(".")[0]


def ordinary_loads(loop: Sequence[Line]) -> list[str]:
    """What a loop reads from shared memory other than by matrices."""
    return [line.text for line in loop if _opcode(line) in ("LD", "LDS")]


def lines(cubin: bytes, kernel: str = KERNEL) -> tuple[list[Line], dict[str, int]]:
    """The kernel's instructions, and where its labels are."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [sass._tool("nvdisasm"), "-gi", "-c", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    found: list[Line] = []
    labels: dict[str, int] = {}
    frames: list[tuple[str, int]] = []
    waiting: list[str] = []
    here = fresh = False
    for line in text.splitlines():
        if line.startswith(".text"):
            here, frames = re.search(kernel, line) is not None, []
        elif match := re.search(r'//## File "([^"]*)", line (\d+)', line):
            frames = [(match[1], int(match[2]))] if fresh else [*frames, (match[1], int(match[2]))]
            fresh = False
        elif here and (match := re.match(r"(\.L_x_\d+):", line.strip())):
            waiting.append(match[1])
        elif here and (match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line)):
            address = int(match[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting, fresh = [], True
            found.append(Line(address, match[2].strip(), tuple(frames)))
    return found, labels


def machine_code(cubin: bytes, length: int) -> dict[int, sass.Instruction]:
    """The kernel's instructions by address: of all functions in the file, the one that is so long."""
    functions: list[list[sass.Instruction]] = []
    for i in sass.listing(cubin):
        if not functions or i.address <= functions[-1][-1].address:
            functions.append([])
        functions[-1].append(i)
    return {i.address: i for i in next(f for f in functions if len(f) == length)}


def _written(frame: tuple[str, int]) -> str:
    return _source(Path(frame[0]).name)[frame[1] - 1].strip()


@functools.cache
def _source(name: str) -> list[str]:
    for path in (ROOT / "csrc" / "cuda" / name, ROOT / "csrc" / name):
        if path.exists():
            return path.read_text("utf-8").splitlines()
    return [""] * 10000


def rows(cubin: bytes | None = None) -> list[Row]:
    """The loops of TURNS; of two that are written alike the longer, as only one of them runs."""
    cubin = cubin or compiled()
    code, labels = lines(cubin)
    instructions = machine_code(cubin, len(code))
    spans = [(low, line) for line in code if (low := _target(line, labels)) is not None and low < line.address]
    found: dict[tuple[str, str], Row] = {}
    for low, end in spans:
        key = _loop(low, end, code)
        if key is None or (key == ("pool_values", "for (int i") and not _inside(low, end, spans)):
            continue
        inner = [(a, b.address) for a, b in spans if (a, b) != (low, end) and low <= a and b.address <= end.address]
        own = [
            instructions[line.address]
            for line in code
            if low <= line.address <= end.address and not any(a <= line.address <= b for a, b in inner)
        ]
        row = Row(*key, sass.count(own)["all"], TURNS[key], sass.loop_cycles(own))
        if key not in found or found[key].instructions < row.instructions:
            found[key] = row
    return [*(found[key] for key in TURNS), *_around(code, instructions, spans)]


def _around(
    code: Sequence[Line], instructions: dict[int, sass.Instruction], spans: Sequence[tuple[int, Line]]
) -> Iterator[Row]:
    """What is around the loops, each once: of an iteration, and of a problem."""
    end = next(line.address for line in code if line.text == "EXIT")
    inside = [(low, last.address) for low, last in spans if _loop(low, last, code)]
    rest = [line for line in code if line.address <= end and not any(a <= line.address <= b for a, b in inside)]
    for name, wanted in ((ITERATION, True), (PROBLEM, False)):
        own = [instructions[line.address] for line in rest if (_called(line) == "solve_narrow") == wanted]
        yield Row("around the loops", name, sass.count(own)["all"], 0, sass.loop_cycles(own))


def _called(line: Line) -> str:
    """The function that the kernel's own line calls."""
    found = re.search(r"(\w+)\(", _written(line.frames[-1])) if line.frames else None
    return found[1] if found else ""


def _loop(low: int, end: Line, code: Sequence[Line]) -> tuple[str, str] | None:
    """Which of TURNS a loop is, by the line of its branch or else those of what is before it."""
    called = _called(end)
    before = [line for line in code if low <= line.address <= end.address]
    for line in [end] if _written(end.frames[0]).startswith("for (") else reversed(before):
        for key in TURNS:
            if key[0] == called and _written(line.frames[0]).startswith(key[1]):
                return key
    return None


def _target(line: Line, labels: dict[str, int]) -> int | None:
    """Where a branch goes that may fall through: out-of-line code comes back by branches that do not."""
    branch = re.search(r"^@.*BRA.*(\.L_x_\d+)", line.text)
    return labels.get(branch[1]) if branch else None


def _inside(low: int, end: Line, spans: Sequence[tuple[int, Line]]) -> bool:
    """Whether a loop is part of the one over the values; there is one more before it, for the first values."""
    return any(
        a < low and end.address < b.address and _written(b.frames[0]).startswith("for (int first") for a, b in spans
    )


def seconds(found: Sequence[Row], gpu: Gpu, work: Work) -> float:
    """A launch, from what a processor has to issue and what a warp alone has to wait for."""
    issue = alone = 0.0
    for row in found:
        if row.turns:
            turns = row.turns * (work.iterations / T if row.phase == "solve_narrow" else 1) * work.tiles / work.warps
        else:
            turns = work.problems * (work.iterations if row.loop == ITERATION else 1)
        issue += row.instructions * turns * work.warps * work.blocks / SCHEDULERS
        alone += row.cycles * turns
    barrier = GRID_BARRIER_S if work.in_grid else BARRIER_S if work.cluster > 1 else 0.0
    barriers = (work.iterations + 2) * barrier  # one an iteration, two for z
    return LAUNCH_S + work.waves * (barriers + max(issue, alone) / gpu.clock)


def total(found: Sequence[Row]) -> float:
    return sum(row.issued for row in found)


def committed() -> list[Row]:
    with TABLE.open() as file:
        return list(_read(csv.DictReader(file)))


def _read(table: Iterator[dict[str, str]]) -> Iterator[Row]:
    for row in table:
        yield Row(row["phase"], row["loop"], int(row["instructions"]), float(row["turns"]), int(row["cycles"]))


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled.cuda_instructions", description=__doc__)
    parser.add_argument("--out", type=Path, default=TABLE, help="file to write (default: the committed table)")
    arguments = parser.parse_args(argv)
    if not available():
        raise entry_point.NotHereError("needs nvcc on PATH")
    found = rows()
    with arguments.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(found)
    for row in found:
        print(f"{row.phase:<20} {row.loop:<20} {row.instructions:>4} x {row.turns:g} = {row.issued:.0f}")
    print(f"{total(found):.0f} instructions of a warp for 16 keys and 16 queries, T = {T}")
    return 0


if __name__ == "__main__":
    entry_point.run("benchmarks.compiled.cuda_instructions", main)
