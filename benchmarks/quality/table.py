"""The table: mean ± standard deviation over the seeds, a row a variant, a column a task."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

from benchmarks.quality.results import Record
from benchmarks.quality.tasks import TASKS, Task


def scores(rows: Sequence[Record], task: str, variant: str) -> list[float]:
    """Scores in percent, by seed."""
    found = [one for one in rows if (one["task"], one["variant"]) == (task, variant)]
    return [100 * float(one["score"]) for one in sorted(found, key=lambda one: int(one["seed"]))]


def cell(found: Sequence[float]) -> str:
    """Mean ± sample standard deviation."""
    if not found:
        return "not measured"
    return f"{mean(found):.1f}" + (f" ± {stdev(found):.1f}" if len(found) > 1 else "")


def measured_tasks(rows: Sequence[Record]) -> list[Task]:
    """The tasks that have rows, in the order of `TASKS`."""
    return [task for task in TASKS if any(one["task"] == task.name for one in rows)]


def variants(rows: Sequence[Record]) -> list[str]:
    """The variants in the order in which they were run: softmax attention first."""
    return list(dict.fromkeys(one["variant"] for one in rows))


def render(rows: Sequence[Record]) -> str:
    """The table for a README, and what it was measured on."""
    tasks = measured_tasks(rows)
    head = ["", *(f"{task.title}: {task.metric}" for task in tasks)]
    body = [[name, *(cell(scores(rows, task.name, name)) for task in tasks)] for name in variants(rows)]
    lines = [head, ["---"] * len(head), *body]
    seeds = sorted({int(one["seed"]) for one in rows})
    stamps = sorted({(one["cpu"], one["threads"], one["torch"], one["commit"], one["date"]) for one in rows})
    where = [
        f"{cpu}, threads: {threads}, float32; torch {torch}, commit {commit}, {date}"
        for cpu, threads, torch, commit, date in stamps
    ]
    caption = f"Percent, mean ± standard deviation over {len(seeds)} seeds; {'; '.join(where)}."
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", caption])
