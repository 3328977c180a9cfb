"""Who the ranks of a context are, and what they say to each other: all-gathers in the group's order, and words.

Ops name their ranks by a string, so that a graph can hold it: `of_name` finds them again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

WORDS = 4096  # bytes that a rank may say in an agreement
_known: dict[str, Communicator] = {}


class Communicator(ABC):
    """One rank of several that make the same calls."""

    def __init__(self, name: str, rank: int, size: int) -> None:
        self.name, self.rank, self.size = f"{name}:{rank}/{size}", rank, size
        _known[self.name] = self

    @abstractmethod
    def _gathered(self, flat: Tensor) -> Tensor:
        """[n] of every rank, one after another: [size · n]."""

    @abstractmethod
    def _words(self) -> torch.device:
        """Where tensors lie that hold words."""

    def gather(self, t: Tensor) -> Tensor:
        """t [...] of every rank: [size, ...]."""
        if t.numel() == 0:  # the same on every rank, and nothing to say; gloo aborts
            return t.new_empty((self.size, *t.shape))
        return self._gathered(t.contiguous().view(-1)).view(self.size, *t.shape)

    def told(self, text: str) -> list[str]:
        """What every rank says, in their order."""
        said = text.encode()[:WORDS].ljust(WORDS, b"\0")
        words = torch.frombuffer(bytearray(said), dtype=torch.uint8).to(self._words())
        rows = self._gathered(words).view(self.size, WORDS).cpu()
        return [bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in rows]


def of_name(name: str) -> Communicator:
    if name not in _known:
        raise RuntimeError(f"no context was built for the ranks {name!r} in this process: build_cp_context makes it")
    return _known[name]


class Processes(Communicator):
    """The processes of a group of torch.distributed."""

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        super().__init__(group.group_name, dist.get_rank(group), dist.get_world_size(group))
        self.group = group

    def _gathered(self, flat: Tensor) -> Tensor:
        import torch.distributed as dist

        found = flat.new_empty(self.size * flat.numel())
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
        gather(found, flat, group=self.group)
        return found

    def _words(self) -> torch.device:
        import torch.distributed as dist

        if "gloo" in dist.get_backend_config(self.group):
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())


def communicator(group: Any, name: str = "group") -> Communicator:
    """The ranks of a ProcessGroup, a DeviceMesh of one dimension, or None: all processes; ValueError for others."""
    if isinstance(group, Communicator):
        return group
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(f"{name} must be one of torch.distributed, which is not initialised, got {kind_of(group)}")
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"{name} must be a mesh of one dimension, mesh['cp'] say, got {group.ndim}: {group}")
        group = group.get_group()
    group = dist.group.WORLD if group is None else group
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{name} must have this process as a member, got one without it")
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"{name} must be a ProcessGroup, a DeviceMesh of one dimension or None, got {kind_of(group)}")
    return Processes(group)


def kind_of(group: Any) -> str:
    return "None" if group is None else type(group).__name__
