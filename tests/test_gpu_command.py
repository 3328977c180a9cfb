"""`make gpu` as far as it can be tested without a GPU: its steps, its sharded tests, its table, and a dry run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks.common.cases import BOTH, FORWARD
from benchmarks.common.results import Row, read_csv
from benchmarks.common.targets import MET, NOT_MET, UNMEASURED
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import build, warm
from benchmarks.gpu import table as gpu_table
from benchmarks.gpu import tests as gpu_tests
from benchmarks.gpu.cases import PARTS, GpuCase, copies, dry_plan, full_plan
from benchmarks.gpu.device import Cpu
from benchmarks.gpu.journal import Journal, Log, Record
from benchmarks.gpu.measure import Measure
from benchmarks.gpu.process import System
from benchmarks.gpu.steps import FAILED, OK, SECONDS, SKIPPED, Run, Step, battery
from setformer_kernels import dispatch
from setformer_kernels.problem import Problem

Patch = pytest.MonkeyPatch
ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main(["--out", str(tmp_path)]) == gpu.NO_GPU
    assert "nothing was run or measured" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_failed_step_does_not_stop_the_next_and_time_passes_on(tmp_path: Path) -> None:
    given = {}

    def step(name: str, status: str) -> Callable[[Run, float], Step]:
        def run(_: Run, seconds: float) -> Step:
            given[name] = seconds
            if status == "raises":
                raise RuntimeError("broken")
            return Step(name, status, "")

        return run

    wanted = {"build": OK, "kernels": "raises", "sanitizer": SKIPPED, "sweep": OK}
    steps = {name: step(name, status) for name, status in wanted.items()}
    run = Run(Journal(tmp_path / "run.jsonl"), tmp_path)
    done = battery(list(wanted), steps, run, SECONDS, 1000.0)
    assert [s.status for s in done] == [OK, FAILED, SKIPPED, OK]
    assert done[1].summary == "RuntimeError: broken"
    assert given["build"] == pytest.approx(1000 - sum(SECONDS[name] for name in list(wanted)[1:]), abs=1)
    assert given["sweep"] == pytest.approx(1000, abs=2), "what earlier steps leave, later ones may use"
    assert [record["step"]["name"] for record in run.journal.read()] == list(wanted)
    assert all(s.status == SKIPPED for s in battery(list(wanted), steps, run, SECONDS, 1.0))


def test_all_steps_fit_the_promised_time() -> None:
    assert sum(SECONDS.values()) <= 1000
    assert gpu.TOTAL_S < 15 * 60


SUITE = """
import time, pytest
@pytest.mark.parametrize("n", range(5))
def test_some(n): pass
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_passes(backend): pass
def test_fails(): assert 1 == 2, "wrong sum"
@pytest.mark.skip(reason="not here")
def test_skipped(): pass
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "test_some.py"
    path.write_text(SUITE)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(Journal(tmp_path / "run.jsonl"), tmp_path)


def outcomes(run: Run, path: Path, seconds: float = 60.0, number: int = 1) -> tuple[Step, list[Record]]:
    """The step `tests` on one file, and what became of each test."""
    run.tests = (str(path),)
    step = gpu_tests.step(run, seconds, "tests", number)
    return step, [record for record in run.journal.read() if "outcome" in record or "lost" in record]


def test_shares_run_every_test_once(suite: Path, run: Run) -> None:
    step, records = outcomes(run, suite, number=3)
    assert (step.status, step.summary) == (FAILED, "7 passed, 1 failed, 1 skipped")
    assert len(step.details) == 1
    assert "wrong sum" in step.details[0]
    ran = [record["end"] for record in records]
    assert len(ran) == len(set(ran)) == 9
    step, records = outcomes(run, suite)
    assert (step.summary, len(records)) == ("nothing ran", 9), "a later call goes on where this one ended"


def test_tests_of_gpu_backends_come_first(suite: Path, run: Run) -> None:
    _, records = outcomes(run, suite)
    assert records[0]["end"].endswith("test_passes[triton]")


@pytest.mark.slow
def test_a_test_that_kills_its_process_or_hangs_costs_itself(tmp_path: Path, run: Run, monkeypatch: Patch) -> None:
    monkeypatch.setattr(gpu_tests, "SILENCE_S", 15.0)
    path = tmp_path / "test_bad.py"
    path.write_text("import os, time\ndef test_a(): os.abort()\ndef test_b(): time.sleep(600)\ndef test_c(): pass\n")
    step, records = outcomes(run, path, 120.0)
    assert (step.status, step.summary) == (FAILED, "1 passed, 2 failed")
    lost = {record["lost"].partition("::")[2]: record["why"] for record in records if "lost" in record}
    assert lost["test_a"].startswith("died (signal 6)")
    assert lost["test_b"] == "hung: nothing for 15 s"


