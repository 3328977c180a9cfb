"""Host time: what Python and PyTorch do before and at a launch, and around the kernels of a module, without a GPU.

    python -m benchmarks.compiled.host                        # this checkout
    python -m benchmarks.compiled.host --against ../before    # beside another checkout; writes results/host_DATE.csv

Launches go to stubs that return at once (benchmarks/compiled/stubs.py); the module's calls run on the CPU backend, at
sizes where arithmetic takes next to nothing.  Each checkout has a process of its own; rounds are interleaved, step by
step, so that a shared machine disturbs both alike.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.common import entry_point
from benchmarks.common.hardware import ROOT, commit, cpu_model

Sample = Callable[[], float]  # seconds of one call
ROUNDS, CALLS, WARM = 31, 100, 20
COLUMNS = (
    *("step", "checkout", "best_us", "q25_us", "median_us", "q75_us", "ratio_of_best", "ratio", "rounds"),
    *("commit", "cpu", "load", "versions", "date"),
)


class Clock:
    """What launches reach: notes the time of the first since it was set."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self, *_: Any) -> None:
        if not self.at:
            self.at = time.perf_counter()

    def until_first(self, call: Callable[[], Any]) -> Sample:
        def sample() -> float:
            self.at = 0.0
            start = time.perf_counter()
            call()
            return self.at - start

        return sample


def whole(call: Callable[[], Any]) -> Sample:
    """Seconds of a call, return included."""

    def sample() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return sample


def functional_steps(clock: Clock) -> dict[str, Sample]:
    """Of one eager `set_attention` at T = 3, D = E = M = 64, on each GPU backend: all, and its parts."""
    import torch

    import setformer_kernels.functional as SF
    from setformer_kernels import dispatch

    q, k, v = (torch.randn(1, 16, 64, 64, dtype=torch.bfloat16) for _ in range(3))
    y = torch.randn(16, 64, 64)
    leaves = [t.clone().requires_grad_() for t in (q, k, v, y)]
    d_o = torch.randn_like(q)

    def forward(backend: str) -> Any:
        with torch.no_grad():
            return SF.set_attention(q, k, v, y, num_iters=3, backend=backend)

    def both(backend: str) -> Any:
        return torch.autograd.grad(SF.set_attention(*leaves, num_iters=3, backend=backend), leaves, d_o)

    steps: dict[str, Sample] = {}
    for name in ("cuda", "triton"):
        steps[f"{name}: until the first launch"] = clock.until_first(lambda name=name: forward(name))
        steps[f"{name}: a forward"] = whole(lambda name=name: forward(name))
        steps[f"{name}: forward and backward"] = whole(lambda name=name: both(name))
        x, opt = _operands(q, k, v, y)
        module = dispatch.NATIVE[name]
        steps[f"{name}: the backend alone"] = whole(lambda m=module, x=x, opt=opt: m.attention(x, opt))
    return steps


def _operands(q: Any, k: Any, v: Any, y: Any, T: int = 3) -> Any:
    from setformer_kernels.arguments import normalise

    options = {"kernel": "rbf", "num_iters": T, "dropout_p": 0.0, "seed": None, "backend": "cuda"}
    return normalise(q, k, v, y, (1.0, 0.05, 1.0, 1.0, 1.0), *[None] * 5, **options)


def launch_steps() -> dict[str, Sample]:
    """Each launch of that call, on Triton, forward and backward."""
    import torch

    from setformer_kernels.backends.triton import face
    from setformer_kernels.backends.triton.host import launch

    q, k, v = (torch.randn(1, 16, 64, 64, dtype=torch.bfloat16) for _ in range(3))
    x, opt = _operands(q, k, v, torch.randn(16, 64, 64))
    with launch.recorded(launch._assumed) as taken:
        o, z, c = face.attention(x, opt)
        face.attention_backward(x, opt, z, c, o, [t is not None for t in x])
    steps: dict[str, Sample] = {}
    for one in taken:
        count = sum(len(a) if isinstance(a, tuple) else 1 for a in (*one.args, *one.constants.values()))
        name = f"launch: {one.kernel.fn.__name__}, {count} arguments"
        steps.setdefault(name, whole(lambda one=one: launch.launch(*one)))
    return steps


