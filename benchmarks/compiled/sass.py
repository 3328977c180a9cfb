"""Machine code of a compiled kernel: registers, spills, instruction counts, and the time one warp spends in its loop.

The disassembler is the one in Triton's package (or the PATH's).  Each SASS instruction since sm_70 carries its own
scheduling: a stall count and six scoreboard barriers, in bits 105 to 121 of its encoding.  `loop_cycles` replays them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

TENSOR = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "UTCOMMA")
# Cycles until the result of an instruction without fixed latency is there, as microbenchmarks of sm_80 and sm_90
# report them (global loads: an L2 hit); everything else is covered by stall counts.
LATENCY = {
    "LDG": 270, "LD": 270, "LDGSTS": 270, "UBLKCP": 600, "UTMALDG": 600, "LDS": 30, "LDSM": 33, "STS": 20, "STSM": 20,
    "SHFL": 25, "MUFU": 20, "HMMA": 34, "HGMMA": 80, "UTCHMMA": 120, "LDTM": 40, "STTM": 30, "BAR": 25, "LDC": 30,
    "LDCU": 30, "SYNCS": 25, "ATOMS": 60, "S2R": 20, "I2F": 15, "F2F": 15, "REDUX": 20, "DMMA": 40, "R2UR": 12,
}  # fmt: skip
DEFAULT_LATENCY = 20


class Instruction(NamedTuple):
    """One SASS instruction with its scheduling."""

    address: int
    opcode: str  # with modifiers, "LDG.E.128"
    target: int | None  # of a branch
    conditional: bool  # a branch that may fall through
    stall: int
    write_barrier: int  # released when the result is there; 7: none
    read_barrier: int  # released when the operands are read; 7: none
    waits: int  # six bits: barriers waited for

    @property
    def root(self) -> str:
        return self.opcode.split(".")[0]


class Usage(NamedTuple):
    """What ptxas gave a kernel."""

    registers: int
    stack: int  # bytes per thread: spills and arrays the compiler could not keep in registers
    local: int


def _tool(name: str) -> str:
    try:
        import triton

        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        if bundled.exists():
            return str(bundled)
    except ImportError:
        pass
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is neither in Triton's package nor on the PATH")
    return found


def _cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_tool("cuobjdump"), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def usage(cubin: bytes) -> Usage:
    """Registers, stack and local memory per thread."""
    text = _cuobjdump(cubin, "-res-usage")
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return Usage(int(found["REG"]), int(found["STACK"]), int(found["LOCAL"]))


_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);\s*/\* 0x([0-9a-f]{16}) \*/")
_SECOND = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/\s*$")


def listing(cubin: bytes) -> list[Instruction]:
    """The instructions of a kernel in order of address."""
    found: list[Instruction] = []
    first: re.Match[str] | None = None
    for line in _cuobjdump(cubin, "-sass").splitlines():
        if match := _LINE.search(line):
            first = match
        elif first is not None and (second := _SECOND.match(line)):
            found.append(_decode(first, int(second.group(1), 16)))
            first = None
    if not found:
        raise ValueError("no machine code found in the disassembly")
    return found


def _decode(match: re.Match[str], high: int) -> Instruction:
    address, guard, opcode, operands, _ = match.groups()
    control = high >> 41
    target = re.search(r"0x([0-9a-f]+)\s*$", operands.strip()) if opcode.startswith("BRA") else None
    conditional = guard is not None or not operands.strip().startswith("0x")
    return Instruction(
        int(address, 16),
        opcode,
        int(target.group(1), 16) if target else None,
        conditional,
        control & 15,
        control >> 5 & 7,
        control >> 8 & 7,
        control >> 11 & 63,
    )


def loops(code: Sequence[Instruction]) -> list[Sequence[Instruction]]:
    """Bodies of the outermost loops: from a backward branch's target to the branch; end traps (self loops) left out."""
    spans = [(i.target, i.address) for i in code if i.target is not None and i.target < i.address]
    outer = [s for s in set(spans) if not any(o != s and o[0] <= s[0] and s[1] <= o[1] for o in spans)]
    return [[i for i in code if low <= i.address <= high] for low, high in sorted(outer)]