@pytest.mark.slow
def test_a_stopped_share_keeps_what_it_found(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "test_slow.py"
    path.write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(600)\n")
    step, _ = outcomes(run, path, 15.0)
    assert step.summary == "1 passed, 1 left (left: not run before the time was out)"
    assert step.status == OK


def test_a_file_that_does_not_import_is_a_failure(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "test_broken.py"
    path.write_text("import there_is_no_such_module\n")
    step, _ = outcomes(run, path)
    assert step.status == FAILED
    assert "there_is_no_such_module" in step.details[0]


BARE = """
import sys, importlib.abc, importlib.util
ABSENT = {"xdist", "pytest_benchmark", "hypothesis", "ot", "sklearn", "matplotlib", "geomloss", "scipy", "tqdm"}
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in ABSENT else found(name, *rest)
"""


@pytest.mark.slow
def test_the_suite_is_collected_with_nothing_but_pytest_and_torch(tmp_path: Path) -> None:
    (tmp_path / "bare.py").write_text(BARE)
    environment = {
        **os.environ,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
    }
    command = [sys.executable, "-m", "pytest", "-p", "bare", *gpu_tests.OPTIONS, "--collect-only", *gpu_tests.ELSEWHERE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def timed(
    impl: str, T: int | None, L: int, us: float, case: str = "headline", mode: str = FORWARD, **more: object
) -> Row:
    sizes = {"B": 1, "H": 16, "M": 64, "D": 64, "dtype": "bfloat16"}
    row = Row(case, impl, mode, "time", "s", OK, T=T, L=L, median=us * 1e-6, **sizes)  # type: ignore[arg-type]
    return replace(row, **more)  # type: ignore[arg-type]


def verdicts(rows: list[Row]) -> dict[str, str]:
    return {target.what: target.verdict(target.measure(rows)) for target in gpu_table.targets("triton")}


def test_the_fastest_sdpa_is_the_opponent() -> None:
    what = "forward against the best SDPA, L = 4096"
    slow, fast = (
        timed(impl, None, 4096, us, ratio=us / 10) for impl, us in (("sdpa flash", 70.0), ("sdpa cudnn", 55.0))
    )
    assert verdicts([slow])[what] == MET
    assert verdicts([slow, fast])[what] == NOT_MET
    assert verdicts([])[what] == UNMEASURED


def test_share_of_the_floor_is_the_worst_length() -> None:
    probes = [Row("probe", name, "", "rate", "", OK, median=value)
              for name, value in (("copy bandwidth", 4.3e12), ("exp rate", 3.9e12), ("matmul", 8e14))]  # fmt: skip
    what = "share of the max(bytes, exps, FLOPs), forward, L ≥ 16k"
    good = [timed("triton", 3, 16384, 60.0), timed("triton", 3, 65536, 250.0)]
    assert verdicts([*probes, *good])[what] == MET  # floors 46.8 and 187 µs
    assert verdicts([*probes, good[0], timed("triton", 3, 65536, 300.0)])[what] == NOT_MET
    assert verdicts(good)[what] == UNMEASURED


def test_share_of_the_copy_floor_and_break_even_and_memory() -> None:
    rows = [timed("copy", None, 16384, 31.0), timed("triton", 3, 16384, 70.0), timed("triton", 1, 16384, 60.0)]
    found = verdicts(rows)
    assert found["share of the copy floor, T = 3, forward, L ≥ 16k"] == MET
    assert found["share of the copy floor, T = 1, forward, L ≥ 16k"] == NOT_MET
    sweep = [timed("triton", 3, L, 100.0, "sweep", mode=BOTH) for L in (512, 1024)]
    sweep += [timed("sdpa flash", None, L, us, "sweep", mode=BOTH) for L, us in ((512, 50.0), (1024, 150.0))]
    assert verdicts(sweep)["break-even with SDPA, forward + backward, B8"] == MET
    memory = [
        timed("triton", T, 4096, us, "memory", mode=BOTH, metric="memory", work=1e-4)
        for T, us in ((1, 10.0), (3, 30.0))
    ]
    assert verdicts(memory[:1])["peak extra memory, forward + backward, × (q, k, v, o)"] == MET
    assert verdicts(memory)["peak extra memory, forward + backward, × (q, k, v, o)"] == NOT_MET


def test_copies_move_what_cannot_be_avoided() -> None:
    for mode, moves in ((FORWARD, 4), (BOTH, 11)):
        case = GpuCase("x", 32, mode, H=2, D=16)
        target = copies(case, "cpu")()
        assert 2 * target.numel() * 4 == moves * case.token_bytes()  # type: ignore[attr-defined]


def test_plans_cover_the_targets() -> None:
    plan = full_plan()
    headline = {(case.mode, case.L) for case in plan.cases if case.name == "headline"}
    assert headline == {(mode, L) for mode in (FORWARD, BOTH) for L in (4096, 16384, 65536)}
    assert {case.L for case in plan.cases if case.name == "compiled" and case.mode == FORWARD} == {16384, 65536}
    assert all(case.B == 8 for case in plan.cases if case.name == "sweep")
    assert {case.name for case in dry_plan().cases} == {case.name for case in plan.cases}
    beside = {(case.mode, case.B * case.H, case.L) for case in plan.cases if case.name.endswith(" compiled")}
    sizes = {(128, L) for L in (256, 512, 1024, 2048)} | {(144, 4096), (4096, 49), (4096, 196)}
    assert beside == {(mode, *size) for mode in (FORWARD, BOTH) for size in sizes}
    assert beside <= {(case.mode, case.B * case.H, case.L) for case in plan.cases if not case.compiled}


def test_a_backend_is_timed_where_its_backward_runs_too(monkeypatch: Patch, tmp_path: Path) -> None:
    class Half:
        @staticmethod
        def unsupported_reasons(problem: Problem) -> list[str]:
            return ["too many keys"] if (100 if problem.backward else 200) < problem.N else []

    monkeypatch.setattr(dispatch, "NATIVE", {"half": Half})
    log = Log(Journal(tmp_path / "run.jsonl"), "headline half")
    measure = Measure(replace(dry_plan(), device="cuda"), "half", Cpu(), log, 1.0)
    cases = [(mode, L) for mode in (FORWARD, BOTH) for L in (100, 200, 201)]
    able = [(mode, L) for mode, L in cases if measure.able(GpuCase("x", L, mode))]
    assert able == [(FORWARD, 100), (FORWARD, 200), (BOTH, 100)]


def test_the_first_part_has_what_takes_seconds(tmp_path: Path, monkeypatch: Patch) -> None:
    able = SimpleNamespace(unsupported_reasons=lambda problem: [])
    monkeypatch.setattr(dispatch, "NATIVE", {"triton": able})
    measure = Measure(full_plan(), "triton", Cpu(), Log(Journal(tmp_path / "run.jsonl"), "x"), 1.0)
    order = list(dict.fromkeys(item.row.case for item in measure.items("headline")))
    assert order == ["probe", "host", "headline", "memory", "sinkhorn"]
    parts = [item.key for part in PARTS for item in measure.items(part)]
    assert len(parts) == len(set(parts)), "every item has a name of its own"
    assert {item.row.case for part in PARTS for item in measure.items(part)} >= {c.name for c in full_plan().cases}


def test_every_kernel_is_compiled_before_the_gpu_waits() -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = "\n".join(path.read_text() for path in (ROOT / "setformer_kernels/backends/triton").rglob("*.py"))
    there = set(re.findall(r"^@kernel\ndef (\w+)", source, re.MULTILINE))
    assert len(there) > 25
    assert {launch.kernel.fn.__name__ for launch in warm.taken(device)} == there


class Started(System):
    """Notes the environment of what is started, which succeeds."""

    def __init__(self, tools: tuple[str, ...]) -> None:
        self.tools, self.variables = tools, []

    def which(self, tool: str) -> str | None:
        return tool if tool in self.tools else None

    def start(self, command: list[str], log: Path, variables: dict[str, str]) -> SimpleNamespace:
        if command[1] == "setup.py":
            self.variables.append(variables)
        return SimpleNamespace(poll=lambda: 0, end=lambda: None)


@pytest.mark.parametrize("nvcc", [True, False])
def test_cuda_kernels_are_built_for_this_machine_where_nvcc_is(nvcc: bool, monkeypatch: Patch, run: Run) -> None:
    system = Started(("c++", "nvcc") if nvcc else ("c++",))
    monkeypatch.setattr(build, "is_new", lambda: False)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("CUDA_HOME", raising=False)
    step = build.step(replace(run, system=system), 60)
    assert step.status == OK
    assert ("no nvcc" in step.summary) == (not nvcc)
    assert [variables.get("SETFORMER_KERNELS_CUDA") for variables in system.variables] == ["1" if nvcc else None]
    assert [variables["SETFORMER_KERNELS_CPU_BUILD"] for variables in system.variables] == ["native"]


def package(root: Path) -> Path:
    """A source tree with a built extension."""
    for folder in ("setformer_kernels", "csrc"):
        (root / folder).mkdir(parents=True)
    built = root / "setformer_kernels" / f"_C{EXTENSION_SUFFIXES[0]}"
    for path in (root / "setup.py", root / "csrc" / "a.cu", built):
        path.touch()
    return built


def test_an_extension_older_than_its_sources_is_built_again(tmp_path: Path) -> None:
    built = package(tmp_path)
    assert build.is_new(built.parent)
    os.utime(built, (1, 1))
    assert not build.is_new(built.parent)
    built.unlink()
    assert not build.is_new(built.parent)


def test_a_prebuilt_extension_is_taken_as_it_is(tmp_path: Path) -> None:
    built = package(tmp_path)
    os.utime(built, (1, 1))
    given = tmp_path / "given"
    given.mkdir()
    assert "holds none named _C" in build.take(given, built.parent)
    (given / built.name).write_text("new")
    assert build.take(given, built.parent) == ""
    assert built.read_text() == "new"
    other = given / "_C.cpython-27-x.so"
    other.touch()
    assert "for another interpreter" in build.take(other, built.parent)


@pytest.mark.parametrize(
    ("status", "why"), [(0, ""), (build.WITHOUT_CUDA, "without the CUDA kernels"), (1, "no output")]
)
def test_a_prebuilt_extension_that_does_not_load_says_why(status: int, why: str, run: Run, monkeypatch: Patch) -> None:
    monkeypatch.setenv(build.PREBUILT, "/there")
    monkeypatch.setattr(build, "take", lambda given: "")
    monkeypatch.setattr(build, "child", lambda *_, **__: (status, ""))
    step = build.step(run, 60)
    assert step.status == (FAILED if status else OK)
    assert "/there" in step.summary
    assert why in step.summary


def test_the_resident_targets_are_the_cuda_backends() -> None:
    rows = [timed("cuda", 3, 49, 15.0, "windows"), timed("sdpa flash", None, 49, 11.0, "windows")]
    rows += [timed("cuda", 3, L, 10.0, "sweep") for L in (256, 512)] + [timed("triton", 3, 256, 16.0, "sweep")]
    rows += [timed("triton", 3, 512, 14.0, "sweep"), timed("triton", 1, 256, 1.0, "sweep")]
    rows += [timed("cuda", 3, 4096, 10.0, "many heads"), timed("copy", None, 4096, 6.0, "many heads")]
    found = {target.what: target.verdict(target.measure(rows)) for target in gpu_table.resident_targets("cuda")}
    assert list(found.values()) == [NOT_MET, MET, UNMEASURED, MET]  # 1.4 at 512; 0.6; –; 11/15 ≥ 0.667


def test_opponents_are_those_of_the_same_rounds() -> None:
    """Each backend has a process of its own, and opponents that were timed beside it."""
    rows = [timed(backend, 3, 4096, us, backend=backend) for backend, us in (("cuda", 10.0), ("triton", 20.0))]
    rows += [timed("sdpa flash", None, 4096, us, ratio=us / own, ratio_q25=0.0, ratio_q75=0.0, ratio_t1=0.0, backend=b)
             for b, us, own in (("cuda", 60.0, 10.0), ("triton", 70.0, 20.0))]  # fmt: skip
    what = "forward against the best SDPA, L = 4096"
    found = {backend: next(t for t in gpu_table.targets(backend) if t.what == what) for backend in ("cuda", "triton")}
    assert found["cuda"].measure(rows).value == 6.0
    assert found["triton"].measure(rows).value == 3.5


@pytest.mark.slow
def test_dry_run_writes_every_file(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    test = tmp_path / "test_one.py"
    test.write_text("def test_one(): pass\n")
    steps = ("canary", "tests", "headline", "sweep", "compiled")
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--seconds", "900", "--seconds", "headline=300"]
    command += [word for step in steps for word in ("--only", step)]
    command += ["--out", str(tmp_path / "out"), "--name", "dry", str(test)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows, stamp = read_csv(tmp_path / "out" / "dry.csv")
    assert stamp["device"] == "cpu (dry run)"
    assert {row.case for row in rows} >= {"check", "probe", "host", "headline", "sweep", "memory", "sinkhorn"}
    assert {row.impl for row in rows if row.case == "headline" and row.status == OK} >= {"triton", "reference", "copy"}
    about = json.loads((tmp_path / "out" / "dry.json").read_text())
    assert [step["status"] for step in about["steps"]] == [OK] * len(steps)
    assert "not measured" in (tmp_path / "out" / "dry.md").read_text()
    assert (tmp_path / "out" / "dry.png").exists()