def module_steps() -> dict[str, Sample]:
    """One call of `SeTAttention` and of `nn.MultiheadAttention(need_weights=False)`, self-attention, batch 1."""
    import torch

    from setformer_kernels.nn import SeTAttention

    steps: dict[str, Sample] = {}
    for width, length, t in ((12, 2, 1), (384, 16, 1)):
        for name, kind, own in (("nn.MultiheadAttention", torch.nn.MultiheadAttention, {}),
                                ("SeTAttention", SeTAttention, {"num_iters": t})):  # fmt: skip
            module = kind(width, 6, batch_first=True, **own)
            x = torch.randn(1, length, width)
            for mode in ("eval", "train"):
                made = kind(width, 6, batch_first=True, **own).train(mode == "train")
                made.load_state_dict(module.state_dict())
                step = f"module, width {width}, length {length}, {mode}: {name}"
                steps[step] = whole(_call(made, x, mode == "train"))
        steps[f"module, width {width}, length {length}: the C++ kernel of SeTAttention"] = _kernel(
            width // 6, length, t
        )
    return steps


def _kernel(width: int, length: int, T: int) -> Sample:
    """The arithmetic of one such call, which is not Python."""
    import torch

    from setformer_kernels.backends import cpu
    from setformer_kernels.backends._extension import view

    q, k, v = (torch.randn(1, length, 6, width).transpose(1, 2) for _ in range(3))
    x, opt = _operands(q, k, v, torch.randn(6, 64, width), T)
    outputs = cpu.attention(x, opt)
    kept, given = (x, outputs), (*cpu._common(x, opt), *[view(t) for t in outputs])
    return whole(lambda kept=kept: cpu._C.attention(*given))  # views do not keep their tensors


def _call(module: Any, x: Any, train: bool) -> Callable[[], Any]:
    import torch

    def call() -> Any:
        with torch.set_grad_enabled(train):
            return module(x, x, x, need_weights=False)[0]

    return call


def serve(package: str) -> None:
    """A process of one checkout: takes the number of a step a line, answers with the seconds of its calls."""
    sys.path.insert(0, package)
    import torch

    import setformer_kernels
    from benchmarks.compiled.stubs import silent_cuda, silent_triton

    if Path(setformer_kernels.__file__).parents[1].resolve() != Path(package).resolve():
        raise RuntimeError(f"{setformer_kernels.__file__} is not of {package}")
    torch.set_num_threads(1)
    clock = Clock()
    steps = module_steps()  # before the stubs take CPU tensors for a GPU's
    silent_triton(clock)
    silent_cuda(clock)
    steps |= functional_steps(clock) | launch_steps()
    names = list(steps)
    print(json.dumps(names), flush=True)
    gc.disable()
    for line in sys.stdin:
        name, calls = json.loads(line)
        print(json.dumps([steps[name]() for _ in range(calls)]), flush=True)


class Worker:
    """A checkout's process, and what it answered."""

    def __init__(self, label: str, checkout: Path, only: str) -> None:
        self.label, self.checkout = label, checkout
        command = [sys.executable, "-m", "benchmarks.compiled.host", "--serve", str(checkout.resolve())]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        compiled = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        self.process = subprocess.Popen(command, cwd=ROOT, env=compiled, **pipes)
        self.steps: list[str] = [name for name in self._answer() if only in name]
        self.medians: dict[str, list[float]] = {name: [] for name in self.steps}
        self.best: dict[str, float] = dict.fromkeys(self.steps, math.inf)

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.checkout} ended: {self.process.wait()}")
        return json.loads(line)

    def run(self, step: str, calls: int) -> list[float]:
        assert self.process.stdin is not None
        print(json.dumps([step, calls]), file=self.process.stdin, flush=True)
        return self._answer()

    def round(self, step: str, calls: int) -> None:
        found = self.run(step, calls)
        self.medians[step].append(statistics.median(found))
        self.best[step] = min(self.best[step], *found)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(workers: Sequence[Worker], rounds: int, calls: int) -> None:
    """Interleaved rounds of every step: the median of a round's calls, and the best call of all, which a shared machine
    disturbs least."""
    for name in workers[-1].steps:
        there = [worker for worker in workers if name in worker.steps]
        for worker in there:
            worker.run(name, WARM)
    for _ in range(rounds):
        for name in workers[-1].steps:
            for worker in workers:
                if name in worker.steps:
                    worker.round(name, calls)


