"""`python -m benchmarks.compiled.resources`: every Triton kernel compiled for GPUs that are not there, what it takes.

Needs triton and no GPU.  For every call of `tables.table_calls` the backend's launches are recorded, each distinct
binary is compiled for sm_80, sm_90 and sm_100, and registers, spills, shared memory, tensor-core use and the
instructions of the loop over tokens are read from the machine code; for gfx90a and gfx942 (AMD) the same, but for the
loop, from the assembly.  Exit status 1 where a kernel spills, exceeds the device's shared memory, computes a product
without tensor cores, or reads a register that nothing has written (see `uniform`).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import multiprocessing
import os
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common import entry_point
from benchmarks.common.hardware import ROOT
from benchmarks.compiled import aot, gcn, sass, tables, uniform, workloads
from benchmarks.compiled.gpus import AMD, FAMILIES, resident_blocks, shared_limit
from benchmarks.compiled.workloads import Call

TABLE = ROOT / "benchmarks" / "results" / "triton_resources.csv"
BACKEND = ROOT / "setformer_kernels" / "backends" / "triton"
ORDER = (*FAMILIES, *AMD)
TENSOR = (*sass.TENSOR, gcn.PRODUCT)
MEASURED = ("registers", "spill_bytes", "shared_bytes", "instructions", "tensor_instructions")
REGENERATE = "regenerate it with `python -m benchmarks.compiled.resources`"


@dataclass(frozen=True)
class Row:
    """One binary.  `loop_*`: one iteration of the loop over tokens on its hot path, per warp, inner loops once.

    On AMD GPUs the loop is not read: 0.
    """

    family: str
    kernel: str
    dtype: str
    D: int
    E: int
    M: int
    calls: str  # what launches it
    rows: int  # tokens per iteration
    depth: int
    warps: int
    stages: int
    registers: int  # AMD: vector registers
    scalar_registers: int  # AMD alone
    spill_bytes: int  # per thread, stack and local memory
    shared_bytes: int
    shared_limit: int
    blocks_per_sm: int
    products: int  # written in the kernel
    fma_products: int  # of the compiled products, those without tensor cores that should have them
    tensor_instructions: str  # "HGMMA:12"
    instructions: int
    loop_instructions: int
    loop_tensor: int
    loop_ex2: int
    loop_mufu: int
    loop_fp32: int
    loop_ffma: int
    loop_ldg: int
    loop_ldg_128: int
    loop_shared: int  # loads and stores of shared memory
    loop_shfl: int
    loop_barriers: int
    loop_cycles: int  # one warp alone, in the steady state
    key: str  # of the binary: specialisation and tile, hashed
    sources: str
    triton: str

    def faults(self, known_spill: int = 0) -> list[str]:
        """What a kernel must not do; spill at all, or more than the committed table already says."""
        name = f"{self.kernel} ({self.calls.split(';')[0]}, {self.dtype}, D {self.D}, M {self.M}, {self.family})"
        found = []
        if self.spill_bytes > known_spill:
            found.append(f"{name}: {self.spill_bytes} bytes of registers spilled per thread")
        if self.shared_bytes > self.shared_limit:
            found.append(f"{name}: {self.shared_bytes} bytes of shared memory, {self.shared_limit} allowed")
        if self.fma_products or (self.products and not self.tensor_instructions):
            found.append(f"{name}: {self.fma_products} products without tensor cores")
        return found


class Job(NamedTuple):
    """One binary to compile and the calls that launch it."""

    variant: aot.Variant
    family: str
    calls: tuple[Call, ...]


def jobs(calls: Iterable[Call], family: str) -> list[Job]:
    """The distinct binaries of some calls."""
    by_key: dict[tuple[str, str], tuple[aot.Variant, dict[Call, None]]] = {}
    for call in calls:
        for variant in aot.variants(workloads.launches(call, family), family):
            by_key.setdefault((variant.name, variant.key), (variant, {}))[1][call] = None
    return [Job(variant, family, tuple(users)) for variant, users in by_key.values()]


def _dots(ttir: str, ttgir: str) -> tuple[int, int]:
    """Products in the source, and compiled ones left to FMAs although not asked to be IEEE float32."""
    lines = [line for line in ttgir.splitlines() if re.search(r"\btt\.dot\b", line)]
    exact = re.compile(r"tensor<[\dx]+xf32.*tensor<[\dx]+xf32")
    left = [line for line in lines if "#blocked" in line.split("->")[-1]]
    asked = [line for line in left if exact.search(line) and "tf32" not in line]
    return len(re.findall(r"\btt\.dot\b", ttir)), len(left) - len(asked)


class Failure(NamedTuple):
    """A binary that did not come out."""

    what: str
    error: str

    def faults(self, known_spill: int = 0) -> list[str]:
        """As of a row."""
        return [f"{self.what} does not compile: {self.error}"]


def compile_job(job: Job, sources: str = "") -> Row | Failure:
    """One row, or why there is none."""
    try:
        return compile_row(job, sources)
    except Exception as error:  # the compiler's own errors have no common base
        call = job.calls[0]
        what = f"{job.variant.name} ({call}, {call.dtype}, D {call.D}, M {call.M}, {job.family})"
        return Failure(what, f"{type(error).__name__}: {str(error)[-1500:]}")


def _names(calls: Sequence[Call]) -> str:
    return "; ".join(dict.fromkeys(str(call) for call in calls))


class Code(NamedTuple):
    """What a binary's code says of it."""

    registers: int
    scalar_registers: int
    spill_bytes: int
    inside: Counter[str]  # the loop over tokens
    everywhere: Counter[str]
    cycles: int


