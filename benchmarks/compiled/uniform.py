"""`python -m benchmarks.compiled.uniform`: uniform registers that a kernel reads and no path has written.

That is what a miscompiled product looks like.

ptxas 12.8 (of Triton 3.6 and 3.7) sometimes loses the instruction that puts the descriptor of an operand in shared
memory into a uniform register, where products are asynchronous (`wgmma`): the product then reads any address.  On an
H100 that is a wrong gradient or an illegal access; here it is a register that is read before it can have been written.

The command compiles the kernels with such products of attention's forward and backward pass for sm_90, with --all those
of every call of the table, by whatever Triton is there; exit status 1 where one reads such a register.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from benchmarks.common import entry_point
from benchmarks.compiled import aot, sass, tables, workloads
from benchmarks.compiled.workloads import Call

FAMILY = "sm_90"

_LABEL = re.compile(r"^(\.L_x_\d+):")
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*(?:\.[A-Za-z_]\w*|\.\d+[xX]?\w*)*)\s*([^;]*);")
_REGISTER = re.compile(r"\bUR(\d+)\b")
_DESCRIPTOR = re.compile(r"gdesc\[UR(\d+)\]")
_JUMPS = ("BRA", "BRX", "JMP")


class Step(NamedTuple):
    """One instruction: its address and text, what it writes and reads of the uniform registers, what may follow it."""

    address: str
    text: str
    writes: frozenset[int]
    reads: frozenset[int]
    label: str  # of a jump
    falls: bool  # whether the next instruction may be next


def _width(opcode: str) -> int:
    """How many registers the result of an instruction has."""
    return 4 if ".128" in opcode else 2 if ".64" in opcode or ".WIDE" in opcode else 1


def _product_reads(operands: Sequence[str]) -> Iterator[int]:
    """Of an asynchronous product: both operands' descriptors; the second's alone where the first is in registers."""
    for before, operand in itertools.pairwise(operands):
        if match := _DESCRIPTOR.match(operand):
            first = int(match[1])
            in_registers = before is not operands[0] and re.match(r"R\d+", before) is not None
            yield from range(first + 2 * in_registers, first + 4)


def _step(address: str, guard: str | None, opcode: str, arguments: str) -> Step:
    operands = [part.strip() for part in re.split(r",\s*(?![^\[]*\])", arguments)]
    root, writes, reads = opcode.split(".")[0], set[int](), set[int]()
    sources = operands
    if (target := re.fullmatch(r"UR(\d+)", operands[0])) and root != "R2UP":
        writes.update(range(int(target[1]), int(target[1]) + _width(opcode)))
        sources = operands[1:]
    if root == "HGMMA":
        reads.update(_product_reads(operands))
    else:
        wide = 2 if opcode.startswith("UIADD3.64") else 1
        for operand in sources:
            for match in _REGISTER.finditer(operand):
                first = int(match[1])
                reads.update(range(first, first + (2 if operand.startswith(f"desc[UR{first}]") else wide)))
    label = re.search(r"\.L_x_\d+", arguments)
    jumps, leaves = root in _JUMPS, root in ("EXIT", "RET")
    falls = not (jumps or leaves) or guard is not None or re.match(r"!?U?P\d|~", arguments.strip()) is not None
    return Step(address, f"{opcode} {arguments.strip()}", frozenset(writes), frozenset(reads),
                label[0] if label and jumps else "", falls)  # fmt: skip


def parsed(text: str) -> list[tuple[Step, list[int]]]:
    """The instructions of `nvdisasm -c`, and the places of those that may follow each."""
    steps: list[Step] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if match := _LABEL.match(line.strip()):
            labels[match[1]] = len(steps)
        elif match := _LINE.search(line):
            steps.append(_step(*match.groups()))
    found = []
    for place, step in enumerate(steps):
        after = [place + 1] if step.falls else []
        after += [labels[step.label]] if step.label in labels else []
        found.append((step, [at for at in after if at < len(steps)]))
    return found


def undefined(text: str) -> list[str]:
    """The instructions that read a uniform register which no way to them has written, of `nvdisasm -c`."""
    code = parsed(text)
    written: list[set[int] | None] = [None] * len(code)  # on some way there
    todo = [0] if code else []
    if code:
        written[0] = set()
    while todo:
        place = todo.pop()
        step, after = code[place]
        out = (written[place] or set()) | step.writes
        for at in after:
            known = written[at]
            if known is None or not out <= known:
                written[at] = out | (known or set())
                todo.append(at)
    found = []
    for (step, _), known in zip(code, written, strict=True):
        if known is not None and (lost := step.reads - known):
            found.append(f"{step.address} {step.text} reads {', '.join(f'UR{n}' for n in sorted(lost))}")
    return found


def of(cubin: bytes) -> list[str]:
    """`undefined` of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [sass._tool("nvdisasm"), "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    return undefined(text)


def variants(calls: Iterable[Call]) -> dict[tuple[str, str], aot.Variant]:
    """The distinct binaries of some calls whose products may be asynchronous."""
    launches = [launch for call in calls for launch in workloads.launches(call, FAMILY) if launch.tile.wgmma]
    return {(variant.name, variant.key): variant for variant in aot.variants(launches, FAMILY)}


def main(argv: list[str] | None = None) -> int:
    """Entry point; 1 where a kernel reads a register that nothing has written, or none has such a product."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled.uniform", description=__doc__)
    parser.add_argument("--all", action="store_true", help="every call of the table, which takes minutes")
    calls = tables.table_calls(FAMILY) if parser.parse_args(argv).all else tables.few_calls(FAMILY)
    import triton

    faults, names, products = [], [], 0
    for variant in variants(calls).values():
        cubin = aot.compiled(variant, FAMILY).asm["cubin"]
        names.append(variant.name)
        products += sass.count(sass.listing(cubin))["HGMMA"]
        faults += [f"{variant.name} ({variant.launch.tile}): {found}, which nothing has written" for found in of(cubin)]
    print("\n".join(faults), file=sys.stderr)
    print(
        f"Triton {triton.__version__}: {len(names)} binaries of {len(set(names))} kernels, {products} asynchronous "
        f"products, {len(faults)} faults"
    )
    return 1 if faults or not products else 0


if __name__ == "__main__":
    entry_point.run("benchmarks.compiled.uniform", main)
