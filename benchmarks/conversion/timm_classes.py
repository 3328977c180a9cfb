"""timm's attention classes: for each, the smallest of a few models that have it, converted, and what came of it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import timm
import torch
from torch import nn

from setformer_kernels.models.convert.fused import calls

from . import TIMM
from .census import SECONDS, Row, awake, converted, limited, numbers, said

NAMES = 6  # models of a file that are looked at
SIZES = ("test", "atto", "femto", "pico", "nano", "tiny", "_xs", "small", "base")  # in names, from the smallest on
MOST_PARAMETERS = 100_000_000


def classes() -> dict[str, type[nn.Module]]:
    """By its full name, whatever of timm is written with a call of softmax attention."""
    found = {}
    for package in (importlib.import_module("timm.layers"), importlib.import_module("timm.models")):
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            for kind in vars(importlib.import_module(info.name)).values():
                if inspect.isclass(kind) and issubclass(kind, nn.Module) and calls(kind):
                    found[name_of(kind)] = kind
    return found


def name_of(kind: type[nn.Module]) -> str:
    return f"{kind.__module__}.{kind.__name__}"


def smallest() -> dict[str, str]:
    """Class -> the smallest model that has it, of those that are looked at."""
    wanted, sizes, found = set(classes()), {}, {}
    for file in sorted({timm.model_entrypoint(name).__module__ for name in timm.list_models()}):
        for name in sorted(timm.list_models(module=file.rpartition(".")[2]), key=_by_size)[:NAMES]:
            model = _built(name)
            size = MOST_PARAMETERS if model is None else sum(p.numel() for p in model.parameters())
            if model is None or size >= MOST_PARAMETERS:
                continue
            for kind in {name_of(type(module)) for module in model.modules()} & wanted:
                if size < sizes.get(kind, MOST_PARAMETERS):
                    sizes[kind], found[kind] = size, name
    return found


def _by_size(name: str) -> int:
    return next((rank for rank, word in enumerate(SIZES) if word in name), len(SIZES))


def _built(name: str) -> nn.Module | None:
    """Without numbers, or with them where a model wants to look at some."""
    for device in ("meta", "cpu") if _by_size(name) < len(SIZES) else ("meta",):
        try:
            with torch.device(device):
                return timm.create_model(name)
        except Exception:  # noqa: PERF203  # not there; another of the file may be
            continue
    return None


def rows() -> Iterator[Row]:
    """A row for each class; what no small model has is not built."""
    models = smallest()
    for kind in sorted(classes()):
        row = Row(TIMM, models.get(kind, ""), "not built", attention=kind, reason="in none of the models looked at")
        if row.model:
            try:
                with limited(SECONDS):
                    row = examined(row.model, kind)
            except Exception as error:
                row.reason = said(error)
        row.attention, row.left = kind, ""  # others of the model were skipped
        print(f"{kind} in {row.model}: {row.status} {row.reason}", flush=True)
        yield row


def size_of(model: nn.Module) -> int:
    """Pixels along an edge of its images."""
    return int(model.default_cfg["input_size"][-1])  # type: ignore[index,union-attr]


def examined(name: str, kind: str) -> Row:
    """The model, whose other attention stays as it is."""
    torch.manual_seed(0)
    model = awake(timm.create_model(name).eval())
    given = {"x": torch.randn(2 if size_of(model) <= 400 else 1, *model.default_cfg["input_size"])}
    with torch.no_grad():
        softmax = numbers(model(**given))
    return converted(Row(TIMM, name, "failed"), model, given, softmax, lambda _, m: name_of(type(m)) != kind)
