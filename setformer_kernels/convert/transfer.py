"""Attention transfer: a converted copy of a model learns, without labels, what the softmax it replaces answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .adapters import Adapters, adapted, lora_classes
from .fitting import Schedule, fit
from .hybrid import conversion_curve, within
from .matching import LayerMatching, OutputMatching
from .measuring import attention_errors, output_agreement
from .recording import Recording, recorded_by
from .report import HYBRID, MATCHED, PLACED, TUNED, TransferReport
from .students import (
    Collate,
    hybrid_of,
    layers_of,
    make_student,
    new_parameters,
    parameters_of,
    place_references,
    query_key_parameters,
    scale_of,
)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Transfer:
    """How a model is taught.

    Args:
        match: stage 1, every layer on the teacher's inputs.
        tune: stage 2, the converted layers end to end; steps=0 leaves it out.  Its learning rate is a share of every
            tensor's root mean square (`students.scale_of`): in one absolute step the small weights of a
            deep model would change too much, the large ones of a shallow one too little.  Where it ends with a larger
            error on the held-out samples than it began with, as by too large a learning rate, it is undone.
        projections: stage 1 also learns the projections of queries and keys, not only what SeT attention has of its
            own.
        own_rate: the learning rate of what SeT attention has of its own, as a multiple of the projections', in stage 1.
        tune_all: stage 2 learns all weights of the model, not only those of the converted layers.
        lora_rank: stage 2 learns corrections of this rank (peft) instead of the weights themselves; 0: the weights.
        pooling, hidden: of stage 2 and its measurements, as `OutputMatching` takes them.
        max_error: leaves the layers softmax that cost most, so that the relative error of the output after stage 1 is
            at most this; None converts all.
        curve: measures the error of every number of converted layers, as max_error does.
        placed_on: samples that the references are placed on.
        measured_on: batches of `match.batch_size` held-out samples that errors are measured on; 0: all.
        curve_on: of these batches, how many the curve is measured on; 0: all.
    """

    match: Schedule = field(default_factory=lambda: Schedule(300, 3e-3))
    tune: Schedule = field(default_factory=lambda: Schedule(200, 2e-3))
    projections: bool = True
    own_rate: float = 5.0
    tune_all: bool = False
    lora_rank: int = 0
    pooling: str = "mean"
    hidden: bool = False
    max_error: float | None = None
    curve: bool = False
    placed_on: int = 256
    measured_on: int = 8
    curve_on: int = 8

    def __post_init__(self) -> None:
        for name, low in (("lora_rank", 0), ("placed_on", 1), ("measured_on", 0), ("curve_on", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be ≥ {low}, got {getattr(self, name)}")
        if self.max_error is not None and not self.max_error >= 0:
            raise ValueError(f"max_error must be ≥ 0, got {self.max_error}")


def transfer_attention(
    teacher: nn.Module, train: Dataset, held_out: Dataset, collate: Collate, output: Path, how: Transfer | None = None,
    *, resume: bool = False, skip: Callable[[str, nn.Module], bool] | None = None, progress: Progress = print,
    recording: Path | None = None, **own: Any,
) -> tuple[nn.Module, TransferReport]:  # fmt: skip
    """A copy of the teacher with SeT attention that was taught by the teacher, and what came of it.

    References are placed by k-means; stage 1 matches every layer's attention on the teacher's own inputs; layers that
    cost too much go back to softmax (how.max_error); stage 2 matches the outputs.  No labels are used.  Trained by
    transformers' Trainer, also on several ranks (torchrun), with checkpoints in output/match and output/tune; the
    report is also written to output.

    Args:
        teacher: a model with softmax attention; it is not changed, but put in eval mode and on the Trainer's device.
        train, held_out: samples, of which `collate` makes keyword arguments of the model.
        resume: go on from what is in output, after a kill, with the same arguments.
        skip, own: as `replace_attention` takes them (num_references, learn_epsilon, ...).
        progress: called with a line for every step but those that Trainer reports.
        recording: a folder for the teacher's answers to `train`: recorded there first, of all layers that are replaced,
            unless they are there from an earlier run, whatever its student was; then no step runs the teacher.

    Raises:
        ValueError: nothing can be replaced or adapted, the data have fewer tokens than a layer has references, or
            output holds another run.
        ModuleNotFoundError: how.lora_rank, and peft is not there.
    """
    how = Transfer() if how is None else how
    processes = PartialState(cpu=how.match.cpu)
    torch.manual_seed(how.match.seed)  # of the references
    student, replaced = make_student(teacher.to(processes.device), skip=skip, **own)
    layers, report = layers_of(student, replaced), TransferReport(replaced)
    report.converted = list(layers)
    if how.lora_rank and how.tune.steps:  # or raises, before anything has learned
        lora_classes()
        adapted(student, None if how.tune_all else report.converted)
    batches = _batches(held_out, collate, how)
    kept = None
    if recording is not None:
        asked = (layers if how.match.steps else [], how.hidden and how.tune.steps > 0)
        with processes.main_process_first():
            kept = recorded_by(teacher, train, collate, recording, *asked, progress=progress)
    run = _Run(teacher, train, collate, output, how, resume, progress, report, batches, kept)
    place_references(student, train, collate, how.placed_on)
    run.measure(PLACED, student, layers)
    if how.match.steps:
        run.match(student, layers)
    if how.curve or how.max_error is not None:
        student = run.choose(student, layers, own)
    if how.tune.steps and report.converted:
        student = run.tune(student)
    run.write()
    return student, report


def _batches(data: Dataset, collate: Collate, how: Transfer) -> list[dict[str, Tensor]]:
    size = len(data)  # type: ignore[arg-type]
    count = size if how.measured_on == 0 else min(size, how.measured_on * how.match.batch_size)
    if count == 0:
        raise ValueError("held_out must hold at least one sample, got none")
    rows = [data[i] for i in range(0, size, size // count)][:count]
    return list(DataLoader(rows, how.match.batch_size, collate_fn=collate))  # type: ignore[arg-type]


def _on_host(state: dict[str, Any]) -> dict[str, Any]:
    """A copy that takes nothing of the device; what is no tensor is a module's own (`get_extra_state`)."""
    return {
        name: x.detach().to("cpu", copy=True) if isinstance(x, Tensor) else deepcopy(x) for name, x in state.items()
    }


