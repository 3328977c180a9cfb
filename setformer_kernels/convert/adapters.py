"""Low-rank adapters (peft) for the second stage: the linear layers learn a correction, which is merged at the end."""

from __future__ import annotations

from typing import Any

from torch import nn


class Adapters:
    """Adapters of a rank in every nn.Linear of a model, in place, but those that are an output projection's plain
    weights in nn.MultiheadAttention."""

    def __init__(self, model: nn.Module, rank: int) -> None:
        try:
            from peft import LoraConfig
            from peft.tuners.lora import LoraModel
        except ModuleNotFoundError as missing:
            raise ModuleNotFoundError(
                f"adapters need {missing.name}: pip install peft, or train the weights themselves (lora_rank=0)"
            ) from missing
        targets = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        if not targets:
            raise ValueError("lora_rank must be 0: the model has no nn.Linear")
        config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets)
        self.around: Any = LoraModel(model, config, "default")
        self.names = [name for name, _ in model.named_parameters() if "lora_" in name]

    def merge(self) -> nn.Module:
        """The model without adapters, its weights corrected."""
        merged: nn.Module = self.around.merge_and_unload()
        return merged
