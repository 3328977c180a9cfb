"""What all recipes share: transformers' Trainer (and so Accelerate), checkpoints that survive a kill, records."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ..checkpoints import COMPLETE, MarkComplete, discard_incomplete, last_complete, write_atomically
from .curve import write_curve
from .errors import RecipeError

# References and where they stand are directions and places: decay would only shrink them towards each other.
NO_DECAY = re.compile(r"references$|reference_position$|position_scale$|gamma\d$|log_epsilon$|reference_log_mass$")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay acts on a parameter: on matrices, save those of NO_DECAY."""
    return parameter.dim() > 1 and not NO_DECAY.search(name)


class RecipeTrainer(Trainer):
    """transformers' Trainer, with decay where it makes sense, and losses that are means over their batch.

    Of a model whose forward takes any keyword transformers believes that its loss is a sum over all ranks' batches and
    all that are accumulated, and scales it by their number.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = getattr(self.model, "accepts_loss_kwargs", False)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, parameter in model.named_parameters() if decays(name, parameter)]


@dataclass
class Job:
    """What a recipe hands over to be trained and evaluated."""

    model: PreTrainedModel
    train: Dataset | None
    evaluations: Mapping[str, Dataset]  # by name; the one called "" needs no name
    collate: Callable[[list[Any]], dict[str, Any]]
    metrics: Callable[..., dict[str, float]] | None  # None where the trainer measures itself
    processor: Any = None  # saved beside the model
    own_arguments: dict[str, Any] = field(default_factory=dict)  # of TrainingArguments
    trainer: Callable[..., RecipeTrainer] = RecipeTrainer


def training_arguments(args: argparse.Namespace, own: Mapping[str, Any]) -> TrainingArguments:
    saving: dict[str, Any] = {"save_strategy": "epoch"}
    if args.save_every:
        saving = {"save_strategy": "steps", "save_steps": args.save_every}
    return TrainingArguments(**{
        "output_dir": str(args.output), "num_train_epochs": args.epochs, "learning_rate": args.learning_rate,
        "per_device_train_batch_size": args.batch_size, "per_device_eval_batch_size": args.batch_size,
        "weight_decay": args.weight_decay, "warmup_steps": args.warmup, "lr_scheduler_type": "cosine",
        "gradient_accumulation_steps": args.accumulate, "bf16": args.precision == "bf16",
        "fp16": args.precision == "fp16", "dataloader_num_workers": args.workers, "seed": args.seed,
        "data_seed": args.seed, "use_cpu": args.cpu, "eval_strategy": "epoch", "logging_steps": 10,
        "save_total_limit": 2, "report_to": "none", "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available() and not args.cpu, **saving, **own,
    })  # fmt: skip


def execute(args: argparse.Namespace, job: Job) -> dict[str, float]:
    """Trains (unless args.evaluate) and evaluates; what was measured, as written to metrics.json."""
    if args.gradient_checkpointing:
        able = (m for m in job.model.modules() if getattr(m, "supports_gradient_checkpointing", False))
        next(able).activation_checkpointing_enable()  # of a model around a backbone, the backbone
    checkpoint = None if args.evaluate else resumable(args, job.model)
    arguments = training_arguments(args, job.own_arguments)  # also sets up the processes
    discard_incomplete(args.output)
    trainer = job.trainer(
        job.model, arguments, job.collate, job.train,
        next(iter(job.evaluations.values())), job.processor, compute_metrics=job.metrics, callbacks=[MarkComplete()],
    )  # fmt: skip
    if job.train is not None:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    measured = evaluate(trainer, job.evaluations)
    if trainer.is_world_process_zero():
        record(args.output, trainer, measured, trained=job.train is not None)
    return measured


def evaluate(trainer: Trainer, evaluations: Mapping[str, Dataset]) -> dict[str, float]:
    measured = {}
    for name, dataset in evaluations.items():
        prefix = f"{name}_" if name else ""
        for key, value in trainer.evaluate(dataset).items():
            if not re.search(r"runtime|per_second|epoch|preparation", key):
                measured[prefix + key.removeprefix("eval_")] = float(value)
    return measured


def record(output: Path, trainer: Trainer, measured: dict[str, float], trained: bool) -> None:
    """metrics.json; of a training also model/, curve.csv and curve.png."""
    print(", ".join(f"{name} {value:.4f}" for name, value in measured.items()))
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "metrics.json", json.dumps(measured, indent=2) + "\n")
    if trained:
        write_curve(trainer.state.log_history, output)
        partial, final = output / "model.partial", output / "model"
        shutil.rmtree(partial, ignore_errors=True)
        trainer.save_model(str(partial))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)


def resumable(args: argparse.Namespace, model: PreTrainedModel) -> Path | None:
    """The last complete checkpoint of args.output, checked to be of this model; None for a run from the start."""
    complete = last_complete(args.output)
    if not args.resume:
        if complete is not None:
            raise RecipeError(f"--output {args.output} holds the checkpoints of a run: add --resume, or name another")
        return None
    if complete is None:
        raise RecipeError(f"--resume: {args.output} has no complete checkpoint (checkpoint-*/{COMPLETE})")
    check_variant(complete / "config.json", model)
    return complete


def check_variant(path: Path, model: PreTrainedModel) -> None:
    """The configuration at path is that of the model; RecipeError with the first difference otherwise."""
    saved, wanted = read_json(path), json.loads(model.config.to_json_string(use_diff=False))
    passing = {"architectures", "dtype", "transformers_version", "problem_type", "_name_or_path"}
    for name in sorted(wanted.keys() & saved.keys() - passing):
        if saved[name] != wanted[name]:
            raise RecipeError(f"{path} is of another variant: {name} is {saved[name]!r}, this run has {wanted[name]!r}")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # not UTF-8 either
        raise RecipeError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


def load_model(model_class: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """A saved model of this class."""
    config = read_json(folder / "config.json")
    if config.get("architectures") != [model_class.__name__]:
        raise RecipeError(
            f"{folder / 'config.json'} must be of {model_class.__name__}, got {config.get('architectures')}"
        )
    return load_weights(model_class, folder)


def load_weights(
    model_class: type[PreTrainedModel], folder: Path, needed: str = "", **options: Any
) -> PreTrainedModel:  # fmt: skip
    """A model of this class with the weights in the folder, among which all are that begin with `needed`."""
    path = folder / "model.safetensors"
    if not path.is_file():
        raise RecipeError(f"{path} is missing")
    try:
        model, loading = model_class.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:  # of safetensors, torch or transformers
        raise RecipeError(f"{path} cannot be loaded: {error}") from error
    if missing := sorted(name for name in loading["missing_keys"] if name.startswith(needed)):
        raise RecipeError(f"{path} lacks {len(missing)} of the weights, {missing[0]} first")
    return model