@dataclass
class _Run:
    """What the stages of a transfer share."""

    teacher: nn.Module
    train: Dataset
    collate: Collate
    output: Path
    how: Transfer
    resume: bool
    progress: Progress
    report: TransferReport
    batches: list[dict[str, Tensor]]
    kept: Recording | None

    def on_device(self) -> list[dict[str, Tensor]]:
        device = next(self.teacher.parameters()).device
        return [{name: x.to(device) for name, x in batch.items()} for batch in self.batches]

    def write(self, picture: bool = True) -> None:
        """By one of the ranks, which all measure the same."""
        if PartialState().is_main_process:
            self.report.write(self.output, picture)

    def measure(self, moment: str, student: nn.Module, layers: Sequence[str]) -> None:
        self.teacher.eval()
        student.eval()
        batches = self.on_device()
        if layers:
            self.report.layers[moment] = attention_errors(self.teacher, student, layers, batches)
        self.report.outputs[moment] = output_agreement(self.teacher, student, batches, self.how.pooling)
        self.report.returned = moment
        self.write(picture=False)  # which takes a second
        self.progress(f"{moment}: " + ", ".join(f"{k} {v:.4f}" for k, v in self.report.outputs[moment].items()))

    def fit(
        self, stage: str, matching: LayerMatching | OutputMatching, names: Sequence[str], schedule: Schedule,
        rates: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        folder = self.output / stage
        resume = self.resume and folder.exists()
        data, collate = self.train, self.collate
        if self.kept is not None:
            data, collate = self.kept.samples(data), self.kept.collate(collate, matching.reads)
        fit(matching, names, data, collate, folder, schedule, resume, rates)

    def match(self, student: nn.Module, layers: Sequence[str]) -> None:
        """Stage 1."""
        new = new_parameters(self.teacher, student)
        names = new + (query_key_parameters(student, layers) if self.how.projections else [])
        matching = LayerMatching(self.teacher, student, layers)
        self.fit("match", matching, names, self.how.match, dict.fromkeys(new, self.how.own_rate))
        self.measure(MATCHED, student, layers)

    def choose(self, student: nn.Module, layers: Sequence[str], own: dict[str, Any]) -> nn.Module:
        """Measures the curve; the student, or with how.max_error the hybrid of the layers that are cheap enough."""
        few = self.on_device()[: self.how.curve_on or None]
        self.report.curve = conversion_curve(self.teacher, student, layers, few, progress=self.progress, **own)
        if self.how.max_error is None:
            return student
        self.report.converted = within(self.report.curve, self.how.max_error)
        student = hybrid_of(self.teacher, student, self.report.converted, **own)
        self.measure(HYBRID, student, [])
        return student

    def tune(self, student: nn.Module) -> nn.Module:
        """Stage 2; a layer's error on the teacher's inputs says nothing any more, as its inputs are others."""
        before, moment = _on_host(student.state_dict()), self.report.returned
        within = None if self.how.tune_all else self.report.converted
        adapters = Adapters(student, self.how.lora_rank, within) if self.how.lora_rank else None
        new = new_parameters(self.teacher, student)
        names = parameters_of(student, within)
        if adapters is not None:
            own = [name for name in new if "lora_" not in name and "base_layer" not in name]
            names = own + adapters.names
        matching = OutputMatching(self.teacher, student, self.how.pooling, self.how.hidden)
        rates = {name: scale_of(student.get_parameter(name)) for name in names}
        self.fit("tune", matching, names, self.how.tune, rates)
        student = student if adapters is None else adapters.merge()
        self.measure(TUNED, student, [])
        errors = self.report.outputs
        if not errors[TUNED]["error"] <= errors[moment]["error"]:  # NaN, too
            student.load_state_dict(before)
            self.report.returned = moment
            self.progress(f"stage 2 made it worse and was undone: the model is that of {moment!r}")
        return student
