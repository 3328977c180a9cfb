"""`python -m benchmarks.compiled.front_end`: what Triton's front end makes of every kernel, however it is called.

Every operand that may be absent is absent and present, alone and among the others.  Prints each binary that does not
compile, and each product of a stride that is formed in 32 bits; exit status 1 where there is one.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator

from benchmarks.common import entry_point
from benchmarks.compiled import aot, tables, workloads

FAMILY = "sm_90"
_ASSIGNED = re.compile(r"^\s*(%[\w#]+)(?::\d+)? = ([\w.]+) (.*)$")
_VALUE = re.compile(r"%[\w#]+")
_FORWARDS = ("arith.muli", "arith.addi", "arith.extsi", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape")


def narrow_products(ttir: str) -> list[str]:
    """The lines in which a stride, or what was made of one, is multiplied in 32 bits."""
    found, strides = [], set()
    for line in ttir.splitlines():
        if match := _ASSIGNED.match(line):
            name, operation, rest = match.groups()
            strided = any(value in strides or value.startswith("%stride_") for value in _VALUE.findall(rest))
            if strided and operation in _FORWARDS:
                strides.add(name)
                if operation == "arith.muli" and re.search(r": (tensor<[\dx]+xi32>|i32\b)", rest):
                    found.append(line.split(" loc(")[0].strip())
    return found


def variants() -> Iterator[tuple[workloads.Call, aot.Variant]]:
    """Every distinct binary of `tables.every_operand`, and the first call that launches it."""
    seen = set()
    for call in tables.every_operand():
        for variant in aot.variants(workloads.launches(call, FAMILY), FAMILY):
            if (variant.name, variant.key) not in seen:
                seen.add((variant.name, variant.key))
                yield call, variant


def main(argv: list[str] | None = None) -> int:
    """Entry point; 1 where a kernel has a fault."""
    argparse.ArgumentParser(prog="python -m benchmarks.compiled.front_end", description=__doc__).parse_args(argv)
    import triton

    faults, names = [], []
    for call, variant in variants():
        names.append(variant.name)
        try:
            faults += [f"{variant.name} ({call}): {line}" for line in narrow_products(aot.front_end(variant, FAMILY))]
        except Exception as error:  # the compiler's own errors have no common base
            faults.append(f"{variant.name} ({call}): {type(error).__name__}: {str(error)[-1500:]}")
    print("\n".join(faults), file=sys.stderr)
    print(f"Triton {triton.__version__}: {len(names)} binaries of {len(set(names))} kernels, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    entry_point.run("benchmarks.compiled.front_end", main)
