"""The table: mean ± standard deviation over the seeds, a row a variant, a column a task."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

from benchmarks.common import markdown
from benchmarks.quality import language
from benchmarks.quality.results import Record
from benchmarks.quality.tasks import TASKS, Task


def scores(rows: Sequence[Record], task: str, variant: str) -> list[float]:
    """Scores by seed, shares in percent."""
    found = [one for one in rows if (one["task"], one["variant"]) == (task, variant)]
    scale = 1 if task in language.BY_NAME else 100
    return [scale * float(one["score"]) for one in sorted(found, key=lambda one: int(one["seed"]))]


def cell(found: Sequence[float], digits: int = 1) -> str:
    """Mean ± sample standard deviation."""
    if not found:
        return "not measured"
    return f"{mean(found):.{digits}f}" + (f" ± {stdev(found):.{digits}f}" if len(found) > 1 else "")


def digits(task: Task) -> int:
    return 3 if task.metric == language.METRIC else 1


def measured_tasks(rows: Sequence[Record]) -> list[Task]:
    """The tasks that have rows, in the order of `TASKS`."""
    return [task for task in (*TASKS, *language.TASKS) if any(one["task"] == task.name for one in rows)]


def variants(rows: Sequence[Record]) -> list[str]:
    """The variants in the order in which they were run: softmax attention first."""
    return list(dict.fromkeys(one["variant"] for one in rows))


def render(rows: Sequence[Record]) -> str:
    """The table for a README, and what it was measured on."""
    tasks = measured_tasks(rows)
    head = ["", *(f"{task.title}: {task.metric}" for task in tasks)]
    body = [[name, *(cell(scores(rows, task.name, name), digits(task)) for task in tasks)] for name in variants(rows)]
    seeds = sorted({int(one["seed"]) for one in rows})
    stamps = sorted({(one["cpu"], one["threads"], one["torch"], one["commit"], one["date"]) for one in rows})
    where = [markdown.where(*stamp) for stamp in stamps]
    units = {task.metric if task.metric == language.METRIC else "percent" for task in tasks}
    unit = " and ".join(sorted(units)).capitalize()
    caption = f"{unit}, mean ± standard deviation over {len(seeds)} seeds; {'; '.join(where)}."
    return "\n".join([*markdown.table(head, body), "", caption])
