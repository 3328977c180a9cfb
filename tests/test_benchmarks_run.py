"""`python -m benchmarks --quick` as a user runs it: files, columns, plot, table; and that wrong results stop it."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks import __main__ as command
from benchmarks.common import correctness, implementations
from benchmarks.common.cases import Entry, MemoryCase, quick_plan
from benchmarks.common.hardware import ROOT
from benchmarks.common.results import COLUMNS, OK
from benchmarks.cpu import memory


@pytest.fixture(autouse=True)
def _same_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A quick run's folder and what it printed."""
    folder = tmp_path_factory.mktemp("results")
    done = run("--quick", "--threads", "1", "--out", str(folder), "--name", "quick")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_quick_run_writes_csv_environment_and_plot(quick):
    folder, output = quick
    with (folder / "quick.csv").open(newline="") as file:
        records = list(csv.DictReader(file))
    assert tuple(records[0]) == COLUMNS
    timed = [record for record in records if record["case"] in ("headline", "sweep") and record["metric"] == "time"]
    assert {record["impl"] for record in timed} == {"set", "sdpa", "reference", "compiled", "elu"}
    for record in timed:
        if record["status"] == OK:
            assert 0 < float(record["q25"]) <= float(record["median"]) <= float(record["q75"])
            assert int(record["runs"]) >= 3
        else:
            assert record["note"]
            assert record["median"] == ""
    assert all(record["ratio"] == "1" for record in timed if record["impl"] == "set")
    about = json.loads((folder / "quick.json").read_text())
    assert {"commit", "cpu", "versions", "threads", "correctness"} <= set(about)
    assert (folder / "quick.png").read_bytes().startswith(b"\x89PNG")
    assert output.index("correct:") < output.index("headline:"), "correctness comes first"


@pytest.mark.slow
def test_table_and_plot_commands(quick, tmp_path):
    csv_path = str(quick[0] / "quick.csv")
    shown = run("table", csv_path)
    assert shown.returncode == 0
    assert "| where | what | target |" in shown.stdout
    assert "not measured" in shown.stdout
    drawn = run("plot", csv_path, "--out", str(tmp_path / "again.png"))
    assert drawn.returncode == 0
    assert (tmp_path / "again.png").stat().st_size > 10_000


@pytest.mark.parametrize("arguments", [("table", "/nonexistent.csv"), ("--device", "abacus"), ("--only", "lunch")])
def test_bad_arguments_are_refused(arguments, capsys):
    try:
        code = command.main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    assert code != 0
    assert capsys.readouterr().err


def test_a_wrong_implementation_stops_the_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(implementations, "_elu", lambda x: torch.zeros_like(x.value) + 0 * (x.query + x.key + x.value))
    assert command.main(["--quick", "--threads", "1", "--out", str(tmp_path)]) == 1
    assert "elu" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_wrong_package_result_is_found(monkeypatch):
    true = correctness.SF.set_attention

    def off(*tensors, backend, **keywords):
        return true(*tensors, backend=backend, **keywords) * (1 + 1e-5 * (backend == "auto"))

    monkeypatch.setattr(correctness.SF, "set_attention", off)
    with pytest.raises(correctness.Wrong, match="budget"):
        correctness.check(quick_plan(), log=lambda text: None)


def test_a_failing_memory_child_is_reported():
    with pytest.raises(RuntimeError, match="KeyError"):
        memory.measure(MemoryCase(Entry("nonsense", 3), 64), threads=1)


def test_elu_is_linear_attention():
    assert correctness._check_other(Entry("elu", None), 33) < correctness.SANITY


def test_host_command_times_each_launch_beside_another_checkout(tmp_path):
    pytest.importorskip("triton")
    path = tmp_path / "host.csv"
    few = ["--rounds", "2", "--calls", "2", "--only", "launch: transport_kernel", "--out", str(path)]
    command = [sys.executable, "-m", "benchmarks.compiled.host", "--against", str(ROOT), *few]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with path.open(newline="") as file:
        records = list(csv.DictReader(file))
    assert [(record["checkout"], record["rounds"]) for record in records] == [("before", "2"), ("now", "2")]
    for record in records:
        assert 0 < float(record["best_us"]) <= float(record["median_us"])
    assert records[0]["step"] in done.stdout
