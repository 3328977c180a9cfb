"""Quality at length: `python -m benchmarks.quality.long [run] --minutes 30`, again and again; `table CSV`.

ListOps at the Long Range Arena's own lengths (500 to 2000), and bytes of text at 2048 and 4096, with the encoder of the
short tasks (width 64, 2 heads, 2 blocks).  Every run is trained in pieces: what a call has no minutes left for goes on
in the next one from where it stood, to the weights that one piece would have had; what the results have whole is left.
A row every EVERY steps: the mean loss since the last one, the score on the test, and the CPU seconds of all training
steps so far.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from benchmarks.common import entry_point
from benchmarks.common.hardware import ROOT
from benchmarks.common.results import Stamp, stamp
from benchmarks.quality.tasks import Budget, Task, listops_task, text_task
from benchmarks.quality.train import VARIANTS, Variant, initial
from benchmarks.tasks import listops
from benchmarks.tasks.training import Trainer, predict, rate

EVERY, TEST_BATCH, SEEDS = 100, 25, 2
# The arena trains 5000 steps of 32; what two cores allow is less, and the schedule ends where the budget does.
TASKS = (
    listops_task("listops2k", listops.ARENA, Budget(1500, 32, 1e-3, train=12_000, test=500)),
    text_task("text2k", 2048, Budget(400, 16, 1e-3, test=400)),
    text_task("text4k", 4096, Budget(400, 8, 1e-3, test=200)),
)
NAMES = ("softmax", "SeT, T = 1", "SeT, T = 3", "elu linear")


@dataclass(frozen=True)
class Row:
    """Where one run stood after `step` of `steps`."""

    task: str
    variant: str
    seed: int
    step: int
    steps: int
    loss: float
    score: float
    cpu_seconds: float  # of the training steps so far


@dataclass
class Run:
    """One task, attention and seed, from its last checkpoint on."""

    task: Task
    variant: Variant
    seed: int
    folder: Path
    step: int = 0
    cpu_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.data = self.task.data(self.task.budget)
        self.rng = np.random.default_rng(self.seed)
        self.model = initial(self.task, self.variant, self.seed)
        self.trainer = Trainer(self.model, lambda: self.data.sample(self.task.budget.batch, self.rng))
        if self.path.exists():
            self._load(torch.load(self.path, weights_only=False))

    @property
    def path(self) -> Path:
        words = f"{self.task.name} {self.variant.name} {self.seed}"
        return self.folder / f"{''.join(c if c.isalnum() else '_' for c in words)}.pt"

    def _load(self, saved: dict) -> None:
        self.model.load_state_dict(saved["model"])
        self.trainer.optimizer.load_state_dict(saved["optimizer"])
        self.rng.bit_generator.state = saved["rng"]
        self.step, self.cpu_seconds, self.losses = saved["step"], saved["cpu_seconds"], saved["losses"]

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(), "optimizer": self.trainer.optimizer.state_dict(),
            "rng": self.rng.bit_generator.state, "step": self.step, "cpu_seconds": self.cpu_seconds,
            "losses": self.losses,
        }  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        torch.save(state, beside)
        os.replace(beside, self.path)

    def rows(self, goes_on: Callable[[], bool], every: int = EVERY) -> Iterator[Row]:
        """Trains until the budget ends or `goes_on` says no, then saves; a row every so many steps."""
        budget = self.task.budget
        while self.step < budget.steps and goes_on():
            start = time.process_time()
            progress = (self.step + 0.5) / budget.steps
            self.losses.append(self.trainer.step(budget.learning_rate * rate(progress))[0])
            self.cpu_seconds += time.process_time() - start
            self.step += 1
            if self.step % every == 0 or self.step == budget.steps:
                score = self.task.score(predict(self.model, self.data.tokens, TEST_BATCH), self.data.labels)
                loss, self.losses = mean(self.losses), []
                self.save()
                yield Row(
                    self.task.name, self.variant.name, self.seed, self.step, budget.steps, loss, score,
                    self.cpu_seconds,
                )  # fmt: skip
        self.save()


def runs(names: Sequence[str], variants: Sequence[str], seeds: int) -> list[tuple[Task, Variant, int]]:
    """Seed by seed, so that what is cut off has all attentions."""
    tasks = [task for task in TASKS if not names or task.name in names]
    chosen = [next(v for v in VARIANTS if v.name == name) for name in variants or NAMES]
    return [(task, variant, seed) for task, seed, variant in itertools.product(tasks, range(seeds), chosen)]


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def of(rows: Iterable[dict[str, str]], task: Task, variant: Variant, seed: int) -> list[dict[str, str]]:
    """What the results have of one run."""
    return [row for row in rows if (row["task"], row["variant"], row["seed"]) == (task.name, variant.name, str(seed))]


def write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    names = [f.name for kind in (Row, Stamp) for f in fields(kind)]
    beside = path.with_suffix(".part")
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(beside, path)


def table(rows: Sequence[dict[str, str]]) -> str:
    """Of each task and attention the last score of every seed, how far it is, and CPU seconds a step, as markdown."""
    lines = ["| task | attention | score, percent, a seed | steps | CPU seconds a step |", "|---|---|---|---|---|"]
    for task, variant in dict.fromkeys((row["task"], row["variant"]) for row in rows):
        own = [row for row in rows if (row["task"], row["variant"]) == (task, variant)]
        last = {row["seed"]: row for row in own}.values()
        scores = ", ".join(f"{100 * float(row['score']):.1f}" for row in last)
        steps = ", ".join(f"{row['step']} of {row['steps']}" for row in last)
        seconds = mean(float(row["cpu_seconds"]) / int(row["step"]) for row in last)
        lines.append(f"| {task} | {variant} | {scores} | {steps} | {seconds:.3f} |")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Score against training steps and against CPU time, a row a task (needs matplotlib)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, panels = pyplot.subplots(len(tasks), 2, figsize=(9, 3 * len(tasks)), squeeze=False, layout="constrained")
    for pair, task in zip(panels, tasks, strict=True):
        for axes, key in zip(pair, ("step", "cpu_seconds"), strict=True):
            for number, variant in enumerate(dict.fromkeys(row["variant"] for row in rows)):
                for seed in sorted({row["seed"] for row in rows}):
                    own = [r for r in rows if (r["task"], r["variant"], r["seed"]) == (task, variant, seed)]
                    label = variant if seed == "0" else None
                    points = [float(r[key]) for r in own], [100 * float(r["score"]) for r in own]
                    axes.plot(*points, color=f"C{number}", label=label, alpha=0.8)
            axes.set(title=task, xlabel=key.replace("_", " "), ylabel="score, %")
    panels[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.quality.long", description=__doc__)
    commands = found.add_subparsers(dest="command")
    run = commands.add_parser("run", help="train on (the default)")
    run.add_argument("--minutes", type=float, default=float("inf"), help="after which it stops, to go on another time")
    run.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    run.add_argument("--work", type=Path, default=ROOT / "build" / "long", help="folder of the checkpoints")
    run.add_argument("--name", default="quality_long", help="file name without ending")
    run.add_argument("--task", choices=[task.name for task in TASKS], action="append", help="only this (repeatable)")
    run.add_argument(
        "--variant", choices=[v.name for v in VARIANTS], action="append", metavar="NAME", help="likewise, attentions"
    )
    run.add_argument("--seeds", type=int, default=SEEDS, help=f"how many seeds, from 0 (default: {SEEDS})")
    run.add_argument("--threads", type=int, default=1)
    shown = commands.add_parser("table", help="print the table of a results file")
    shown.add_argument("csv", type=Path)
    return found


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(entry_point.words(argv, "run"))
    if args.command == "table":
        print(table(read(args.csv)))
        return 0
    torch.set_num_threads(args.threads)
    end, mark = time.monotonic() + 60 * args.minutes, asdict(stamp(args.threads, "cpu"))
    path = args.out / f"{args.name}.csv"
    rows = read(path)
    for task, variant, seed in runs(args.task or (), args.variant or (), args.seeds):
        if time.monotonic() > end:
            break
        known = of(rows, task, variant, seed)
        if any(row["step"] == row["steps"] for row in known):
            continue
        run = Run(task, variant, seed, args.work)
        # Where the checkpoint was lost, or is older than the rows, they are measured again.
        rows = [row for row in rows if row not in known or int(row["step"]) <= run.step]
        for row in run.rows(lambda: time.monotonic() < end):
            print(f"{row.task}, {row.variant}, seed {row.seed}: step {row.step}, {row.score:.3f}", flush=True)
            rows.append({name: str(cell) for name, cell in {**asdict(row), **mark}.items()})
            write(path, rows)
    if rows:
        draw(rows, path.with_suffix(".png"))
        print(table(rows))
    return 0


if __name__ == "__main__":
    entry_point.run("benchmarks.quality.long", main)
