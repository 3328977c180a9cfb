"""How transformers draws weights that a checkpoint lacks: SeT layers whole, as their own modules do."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel, initialization

from ...nn import SeTAttention, SeTPooling
from ...nn.reference_set import ReferenceSet
from ..transport import SetTransport
from ..vision import VisionBlock


class SeTPreTrainedModel(PreTrainedModel):
    supports_gradient_checkpointing = True
    _no_split_modules = ("VisionBlock", "TextBlock")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ReferenceSet):
            draw_missing(module, self.config.position_scale)
        elif isinstance(module, VisionBlock):
            for gamma in (module.gamma1, module.gamma2):
                initialization.constant_(gamma, self.config.layer_scale)
        elif isinstance(module, nn.Conv2d):
            initialization.kaiming_normal_(module.weight, mode="fan_out")
        else:
            super()._init_weights(module)


def draw_missing(module: ReferenceSet, position_scale: float | None) -> None:
    """Draws the parameters of an attention or pooling layer anew, those that were loaded left as they are."""
    loaded = [(p, p.clone()) for p in module.parameters() if getattr(p, "_is_hf_initialized", False)]
    assert isinstance(module, (SeTAttention, SeTPooling, SetTransport))
    module.reset_parameters()
    if module.position_scale is not None and position_scale is not None:
        module.position_scale.fill_(position_scale)
    for parameter, value in loaded:
        parameter.copy_(value)
