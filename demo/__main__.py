"""`python -m demo`: run the three parts within three minutes; prints what was measured, writes demo_output/."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from setformer_kernels.dispatch import available_backends, select, typical_problem

OUTPUT = Path("demo_output")
# Seconds each part may take, and the whole: a slow part leaves less to the next, and what was cut is reported.
DIGITS_SECONDS, TEXT_SECONDS, LENGTHS_SECONDS, TOTAL_SECONDS = 40.0, 85.0, 15.0, 160.0


def environment() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "backends": available_backends(),
        "auto": select(typical_problem()),
    }


def print_environment(facts: dict[str, Any]) -> None:
    print(f"torch {facts['torch']}, Python {facts['python']}, {facts['threads']} threads, {facts['machine']}")
    print(f"SeT attention runs on the backend {facts['auto']!r}")
    for name, reasons in facts["backends"].items():
        if reasons:
            print(f"  {name} cannot run: {'; '.join(reasons)}")


def run_parts(start: float) -> dict[str, Any]:
    from . import digits, figures, report, text

    def left(part: float, reserve: float) -> float:
        return min(part, TOTAL_SECONDS - reserve - (time.perf_counter() - start))

    print("\n(a) handwritten digits, one token a pixel", flush=True)
    model, digits_result = digits.compare(left(DIGITS_SECONDS, 0.0))
    report.print_task(digits_result)
    print("\n(b) which standard-library package does this chunk of source come from, one token a byte", flush=True)
    text_result = text.compare(left(TEXT_SECONDS, LENGTHS_SECONDS))
    report.print_text(text_result)
    print("\n(c) time against length, and a transport plan", flush=True)
    lengths = figures.time_lengths(left(LENGTHS_SECONDS, 0.0))
    report.print_lengths(lengths)
    figures.plot_lengths(lengths, OUTPUT / "speed_vs_length.png")
    figures.plot_plan(model, OUTPUT / "transport_plan.png")
    return {"digits": digits_result, "text": text_result, "lengths": lengths}


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    argparse.ArgumentParser(prog="python -m demo", description=__doc__).parse_args(argv)
    if missing := [name for name in ("sklearn", "matplotlib", "tqdm") if importlib.util.find_spec(name) is None]:
        sys.exit(f"demo: {', '.join(missing)} missing: pip install '.[demo]'")
    start = time.perf_counter()
    OUTPUT.mkdir(exist_ok=True)
    facts = environment()
    print_environment(facts)
    results = run_parts(start)
    seconds = time.perf_counter() - start
    record = {"environment": facts, **results, "seconds": seconds}
    (OUTPUT / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    names = ("speed_vs_length.png", "transport_plan.png", "results.json")
    print(f"\nDone in {seconds:.0f} s. Written: " + ", ".join(str(OUTPUT / name) for name in names))


if __name__ == "__main__":
    main()
