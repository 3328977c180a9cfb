"""`make gpu` rehearsed on stand-ins for device, clock, profiler and processes: whatever fails, the rest is there."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from gpu_stand_ins import BACKENDS, BINARIES, TESTS, World, install, plan

from benchmarks.common.results import FAILED as ROW_FAILED
from benchmarks.common.results import OK as MEASURED
from benchmarks.common.results import Row, read_csv
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import plugin, results
from benchmarks.gpu.journal import Journal, Log, identity, rows
from benchmarks.gpu.measure import Measure
from benchmarks.gpu.steps import FAILED, OK, SECONDS, Run, Step

STAMP = {"commit": "abc", "cpu": "c", "cpu_flags": "", "threads": 2, "device": "stand-in", "torch": "2", "python": "3",
         "date": "2026-01-01"}  # fmt: skip


Undisturbed = tuple[dict[str, Step], set[tuple[Any, ...]]]


class Rehearsal:
    """Calls of the command on one machine, into one folder."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch
        self.journal = Journal(folder / "run.jsonl")
        self.world = World()

    def run(self, accidents: dict[str, str] | None = None, only: tuple[str, ...] = (), total: float = 2000.0,
            tools: tuple[str, ...] = World.tools) -> dict[str, Step]:  # fmt: skip
        self.world = World(accidents=accidents or {}, tools=tools)
        install(self.world, self.patch)
        self.journal.write(about={"date": "2026-01-01T00:00:00", "stamp": STAMP})
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        run = Run(self.journal, logs, system=self.world, backends=BACKENDS)
        done = gpu.finished(run, self.folder / "run.csv", only, total, dict(SECONDS))
        return {step.name: step for step in done}

    @property
    def rows(self) -> list[Row]:
        return rows(self.journal.read())

    @property
    def complete(self) -> set[tuple[Any, ...]]:
        """What the rows that are measured are about; rows themselves hold NaN, and differ."""
        return {identity(row) for row in self.rows if row.status == MEASURED}

    def measured(self, backend: str, case: str = "") -> list[Row]:
        """The rows that one backend's processes measured."""
        return [r for r in self.rows if r.backend == backend and r.status == MEASURED and case in ("", r.case)]


@pytest.fixture
def rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rehearsal:
    return Rehearsal(tmp_path, monkeypatch)


def test_where_nothing_fails_every_step_is_well(rehearsal: Rehearsal) -> None:
    done = rehearsal.run()
    assert list(done) == list(SECONDS)
    assert {name: step.summary for name, step in done.items() if step.status != OK} == {}
    counts = {backend: len(rehearsal.measured(backend)) for backend in BACKENDS}
    assert counts["cuda"] == counts["triton"] > 20
    assert not [row for row in rehearsal.rows if row.status == ROW_FAILED]
    ended = [r["end"] for r in rehearsal.journal.read() if r.get("outcome") == "passed"]
    assert sorted(ended) == sorted(TESTS)
    assert all(process.ended for process in rehearsal.world.processes)