def hot_path(body: Sequence[Instruction]) -> list[Instruction]:
    """The cheapest way through a piece of code: most tensor-core work, then fewest exponentials, then instructions.

    Rare cases (logits too far apart for rescaling, the slow path of a division) sit behind branches and cost more.
    """
    index = {i.address: n for n, i in enumerate(body)}
    # best[n]: cost of the cheapest way from n to the end, and the instruction after n on it.
    best: list[tuple[tuple[int, int, int], int]] = [((0, 0, 0), len(body))] * (len(body) + 1)
    for n in range(len(body) - 1, -1, -1):
        i = body[n]
        jump = index.get(i.target, len(body)) if i.target is not None and i.target > i.address else None
        ways = [n + 1] if jump is None or i.conditional else []
        # A jump out of the piece leaves it; only its end, by falling through or by the last branch, is on the path.
        ways += [jump] if jump is not None and jump < len(body) else []
        own = (-(i.root in TENSOR), "EX2" in i.opcode, 1)
        costs = [(tuple(a + b for a, b in zip(own, best[way][0], strict=True)), way) for way in ways or [n + 1]]
        best[n] = min(costs)  # type: ignore[assignment]
    path, n = [], 0
    while n < len(body):
        path.append(body[n])
        n = best[n][1]
    return path


def main_loop(code: Sequence[Instruction]) -> Sequence[Instruction]:
    """The hot path of the loop over tokens: the outermost loop with most tensor-core work, then most instructions."""
    bodies = loops(code)
    return hot_path(max(bodies, key=lambda body: (count(body)["tensor"], len(body)))) if bodies else []


def count(code: Iterable[Instruction]) -> Counter[str]:
    """Instructions by what they cost: tensor, ex2, mufu (others), fp32, memory by width, barriers, all."""
    totals: Counter[str] = Counter()
    for i in code:
        totals["all"] += i.root != "NOP"
        if i.root in TENSOR:
            totals["tensor"] += 1
            totals[i.root] += 1
        elif i.root == "MUFU":
            totals["ex2" if "EX2" in i.opcode else "mufu"] += 1
        elif i.root in ("FFMA", "FADD", "FMUL", "FMNMX", "FSEL", "FSETP"):
            totals["fp32"] += 1
            totals["ffma"] += i.root == "FFMA"
        elif i.root in ("FFMA2", "FADD2", "FMUL2"):  # two lanes an instruction, sm_100
            totals["fp32"] += 2
        elif i.root in ("LDG", "STG", "LDGSTS", "LDS", "STS", "LDSM", "STSM", "LDL", "STL", "LDTM", "STTM"):
            width = next((w for w in ("128", "64", "U16", "U8", "16") if f".{w}" in i.opcode), "32")
            totals[i.root] += 1
            totals[f"{i.root}.{width}"] += 1
        elif i.root in ("BAR", "SYNCS", "WARPSYNC"):
            totals["barrier"] += 1
        elif i.root == "SHFL":
            totals["shfl"] += 1
    return totals


def loop_cycles(body: Sequence[Instruction]) -> int:
    """Cycles one warp alone needs for one iteration in the steady state (inner loops counted once)."""
    clock, free = 0, [0] * 6  # when each barrier is released
    marks = []
    for _ in range(3):
        for i in body:
            for barrier in range(6):
                if i.waits >> barrier & 1:
                    clock = max(clock, free[barrier])
            done = clock + LATENCY.get(i.root, DEFAULT_LATENCY)
            if i.write_barrier < 6:
                free[i.write_barrier] = max(free[i.write_barrier], done)
            if i.read_barrier < 6:
                free[i.read_barrier] = max(free[i.read_barrier], clock + 12)
            clock += max(i.stall, 1)
        marks.append(clock)
    return marks[2] - marks[1]
