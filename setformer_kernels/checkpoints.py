"""Checkpoints of transformers' Trainer that survive a kill: each gets a marker last, what has none is passed over."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainingArguments

COMPLETE = "complete"  # the file that a checkpoint gets last


class MarkComplete(TrainerCallback):
    """The marker is the last thing written: what a kill left half-written has none, and resuming passes it over."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()  # every process writes its own random state
        if state.is_world_process_zero:
            write_atomically(Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE, "")


def last_complete(output: Path) -> Path | None:
    """The checkpoint of the most steps in output that has its marker."""
    there = [path for path in output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return max((path for path in there if (path / COMPLETE).is_file()), key=steps_of, default=None)


def steps_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def discard_incomplete(output: Path) -> None:
    """Removes what a kill left half-written: it would count among the checkpoints that are kept."""
    processes = PartialState()
    processes.wait_for_everyone()
    if processes.is_main_process:
        for path in output.glob("checkpoint-*"):
            if path.is_dir() and not (path / COMPLETE).is_file():
                shutil.rmtree(path)
    processes.wait_for_everyone()


def write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
