"""The student: a copy of the teacher on SeT attention, all or some of its layers, its references on real keys."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..models import replace_attention
from ..models.convert import ReplacementReport
from ..models.layers import initialize_references_of
from ..nn.reference_set import ReferenceSet

Collate = Callable[[list[Any]], dict[str, Tensor]]
# What projects queries and keys, by the names that transformers, timm and torch use; and what projects values too, with
# as many heads: the last third of its outputs.
QUERY_KEY = re.compile(r"(^|\.)(q|k|query|key|q_proj|k_proj|q_lin|k_lin|query_proj|key_proj)(_weight|\.weight|\.bias)$")
FUSED = re.compile(r"(^|\.)((qkv|Wqkv|qkv_proj|c_attn)\.(weight|bias)|in_proj_(weight|bias))$")
FROM_ZERO = 0.03  # about what torch draws the weights of 400 inputs with


def make_student(
    teacher: nn.Module, *, skip: Callable[[str, nn.Module], bool] | None = None, **own: Any
) -> tuple[nn.Module, ReplacementReport]:  # fmt: skip
    """A copy of the teacher with SeT attention for softmax attention, and what was replaced in it.

    Args:
        skip, own: as `replace_attention` takes them.

    Raises:
        ValueError: nothing was replaced.
    """
    student = copy.deepcopy(teacher)
    report = replace_attention(student, skip=skip, **own)
    if not report.replaced:
        raise ValueError(f"teacher must have softmax attention that can be replaced: {report}")
    return student, report


def layers_of(student: nn.Module, report: ReplacementReport) -> list[str]:
    """The names of the layers that were replaced, one for each module."""
    return list({student.get_submodule(name): name for name in reversed(report.replaced)}.values())[::-1]


def place_references(student: nn.Module, data: Dataset, collate: Collate, samples: int = 64) -> None:
    """Puts every layer's references on the k-means centres of its keys for `samples` samples from all over the data, or
    for more, up to all, where a layer gets fewer tokens from these than it has references.

    Raises:
        ValueError: all samples together have too few tokens.
    """
    size = len(data)  # type: ignore[arg-type]
    count = min(samples, size)
    device = next(student.parameters()).device
    while True:
        rows = [data[i] for i in range(0, size, size // max(count, 1))][:count] if count else []
        batch = {name: x.to(device) for name, x in collate(rows).items()} if rows else {}
        left = initialize_references_of(student, **batch) if rows else ["every layer"]
        if not left:
            return
        if count == size:
            raise ValueError(
                f"data must have at least as many tokens as a layer has references: all {size} samples together have"
                f" fewer in {', '.join(left)}; pass more data, or a smaller num_references"
            )
        count = min(2 * count, size)


def hybrid_of(teacher: nn.Module, student: nn.Module, names: Sequence[str], **own: Any) -> nn.Module:
    """A copy of the teacher with the student's SeT attention in the layers called names; own made the student."""
    chosen = {student.get_submodule(name) for name in names}
    model = copy.deepcopy(teacher)
    if chosen:
        replace_attention(model, skip=lambda name, _: student.get_submodule(name) not in chosen, **own)
    layers = tuple(f"{name}." for name in names)
    state = {name: value for name, value in student.state_dict().items() if name.startswith(layers)}
    model.load_state_dict(state, strict=False)
    return model.eval()


def new_parameters(teacher: nn.Module, student: nn.Module) -> list[str]:
    """The names of what only SeT attention has: references, and epsilons and masses where they are learned."""
    had = {name for name, _ in teacher.named_parameters()}
    return [name for name, _ in student.named_parameters() if name not in had]


def parameters_of(student: nn.Module, layers: Sequence[str] | None) -> list[str]:
    """The names of the layers' parameters; of all where layers is None."""
    if layers is None:
        return [name for name, _ in student.named_parameters()]
    return [f"{layer}.{name}" for layer in layers for name, _ in student.get_submodule(layer).named_parameters()]


@torch.no_grad()
def scale_of(parameter: Tensor) -> float:
    """√(mean of squares); FROM_ZERO for what is 0."""
    return float(parameter.float().square().mean().sqrt()) or FROM_ZERO


def query_key_parameters(student: nn.Module, layers: Sequence[str]) -> list[str]:
    """The names of what makes the layers' queries and keys.

    Raises:
        ValueError: a layer has none by a known name.
    """
    found = []
    for layer in layers:
        module = student.get_submodule(layer)
        own = [
            name
            for name, parameter in module.named_parameters()
            if QUERY_KEY.search(name) or (FUSED.search(name) and 3 * width_of(module) in parameter.shape)
        ]
        if not own:
            raise ValueError(f"the query and key projections of {layer} have no known names: leave projections=False")
        found += [f"{layer}.{name}" for name in own]
    return found


def references_of(layer: nn.Module) -> ReferenceSet:
    """What SeT attention added to a layer.

    Raises:
        ValueError: the layer is another.
    """
    found = next((module for module in layer.modules() if isinstance(module, ReferenceSet)), None)
    if found is None:
        raise ValueError(f"layers must name SeT attention in the student, got a {type(layer).__name__}")
    return found


def width_of(layer: nn.Module) -> int:
    """H·D of a SeT layer."""
    heads, _, width = references_of(layer).references.shape
    return heads * width


@contextmanager
def learning(model: nn.Module, names: Sequence[str], values: bool = True) -> Iterator[None]:
    """Within it the parameters called names have gradients and the others have none; without `values`, the part of a
    fused projection that makes values has a gradient of 0."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    learned = {model.get_parameter(name) for name in names}
    for parameter in before:
        parameter.requires_grad_(parameter in learned)
    fused = [] if values else [model.get_parameter(name) for name in names if FUSED.search(name)]
    handles = [parameter.register_hook(partial(_without_values, dim=_outputs(parameter))) for parameter in fused]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, had in before.items():
            parameter.requires_grad_(had)


def _outputs(parameter: nn.Parameter) -> int:
    """The dimension of a fused projection's outputs: GPT-2's weights are [in, out]."""
    return 1 if parameter.dim() == 2 and parameter.shape[1] == 3 * parameter.shape[0] else 0


def _without_values(gradient: Tensor, dim: int) -> Tensor:
    """The gradient with zeros in the last third of a dimension."""
    query, key, value = gradient.chunk(3, dim)
    return torch.cat([query, key, torch.zeros_like(value)], dim)
