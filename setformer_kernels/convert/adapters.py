"""Low-rank adapters (peft) for the second stage: linear layers learn a correction, which is merged at the end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn


class Adapters:
    """Adapters of a rank in every nn.Linear of a model's layers (None: of the model), in place, but those that are an
    output projection's plain weights in nn.MultiheadAttention."""

    def __init__(self, model: nn.Module, rank: int, layers: Sequence[str] | None = None) -> None:
        try:
            from peft import LoraConfig
            from peft.tuners.lora import LoraModel
        except ModuleNotFoundError as missing:
            raise ModuleNotFoundError(
                f"adapters need {missing.name}: pip install peft, or train the weights themselves (lora_rank=0)"
            ) from missing
        targets = [
            name
            for name, module in model.named_modules()
            if type(module) is nn.Linear and (layers is None or name.startswith(tuple(f"{x}." for x in layers)))
        ]
        if not targets:
            where = "model has" if layers is None else "converted layers have"
            raise ValueError(f"lora_rank must be 0: the {where} no nn.Linear")
        exactly = "|".join(map(re.escape, targets))  # peft takes a name in a list for the end of one, too
        config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=exactly)
        self.around: Any = LoraModel(model, config, "default")
        self.names = [name for name, _ in model.named_parameters() if "lora_" in name]

    def merge(self) -> nn.Module:
        """The model without adapters, its weights corrected."""
        merged: nn.Module = self.around.merge_and_unload()
        return merged
