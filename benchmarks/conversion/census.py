"""One model class: built small, converted, run forward and backward, and what came of it."""

from __future__ import annotations

import copy
import importlib
import inspect
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from setformer_kernels import SeTAttention
from setformer_kernels.models import replace_attention
from setformer_kernels.models.convert.transformers import asks_the_interface
from setformer_kernels.models.transport import SetTransport

from . import ELSEWHERE, TIMM
from .inputs import candidates
from .small import small

SECONDS, MOST_PARAMETERS = 90, 60_000_000
OWN = {"num_references": 4}


@dataclass
class Row:
    """status: converted (all attention that ran is SeT attention, forward and backward); left (none could be
    replaced); failed (replaced, and did not run); none (no attention); not built, not run (as transformers made it)."""

    folder: str
    model: str
    status: str
    attention: str = ""
    left: str = ""
    reason: str = ""
    seen: set[str] = field(default_factory=set)

    def cells(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in ("folder", "model", "status", "attention", "left", "reason")}


def folders() -> list[str]:
    """Those of transformers' models, and what stands for timm."""
    root = Path(transformers.__file__).parent / "models"
    return [*sorted(path.name for path in root.iterdir() if list(path.glob("modeling_*.py"))), TIMM]


def model_classes(folder: str) -> list[type[PreTrainedModel]]:
    """The folder's models, parts before what is made of them."""
    found: list[type[PreTrainedModel]] = []
    root = Path(transformers.__file__).parent / "models" / folder
    for path in sorted(root.glob("modeling_*.py")):
        module = importlib.import_module(f"transformers.models.{folder}.{path.stem}")
        found += [
            c for c in vars(module).values()
            if inspect.isclass(c) and issubclass(c, PreTrainedModel) and c.__module__ == module.__name__
            and not c.__name__.endswith("PreTrainedModel") and c.config_class is not None
        ]  # fmt: skip
    return sorted(found, key=lambda c: ("For" in c.__name__, len(c.__name__)))


def rows_of(folder: str) -> Iterator[Row]:
    """A row for each model whose attention classes are not all in an earlier row of the folder that converted."""
    done: set[str] = set()
    reasons: set[str] = set()
    try:
        kinds = model_classes(folder)
    except ImportError as error:
        yield Row(folder, "", "not built", reason=said(error))
        return
    for kind in kinds:
        started = time.monotonic()
        try:
            with limited(SECONDS):
                row = examined(folder, kind, done)
        except Exception as error:
            row = Row(folder, kind.__name__, "not built", reason=said(error))
        if row is None or (row.status.startswith("not") and row.reason in reasons):
            continue
        done |= row.seen
        reasons.add(row.reason)
        print(f"{folder} {kind.__name__}: {row.status} {row.reason} ({time.monotonic() - started:.1f} s)", flush=True)
        yield row


def examined(folder: str, kind: type[PreTrainedModel], done: set[str]) -> Row | None:
    """None where all attention of it is in done."""
    errors: list[str] = []
    for widths, images in ((True, True), (True, False), (False, True), (False, False)):
        try:
            model = built(kind, widths, images)
        except Exception as error:
            errors.append(said(error))
            continue
        kinds = {type(m).__name__ for m in model.modules() if asks_the_interface(m)}
        if kinds and kinds <= done:
            return None
        if not kinds:
            return _without_interface(folder, model, done)
        try:
            given, softmax = fitting(model)
        except Exception as error:
            errors.append(said(error))
            continue
        return converted(Row(folder, kind.__name__, "failed", " ".join(sorted(kinds))), model, given, softmax)
    status = "not run" if any(e.startswith("inputs: ") for e in errors) else "not built"
    return Row(folder, kind.__name__, status, reason=errors[0])


def _without_interface(folder: str, model: PreTrainedModel, done: set[str]) -> Row | None:
    named = {type(m).__name__ for m in model.modules() if "Attention" in type(m).__name__}
    if not named:
        return Row(folder, type(model).__name__, "none")
    if named <= done:
        return None
    return Row(folder, type(model).__name__, "left", left=" ".join(sorted(named)), reason=ELSEWHERE, seen=named)


