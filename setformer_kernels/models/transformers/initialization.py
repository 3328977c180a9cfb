"""How transformers draws weights that a checkpoint lacks: SeT layers whole, as their own modules do."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, initialization

from ...nn import SeTAttention, SeTPooling
from ...nn.reference_set import ReferenceSet
from ..causal import Gates, ShortConvolution
from ..layers import own_start
from ..transport import SetTransport
from ..vision import VisionBlock


class SeTPreTrainedModel(PreTrainedModel):
    """What the text and the vision models share.

    _fixed_options: by name, what options that BERT's and Swin's configurations have must be: there is no other here.
    """

    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # Trainer averages over the steps of an accumulated batch itself
    _fixed_options: ClassVar[dict[str, Any]] = {}

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        for name, value in self._fixed_options.items():
            if getattr(config, name, value) != value:
                raise ValueError(
                    f"{name} must be {value!r}, which {type(self).__name__} always has, got {getattr(config, name)!r}"
                )
        super().__init__(config, *args, **kwargs)

    def post_init(self) -> None:
        """Layers that draw themselves (`reset_parameters`) do so with the configuration's deviation."""
        for module in self.modules():
            if "reset_parameters" in vars(module):
                own_start(module, self.config.initializer_range)
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (ReferenceSet, Gates, ShortConvolution)):
            draw_missing(module)
        elif isinstance(module, VisionBlock):
            for gamma in (module.gamma1, module.gamma2):
                initialization.constant_(gamma, self.config.layer_scale)
        elif isinstance(module, nn.Conv2d):
            initialization.kaiming_normal_(module.weight, mode="fan_out")
        else:
            super()._init_weights(module)

    def classification_loss(
        self, logits: Tensor, labels: Tensor | None, num_items_in_batch: Tensor | int | None
    ) -> Tensor | None:
        """transformers' loss of logits [B, num_labels] by `config.problem_type`; None without labels."""
        if labels is None:
            return None
        loss = self.loss_function(
            labels=labels, pooled_logits=logits, config=self.config, num_items_in_batch=num_items_in_batch
        )
        if num_items_in_batch is not None and self.config.problem_type != "single_label_classification":
            raise ValueError(
                "num_items_in_batch must be None where the loss is a mean over all numbers"
                f" (problem_type={self.config.problem_type!r}), got {num_items_in_batch}"
            )
        return loss


def draw_missing(module: nn.Module) -> None:
    """Draws the parameters of a layer anew as it draws them itself, those that were loaded left as they are."""
    loaded = [(p, p.clone()) for p in module.parameters() if getattr(p, "_is_hf_initialized", False)]
    if len(loaded) == len(list(module.parameters())):
        return
    assert isinstance(module, (SeTAttention, SeTPooling, SetTransport, Gates, ShortConvolution))
    module.reset_parameters()
    for parameter, value in loaded:
        parameter.copy_(value)
