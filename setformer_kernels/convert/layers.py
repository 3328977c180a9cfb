"""What attention layers answer, seen by hooks: all of it, or head by head before the heads are mixed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Answers = dict[str, list[Tensor]]  # by the layer's name, one tensor a call


def tensor_of(answer: Any) -> Tensor:
    """A layer's answer, or the first part of it: the others are weights and caches."""
    first = answer[0] if isinstance(answer, (tuple, list)) else answer
    if not isinstance(first, Tensor):
        raise TypeError(f"an attention layer must return a tensor, or a tuple that begins with one, got {type(first)}")
    return first


@contextmanager
def recorded(model: nn.Module, names: Sequence[str], heads: bool = False) -> Iterator[tuple[Answers, Answers]]:
    """Within it the layers called names are seen: yields what they answer, and what their heads do (if asked for)."""
    with _seen(model, names, heads, lambda name, answer: None) as seen:
        yield seen


@contextmanager
def taught(
    model: nn.Module, names: Sequence[str], answers: Answers, heads: bool = False
) -> Iterator[tuple[Answers, Answers]]:  # fmt: skip
    """As `recorded`, and the model goes on with `answers` instead of its own: so every layer gets what it would get if
    all the others answered so."""
    calls = dict.fromkeys(names, 0)

    def instead(name: str, answer: Any) -> Any:
        said = answers[name][calls[name]]
        calls[name] += 1
        own = tensor_of(answer)
        if said.shape != own.shape:
            raise ValueError(f"teacher must have the student's shapes: {name} answers {[*said.shape]}, {[*own.shape]}")
        said = said.to(own.dtype)
        return (said, *answer[1:]) if isinstance(answer, (tuple, list)) else said

    with _seen(model, names, heads, instead) as seen:
        yield seen


@contextmanager
def _seen(
    model: nn.Module, names: Sequence[str], heads: bool, instead: Callable[[str, Any], Any]
) -> Iterator[tuple[Answers, Answers]]:  # fmt: skip
    own: Answers = {name: [] for name in names}
    of_heads: Answers = {name: [] for name in names}
    handles: list[Any] = []
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # torch's encoder layers would call no module
    try:
        for name in names:
            layer = model.get_submodule(name)
            reader = _HeadReader(layer, handles) if heads else None

            def see(
                layer: nn.Module, args: Any, kwargs: Any, answer: Any, name: str = name,
                reader: _HeadReader | None = reader,
            ) -> Any:  # fmt: skip
                own[name].append(tensor_of(answer))
                if reader is not None:
                    of_heads[name].append(reader.read(args, kwargs, answer))
                return instead(name, answer)

            handles.append(layer.register_forward_hook(see, with_kwargs=True))
        yield own, of_heads
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()


class _HeadReader:
    """What the heads of a layer answer [..., H·D]: the input of its output projection, which is the last of its
    projections and the one that does not take what the layer takes; the layer's own answer where it has none."""

    def __init__(self, layer: nn.Module, handles: list[Any]) -> None:
        self.layer, self.unmixed = layer, _without_mixing(layer)
        self.given: list[Any] = []
        self.last: Tensor | None = None
        if self.unmixed is not None:
            return
        handles.append(layer.register_forward_pre_hook(self._begin, with_kwargs=True))
        for module in layer.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding):
                handles.append(module.register_forward_pre_hook(self._see))

    def _begin(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        self.given, self.last = [*args, *kwargs.values()], None

    def _see(self, module: nn.Module, args: Any) -> None:
        if args and not any(args[0] is given for given in self.given):
            self.last = args[0]

    def read(self, args: Any, kwargs: Any, answer: Any) -> Tensor:
        if self.unmixed is not None:
            return tensor_of(type(self.layer).forward(self.unmixed, *args, **kwargs))
        return tensor_of(answer) if self.last is None else self.last


def _without_mixing(layer: nn.Module) -> nn.Module | None:
    """A shallow copy of nn.MultiheadAttention whose output projection is the identity: it may be read, not called."""
    if not isinstance(layer, nn.MultiheadAttention):
        return None
    weight = layer.out_proj.weight
    bare = copy.copy(layer)
    bare._modules = dict(layer._modules)
    same = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    same.weight = nn.Parameter(torch.eye(len(weight), dtype=weight.dtype, device=weight.device), requires_grad=False)
    bare._modules["out_proj"] = same
    return bare