def built(kind: type[PreTrainedModel], widths: bool = True, images: bool = True) -> PreTrainedModel:
    torch.manual_seed(0)
    config = small(kind.config_class(), widths, images)
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"its smallest configuration here has {size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    return awake(kind(config).eval())


@torch.no_grad()
def awake(model: nn.Module) -> Any:
    """The model, without the weights that start as zero and stop gradients."""
    for p in model.parameters():
        if p.dim() > 1 and not p.any():
            p.normal_(std=0.02)
    return model


def fitting(model: PreTrainedModel) -> tuple[dict[str, Any], list[Tensor]]:
    """The first inputs that the model takes as transformers made it, and what it answers."""
    torch.manual_seed(1)
    errors = []
    for given in candidates(model):
        try:
            with torch.no_grad():
                return given, numbers(model(**copy.deepcopy(given)))
        except Exception as error:  # noqa: PERF203
            errors.append(said(error))
    names = ", ".join(inspect.signature(model.forward).parameters)
    raise ValueError(f"inputs: {errors[0] if errors else f'none are known for {names}'}")


def numbers(outputs: Any) -> list[Tensor]:
    """The floating tensors of what a model answers."""
    leaves = tree_leaves(dict(outputs) if hasattr(outputs, "items") else outputs)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def converted(
    row: Row, model: nn.Module, given: dict[str, Any], softmax: list[Tensor],
    skip: Callable[[str, nn.Module], bool] | None = None,
) -> Row:  # fmt: skip
    """The row, filled: model replaced and run on what it was given, where it answered `softmax` before."""
    report = replace_attention(model, skip=skip, **OWN)
    row.attention = " ".join(sorted(set(report.replaced.values())))
    left = {f"{type(model.get_submodule(name)).__name__}: {why}" for name, why in report.left.items()}
    row.left = "; ".join(sorted(left))
    if not report.replaced:
        row.status, row.reason, row.seen = "left", row.left, {type(m).__name__ for m in model.modules()}
        return row
    called: set[str] = set()
    for name in report.replaced:
        module = model.get_submodule(name)
        getattr(module, "set_transport", module).register_forward_pre_hook(_noting(called, report.replaced[name]))
    try:
        answers = numbers(model(**copy.deepcopy(given)))
        _loss(answers).backward()
        row.reason = _wrong(model, called, answers, softmax)
    except Exception as error:
        row.reason = said(error)
        return row
    if not row.reason:
        row.status, row.seen = "converted", called
        if missed := set(report.replaced.values()) - called:
            row.reason = f"not called by these inputs: {' '.join(sorted(missed))}"
    return row


def _noting(called: set[str], kind: str) -> Callable[..., None]:
    return lambda *_: called.add(kind)


def _loss(answers: list[Tensor]) -> Tensor:
    """A fixed projection of all that depends on a parameter; some models answer −∞ by design."""
    answers = [x.float().masked_fill(~x.isfinite(), 0.0) for x in answers if x.requires_grad]
    if not answers:
        raise ValueError("no output depends on a parameter")
    return torch.stack([(x * torch.linspace(0, 9, x.numel()).sin().view_as(x)).sum() for x in answers]).sum()


def _wrong(model: nn.Module, called: set[str], answers: list[Tensor], softmax: list[Tensor]) -> str:
    gradients = [m.references.grad for m in model.modules() if isinstance(m, (SetTransport, SeTAttention))]
    known = [g for g in gradients if g is not None]
    if not called or not known:
        return "no replaced attention was called by these inputs"
    if [x.isfinite().all() for x in answers] != [x.isfinite().all() for x in softmax]:
        return "answers are not finite where softmax's are"
    if not all(g.isfinite().all() for g in known):
        return "gradients are not finite"
    return "" if any(g.any() for g in known) else "no gradient reaches the references"


def said(error: BaseException) -> str:
    said = str(error) if str(error).startswith("inputs:") else f"{type(error).__name__}: {error}"
    return " ".join(said.split())[:160]


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
