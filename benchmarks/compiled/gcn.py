"""Assembly of a kernel compiled for an AMD GPU: registers, spills, instruction counts.

The compiler writes the numbers behind the code, as the metadata that a loader reads.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

PRODUCT = "v_mfma"


class Usage(NamedTuple):
    """What the compiler gave a kernel."""

    registers: int  # vector registers of a lane, accumulation registers among them
    scalar_registers: int
    scratch: int  # bytes of memory a lane has for what no register holds


def usage(assembly: str) -> Usage:
    """Registers and scratch memory of the one kernel of an assembly."""
    found = dict(re.findall(r"^\s+(?:- )?\.(\w+):\s+(\d+)$", assembly, re.MULTILINE))
    return Usage(int(found["vgpr_count"]), int(found["sgpr_count"]), int(found["private_segment_fixed_size"]))


def count(assembly: str) -> Counter[str]:
    """Instructions: all, and those of matrix cores by their common name."""
    names = re.findall(r"^\t([a-z]\w+)(?:\s|$)", assembly, re.MULTILINE)
    totals = Counter({"all": len(names)})
    totals[PRODUCT] = sum(name.startswith(PRODUCT) for name in names)
    return totals
