"""GLUE's nine tasks: where their TSV files keep sentences and labels, and how they are scored."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from .errors import RecipeError

Scores = dict[str, float]


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> Scores:
    return {"accuracy": accuracy_score(labels, predicted)}


def accuracy_and_f1(predicted: np.ndarray, labels: np.ndarray) -> Scores:
    return {**accuracy(predicted, labels), "f1": f1_score(labels, predicted)}


def matthews(predicted: np.ndarray, labels: np.ndarray) -> Scores:
    return {"matthews": matthews_corrcoef(labels, predicted)}


def correlations(predicted: np.ndarray, labels: np.ndarray) -> Scores:
    """0 where a correlation is not defined: all predictions equal."""
    if np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {"pearson": pearsonr(predicted, labels)[0], "spearman": spearmanr(predicted, labels)[0]}


@dataclass(frozen=True)
class GlueTask:
    """Columns by their name in the header, or by position (from 0) where the files have no header."""

    sentences: tuple[str | int, ...]
    label: str | int
    classes: tuple[str, ...] | None  # as written in the files; None: a number (regression)
    score: Callable[[np.ndarray, np.ndarray], Scores]
    evaluations: Mapping[str, str]  # name -> file; one evaluation needs no name
    has_broken_lines: bool = False  # the official files have some with too few columns, which all readers skip


ONE_DEV = {"": "dev.tsv"}
BOTH_DEV = {"matched": "dev_matched.tsv", "mismatched": "dev_mismatched.tsv"}
ENTAILMENT = ("entailment", "not_entailment")
TASKS = {
    "cola": GlueTask((3,), 1, ("0", "1"), matthews, ONE_DEV),
    "sst2": GlueTask(("sentence",), "label", ("0", "1"), accuracy, ONE_DEV),
    "mrpc": GlueTask(("#1 String", "#2 String"), "Quality", ("0", "1"), accuracy_and_f1, ONE_DEV),
    "stsb": GlueTask(("sentence1", "sentence2"), "score", None, correlations, ONE_DEV),
    "qqp": GlueTask(("question1", "question2"), "is_duplicate", ("0", "1"), accuracy_and_f1, ONE_DEV, True),
    "mnli": GlueTask(
        ("sentence1", "sentence2"), "gold_label", ("entailment", "neutral", "contradiction"), accuracy, BOTH_DEV
    ),
    "qnli": GlueTask(("question", "sentence"), "label", ENTAILMENT, accuracy, ONE_DEV),
    "rte": GlueTask(("sentence1", "sentence2"), "label", ENTAILMENT, accuracy, ONE_DEV),
    "wnli": GlueTask(("sentence1", "sentence2"), "label", ("0", "1"), accuracy, ONE_DEV),
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    sentences: tuple[str, ...]
    label: float  # the class number, or the score


def read_examples(path: Path, task: GlueTask) -> list[Example]:
    """Every line of a TSV file; quotes mean nothing, as in GLUE.  What is skipped is counted on stderr."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8: {error}") from error
    # Only these end a line: sentences hold other characters that str.splitlines takes for one.
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []
    columns, first = locate(path, lines, task)
    wanted, examples, broken = max(columns) + 1, [], []
    for n, line in enumerate(lines[first:], first + 1):
        cells = line.split("\t")
        if len(cells) >= wanted:
            examples.append(example(f"{path}:{n}", cells, columns, task))
        elif task.has_broken_lines:
            broken.append(n)
        else:
            raise RecipeError(f"{path}:{n}: expected at least {wanted} columns between tabs, got {len(cells)}")
    if broken:
        which = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
        print(f"{path}: lines left out, with fewer than {wanted} columns: {len(broken)} ({which})", file=sys.stderr)
    if not examples:
        raise RecipeError(f"{path} holds no examples")
    return examples


def locate(path: Path, lines: list[str], task: GlueTask) -> tuple[list[int], int]:
    """Where the sentences and, last, the label are, and the first line that is an example."""
    wanted = [*task.sentences, task.label]
    if isinstance(task.label, int):
        return [int(column) for column in wanted], 0
    header = lines[0].split("\t") if lines else []
    missing = [str(column) for column in wanted if column not in header]
    if missing:
        raise RecipeError(
            f"{path}:1: the header must name {', '.join(missing)}; it has {', '.join(header) or 'nothing'}"
        )
    return [header.index(str(column)) for column in wanted], 1


def example(where: str, cells: list[str], columns: list[int], task: GlueTask) -> Example:
    *sentences, label = (cells[column] for column in columns)
    return Example(tuple(sentences), number_of(where, label, task))


def number_of(where: str, label: str, task: GlueTask) -> float:
    if task.classes is not None:
        if label not in task.classes:
            raise RecipeError(f"{where}: the label must be one of {', '.join(task.classes)}, got {label!r}")
        return task.classes.index(label)
    try:
        return float(label)
    except ValueError as error:
        raise RecipeError(f"{where}: the score must be a number, got {label!r}") from error