def rows(workers: Sequence[Worker]) -> Iterator[dict[str, Any]]:
    """A row a step and checkout, in µs; `ratio` is over the first checkout, in the same rounds."""
    import torch
    import triton

    shared = {
        "cpu": cpu_model(),
        "versions": f"Python {sys.version.split()[0]}, torch {torch.__version__}, Triton {triton.__version__}",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "load": f"{os.getloadavg()[1]:.1f} on {os.cpu_count()}",
    }
    first = workers[0]
    for name in workers[-1].steps:
        for worker in workers:
            samples = worker.medians.get(name)
            if not samples:
                continue
            q25, median, q75 = (1e6 * t for t in statistics.quantiles(samples, n=4, method="inclusive"))
            pairs = zip(samples, first.medians.get(name, []), strict=False)
            ratio = statistics.median([a / b for a, b in pairs]) if first.medians.get(name) else 0.0
            yield {
                "step": name, "checkout": worker.label, "q25_us": f"{q25:.1f}", "median_us": f"{median:.1f}",
                "q75_us": f"{q75:.1f}", "ratio": f"{ratio:.2f}", "best_us": f"{1e6 * worker.best[name]:.1f}",
                "ratio_of_best": f"{worker.best[name] / first.best.get(name, math.inf):.2f}", "rounds": len(samples),
                "commit": _commit_of(worker.checkout), **shared,
            }  # fmt: skip


def _commit_of(checkout: Path) -> str:
    if checkout.resolve() == ROOT:
        return commit()
    done = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=checkout, capture_output=True, text=True)
    return done.stdout.strip()


def table(found: Sequence[dict[str, Any]]) -> str:
    """A line a step: every checkout's best and median, and the ratios of the last to the first."""
    labels = list(dict.fromkeys(row["checkout"] for row in found))
    lines = [f"| step, µs, best (median) | {' | '.join(labels)} | ratio |", "|---|" + "---|" * (len(labels) + 1)]
    for step in dict.fromkeys(row["step"] for row in found):
        here = {row["checkout"]: row for row in found if row["step"] == step}
        cells = [f"{here[label]['best_us']} ({here[label]['median_us']})" if label in here else "" for label in labels]
        last = here[labels[-1]]
        lines.append(f"| {step} | {' | '.join(cells)} | {last['ratio_of_best']} ({last['ratio']}) |")
    return "\n".join(lines)


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled.host", description="Host time of calls, launches and modules, in µs."
    )
    parser.add_argument("--against", type=Path, help="another checkout, with its extension built: the first column")
    parser.add_argument("--only", default="", help="steps whose names hold this")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="at least 2")
    parser.add_argument("--calls", type=int, default=CALLS, help="calls a round and step")
    parser.add_argument("--out", type=Path, help="the CSV")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    if a.rounds < 2 or a.calls < 1:
        parser.error(f"--rounds must be at least 2 and --calls at least 1, got {a.rounds} and {a.calls}")
    if a.against and not (a.against / "setformer_kernels" / "__init__.py").exists():
        parser.error(f"--against must be a checkout of this repository, got {a.against}")
    return a


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the CSV."""
    arguments = _parsed(argv)
    import triton  # noqa: F401  (missing, it is named before any process starts)

    if arguments.serve:
        serve(arguments.serve)
        return 0
    checkouts = [("before", arguments.against)] if arguments.against else []
    workers = [Worker(label, path, arguments.only) for label, path in (*checkouts, ("now", ROOT))]
    measure(workers, arguments.rounds, arguments.calls)
    found = list(rows(workers))
    for worker in workers:
        worker.close()
    if arguments.out:
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(found)
    print(table(found) if found else f"no step has {arguments.only!r} in its name")
    return 0 if found else 1


if __name__ == "__main__":
    entry_point.run("benchmarks.compiled.host", main)
