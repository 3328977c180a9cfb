"""`python -m benchmarks.gpu.results FOLDER...`: the files of a run from its journal, of several calls joined into one.

NAME.csv (the table), NAME.json (environment, steps), NAME.md (targets and times), NAME.png, NAME_profile.csv.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.common import entry_point
from benchmarks.common.hardware import ROOT, commit, cpu_flags, cpu_model, default_threads, environment
from benchmarks.common.results import Stamp, write_csv
from benchmarks.gpu import table
from benchmarks.gpu.device import Cpu, Gpu
from benchmarks.gpu.journal import Journal, Record, rows
from benchmarks.gpu.steps import Step

SAME = ("commit", "device", "torch")  # what the calls that are joined have in common


def about(dry: bool, of: str | None = None) -> Record:
    """The machine and the software: what the JSON says, and what the rows of this call share."""
    import torch

    found = environment(default_threads())
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        facts = {"name": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count}
        found["gpu"] = {**facts, "memory_bytes": p.total_memory, "cuda": torch.version.cuda, "driver": _driver()}
    device = Cpu() if dry or not torch.cuda.is_available() else Gpu()
    today = datetime.now(timezone.utc).date().isoformat()
    stamp = Stamp(of or commit(), cpu_model(), cpu_flags(), default_threads(), device.label(), torch.__version__,
                  sys.version.split()[0], today)  # fmt: skip
    return {**found, "commit": stamp.commit, "stamp": asdict(stamp)}


def _driver() -> str:
    """Driver version and clocks as nvidia-smi reports them."""
    query = "driver_version,clocks.max.sm,clocks.max.memory,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"


def differing(records: Sequence[Record]) -> str:
    """In what the calls of these records differ that makes them no one result; empty where in nothing."""
    stamps = [record["about"]["stamp"] for record in records if "about" in record]
    for name in SAME:
        values = list(dict.fromkeys(stamp[name] for stamp in stamps))
        if len(values) > 1:
            return f"{name}: {' and '.join(values)}"
    return ""


def steps_of(records: Sequence[Record]) -> list[Step]:
    """Every step of every call, as they ran."""
    told = [record["step"] for record in records if "step" in record]
    return [Step(**{**step, "details": tuple(step["details"])}) for step in told]


def write(csv_path: Path, records: Sequence[Record], plot: bool = True) -> None:
    """Every file of a run beside `csv_path`; a plot takes a second that a GPU may have to wait for."""
    abouts = [record["about"] for record in records if "about" in record]
    stamp: Mapping[str, Any] = abouts[-1]["stamp"]
    told = {key: value for key, value in abouts[-1].items() if key != "stamp"}
    steps, found = steps_of(records), rows(records)
    chips = [record["chip"] for record in records if "chip" in record]
    told |= {"chip": chips[-1]} if chips else {}
    told |= {"calls": len(abouts), "steps": [asdict(step) for step in steps]}
    csv_path.with_suffix(".json").write_text(json.dumps(told, indent=2) + "\n")
    lines = ["# GPU", "", "| step | | | s |", "|---|---|---|---|"]
    lines += [f"| {s.name} | {s.status} | {s.summary.replace('|', '/')} | {s.seconds:.0f} |" for s in steps]
    if found:
        write_csv(csv_path, found, Stamp(**stamp))
        lines += ["", table.render(found, {key: str(value) for key, value in stamp.items()})]
        if importlib.util.find_spec("matplotlib") is not None and plot:
            table.draw(found, stamp, csv_path.with_suffix(".png"))
        elif plot:
            lines += ["", "No plot: matplotlib is not installed."]
    lines += _profiled(csv_path, [record["profile"] for record in records if "profile" in record])
    csv_path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _profiled(csv_path: Path, metrics: Sequence[Record]) -> list[str]:
    """What profilers say, as a file of its own; the times of kernels as markdown too."""
    if not metrics:
        return []
    path = csv_path.with_name(f"{csv_path.stem}_profile.csv")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(metrics[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(metrics)
    lines = ["", f"Kernels of a forward + backward, T = 3 (all metrics: `{path.name}`):", ""]
    lines += ["| backend | L | kernel | | µs |", "|---|---|---|---|---|"]
    for m in metrics:
        if m["section"] == "torch.profiler":
            lines.append(f"| {m['backend']} | {m['L']} | {m['kernel'][:60]} | {m['metric']} | {m['value']:.1f} |")
    return lines


def joined(folders: Sequence[Path], name: str | None) -> tuple[str, list[Record]]:
    """The name of a run and the records of its journals in several folders, in the order of their calls."""
    paths = [path for folder in folders for path in sorted(folder.glob(f"{name or '*'}.jsonl"))]
    names = list(dict.fromkeys(path.stem for path in paths))
    if not paths:
        raise entry_point.NotHereError(f"no journal {name or '*'}.jsonl in {', '.join(map(str, folders))}")
    if len(names) > 1 and name is None:
        raise entry_point.NotHereError(f"journals of several runs: {', '.join(names)}; choose one with --name")
    journals = [records for path in paths if (records := Journal(path).read())]
    journals.sort(key=lambda records: str(next((r["about"]["date"] for r in records if "about" in r), "")))
    records = [record for one in journals for record in one]
    if other := differing(records):
        raise entry_point.NotHereError(f"these are not parts of one result, they differ in {other}")
    return names[0], records


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.results", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="what calls of `make gpu` wrote")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--name", help="of the run, where the folders hold several")
    arguments = parser.parse_args(argv)
    name, records = joined(arguments.folders, arguments.name)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write(arguments.out / f"{name}.csv", records)
    print((arguments.out / f"{name}.md").read_text())
    return 0


if __name__ == "__main__":
    entry_point.run("benchmarks.gpu.results", main)
