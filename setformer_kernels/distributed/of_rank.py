"""Modules whose parameters are DTensors, and whose calls compute with this rank's part of them.

What is outside of a call sees the whole: optimizers, FSDP, checkpoints and state dicts hold DTensors under the names
that parameters have.  A packed parameter (q|k|v one after another) has no placement that gives a rank its rows of each
and that checkpoints know, so its pieces become parameters of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, distribute_tensor


class OfRank(nn.Module):
    """Mixin: within a call every parameter is a plain tensor, what this rank computes with.

    pieces: name of a parameter that was cut -> names of what it was cut into, and their rows.
    summed: parameters that all ranks hold and each uses in part: how to take the part of the whole.
    """

    mesh: DeviceMesh
    pieces: dict[str, tuple[Sequence[str], list[int]]]
    summed: dict[str, Callable[[Tensor], Tensor]]
    joined: tuple[str, ...] = ()  # of `pieces`, those that the module reads as one
    inside = False

    @contextmanager
    def locally(self) -> Iterator[bool]:
        """Yields whether it is the outermost, which is the one that does something."""
        if self.inside:
            yield False
            return
        whole = dict(self._parameters)
        here = {name: self._here(name, p) for name, p in whole.items()}
        here |= {name: torch.cat([here[piece] for piece in self.pieces[name][0]]) for name in self.joined}  # type: ignore[misc]
        self._parameters.update(here)  # type: ignore[arg-type]
        self.inside = True
        try:
            yield True
        finally:
            self.inside = False
            for name in self.joined:
                del self._parameters[name]
            self._parameters.update(whole)

    def _here(self, name: str, parameter: Tensor | None) -> Tensor | None:
        if not isinstance(parameter, DTensor):
            return parameter
        if name not in self.summed:
            return parameter.to_local()
        if not torch.is_grad_enabled():
            return self.summed[name](parameter.to_local())
        # redistributing to what it is changes nothing, and sums the gradient
        at = [Partial() if isinstance(p, Replicate) else p for p in parameter.placements]
        whole = parameter.redistribute(placements=parameter.placements).to_local(grad_placements=at)
        return self.summed[name](whole)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.locally():
            return super().forward(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Takes what one process saved, too: packed parameters, and plain tensors that every rank has whole."""
        for packed, (names, rows) in self.pieces.items():
            if (whole := state_dict.get(prefix + packed)) is None:
                continue
            if prefix + names[0] in state_dict:
                raise ValueError(
                    f"the state dict has both {prefix + packed} and {prefix + names[0]}: load what full_state_dict"
                    " gives by load_state_dict, or cut it first"
                )
            del state_dict[prefix + packed]
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
            state_dict.update(zip([prefix + name for name in names], whole.split(rows), strict=True))
        for name, parameter in self.named_parameters():
            given = state_dict.get(prefix + name)
            if isinstance(parameter, DTensor) and given is not None and not isinstance(given, DTensor):
                given = given.to(parameter.device)
                everywhere = [Replicate()] * parameter.device_mesh.ndim
                state_dict[prefix + name] = DTensor.from_local(
                    given, parameter.device_mesh, everywhere, run_check=False
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


_kinds: dict[tuple[type[OfRank], type[nn.Module]], type[OfRank]] = {}


def become(module: nn.Module, mixin: type[OfRank], mesh: DeviceMesh) -> OfRank:
    """The module, which from now on is also of the mixin's kind."""
    kind = type(module)
    if (mixin, kind) not in _kinds:
        _kinds[mixin, kind] = type(f"{kind.__name__}OfRank", (mixin, kind), {"__module__": kind.__module__})
    module.__class__ = _kinds[mixin, kind]
    assert isinstance(module, OfRank)
    module.mesh, module.pieces, module.summed = mesh, {}, {}
    return module


def place(module: nn.Module, mesh: DeviceMesh, name: str, placement: Placement, source: int | None) -> None:
    """Distributes one parameter, if there is one; source: the rank whose values count, None if all have the same."""
    old = module._parameters.get(name)
    if old is None:
        return
    how = {} if source == 0 else {"src_data_rank": source}  # torch 2.6 does not take it
    whole = distribute_tensor(old.detach(), mesh, [placement], **how)
    module.register_parameter(name, nn.Parameter(whole, requires_grad=old.requires_grad))


def cut(module: nn.Module, name: str, names: Sequence[str], rows: list[int]) -> None:
    """Replaces a parameter by pieces of so many rows each, not yet distributed."""
    whole = module._parameters.pop(name)
    assert whole is not None
    for piece, part in zip(names, whole.detach().split(rows), strict=True):
        module.register_parameter(piece, nn.Parameter(part.clone(), requires_grad=whole.requires_grad))


def rows_of(rows: list[int], rank: int, ranks: int) -> Callable[[Tensor], Tensor]:
    """Of x [Σ rows, ...], q|k|v one after another: the rank's part of each, one after another."""
    return lambda x: torch.cat([part.chunk(ranks)[rank] for part in x.split(rows)])


def enter(x: Any, mesh: DeviceMesh, layout: Placement) -> Any:
    """Tokens that every rank is to read, of whose gradient each will have a part; None stays None.

    Raises:
        ValueError: a nested tensor that is not jagged without holes.
    """
    if not isinstance(x, Tensor):
        return x
    if x.is_nested and not isinstance(x, DTensor):
        if x.layout != torch.jagged or x.lengths() is not None:  # type: ignore[attr-defined]
            raise ValueError("nested tokens on several ranks must be of the layout torch.jagged and without holes")
        rows = enter(x.values(), mesh, layout)
        return torch.nested.nested_tensor_from_jagged(rows, offsets=x.offsets())  # type: ignore[attr-defined]
    if not isinstance(x, DTensor):
        if layout.is_replicate() and not (x.requires_grad and torch.is_grad_enabled()):
            return x
        x = DTensor.from_local(x, mesh, [layout], run_check=False)
    return x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def gathered(x: Tensor, mesh: DeviceMesh, placement: Placement) -> Tensor:
    """What ranks have in parts, on every rank."""
    return DTensor.from_local(x, mesh, [placement], run_check=False).redistribute(placements=[Replicate()]).to_local()


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict that one process has: whole tensors, packed projections in one.  All ranks must call it.

    It loads into the model on one process, and on any number of ranks (`load_state_dict`).
    """
    state = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, OfRank):
            prefix = f"{name}." if name else ""
            for packed, (names, _) in module.pieces.items():
                state[prefix + packed] = torch.cat([state.pop(prefix + piece) for piece in names])
    return state
