"""`make gpu` as far as it can be tested without a GPU: its steps, its sharded tests, its table, and a dry run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks.common.cases import BOTH, FORWARD
from benchmarks.common.results import Row, read_csv
from benchmarks.common.targets import MET, NOT_MET, UNMEASURED
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import table as gpu_table
from benchmarks.gpu import tests as gpu_tests
from benchmarks.gpu.__main__ import FAILED, OK, SKIPPED, Step
from benchmarks.gpu.cases import GpuCase, copies, dry_plan, full_plan
from benchmarks.gpu.measure import Measure
from setformer_kernels import dispatch
from setformer_kernels.problem import Problem

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main(["--out", str(tmp_path)]) == gpu.NO_GPU
    assert "nothing was run or measured" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_failed_step_does_not_stop_the_next_and_time_passes_on() -> None:
    given = {}

    def step(name: str, status: str) -> tuple[str, object]:
        def run(seconds: float) -> Step:
            given[name] = seconds
            if status == "raises":
                raise RuntimeError("broken")
            return Step(name, status, "")

        return name, run

    steps = [step("build", OK), step("tests", "raises"), step("sanitizer", SKIPPED), step("benchmark", OK)]
    done = gpu.battery(steps, 500.0)  # type: ignore[arg-type]
    assert [s.status for s in done] == [OK, FAILED, SKIPPED, OK]
    assert done[1].summary == "RuntimeError: broken"
    assert given["build"] == pytest.approx(gpu.SECONDS["build"], abs=1)
    assert given["benchmark"] == pytest.approx(500, abs=2), "what earlier steps leave, later ones may use"
    assert all(s.status == SKIPPED for s in gpu.battery(steps, 1.0))  # type: ignore[arg-type]


def test_all_steps_fit_the_promised_time() -> None:
    assert sum(gpu.SECONDS.values()) <= 520
    assert gpu.TOTAL_S < 8 * 60


SUITE = """
import time, pytest
@pytest.mark.parametrize("n", range(6))
def test_passes(n): pass
def test_triton_passes(): pass
def test_fails(): assert 1 == 2, "wrong sum"
@pytest.mark.skip(reason="not here")
def test_skipped(): pass
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "test_some.py"
    path.write_text(SUITE)
    return path


def test_shares_run_every_test_once(suite: Path, tmp_path: Path) -> None:
    found = gpu_tests.run(tmp_path / "out", 60, 3, (str(suite),))
    assert found.counts == {"passed": 7, "failed": 1, "skipped": 1, "left": 0}
    assert len(found.failures) == 1
    assert "wrong sum" in found.failures[0]
    ran = [json.loads(line)["test"] for path in (tmp_path / "out").glob("*.jsonl")
           for line in path.read_text().splitlines() if "test" in line]  # fmt: skip
    assert len(ran) == len(set(ran)) == 9


def test_tests_of_gpu_backends_come_first(suite: Path, tmp_path: Path) -> None:
    gpu_tests.run(tmp_path / "out", 60, 1, (str(suite),))
    records = [json.loads(line) for line in (tmp_path / "out" / "share_0.jsonl").read_text().splitlines()]
    assert records[1]["test"].endswith("test_triton_passes")


@pytest.mark.slow
def test_a_stopped_share_keeps_what_it_found(tmp_path: Path) -> None:
    path = tmp_path / "test_slow.py"
    path.write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(600)\n")
    found = gpu_tests.run(tmp_path / "out", 10, 1, (str(path),))
    assert (found.counts["passed"], found.counts["left"], found.failures) == (1, 1, [])


def test_a_file_that_does_not_import_is_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "test_broken.py"
    path.write_text("import there_is_no_such_module\n")
    found = gpu_tests.run(tmp_path / "out", 60, 1, (str(path),))
    assert len(found.failures) == 1
    assert "there_is_no_such_module" in found.failures[0]


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
    command = [sys.executable, "-m", "pytest", "-p", "bare", *gpu_tests.OPTIONS, "--collect-only", "tests"]
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