def _machine_code(asm: Mapping[str, Any], family: str) -> Code:
    if family in AMD:
        text = asm["amdgcn"]
        registers, scalar, scratch = gcn.usage(text)
        return Code(registers, scalar, scratch, Counter(), gcn.count(text), 0)
    used, code = sass.usage(asm["cubin"]), sass.listing(asm["cubin"])
    body = sass.main_loop(code)
    counts = sass.count(body), sass.count(code)
    return Code(used.registers, 0, used.stack + used.local, *counts, sass.loop_cycles(body))


def compile_row(job: Job, sources: str = "") -> Row:
    """Compile one binary and read its machine code."""
    import triton

    variant, family, calls = job
    kernel = aot.compiled(variant, family)
    tile, call, code = variant.launch.tile, calls[0], _machine_code(kernel.asm, family)
    if code.everywhere["HGMMA"] and (lost := uniform.of(kernel.asm["cubin"])):
        raise RuntimeError(f"miscompiled: {lost[0]}, which nothing has written")
    inside, everywhere = code.inside, code.everywhere
    products, fma = _dots(kernel.asm["ttir"], kernel.asm["ttgir"])
    loop = {name: inside[name] for name in ("tensor", "ex2", "mufu", "fp32", "ffma", "shfl")}
    return Row(
        family=family,
        kernel=variant.name,
        dtype=str(call.dtype).removeprefix("torch."),
        D=call.D,
        E=call.E,
        M=call.M,
        calls=_names(calls),
        rows=tile.rows,
        depth=tile.depth,
        warps=tile.warps,
        stages=tile.stages,
        registers=code.registers,
        scalar_registers=code.scalar_registers,
        spill_bytes=code.spill_bytes,
        shared_bytes=kernel.metadata.shared,
        shared_limit=shared_limit(family),
        blocks_per_sm=resident_blocks(family, code.registers, kernel.metadata.shared, tile.warps),
        products=products,
        fma_products=fma,
        tensor_instructions=" ".join(f"{name}:{everywhere[name]}" for name in TENSOR if everywhere[name]),
        instructions=everywhere["all"],
        loop_instructions=inside["all"],
        **{f"loop_{name}": number for name, number in loop.items()},
        loop_ldg=inside["LDG"] + inside["LDGSTS"],
        loop_ldg_128=inside["LDG.128"] + inside["LDGSTS.128"],
        loop_shared=sum(inside[name] for name in ("LDS", "STS", "LDSM", "STSM")),
        loop_barriers=inside["barrier"],
        loop_cycles=code.cycles,
        key=hashlib.sha256(variant.key.encode()).hexdigest()[:12],
        sources=sources,
        triton=triton.__version__,
    )


def build(todo: Sequence[Job], workers: int, sources: str = "") -> Iterator[Row | Failure]:
    """Compile in parallel; children inherit what was recorded."""
    if workers == 1:
        yield from (compile_job(job, sources) for job in todo)
        return
    global _todo
    _todo = todo
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(partial(_compile_nth, sources=sources), range(len(todo)))


_todo: Sequence[Job] = ()  # what forked workers compile: kernels cannot be pickled


def _compile_nth(index: int, sources: str) -> Row | Failure:
    return compile_job(_todo[index], sources)


def sources_hash() -> str:
    """Hash of the code that decides what is compiled: the backend and the calls, without comments and docstrings."""
    digest = hashlib.sha256()
    chooses = ("face.py", "direct.py")  # what and whether is compiled, not how
    kernels = (path for path in sorted(BACKEND.rglob("*.py")) if path.name not in chooses)
    for path in [*kernels, Path(workloads.__file__), Path(tables.__file__)]:
        digest.update("".join(_code(path.read_text())).encode())
    return digest.hexdigest()[:12]


def _code(text: str) -> Iterator[str]:
    """The tokens of a module but comments, line ends and strings that are statements."""
    quiet = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENCODING)
    starts = True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in quiet and not (starts and token.type == tokenize.STRING):
            yield token.string
        if token.type not in (tokenize.NL, tokenize.COMMENT):
            starts = token.type in quiet


