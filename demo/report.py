"""What the demo prints: the measured numbers side by side, and who wins, softmax included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .figures import crossover
from .models import SET, SOFTMAX

Column = tuple[str, str, Callable[[float], str]]

COLUMNS: tuple[Column, ...] = (
    ("accuracy", "accuracy", lambda v: f"{100 * v:.1f} %"),
    ("final loss", "final_loss", lambda v: f"{v:.3f}"),
    ("training", "train_seconds", lambda v: f"{v:.1f} s"),
    ("a step", "seconds_per_step", lambda v: f"{1000 * v:.1f} ms"),
    ("peak memory", "peak_step_bytes", lambda v: f"{v / 2**20:.0f} MiB"),
)


def accuracy_verdict(softmax: float, ours: float, samples: int) -> str:
    """Who is more accurate, and by how much against the sampling error of the test set (two standard errors)."""
    noise = 2 * math.sqrt((softmax * (1 - softmax) + ours * (1 - ours)) / samples)
    ahead = SET if ours > softmax else SOFTMAX
    if ours == softmax:
        return "accuracy: the same"
    sure = "" if abs(ours - softmax) > noise else f", within the noise of {samples} samples (± {100 * noise:.1f})"
    return f"accuracy: {ahead} ahead by {100 * abs(ours - softmax):.1f} points{sure}"


def ratio_verdict(title: str, softmax: float, ours: float, more: str, less: str) -> str:
    """`SeTAttention 3.1x faster (a step)`, or slower: less is better."""
    ratio = softmax / ours if ours < softmax else ours / softmax
    return f"{title}: {SET} {ratio:.2f}x {less if ours < softmax else more}"


def print_task(result: dict[str, Any]) -> None:
    """One row a model, then who wins what."""
    samples = result["test_samples"]
    softmax, ours = result["models"]
    columns = [column for column in COLUMNS if column[1] in softmax]
    print(f"  {result['steps']} steps each, {samples} test samples, sequence length {result['length']}")
    print(f"  {'':<22}" + "".join(f"{title:>13}" for title, _, _ in columns))
    for row in (softmax, ours):
        print(f"  {row['attention']:<22}" + "".join(f"{show(row[key]):>13}" for _, key, show in columns))
    print("  " + accuracy_verdict(softmax["accuracy"], ours["accuracy"], samples))
    print("  " + ratio_verdict("a step", softmax["seconds_per_step"], ours["seconds_per_step"], "slower", "faster"))
    if "peak_step_bytes" in softmax:
        memory = softmax["peak_step_bytes"], ours["peak_step_bytes"]
        print("  " + ratio_verdict("peak memory of a step", *memory, "more", "less"))
    if result["steps"] < result["steps_wanted"]:
        print(f"  time guard: {result['steps']} steps instead of {result['steps_wanted']}, for both models")


def print_text(result: dict[str, Any]) -> None:
    files = result["files"]
    print(f"  packages: {', '.join(result['packages'])}")
    print(f"  {files['train']} files to train on, {files['test']} others to test on", end="; ")
    print(f"always the commonest package would score {100 * result['majority_share']:.1f} %")
    print_task(result)


def print_lengths(rows: list[dict[str, Any]]) -> None:
    print(f"  forward of one module, ms (medians)\n  {'length':>8}{SOFTMAX:>24}{SET:>16}{'ratio':>9}")
    for row in rows:
        softmax, ours = row[SOFTMAX], row[SET]
        print(f"  {row['length']:>8}{1000 * softmax:>24.2f}{1000 * ours:>16.2f}{softmax / ours:>8.2f}x")
    meets = crossover(rows)
    if meets is None:
        print("  softmax attention is faster at the longest length measured")
    elif meets == rows[0]["length"]:
        print("  SeT attention is faster at every length measured")
    else:
        print(f"  SeT attention is faster from length {meets} on; softmax attention wins below")