def test_a_backend_is_timed_where_its_backward_runs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Half:
        @staticmethod
        def unsupported_reasons(problem: Problem) -> list[str]:
            return ["too many keys"] if (100 if problem.backward else 200) < problem.N else []

    monkeypatch.setattr(dispatch, "NATIVE", {"half": Half})
    measure = Measure(replace(dry_plan(), device="cuda"), 1.0, lambda text: None)
    able = {(mode, L): measure._backends_of(GpuCase("x", L, mode)) for mode in (FORWARD, BOTH) for L in (100, 200, 201)}
    assert [key for key, names in able.items() if names] == [(FORWARD, 100), (FORWARD, 200), (BOTH, 100)]


@pytest.mark.parametrize("nvcc", [True, False])
def test_cuda_kernels_are_built_for_this_machine_where_nvcc_is(
    nvcc: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran = []

    def child(command: list[str], seconds: float, log: Path, **variables: str) -> tuple[int, str]:
        ran.append(variables)
        return 0, ""

    answers = iter([False, True])
    monkeypatch.setattr(gpu, "toolkit", lambda: nvcc)
    monkeypatch.setattr(gpu, "is_built", lambda cuda, folder: next(answers))
    monkeypatch.setattr(gpu, "child", child)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(gpu.shutil, "which", lambda name: "/usr/bin/c++")
    step = gpu.build(60, tmp_path)
    assert step.status == OK
    assert ("no nvcc" in step.summary) == (not nvcc)
    assert [variables.get("SETFORMER_KERNELS_CUDA") for variables in ran] == ["1" if nvcc else None]


def test_an_extension_without_cuda_or_older_than_its_sources_is_built_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for folder in ("setformer_kernels", "csrc"):
        (tmp_path / folder).mkdir()
    built, status = tmp_path / "setformer_kernels" / "_C.x.so", [0]
    for path in (tmp_path / "setup.py", tmp_path / "csrc" / "a.cu", built):
        path.touch()
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "child", lambda *command: (status[0], ""))
    assert gpu.is_built(True, tmp_path)
    status[0] = 1
    assert not gpu.is_built(True, tmp_path)
    status[0] = 0
    os.utime(built, (1, 1))
    assert not gpu.is_built(True, tmp_path)


def test_the_resident_targets_are_the_cuda_backends() -> None:
    rows = [timed("cuda", 3, 49, 15.0, "windows"), timed("sdpa flash", None, 49, 11.0, "windows")]
    rows += [timed("cuda", 3, L, 10.0, "sweep") for L in (256, 512)] + [timed("triton", 3, 256, 16.0, "sweep")]
    rows += [timed("triton", 3, 512, 14.0, "sweep"), timed("triton", 1, 256, 1.0, "sweep")]
    rows += [timed("cuda", 3, 4096, 10.0, "many heads"), timed("copy", None, 4096, 6.0, "many heads")]
    found = {target.what: target.verdict(target.measure(rows)) for target in gpu_table.resident_targets("cuda")}
    assert list(found.values()) == [NOT_MET, MET, UNMEASURED, MET]  # 1.4 at 512; 0.6; –; 11/15 ≥ 0.667


@pytest.mark.slow
def test_dry_run_writes_every_file(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    test = tmp_path / "test_one.py"
    test.write_text("def test_one(): pass\n")
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--only", "tests", "--only", "benchmark"]
    command += ["--out", str(tmp_path / "out"), "--name", "dry", str(test)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows, stamp = read_csv(tmp_path / "out" / "dry.csv")
    assert stamp["device"] == "cpu (dry run)"
    assert {row.case for row in rows} >= {"check", "probe", "host", "headline", "sweep", "memory", "sinkhorn"}
    assert {row.impl for row in rows if row.case == "headline" and row.status == OK} >= {"triton", "reference", "copy"}
    about = json.loads((tmp_path / "out" / "dry.json").read_text())
    assert [step["status"] for step in about["steps"]] == [OK, OK]
    assert "not measured" in (tmp_path / "out" / "dry.md").read_text()
