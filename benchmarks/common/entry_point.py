"""What commands share: their words, and how one ends where something that it needs is not on this machine, with one
sentence, not with a traceback."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from benchmarks.common.hardware import ROOT

NOT_HERE = 2
# Import name -> the extra of this package that brings it.
EXTRAS = {
    "triton": "triton",
    "sklearn": "demo",
    "tqdm": "demo",
    "matplotlib": "bench",
    "ot": "bench",
    "geomloss": "bench",
    "transformers": "transformers",
}


class NotHereError(RuntimeError):
    """What this machine lacks for the command that was asked for."""


def run(name: str, main: Callable[[], int]) -> NoReturn:
    """Ends the process with main's status; with NOT_HERE and a sentence where a tool or a library is missing."""
    try:
        sys.exit(main())
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        reason = f"{missing} is missing: pip install '.[{EXTRAS[missing]}]'"
    except NotHereError as error:
        reason = str(error)
    print(f"{name}: {reason}", file=sys.stderr)
    sys.exit(NOT_HERE)


def words(argv: list[str] | None, default: str) -> list[str]:
    """The words of the command line; `default` goes before them where they begin with no subcommand."""
    found = list(sys.argv[1:] if argv is None else argv)
    named = found and (not found[0].startswith("-") or found[0] in ("-h", "--help"))
    return found if named else [default, *found]


def measure_or_table(name: str, description: str | None, argv: list[str] | None) -> argparse.Namespace:
    """Of a command that measures (command "run": quick, out, threads), or prints what a file says ("table": csv)."""
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=description)
    commands = parser.add_subparsers(dest="command")
    measure = commands.add_parser("run", help="measure (the default)")
    measure.add_argument("--quick", action="store_true", help="every code path in seconds; the numbers mean little")
    measure.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    measure.add_argument("--threads", type=int, default=1)
    commands.add_parser("table", help="print what a file says").add_argument("csv", type=Path)
    return parser.parse_args(words(argv, "run"))
