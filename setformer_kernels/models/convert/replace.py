"""Swaps the attention of an existing model for SeT attention, in place, and says what it did and what it left."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from ...nn import SeTAttention
from .fused import calls, from_fused
from .report import Refusal, ReplacementReport
from .timm import from_timm
from .torch import from_multihead
from .transformers import asks_the_interface, from_transformers


def replace_attention(
    model: nn.Module, *, skip: Callable[[str, nn.Module], bool] | None = None, **own: Any
) -> ReplacementReport:
    """Makes the softmax attention in model SeT attention with the same projections.

    Known: `nn.MultiheadAttention`; timm's `Attention` (ViT and kin) and whatever else of timm is written with one call
    of `F.scaled_dot_product_attention` (Swin, BEiT, EVA, ...); and whatever goes through the attention interface of
    transformers, of any model: encoders, decoders with their caches, grouped queries, cross attention.  References
    are new, so the model must be fine-tuned; place them first with `initialize_references(model, ...)`.

    A module stays the object it is and becomes one of another class: its Parameter objects, its hooks, and what
    computes its weights (prune, the old weight_norm and spectral_norm, merged adapters) go on working.  What cannot
    be carried over is left, with the reason in the report: subclasses, parametrized weights, an exchanged `forward`.

    Args:
        skip: of (name, module), whether to leave it; a module with several names is left if one of them is skipped.
        own: keyword arguments of `SeTAttention` beyond those of `nn.MultiheadAttention` (num_references, epsilon, ...).

    Raises:
        TypeError: model is no module.
        ValueError: model is itself an attention module, or position_dim is asked for (the model passes no positions).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if own.get("position_dim"):
        raise ValueError(f"position_dim must be 0: the model passes no positions, got {own['position_dim']}")
    if _rule_of(model) is not None:
        raise ValueError(f"model must contain attention modules, got an attention module: {type(model).__name__}")
    report = ReplacementReport()
    for module, names in _attention_in(model).items():
        kind, rule = type(module).__name__, _rule_of(module)
        assert rule is not None
        try:
            if skipped := [name for name in names if skip is not None and skip(name, module)]:
                raise Refusal("skipped by the caller" + ("" if skipped == names else f" as {skipped[0]}"))
            _refuse_other_weights(module)
            rule(module, own)
        except Refusal as refusal:
            report.left.update(dict.fromkeys(names, str(refusal)))
        else:
            report.replaced.update(dict.fromkeys(names, kind))
    _note_in_configurations(model, report, own)
    _name_the_unknown(model, report)
    return report


def _attention_in(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The modules that there is a rule for, each with all its names."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _rule_of(module) is not None:
            found.setdefault(module, []).append(name)
    return found


def _note_in_configurations(model: nn.Module, report: ReplacementReport, own: dict[str, Any]) -> None:
    """Models of transformers are saved with what was replaced in them."""
    base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
    if any(isinstance(module, base) or hasattr(module, "set_transport") for module in model.modules()) and base:
        from ..transformers.conversion import note_conversion

        note_conversion(model, report.replaced, own)


Rule = Callable[[nn.Module, dict[str, Any]], None]


def _rule_of(module: nn.Module) -> Rule | None:
    """What turns this kind of module into SeT attention.  A class that was never imported has no instances."""
    if isinstance(module, nn.MultiheadAttention) and not isinstance(module, SeTAttention):
        return from_multihead
    if hasattr(module, "set_transport"):
        return None
    kind = _unparametrized(module)
    if kind is getattr(sys.modules.get("timm.models.vision_transformer"), "Attention", None):
        return from_timm
    if calls(kind):
        return from_fused
    return from_transformers if asks_the_interface(module) else None


def _unparametrized(module: nn.Module) -> type[nn.Module]:
    """The class of a module before its weights were parametrized, which makes a subclass of it."""
    return type(module).__bases__[0] if nn.utils.parametrize.is_parametrized(module) else type(module)


def _name_the_unknown(model: nn.Module, report: ReplacementReport) -> None:
    """Adds to the report the innermost modules that are called attention and that no rule covers."""
    known = {*report.replaced, *report.left}
    called = [name for name, module in model.named_modules() if name and "attention" in type(module).__name__.lower()]
    for name in called:
        inner = any(other != name and other.startswith(f"{name}.") for other in (*called, *known))
        inside = any(name == other or name.startswith(f"{other}.") for other in known)
        module = model.get_submodule(name)
        ours = isinstance(module, SeTAttention) or hasattr(module, "set_transport")
        if not inner and not inside and not ours:
            theirs = type(module).__module__.startswith("transformers.")
            why = ": it does not go through transformers' attention interface" if theirs else ""
            report.left[name] = f"no rule for {type(module).__name__}{why}"


def _refuse_other_weights(module: nn.Module) -> None:
    """What SeT attention would compute with other weights, or past code, that the module now runs."""
    if nn.utils.parametrize.is_parametrized(module):
        raise Refusal("its weights are parametrized: remove the parametrizations first")
    own = vars(module).get("_old_forward", vars(module).get("forward"))  # accelerate keeps the class's as _old_forward
    if own is not None and getattr(own, "__func__", None) is not type(module).forward:
        raise Refusal("its forward was exchanged on the instance, and may do more than attention")
    if "_old_forward" in vars(module) and _rule_of(module) is not from_transformers:
        raise Refusal("accelerate wrapped its forward: replace before the model is dispatched")
