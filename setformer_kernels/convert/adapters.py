"""Low-rank adapters (peft) for the second stage: linear layers learn a correction, which is merged at the end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn


def adapted(model: nn.Module, layers: Sequence[str] | None = None) -> list[str]:
    """The names of what gets adapters.

    Raises:
        ValueError: nothing does.
    """
    within = None if layers is None else tuple(f"{layer}." for layer in layers)
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    found = linear if within is None else [name for name in linear if name.startswith(within)]
    if not found:
        where = "model has" if not linear else "converted layers have"
        raise ValueError(f"lora_rank must be 0{', or tune_all' if linear else ''}: the {where} no nn.Linear")
    return found


def lora_classes() -> tuple[Any, Any]:
    """peft's LoraConfig and LoraModel.

    Raises:
        ModuleNotFoundError: peft, or what it needs, is not there.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"adapters need {missing.name}: pip install peft, or train the weights themselves (lora_rank=0)"
        ) from missing
    return LoraConfig, LoraModel


class Adapters:
    """Adapters of a rank in every nn.Linear of a model's layers (None: of the model), in place, but those that are an
    output projection's plain weights in nn.MultiheadAttention."""

    def __init__(self, model: nn.Module, rank: int, layers: Sequence[str] | None = None) -> None:
        new_config, new_model = lora_classes()
        exactly = "|".join(map(re.escape, adapted(model, layers)))  # peft takes a listed name for the end of others
        config = new_config(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=exactly)
        self.around: Any = new_model(model, config, "default")
        self.names = [name for name, _ in model.named_parameters() if "lora_" in name]

    def merge(self) -> nn.Module:
        """The model without adapters, its weights corrected."""
        merged: nn.Module = self.around.merge_and_unload()
        return merged
