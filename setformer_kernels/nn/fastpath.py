"""Why nn.TransformerEncoderLayer calls SeT attention in eval, instead of computing softmax attention from its weights.

In eval the layer hands the projection weights of its `self_attn` to a C++ kernel of softmax attention, without calling
`self_attn.forward`, unless one of the conditions it reads says no.  Most are facts about the weights, which others read
too and which must stay true (`in_proj_bias`, `_qkv_same_embed_dim`, `batch_first`, `num_heads`).  One is free: that no
module in it has a hook.  The layer goes through its modules to count them, by `named_modules` of each: there a module
that must be called makes sure of its hook, so that whoever clears hooks, by any way of doing so, changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module

# It gives back the arguments of the call.  A function of this package, run before the forward of a module that is being
# exported, would be taken for a graph of its own by the strict torch.export of torch 2.6; one of torch.nn is not.
HOOK = nn.Identity.forward
KEY = -1  # of HOOK; those of registered hooks count up from 0


def keep_python_forward(hooked: nn.Module, args: tuple[Any, ...]) -> None:
    """HOOK's predecessor, registered in modules that earlier versions have pickled."""


class PythonForward(nn.Module):
    """Mixin: nn.TransformerEncoderLayer always calls forward."""

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As in nn.Module."""
        self._ensure_hook()
        return super().named_modules(memo, prefix, remove_duplicate)

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        """nn.Module's, which takes its long way where there is a hook: HOOK alone changes nothing."""
        hooks = self._forward_pre_hooks
        if (
            len(hooks) == 1
            and KEY in hooks
            and not (
                self._forward_hooks
                or self._backward_hooks
                or self._backward_pre_hooks
                or module._global_forward_hooks
                or module._global_forward_pre_hooks
                or module._global_backward_hooks
                or module._global_backward_pre_hooks
                or torch._C._get_tracing_state()
            )
        ):
            return self.forward(*args, **kwargs)
        return super()._call_impl(*args, **kwargs)

    def _ensure_hook(self) -> None:
        hooks = self._forward_pre_hooks
        if KEY not in hooks:
            for key in [key for key, hook in hooks.items() if hook is keep_python_forward]:
                del hooks[key]
            hooks[KEY] = HOOK