def write(rows: Sequence[Row], path: Path = TABLE) -> None:
    """The committed table."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read(path: Path = TABLE) -> list[Row]:
    """The committed table as rows."""
    kinds = {field.name: field.type for field in fields(Row)}
    with path.open(newline="") as file:
        records = list(csv.DictReader(file))
    if records and set(records[0]) != set(kinds):
        raise ValueError(f"{path} has other columns; {REGENERATE}")
    return [
        Row(**{n: int(record[n]) if kind == "int" else record[n] for n, kind in kinds.items()}) for record in records
    ]


def stale(rows: Sequence[Row], committed: Sequence[Row]) -> list[str]:
    """Why the committed table does not describe this code: other sources, or binaries that came out otherwise."""
    found = []
    if {row.sources for row in committed} != {sources_hash()}:
        found.append("the kernels have changed since the table was written")
    known = {(row.family, row.kernel, row.key, row.triton): row for row in committed}
    for row in rows:
        before = known.get((row.family, row.kernel, row.key, row.triton))
        changed = [name for name in MEASURED if before and getattr(row, name) != getattr(before, name)]
        found += [f"{row.family} {row.kernel} {row.key}: other {', '.join(changed)}"] if changed else []
    return [f"{reason}; {REGENERATE}" for reason in found]


Kind = tuple[str, str, str, int, int]


def kind(row: Row) -> Kind:
    """What the spills of two compilers can be compared by."""
    return row.family, row.kernel, row.dtype, row.D, row.M


def known_spills(committed: Iterable[Row]) -> dict[Kind, int]:
    """The most bytes that the committed table has for each kind of kernel: a ratchet, not a licence."""
    found: dict[Kind, int] = {}
    for row in committed:
        found[kind(row)] = max(found.get(kind(row), 0), row.spill_bytes)
    return found


def markdown(rows: Sequence[Row]) -> str:
    """A summary by kernel and family: the worst over all sizes."""
    head = "| kernel | GPU | binaries | registers | spills | shared, KiB (limit) | tensor cores | blocks per SM |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.family), []).append(row)
    for (kernel, family), found in groups.items():
        kinds = sorted({part.split(":")[0] for row in found for part in row.tensor_instructions.split()})
        products = max(row.products for row in found)
        lines.append(
            f"| `{kernel}` | {family} | {len(found)} | {_range(row.registers for row in found)} | "
            f"{max(row.spill_bytes for row in found)} | {max(row.shared_bytes for row in found) / 1024:.1f} "
            f"({found[0].shared_limit // 1024}) | {', '.join(kinds) if kinds else '–' if products else 'no product'} | "
            f"{_range(row.blocks_per_sm for row in found)} |"
        )
    return "\n".join(lines)


def _order(row: Row) -> tuple[str | int, ...]:
    return row.kernel, ORDER.index(row.family), row.dtype, row.D, row.M, row.calls, row.key


def _brief(found: Row | Failure) -> str:
    if isinstance(found, Failure):
        return f"{found.what} does not compile"
    return (
        f"{found.family} {found.kernel} {found.dtype} D{found.D} M{found.M} {found.calls[:40]}: {found.registers} "
        f"registers, {found.spill_bytes} spilled, {found.shared_bytes} shared, {found.tensor_instructions}"
    )


def _range(numbers: Iterable[int]) -> str:
    found = list(numbers)
    low, high = min(found), max(found)
    return str(low) if low == high else f"{low}–{high}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled.resources", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the few calls that the tests compile; writes nothing")
    parser.add_argument("--family", choices=ORDER, action="append", help="only this one (repeatable)")
    parser.add_argument("--op", choices=sorted(workloads.RUN), action="append", help="only this one (repeatable)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="only this one")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that compile")
    parser.add_argument("--out", type=Path, help="file to write (default: the committed table, for a full run)")
    parser.add_argument("--table", action="store_true", help="print the committed table and compile nothing")
    return parser


def _wanted(arguments: argparse.Namespace, family: str) -> list[Call]:
    calls = tables.few_calls(family) if arguments.quick else tables.table_calls(family)
    calls = [call for call in calls if not arguments.op or call.op in arguments.op]
    return [call for call in calls if not arguments.dtype or str(call.dtype) == f"torch.{arguments.dtype}"]


def main(argv: list[str] | None = None) -> int:
    """Entry point; 1 where a kernel has a fault."""
    arguments = _parser().parse_args(argv)
    if arguments.table:
        print(markdown(read()))
        return 0
    torch.set_num_threads(1)
    families = arguments.family or ORDER
    todo = [job for family in families for job in jobs(_wanted(arguments, family), family)]
    done = []
    for found in build(todo, arguments.workers, sources_hash()):
        done.append(found)
        print(f"{len(done)}/{len(todo)} {_brief(found)}", flush=True)
    rows = sorted((found for found in done if isinstance(found, Row)), key=_order)
    partial_run = arguments.quick or arguments.family or arguments.op or arguments.dtype
    path = arguments.out or (None if partial_run else TABLE)
    if path:
        write(rows, path)
        print(f"{path}: {len(rows)} binaries")
    print(markdown(rows))
    known = known_spills(read()) if partial_run and TABLE.exists() else {}
    faults = [f for found in done for f in found.faults(known.get(kind(found), 0) if isinstance(found, Row) else 0)]
    print("\n".join(faults) or "no faults", file=sys.stderr if faults else sys.stdout)
    return 1 if faults else 0


if __name__ == "__main__":
    entry_point.run("benchmarks.compiled.resources", main)
