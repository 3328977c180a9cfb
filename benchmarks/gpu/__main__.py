"""`make gpu`, `python -m benchmarks.gpu`: the whole battery on a machine with a GPU, in under eight minutes.

Needs torch, triton, numpy and pytest, no network, no installation; the C++ extension is built in place where a compiler
and pybind11 are.  Steps, each with its own time: build; the test suite on real kernels, those of the GPU backends
first; compute-sanitizer on a reduced set, where the machine allows it; the benchmark table.  A step that fails does
not stop the next, but the exit status is 1; 2 where there is no GPU.  Writes NAME.csv, NAME.json (environment, steps),
NAME.md (targets and times) and NAME.png under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.common.hardware import ROOT, commit, default_threads, environment
from benchmarks.common.results import read_csv
from benchmarks.gpu import table, tests

OK, FAILED, SKIPPED = "ok", "failed", "skipped"
NO_GPU = 2  # exit status
TOTAL_S = 450.0
SECONDS = {"build": 170.0, "tests": 130.0, "sanitizer": 80.0, "benchmark": 140.0}  # each also gets what is left before
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
REFUSED = re.compile(
    r"Device not supported|Target application terminated before first|Unable to find|not permitted", re.I
)
MEMORY_PER_PROCESS = 2 << 30  # a CUDA context and the largest test


@dataclass
class Step:
    """What became of one step."""

    name: str
    status: str
    summary: str
    seconds: float = 0.0
    details: tuple[str, ...] = ()


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


def child(arguments: list[str], seconds: float, log: Path, **variables: str) -> tuple[int | None, str]:
    """A command's exit status (None: stopped, its time was out) and output, which also goes to `log`."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment_ = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **variables}
    with log.open("w+") as file:
        process = subprocess.Popen(arguments, cwd=ROOT, env=environment_, stdout=file, stderr=subprocess.STDOUT)
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = None
    return status, log.read_text(errors="replace")


