"""Tools of torch that rewrite modules, and have no form for SeT attention: what they find in its place."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn


class _NoQConfig:
    """In the place of `qconfig`, which torch.ao.quantization hands down from parent to child: from here on, None.

    A linear layer below with a quantized form would be fed floats.  Whole models that are prepared in vain get torch's
    own warning that nothing was.
    """

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> None:
        return None

    def __set__(self, module: nn.Module, qconfig: Any) -> None:
        """torch.ao.quantization sets what its parent has, or what holds for the whole graph."""

    def __delete__(self, module: nn.Module) -> None:
        """torch.ao.quantization.convert deletes what prepare has set."""


class FloatInPython(nn.Module):
    """Mixin: static quantization leaves the module and its children in float; torch.jit.script says what to use."""

    qconfig = _NoQConfig()

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by torch.jit.script on every module of what it is given."""
        raise NotImplementedError(
            f"torch.jit.script does not read SeTAttention and its kin (here {type(self).__name__}):"
            " use torch.jit.trace, torch.export.export or torch.compile instead"
        )
