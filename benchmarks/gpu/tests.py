"""The test suite on a machine with a GPU: in several processes, for a limited time, with nothing but pytest.

As a pytest plugin (`-p benchmarks.gpu.tests`) it keeps one share of the tests, those of GPU backends first, and writes
each outcome to a file as it comes, so that a run that is stopped loses nothing.  As a module it starts the shares.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]  # nothing is imported that needs torch: every share starts anew
SHARE, REPORT = "SETFORMER_TEST_SHARE", "SETFORMER_TEST_REPORT"
# Last, if there is time: they test what no GPU changes.
LAST = (
    "test_install",
    "test_demo",
    "test_benchmarks",
    "test_gpu_command",
    "test_triton_resources",
    "test_cuda_resources",
    "test_cpu",
)
# Installed plugins are not loaded (one unknown warning would be an error), and the options that need them are dropped.
CONTINUE = "--continue-on-collection-errors"
OPTIONS = (
    "-q",
    "-o",
    "addopts=",
    "-p",
    "no:cacheprovider",
    "--continue-on-collection-errors",
    "-p",
    "benchmarks.gpu.tests",
)


def _rank(nodeid: str) -> int:
    if any(name in nodeid.lower() for name in ("triton", "cuda_kernels")) and "test_triton_resources" not in nodeid:
        return 0
    return 2 if any(name in nodeid for name in LAST) else 1


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep this share, GPU backends first."""
    if SHARE not in os.environ:
        return
    share, shares = map(int, os.environ[SHARE].split("/"))
    ordered = sorted(items, key=lambda item: _rank(item.nodeid))
    items[:] = ordered[share::shares]
    _write({"collected": len(items)})


def pytest_runtest_logreport(report: Any) -> None:
    """Write what became of a test: its call, or the phase that did not pass."""
    if REPORT in os.environ and (report.when == "call" or report.outcome != "passed"):
        text = report.longreprtext[-2000:] if report.failed else ""
        _write({"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "text": text})


def pytest_collectreport(report: Any) -> None:
    """A file that does not import is a failure."""
    if REPORT in os.environ and report.failed:
        _write({"test": report.nodeid, "outcome": "failed", "seconds": 0.0, "text": report.longreprtext[-2000:]})


def _write(record: dict[str, Any]) -> None:
    with Path(os.environ[REPORT]).open("a") as file:
        file.write(json.dumps(record) + "\n")


class Result(NamedTuple):
    """What a sharded run found."""

    counts: dict[str, int]  # passed, failed, skipped, left (not run before the time was out)
    failures: list[str]
    log: str

    @property
    def summary(self) -> str:
        return ", ".join(f"{number} {name}" for name, number in self.counts.items() if number) or "nothing ran"


def _start(index: int, shares: int, folder: Path, arguments: tuple[str, ...]) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        SHARE: f"{index}/{shares}",
        REPORT: str(folder / f"share_{index}.jsonl"),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, "-m", "pytest", *OPTIONS, *arguments]
    log = (folder / f"share_{index}.log").open("wb")
    with log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether a process ends in time; it is stopped if it does not."""
    try:
        process.wait(max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    return True


def run(folder: Path, seconds: float, shares: int, arguments: tuple[str, ...] = ()) -> Result:
    """All tests (or those of `arguments`) in `shares` processes, at most `seconds`."""
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    processes = [_start(index, shares, folder, arguments) for index in range(shares)]
    stopped = {index for index, process in enumerate(processes) if not _ended(process, deadline - time.monotonic())}
    # pytest's exit status: 0 and 1 are told by the outcomes, 5 is an empty share; all else is no test run at all.
    broken = [n for n, p in enumerate(processes) if n not in stopped and p.returncode not in (0, 1, 5)]
    return _collect(folder, shares, broken)


def _collect(folder: Path, shares: int, broken: list[int]) -> Result:
    counts: Counter[str] = Counter(passed=0, failed=0, skipped=0, left=0)
    failures, logs = [], []
    for index in range(shares):
        path = folder / f"share_{index}.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        outcomes = {record["test"]: record for record in records if "test" in record}
        counts.update(record["outcome"] for record in outcomes.values())
        counts["left"] += max(sum(record.get("collected", 0) for record in records) - len(outcomes), 0)
        failed = [record for record in outcomes.values() if record["outcome"] == "failed"]
        failures += [f"{record['test']}\n{record['text']}" for record in failed]
        log = (folder / f"share_{index}.log").read_text(errors="replace")
        if index in broken and not failed:
            failures.append(f"share {index} of {shares} broke off\n{log[-2000:]}")
        logs.append(log)
    return Result(dict(counts), failures, "\n".join(logs))
