"""A pytest plugin (`-p benchmarks.gpu.plugin`): one share of the tests, what needs a GPU first, told to the journal.

Each test is in the journal when it begins and when it ends, so that a run that is stopped loses nothing, and a test
that hangs or breaks the CUDA context is named, and costs itself alone.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.journal import Journal, Log, Record
from benchmarks.gpu.process import STICKY

# Share "I/N", worker's name, path and size of the journal when the step began, part, backends that failed their canary.
SHARE, WORKER, JOURNAL, SINCE, PART, DROPPED = (
    f"SETFORMER_TEST_{name}" for name in ("SHARE", "WORKER", "JOURNAL", "SINCE", "PART", "DROPPED")
)
KERNELS, REST = "kernels", "tests"  # parts
# On the machine with the GPU nothing but the GPU is of interest: these compile for GPUs that are not there, run
# Triton's interpreter, or this command itself; so does whatever else is named after CUDA (test_cuda_*).
NEVER = {"test_gpu_command", "test_gpu_rehearsal", "test_triton_resources",
         "test_triton_signatures", "test_benchmarks_model", "test_benchmarks_budget"}  # fmt: skip
# Last, if there is time: they test what no GPU changes.
LAST = ("test_install", "test_demo", "test_benchmarks", "test_cpu", "test_docs", "test_readme", "test_entry_points")
CUDA_FILES = ("test_cuda_kernels", "test_cuda_fuzz")
TRITON_FILES = ("test_backends", "test_triton_causal", "test_triton_features", "test_triton_sinkhorn", "test_shapes",
                "test_triton_masked", "test_masked", "test_packed", "test_streaming")  # fmt: skip
FILES = tuple(f"tests/{name}.py" for name in (*CUDA_FILES, *TRITON_FILES))  # where the kernels' own tests are


def rank(nodeid: str, fixtures: Collection[str] = ()) -> int | None:
    """When a test runs: 0 the CUDA kernels', 1 Triton's, 2 the others', 3 what no GPU changes; None: not there."""
    path, _, test = nodeid.partition("::")
    file, words = Path(path).stem, set(re.split(r"[\[\]\-]", test)) | set(fixtures)
    if file in CUDA_FILES and "shim" not in words:
        return 0
    if file in NEVER or file.startswith("test_cuda") or "shim" in words:
        return None
    if "triton" in words or file.startswith("test_triton"):
        return 1
    return 3 if words & {"cpu", "eager"} or file.startswith(LAST) else 2


def chosen(nodeid: str, fixtures: Collection[str] = ()) -> tuple[int, int] | None:
    """The order of a test in its part, None where it is not of it; tests of a dropped backend come last."""
    place, part = rank(nodeid, fixtures), os.environ.get(PART, "")
    if place is None or (part == KERNELS and place > 1):
        return None
    name = {0: "cuda", 1: "triton"}.get(place, "")
    return int(name in os.environ.get(DROPPED, "").split(",")) if name else 0, place


def over(records: Iterable[Record]) -> set[str]:
    """The tests that are not run again: those that ended, and those that this call of the command has lost."""
    ended: set[str] = set()
    lost: set[str] = set()
    for record in records:
        if "about" in record:
            lost = set()
        elif "lost" in record:
            lost.add(record["lost"])
        elif "outcome" in record:
            ended.add(record["end"])
    return ended | lost


_log: Log | None = None
_failed = False


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep this share of what was not run before; of what an earlier process of this share has begun, nothing."""
    global _log
    if SHARE not in os.environ:
        return
    journal = Journal(Path(os.environ[JOURNAL]))
    _log = Log(journal, os.environ[WORKER])
    share, shares = map(int, os.environ[SHARE].split("/"))
    before = over(journal.read(until=int(os.environ[SINCE])))
    places = [(place, item) for item in items if (place := chosen(item.nodeid, getattr(item, "fixturenames", ())))]
    ordered = [item for _, item in sorted(places, key=lambda one: one[0]) if item.nodeid not in before]
    if _log.planned is None:
        items[:] = ordered[share::shares]
        _log.plan([item.nodeid for item in items])
    else:
        mine = set(_log.planned)
        items[:] = [item for item in ordered if item.nodeid in mine and not _log.over(item.nodeid)]


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    """From here on an accident is this test's."""
    global _failed
    _failed = False
    if _log is not None:
        _log.begin(nodeid)


def pytest_runtest_logreport(report: Any) -> None:
    """Write what became of a test: its call, or the phase that did not pass."""
    global _failed
    _failed |= bool(report.failed)
    if _log is not None and (report.when == "call" or report.outcome != "passed"):
        text = report.longreprtext[-2000:] if report.failed else ""
        _log.end(report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3), text=text)


def pytest_runtest_logfinish(nodeid: str, location: Any) -> None:
    """A test after which the device answers nothing ends this process: the others go on in a new one."""
    if _log is not None and _failed and broken():
        sys.stdout.flush()
        os._exit(STICKY)


def broken() -> bool:
    """Whether an error stays in this process's CUDA context."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def pytest_collectreport(report: Any) -> None:
    """A file that does not import is a failure."""
    if JOURNAL in os.environ and report.failed:
        journal = Journal(Path(os.environ[JOURNAL]))
        text = report.longreprtext[-2000:]
        journal.write(worker=os.environ[WORKER], end=report.nodeid, outcome="failed", seconds=0.0, text=text)