def last_line(output: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def toolkit() -> bool:
    """Whether nvcc is there."""
    home = os.environ.get("CUDA_HOME", "")
    return bool(shutil.which("nvcc") or (home and shutil.which("nvcc", path=str(Path(home, "bin")))))


def is_built(cuda: bool, folder: Path) -> bool:
    """Whether an extension newer than its sources is there, with the CUDA kernels where they are wanted."""
    found = list((ROOT / "setformer_kernels").glob("_C*.so"))
    sources = [ROOT / "setup.py", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    if not found or min(map(mtime, found)) < max(map(mtime, sources)):
        return False
    asks = "from setformer_kernels.backends import _extension as e; import sys; "
    asks += f"sys.exit(e.MODULE is None or ({cuda} and not hasattr(e.MODULE, 'cuda_attention')))"
    return child([sys.executable, "-c", asks], 60, folder / "extension.log")[0] == 0


def mtime(path: Path) -> float:
    """When a file was written."""
    return path.stat().st_mtime


def cuda_variables() -> dict[str, str]:
    """What makes the build compile the CUDA kernels, for this machine's GPU alone unless the caller says otherwise."""
    import torch

    variables = {"SETFORMER_KERNELS_CUDA": "1"}
    if torch.cuda.is_available() and "SETFORMER_KERNELS_CUDA_ARCHS" not in os.environ:
        major, minor = torch.cuda.get_device_capability()
        variables["SETFORMER_KERNELS_CUDA_ARCHS"] = f"{major}{minor}"
    return variables


def build(seconds: float, folder: Path) -> Step:
    """The C++ extension in place, with the CUDA kernels where nvcc is; the battery goes on without it."""
    cuda = toolkit()
    what = "the extension with the CUDA kernels" if cuda else "the extension, without CUDA kernels: no nvcc"
    if is_built(cuda, folder):
        return Step("build", OK, f"there: {what}")
    lacking = [name for name in ("pybind11", "setuptools") if importlib.util.find_spec(name) is None]
    lacking += [] if shutil.which("c++") or shutil.which("g++") or shutil.which("clang++") else ["a C++ compiler"]
    if lacking:
        return Step("build", SKIPPED, f"without the C++ extension: no {', no '.join(lacking)}")
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--build-temp", str(folder / "build")]
    status, output = child(command, seconds, folder / "build.log", **(cuda_variables() if cuda else {}))
    if status == 0 and is_built(cuda, folder):
        return Step("build", OK, f"built in place: {what}")
    return Step("build", SKIPPED if status is None else FAILED, f"without the C++ extension: {last_line(output)}")


def shares() -> int:
    """Test processes: as many as cores and GPU memory allow."""
    import torch

    by_memory = torch.cuda.mem_get_info()[0] // MEMORY_PER_PROCESS if torch.cuda.is_available() else 2
    return max(1, min(default_threads(), int(by_memory), 16))


def suite(seconds: float, folder: Path, arguments: tuple[str, ...]) -> Step:
    """The test suite in as many processes as the machine carries."""
    found = tests.run(folder / "tests", seconds, shares(), arguments)
    ran = found.counts["passed"] + found.counts["failed"]
    status = FAILED if found.failures or not ran else OK
    late = " (left: not run before the time was out)" if found.counts["left"] else ""
    return Step("tests", status, found.summary + late, details=tuple(found.failures))


def sanitizer(seconds: float, folder: Path) -> Step:
    """compute-sanitizer on every kernel at small sizes."""
    tool = shutil.which("compute-sanitizer")
    smoke = [sys.executable, "-m", "benchmarks.gpu.smoke"]
    start = time.monotonic()
    status, output = child(
        smoke, seconds, folder / "smoke.log"
    )  # compiles, so that the tools watch nothing but kernels
    if status != 0:
        return Step("sanitizer", FAILED if status else SKIPPED, f"without compute-sanitizer: {last_line(output)}")
    if tool is None:
        return Step("sanitizer", SKIPPED, "compute-sanitizer is not on the PATH; the calls themselves ran")
    notes, errors = [], []
    for name in TOOLS:
        left = seconds - (time.monotonic() - start)
        command = [tool, "--tool", name, "--kernel-name", "kernel_substring=_kernel", "--error-exitcode", "9", *smoke]
        log = folder / f"{name}.log"
        if left < 5:
            notes.append(f"{name}: out of time")
            continue
        status, output = child(command, left, log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if status is None:
            notes.append(f"{name}: out of time")
        elif status and REFUSED.search(output):
            notes.append(f"{name}: refused by this machine")
        elif status:
            errors.append(f"{name}: {last_line(output)}\n{output[-3000:]}")
        else:
            notes.append(f"{name}: {last_line(output)}")
    watched = any("SUMMARY" in note for note in notes)
    outcome = FAILED if errors else OK if watched else SKIPPED
    return Step("sanitizer", outcome, "; ".join(notes + [e.splitlines()[0] for e in errors]), details=tuple(errors))


def benchmark(seconds: float, folder: Path, csv: Path, dry: bool) -> Step:
    """The benchmark table, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu.measure", str(csv), "--seconds", str(0.75 * seconds)]
    command += ["--commit", commit(), *(["--dry-run"] if dry else [])]
    variables = {"TRITON_INTERPRET": "1"} if dry else {}
    status, output = child(command, seconds, folder / "benchmark.log", **variables)
    print(output, end="")
    rows = sum(1 for _ in csv.open()) - 1 if csv.exists() else 0
    if status is None:
        return Step("benchmark", OK if rows > 0 else FAILED, f"{rows} rows, then stopped: out of time")
    if status or rows <= 0:
        return Step("benchmark", FAILED, last_line(output), details=(output[-3000:],))
    return Step("benchmark", OK, f"{rows} rows")


def gpu_environment() -> dict[str, object]:
    """The GPU, its driver and the software."""
    import torch

    about = environment(default_threads())
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        facts = {"name": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count}
        about["gpu"] = {**facts, "memory_bytes": p.total_memory, "cuda": torch.version.cuda, "driver": _driver()}
    return about


def _driver() -> str:
    """Driver version and clocks as nvidia-smi reports them."""
    query = "driver_version,clocks.max.sm,clocks.max.memory,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"


def write_results(csv: Path, steps: list[Step], about: Mapping[str, object]) -> None:
    """The environment and the steps as JSON, the table as markdown, the plot where matplotlib is."""
    records = [asdict(step) for step in steps]
    csv.with_suffix(".json").write_text(json.dumps({**about, "steps": records}, indent=2) + "\n")
    lines = ["# GPU", "", "| step | | | s |", "|---|---|---|---|"]
    lines += [f"| {s.name} | {s.status} | {s.summary.replace('|', '/')} | {s.seconds:.0f} |" for s in steps]
    if csv.exists():
        rows, stamp = read_csv(csv)
        lines += ["", table.render(rows, stamp)]
        if importlib.util.find_spec("matplotlib") is not None:
            table.draw(rows, stamp, csv.with_suffix(".png"))
        else:
            lines += ["", "No plot: matplotlib is not installed."]
    csv.with_suffix(".md").write_text("\n".join(lines) + "\n")


def battery(wanted: list[tuple[str, Callable[[float], Step]]], total_s: float) -> list[Step]:
    """Run the steps in order; what one leaves of its time, later ones may use."""
    deadline, done = time.monotonic() + total_s, []
    for index, (name, run) in enumerate(wanted):
        later = sum(SECONDS[other] for other, _ in wanted[index + 1 :])
        left = deadline - time.monotonic()
        share = max(min(left, SECONDS[name]), left - later)
        start = time.monotonic()
        if left < 5:
            step = Step(name, SKIPPED, "out of time")
        else:
            print(f"=== {name} (at most {share:.0f} s)", flush=True)
            try:
                step = run(share)
            except Exception as error:  # one step's accident must not take the others' results
                step = Step(name, FAILED, f"{type(error).__name__}: {error}")
        step.seconds = round(time.monotonic() - start, 1)
        print(f"=== {step.name}: {step.status}, {step.seconds:.0f} s: {step.summary}", flush=True)
        for detail in step.details[:10]:
            print(detail, flush=True)
        done.append(step)
    return done


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="The battery for a GPU machine.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--name", help="file name without ending (default: GPU and date)")
    parser.add_argument("--only", choices=sorted(SECONDS), action="append", help="only this step (repeatable)")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="for everything")
    parser.add_argument("--keep", type=Path, help="folder for the logs of the steps (default: a temporary one)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; tests this command, no more")
    parser.add_argument("tests", nargs="*", help="what pytest gets (default: all tests)")
    return parser


def default_name() -> str:
    """The GPU and the day."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "dry"
    short = re.sub(r"[^A-Za-z0-9]+", "-", device.removeprefix("NVIDIA ")).strip("-").lower()
    return f"gpu_{short}_{datetime.now(timezone.utc).date().isoformat()}"


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0, 1 where a step failed, 2 where there is no GPU."""
    arguments = _parser().parse_args(argv)
    if not arguments.dry_run and (reason := missing()):
        print(f"benchmarks.gpu: nothing was run or measured: {reason}", file=sys.stderr)
        return NO_GPU
    arguments.out.mkdir(parents=True, exist_ok=True)
    csv = arguments.out / f"{arguments.name or default_name()}.csv"
    about = gpu_environment()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        steps: dict[str, Callable[[float], Step]] = {
            "build": lambda s: build(s, folder),
            "tests": lambda s: suite(s, folder, tuple(arguments.tests)),
            "sanitizer": lambda s: sanitizer(s, folder),
            "benchmark": lambda s: benchmark(s, folder, csv, arguments.dry_run),
        }
        wanted = [(name, run) for name, run in steps.items() if not arguments.only or name in arguments.only]
        done = battery(wanted, arguments.seconds)
    write_results(csv, done, about)
    print(f"{csv.with_suffix('.md')}\n{csv.with_suffix('.md').read_text()}")
    return 1 if any(step.status == FAILED for step in done) else 0


if __name__ == "__main__":
    sys.exit(main())
