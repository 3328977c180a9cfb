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
from .census import MOST_PARAMETERS, SECONDS, Row, converted, limited, numbers, said

NAMES, BATCH = 12, 2  # models of a file that are looked at; images that are shown


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
    files = {timm.model_entrypoint(name).__module__ for name in timm.list_models()}
    for file in sorted(files):
        has = {name_of(kind) for kind in vars(importlib.import_module(file)).values() if inspect.isclass(kind)}
        for name in _spread(timm.list_models(module=file.rpartition(".")[2])) if has & wanted else ():
            try:
                with torch.device("meta"):
                    model = timm.create_model(name)
            except Exception:  # one that needs numbers to be built; others of its file do not
                continue
            size = sum(p.numel() for p in model.parameters())
            for kind in {name_of(type(module)) for module in model.modules()} & wanted:
                if size < sizes.get(kind, MOST_PARAMETERS):
                    sizes[kind], found[kind] = size, name
    return found


def _spread(names: list[str]) -> list[str]:
    """At most NAMES of them, of all parts of the list."""
    return names[:: max(1, -(-len(names) // NAMES))]


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
        row.attention, row.left = kind, "" if row.status == "converted" else row.left
        print(f"{kind} in {row.model}: {row.status} {row.reason}", flush=True)
        yield row


def examined(name: str, kind: str) -> Row:
    """The model, whose other attention stays as it is."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    given = {"x": torch.randn(BATCH, *model.default_cfg["input_size"])}
    with torch.no_grad():
        softmax = numbers(model(**given))
    return converted(Row(TIMM, name, "failed"), model, given, softmax, lambda _, m: name_of(type(m)) != kind)