def test_the_files_are_those_that_the_table_reads(rehearsal: Rehearsal) -> None:
    rehearsal.run()
    found, stamp = read_csv(rehearsal.folder / "run.csv")
    assert len(found) == len(rehearsal.rows)
    assert stamp["device"] == "stand-in"
    about = json.loads((rehearsal.folder / "run.json").read_text())
    assert [step["name"] for step in about["steps"]] == list(SECONDS)
    assert about["chip"]["clusters_at_once"] == {"1": 132, "2": 64, "4": 28, "8": 13}, "the driver's word, no estimate"
    assert "| `cuda` | what | target |" in (rehearsal.folder / "run.md").read_text()
    assert "Duration" in (rehearsal.folder / "run_profile.csv").read_text()
    assert len([path for path in rehearsal.folder.iterdir() if path.is_file()]) <= 8


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The steps and the rows of a run in which nothing fails."""
    with pytest.MonkeyPatch.context() as patch:
        one = Rehearsal(tmp_path_factory.mktemp("undisturbed"), patch)
        return one.run(), one.complete


# Where, the step that says so, and what of the failure it names.
PLACES = {
    "canary cuda": ("canary", "cuda"), "canary triton": ("canary", "triton"),
    "headline forward cuda: cuda T=3": ("headline", "cuda T=3"),
    "headline forward cuda: cuda T=3 later": ("headline", "headline forward"),
    "headline forward+backward triton: triton T=1": ("headline", "triton T=1"),
    "host cuda": ("headline", "host"), "sweep forward+backward triton: triton T=3": ("sweep", "triton T=3"),
    "compiled forward cuda: cuda T=3": ("compiled", "compiled"),
    TESTS[0]: ("kernels", "1 failed"), TESTS[3]: ("kernels", "1 failed"), TESTS[4]: ("tests", "1 failed"),
    f"warm {BINARIES[1]}": ("warm", BINARIES[1]), "smoke cuda": ("sanitizer", "cuda"),
    "racecheck cuda": ("sanitizer", "cuda racecheck"), "memcheck triton": ("sanitizer", "triton memcheck"),
    "profile cuda 4096": ("profile", "cuda L=4096"), "ncu triton 16384": ("profile", "triton L=16384"),
    "build": ("build", "without the C++ extension"),
}  # fmt: skip
# A hang that ends a tool's time, and a profiler that is refused, are no failure of the kernels.
NO_FAILURE = {(place, "hang") for place in PLACES if place.split()[0] in ("smoke", "racecheck", "memcheck")}


@pytest.mark.parametrize("accident", ["raise", "hang", "sticky", "die", "wrong"])
@pytest.mark.parametrize("place", PLACES)
def test_an_accident_is_named_and_costs_itself_alone(
    place: str, accident: str, rehearsal: Rehearsal, undisturbed: Undisturbed
) -> None:
    expected, complete = undisturbed
    done = rehearsal.run({place: accident})
    step, named = PLACES[place]
    assert place in rehearsal.world.met
    assert named in done[step].summary
    if (place, accident) not in NO_FAILURE and not place.startswith("ncu"):
        assert done[step].status == FAILED
    others = {name: s.summary for name, s in done.items() if name != step and s.status != expected[name].status}
    assert others == {}, "another step failed with it"
    lost = {row[:3] + row[-1:] for row in complete - rehearsal.complete}
    assert {backend for *_, backend in lost} <= (
        {"cuda"} if "cuda" in place else {"triton"} if "triton" in place else set()
    )
    if not place.startswith("canary"):
        assert len({(case, mode) for case, _, mode, _ in lost}) <= 1, "more than a case was lost"
    assert all(process.ended for process in rehearsal.world.processes)


def test_a_dropped_backend_is_named_in_the_table_and_timed_nowhere(rehearsal: Rehearsal) -> None:
    done = rehearsal.run({"canary cuda": "wrong"})
    assert done["canary"].summary == "cuda is dropped: wrong: canary cuda: error 1, budget 0.1; triton is right"
    assert rehearsal.measured("cuda") == []
    assert len(rehearsal.measured("triton")) > 20
    assert "Not measured: `cuda`, dropped: wrong" in (rehearsal.folder / "run.md").read_text()
    workers = [c for c in rehearsal.world.commands if "benchmarks.gpu.measure" in c or "benchmarks.gpu.smoke" in c]
    assert workers
    assert not [command for command in workers if "cuda" in command]
    ended = [r["end"] for r in rehearsal.journal.read() if r.get("outcome") == "passed"]
    assert sorted(ended) == sorted(TESTS), "its tests still say what is wrong, after the others"


def test_an_opponent_that_breaks_the_context_is_left_out_and_the_case_is_timed(rehearsal: Rehearsal) -> None:
    rehearsal.run({"headline forward triton: sdpa flash": "sticky"}, only=("headline",))
    case = [row for row in rehearsal.rows if (row.case, row.mode, row.backend) == ("headline", "forward", "triton")]
    assert {(row.impl, row.T): row.status for row in case} == {
        ("triton", 3): MEASURED, ("triton", 1): MEASURED, ("sdpa flash", None): ROW_FAILED, ("copy", None): MEASURED,
    }  # fmt: skip
    assert next(row for row in case if row.impl == "sdpa flash").note.startswith("RuntimeError: CUDA error: an illegal")


def test_a_row_is_in_the_journal_before_the_next_case_begins(rehearsal: Rehearsal) -> None:
    rehearsal.run({"sweep forward+backward triton: triton T=3": "hang"}, only=("headline", "sweep"))
    told = [record for record in rehearsal.journal.read() if record.get("worker") == "headline triton"]
    kinds = [next(kind for kind in ("plan", "begin", "row", "end") if kind in record) for record in told]
    ends = [place for place, kind in enumerate(kinds) if kind == "end"]
    assert all("row" in kinds[begin:end] for begin, end in zip([0, *ends], ends, strict=False))


def test_a_later_call_goes_on_and_parts_are_joined(rehearsal: Rehearsal, tmp_path: Path) -> None:
    rehearsal.run({TESTS[2]: "hang"}, only=("canary", "kernels", "headline"))
    first = rehearsal.complete
    done = rehearsal.run(only=("kernels", "headline", "sweep"))
    assert list(done) == ["kernels", "headline", "sweep"], "the canary of the first call stands"
    assert rehearsal.complete > first
    assert not [c for c in rehearsal.world.commands if "benchmarks.gpu.canary" in c]
    assert done["kernels"].summary == "1 passed", "what was run is not run again; what was lost is"

    other = tmp_path / "other"
    other.mkdir()
    second = Rehearsal(other, rehearsal.patch)
    assert list(second.run(only=("compiled",))) == ["canary", "compiled"]
    second.journal.path.rename(other / "run.jsonl")
    results.main([str(tmp_path), str(other), "--out", str(tmp_path / "joined")])
    found, _ = read_csv(tmp_path / "joined" / "run.csv")
    assert {"headline", "sweep", "compiled"} <= {row.case for row in found if row.status == MEASURED}
    assert len(json.loads((tmp_path / "joined" / "run.json").read_text())["steps"]) == 3 + 3 + 2


def test_parts_of_different_commits_are_no_result(rehearsal: Rehearsal, tmp_path: Path) -> None:
    rehearsal.run(only=("canary",))
    other = tmp_path / "other"
    other.mkdir()
    Journal(other / "run.jsonl").write(about={"date": "2026-01-02", "stamp": STAMP | {"commit": "def"}})
    with pytest.raises(results.entry_point.NotHereError, match="differ in commit: abc and def"):
        results.joined([tmp_path, other], None)


def test_what_the_time_does_not_reach_says_so(rehearsal: Rehearsal) -> None:
    hangs = {"headline forward cuda: cuda T=3": "hang", "headline forward+backward triton: triton T=3": "hang"}
    done = rehearsal.run(hangs, only=("canary", "headline", "sweep"), total=30.0)
    assert done["sweep"].summary == "out of time"
    assert rehearsal.measured("triton", "headline"), "the other backend has its share of the time"
    late = [row for row in rehearsal.rows if row.status == "skipped"]
    assert late
    assert {row.note for row in late} == {"out of time"}


def test_a_worker_whose_time_is_over_begins_no_case(rehearsal: Rehearsal) -> None:
    install(rehearsal.world, rehearsal.patch)
    log = Log(rehearsal.journal, "sweep cuda")
    assert Measure(plan(), "cuda", rehearsal.world.device, log, -1.0).run("sweep") == 0  # type: ignore[arg-type]
    assert rehearsal.rows
    assert {(row.status, row.note) for row in rehearsal.rows} == {("skipped", "out of time")}
    assert not [record for record in rehearsal.journal.read() if "begin" in record]


CHECKS = ["memcheck", "racecheck", "synccheck", "initcheck"]


def test_the_cuda_kernels_are_watched_first(rehearsal: Rehearsal) -> None:
    rehearsal.run(only=("canary", "sanitizer"))
    watched = [c for c in rehearsal.world.commands if c[0].endswith("compute-sanitizer")]
    order = [(c[c.index("--backend") + 1], c[c.index("--tool") + 1]) for c in watched]
    assert order == [(backend, check) for backend in BACKENDS for check in CHECKS]
    assert all(("--dtype" in c) == ("triton" in c) for c in watched), "Triton's kernels in one dtype"
    assert all(("--kernel-name" in c) == ("initcheck" not in c) for c in watched), "who wrote what ours read is watched"


def test_tools_watch_side_by_side_and_one_that_hangs_takes_no_other_its_time(rehearsal: Rehearsal) -> None:
    done = rehearsal.run({"racecheck cuda": "hang"}, only=("canary", "sanitizer"))
    said = dict(note.split(": ", 1) for note in done["sanitizer"].summary.split("; "))
    assert said["cuda racecheck"].startswith("out of time at ")
    assert {said[f"cuda {check}"] for check in CHECKS if check != "racecheck"} == {"========= ERROR SUMMARY: 0 errors"}
    assert rehearsal.world.most_at_once == 2, "as many as there are cores"


def test_without_tools_the_steps_say_so(rehearsal: Rehearsal) -> None:
    done = rehearsal.run(only=("canary", "profile", "sanitizer"), tools=("nvcc",))
    assert "ncu is not on the PATH" in done["profile"].summary
    assert "compute-sanitizer is not on the PATH" in done["sanitizer"].summary
    assert {done["profile"].status, done["sanitizer"].status} == {"skipped"}
    times = [record["profile"] for record in rehearsal.journal.read() if "profile" in record]
    assert {(m["backend"], m["L"], m["value"]) for m in times} == {
        (b, L, 12.5) for b in BACKENDS for L in (4096, 16384)
    }


def test_a_worker_that_cannot_begin_is_not_started_again(rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "measure", lambda self, arguments, out: print("ImportError: no", file=out) or 1)
    done = rehearsal.run(only=("canary", "headline"))
    assert done["headline"].status == FAILED
    assert "cuda broke off: died (exit status 1): ImportError: no" in done["headline"].summary
    assert len([c for c in rehearsal.world.commands if "benchmarks.gpu.measure" in c]) == len(BACKENDS)


def test_a_cut_line_costs_that_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    journal.write(end="a")
    with journal.path.open("a") as file:
        file.write('{"end": "b')
    assert journal.read() == [{"end": "a"}]
    assert Journal(journal.path).follow() == []


# Node -> its place in the order on a machine with a GPU; None: it is not run there.
RANKS = {
    "tests/test_cuda_kernels.py::test_pooling[gpu-plain]": 0,
    "tests/test_cuda_kernels.py::test_pooling[shim-plain]": None,
    "tests/test_backends.py::test_output[triton-plain-torch.float32]": 1,
    "tests/test_triton_causal.py::test_lengths": 1,
    "tests/test_backends.py::test_output[cpu-plain-torch.float32]": 3,
    "tests/test_ops.py::test_opcheck": 2,
    "tests/test_install_build.py::test_wheel": 3,
    "tests/test_triton_resources.py::test_no_spills": None,
    "tests/test_cuda_resources.py::test_no_spills": None,
    "tests/test_gpu_command.py::test_dry_run_writes_every_file": None,
    "tests/test_gpu_rehearsal.py::test_limits": None,
}


@pytest.mark.parametrize("node", RANKS)
def test_what_needs_a_gpu_comes_first_and_stand_ins_never(node: str) -> None:
    assert plugin.rank(node) == RANKS[node]


def test_tests_that_take_the_shim_as_a_fixture_never_run_on_a_gpu() -> None:
    node = "tests/test_cuda_kernels.py::test_both_orders_of_threads_agree_bit_for_bit[pair]"
    assert plugin.rank(node, ("shim", "monkeypatch")) is None
    assert plugin.rank(node, ("backend", "monkeypatch")) == 0


def test_files_of_the_kernels_own_tests_are_there() -> None:
    root = Path(__file__).resolve().parents[1]
    assert [file for file in plugin.FILES if not (root / file).is_file()] == []
    assert {name for name in plugin.NEVER if not (root / "tests" / f"{name}.py").is_file()} == set()


def test_limits_are_of_the_run_and_of_steps() -> None:
    assert gpu.limits([]) == (gpu.TOTAL_S, SECONDS)
    total, each = gpu.limits(["300", "sweep=200"])
    assert (total, each["sweep"], each["canary"]) == (300.0, 200.0, SECONDS["canary"])
    for wrong in ("x", "sweep=x", "nothing=3"):
        with pytest.raises(ValueError, match=f"got '{wrong}'"):
            gpu.limits([wrong])


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")
def test_what_a_stopped_command_has_started_ends_with_it(tmp_path: Path) -> None:
    from benchmarks.gpu.process import System, child

    command = ["sh", "-c", f"sleep 60 & echo $! > {tmp_path}/pid; wait"]
    status, _ = child(System(), command, 0.5, tmp_path / "log")
    assert status is None
    stat = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
    deadline = time.monotonic() + 10
    while runs(stat) and time.monotonic() < deadline:  # a signal takes its time where the machine is busy
        time.sleep(0.02)
    assert not runs(stat)


def runs(stat: Path) -> bool:
    """Whether a process is there and no mere entry of one that ended."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
