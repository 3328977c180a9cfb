"""Training a matching on transformers' Trainer, resumable."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from ..checkpoints import MarkComplete, discard_incomplete, last_complete, steps_of
from .matching import LayerMatching, OutputMatching
from .students import learning


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a stage learns.

    Args:
        steps: of the optimizer (AdamW without decay); 0 leaves the stage out.
        learning_rate: after a warm-up over a tenth of the steps; it falls to 0 by half a cosine.
        batch_size: samples a step and device.
        save_every: steps between checkpoints; 0: one at the end.
        accumulate: batches a step.
        precision: "float32", or the "bf16" or "fp16" of autocast.
        workers: processes that load data.
        seed: of the order of the samples.
        cpu: leave accelerators alone.
    """

    steps: int
    learning_rate: float
    batch_size: int = 32
    save_every: int = 0
    accumulate: int = 1
    precision: str = "float32"
    workers: int = 0
    seed: int = 0
    cpu: bool = False

    def __post_init__(self) -> None:
        for name, low in (("steps", 0), ("batch_size", 1), ("save_every", 0), ("accumulate", 1), ("workers", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be ≥ {low}, got {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate}")
        if self.precision not in ("float32", "bf16", "fp16"):
            raise ValueError(f"precision must be float32, bf16 or fp16, got {self.precision!r}")


def fit(
    matching: LayerMatching | OutputMatching, names: Sequence[str], data: Dataset,
    collate: Callable[[list[Any]], dict[str, Any]], output: Path, schedule: Schedule, resume: bool = False,
    rates: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Trains the student's parameters called names; what was logged.

    Args:
        matching: its student is changed.
        output: a folder for checkpoints, which hold what learns.
        rates: by name, the multiple of the learning rate that a parameter learns at; 1 where it has none.
        resume: go on from the last complete checkpoint in output, to the weights that the whole run would have had.

    Raises:
        ValueError: output has checkpoints and resume is not asked for.
    """
    checkpoint = last_complete(output)
    if checkpoint is not None and not resume:
        raise ValueError(f"output {output} holds the checkpoints of a run: resume it, or name another folder")
    discard_incomplete(output)
    if checkpoint is not None and steps_of(checkpoint) >= schedule.steps:  # where Trainer would make a step more
        return _finished(matching, names, checkpoint)
    with learning(matching, [f"student.{name}" for name in names], matching.learns_values):
        arguments = _arguments(output, schedule)
        groups = _groups(matching.student, names, schedule.learning_rate, rates or {})
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        trainer = Trainer(
            matching, arguments, collate, data, callbacks=[MarkComplete()], optimizers=(optimizer, None)
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return trainer.state.log_history


def _finished(
    matching: LayerMatching | OutputMatching, names: Sequence[str], checkpoint: Path
) -> list[dict[str, Any]]:  # fmt: skip
    """Takes up the weights of a run that came to its end; what it logged."""
    with learning(matching, [f"student.{name}" for name in names]):
        matching.load_state_dict(load_file(checkpoint / SAFE_WEIGHTS_NAME))
    history: list[dict[str, Any]] = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())["log_history"]
    return history


def _groups(student: nn.Module, names: Sequence[str], rate: float, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """A group a learning rate."""
    by_rate: dict[float, list[nn.Parameter]] = {}
    for name in names:
        by_rate.setdefault(rate * rates.get(name, 1.0), []).append(student.get_parameter(name))
    return [{"params": parameters, "lr": own} for own, parameters in by_rate.items()]


def _arguments(output: Path, schedule: Schedule) -> TrainingArguments:
    cuda = torch.cuda.is_available() and not schedule.cpu
    arguments = TrainingArguments(
        output_dir=str(output), max_steps=schedule.steps, learning_rate=schedule.learning_rate,
        per_device_train_batch_size=schedule.batch_size, gradient_accumulation_steps=schedule.accumulate,
        warmup_steps=0.1, lr_scheduler_type="cosine", weight_decay=0.0, bf16=schedule.precision == "bf16",
        fp16=schedule.precision == "fp16", dataloader_num_workers=schedule.workers, dataloader_pin_memory=cuda,
        seed=schedule.seed, data_seed=schedule.seed, use_cpu=schedule.cpu, logging_steps=10, report_to="none",
        save_strategy="steps", save_steps=schedule.save_every or schedule.steps, save_total_limit=2,
        remove_unused_columns=False,
    )  # fmt: skip
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # what layers answer is seen by hooks, which nn.DataParallel's replicas would share
    return arguments
