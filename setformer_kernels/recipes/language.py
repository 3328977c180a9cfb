"""How language models are trained and scored: by the mean loss of a token, also where a window lies on several ranks.

With a context of N ranks, N neighbours get the same windows and compute a part of each window's tokens: a mesh of
samples × parts, which Accelerate's loaders follow.  Its own context parallelism, of softmax attention, stays off.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import context_parallel
from .errors import RecipeError
from .training import RecipeTrainer


class LanguageTrainer(RecipeTrainer):
    """The mean loss of a token [nats] as what texts are compared by.

    Of every window apart: ranks fill their last batches up with windows that were there already, and what is gathered
    leaves these out.

    Args:
        length: tokens that a window predicts.
        parts: ranks that share a window.
    """

    def __init__(self, *args: Any, length: int, parts: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.length, self.parts, self.here = length, parts, slice(length)
        self.group: Any = None  # of the ranks that share this one's windows
        if parts > 1:
            self._share_windows()

    def _share_windows(self) -> None:
        ranks = self.accelerator.num_processes
        if ranks % self.parts:
            raise RecipeError(f"--context-parallel must divide the number of ranks, {ranks}, got {self.parts}")
        from torch.distributed.device_mesh import init_device_mesh

        names = ("dp_replicate", "cp")  # as Accelerate calls them: ranks of one "cp" get the same batches
        mesh = init_device_mesh(self.accelerator.device.type, (ranks // self.parts, self.parts), mesh_dim_names=names)
        self.accelerator.state.device_mesh = mesh
        cuts = [self.length * part // self.parts for part in range(self.parts + 1)]
        lengths = [last - first for first, last in itertools.pairwise(cuts)]
        context_parallel(self.model, mesh["cp"], lengths=lengths)
        self.group, part = mesh["cp"].get_group(), mesh["cp"].get_local_rank()
        self.here = slice(cuts[part], cuts[part + 1])

    def get_cp_size(self) -> int:
        return self.parts

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Of a part of the tokens the sum by what makes the mean over all ranks that of all tokens."""
        if self.parts > 1:
            tokens = inputs["labels"]
            inputs = {
                "input_ids": tokens[:, :-1][:, self.here], "shift_labels": tokens[:, 1:][:, self.here].contiguous(),
                "num_items_in_batch": len(tokens) * self.length / self.parts, "use_cache": False,
            }  # fmt: skip
        return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        loss, logits, labels = super().prediction_step(model, inputs, False, ignore_keys)
        next_ones = labels[:, 1:][:, self.here]
        by_token = F.cross_entropy(logits[:, : next_ones.shape[1]].mT.float(), next_ones, reduction="none")
        by_window = by_token.sum(1)
        if self.parts > 1:
            dist.all_reduce(by_window, group=self.group)
        return loss, by_window / self.length, labels.new_zeros(len(labels))

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        if self.parts > 1:
            self.gather_function = self._gathered_once
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        loss = float(output.predictions.astype("float64").mean())
        output.metrics["eval_loss"] = loss
        output.metrics["eval_bits_per_byte"] = loss / math.log(2) * dataloader.dataset.tokens_per_byte
        output.metrics["eval_perplexity"] = math.exp(min(loss, 700.0))
        return output

    def _gathered_once(self, rows: Tensor) -> Tensor:
        """`Accelerator.gather_for_metrics` of windows [B, ..] that `parts` neighbours have alike."""
        every = self.accelerator.gather(rows).unflatten(0, (-1, self.parts, len(rows)))[:, 0].flatten(0, 1)
        state = self.accelerator.gradient_state
        return every[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else every
