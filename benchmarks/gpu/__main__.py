"""`make gpu`, `python -m benchmarks.gpu`: the whole battery on a machine with a GPU, or some of its steps.

Needs torch, triton, numpy and pytest, no network, no installation; the C++ extension is built in place where a compiler
and pybind11 are, or taken prebuilt.  Whatever is found is in NAME.jsonl at once: a backend that is wrong, raises, hangs
or breaks its CUDA context is dropped and named, and takes nothing of the others with it.  A call with the same --out
and --name goes on where an earlier one ended; `python -m benchmarks.gpu.results` joins parts in several folders.
The exit status is 1 where a step failed, 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType

from benchmarks.common.hardware import ROOT
from benchmarks.gpu import build, canary, plugin, profile, results, sanitizer, tests, timing, warm
from benchmarks.gpu.cases import PARTS
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.steps import FAILED, SECONDS, TOTAL_S, Run, Step, battery, wanted, with_canary
from setformer_kernels import dispatch

NO_GPU = 2  # exit status
STEPS: dict[str, Callable[[Run, float], Step]] = {
    "build": build.step,
    "warm": warm.step,
    "canary": canary.step,
    "profile": profile.step,
    "sanitizer": sanitizer.step,
    **{part: functools.partial(tests.step, part=part) for part in (plugin.KERNELS, plugin.REST)},
    **{part: functools.partial(timing.step, part=part) for part in PARTS},
}


def missing() -> str:
    """Why this machine cannot run the battery; empty where it can."""
    for module in ("torch", "triton", "numpy", "pytest"):
        if importlib.util.find_spec(module) is None:
            return f"the Python module {module!r} is not installed in {sys.executable}"
    import torch

    if not torch.cuda.is_available():
        return f"no GPU: torch {torch.__version__} finds no CUDA device (torch.cuda.is_available() is False)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set: kernels would be interpreted, not run; unset it"
    return ""


def limits(given: Sequence[str]) -> tuple[float, dict[str, float]]:
    """The time of the whole run and of each step, from "S" and "STEP=S"; ValueError where that is neither."""
    total, found = TOTAL_S, dict(SECONDS)
    for text in given:
        name, equals, seconds = text.rpartition("=")
        if equals and name not in SECONDS:
            raise ValueError(f"--seconds takes S or STEP=S with STEP one of {', '.join(SECONDS)}, got {text!r}")
        try:
            value = float(seconds)
        except ValueError:
            raise ValueError(f"--seconds takes S or STEP=S with S a number, got {text!r}") from None
        if name:
            found[name] = value
        else:
            total = value
    return total, found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="The battery for a GPU machine.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--name", help="file name without ending (default: GPU and date)")
    parser.add_argument("--only", choices=list(SECONDS), action="append", help="only this step (repeatable)")
    parser.add_argument("--seconds", action="append", metavar="[STEP=]S", default=[],
                        help=f"for everything (default {TOTAL_S:.0f}), or at most for a step (repeatable)")  # fmt: skip
    parser.add_argument("--prebuilt", type=Path, help=f"a built extension, or its folder (or {build.PREBUILT})")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier calls with this --name have found")
    parser.add_argument("--keep", type=Path, help="folder for the logs of the steps (default: a temporary one)")
    parser.add_argument("--commit", help="of these sources, where they are no checkout (default: what git says)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; tests this command, no more")
    parser.add_argument("tests", nargs="*", help="what pytest gets (default: all tests)")
    return parser


def default_name() -> str:
    """The GPU and the day."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "dry"
    short = re.sub(r"[^A-Za-z0-9]+", "-", device.removeprefix("NVIDIA ")).strip("-").lower()
    return f"gpu_{short}_{datetime.now(timezone.utc).date().isoformat()}"


def _stopped(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0, 1 where a step failed, 2 where there is no GPU."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        total, each = limits(arguments.seconds)
    except ValueError as error:
        parser.error(str(error))
    if not arguments.dry_run and (reason := missing()):
        print(f"benchmarks.gpu: nothing was run or measured: {reason}", file=sys.stderr)
        return NO_GPU
    arguments.out.mkdir(parents=True, exist_ok=True)
    csv = arguments.out / f"{arguments.name or default_name()}.csv"
    journal = Journal(csv.with_suffix(".jsonl"))
    if arguments.fresh:
        journal.path.unlink(missing_ok=True)
        journal = Journal(journal.path)
    about = results.about(arguments.dry_run, arguments.commit)
    if other := results.differing([*journal.read(), {"about": about}]):
        parser.error(f"{journal.path} is another run's, they differ in {other}; --name another, or --fresh")
    journal.write(about=about)
    signal.signal(signal.SIGTERM, _stopped)  # ends what runs: every command has a session of its own
    with tempfile.TemporaryDirectory() as temporary:
        logs = arguments.keep or Path(temporary)
        logs.mkdir(parents=True, exist_ok=True)
        backends = tuple(name for name in dispatch.NATIVE if name != "cpu")
        run = Run(journal, logs, dry=arguments.dry_run, tests=tuple(arguments.tests),
                  prebuilt=arguments.prebuilt, backends=backends)  # fmt: skip
        only = arguments.only or []
        only += ["build"] if only and arguments.prebuilt else []
        done = finished(run, csv, only, total, each)
    print(f"{csv.with_suffix('.md')}\n{csv.with_suffix('.md').read_text()}")
    return 1 if any(step.status == FAILED for step in done) else 0


def finished(run: Run, csv: Path, only: Sequence[str], total: float, each: dict[str, float]) -> list[Step]:
    """The steps of this call; the files of the run are written whatever ends it, and after each step."""
    names = with_canary(wanted(only), run)
    try:
        return battery(names, STEPS, run, each, total, lambda: results.write(csv, run.journal.read(), plot=False))
    finally:
        results.write(csv, run.journal.read())


if __name__ == "__main__":
    sys.exit(main())
