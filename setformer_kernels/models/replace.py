"""Swaps the attention of an existing model for SeT attention, in place, and says what it did and what it left."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import SeTAttention
from ..nn.attention import PROJECTIONS
from ..nn.doors import FloatInPython
from ..nn.writing import recomputed
from .transport import SetTransport


@dataclass
class ReplacementReport:
    """By module name: the class that was replaced, and why what looks like attention was left."""

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"replaced {name}: {kind}" for name, kind in self.replaced.items()]
        lines += [f"left {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines) or "nothing replaced: no softmax attention was found in the model"


class Refusal(Exception):
    """Why a module cannot be replaced."""


def replace_attention(
    model: nn.Module, *, skip: Callable[[str, nn.Module], bool] | None = None, **own: Any
) -> ReplacementReport:
    """Makes the softmax attention in model SeT attention with the same projections.

    Known: `nn.MultiheadAttention`, timm's `Attention` (ViT and kin), and BERT and ViT of transformers.  References are
    new, so the model must be fine-tuned; place them first with `initialize_references(model, ...)`.

    A module stays the object it is and becomes one of another class: its Parameter objects, its hooks, and what
    computes its weights (prune, the old weight_norm and spectral_norm, merged adapters) go on working.  What cannot
    be carried over is left, with the reason in the report: subclasses, parametrized weights, an exchanged `forward`.

    Args:
        skip: of (name, module), whether to leave it; a module with several names is left if one of them is skipped.
        own: keyword arguments of `SeTAttention` beyond those of `nn.MultiheadAttention` (num_references, epsilon, ...).

    Raises:
        ValueError: model is itself an attention module, or position_dim is asked for (the model passes no positions).
    """
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
        from .transformers.conversion import note_conversion

        note_conversion(model, report.replaced, own)


Rule = Callable[[nn.Module, dict[str, Any]], None]


def _rule_of(module: nn.Module) -> Rule | None:
    """What turns this kind of module into SeT attention.  A class that was never imported has no instances."""
    if isinstance(module, nn.MultiheadAttention) and not isinstance(module, SeTAttention):
        return _from_multihead
    for path, name, rule in (
        ("timm.models.vision_transformer", "Attention", _from_timm),
        ("transformers.models.vit.modeling_vit", "ViTAttention", _from_transformers),
        ("transformers.models.bert.modeling_bert", "BertSelfAttention", _from_transformers),
    ):
        kind = getattr(sys.modules.get(path), name, None)
        if kind is not None and _unparametrized(module) is kind and not hasattr(module, "set_transport"):
            return rule
    return None


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
            report.left[name] = f"no rule for {type(module).__name__}"


def _refuse_other_weights(module: nn.Module) -> None:
    """What SeT attention would compute with other weights, or past code, that the module now runs."""
    if nn.utils.parametrize.is_parametrized(module):
        raise Refusal("its weights are parametrized: remove the parametrizations first")
    own = vars(module).get("_old_forward", vars(module).get("forward"))  # accelerate keeps the class's as _old_forward
    if own is not None and getattr(own, "__func__", None) is not type(module).forward:
        raise Refusal("its forward was exchanged on the instance, and may do more than attention")
    if "_old_forward" in vars(module) and _rule_of(module) is not _from_transformers:
        raise Refusal("accelerate wrapped its forward: replace before the model is dispatched")


def _like(module: nn.Module) -> Tensor:
    """An empty tensor of the dtype and device of the module's weights, the references' too; packed integers have none
    and stand for the default dtype."""
    tensors = [*module.parameters(), *module.buffers(), *(x for x in vars(module).values() if isinstance(x, Tensor))]
    floating = [x for x in tensors if x.is_floating_point()]
    device = (floating or tensors)[0].device if tensors else None
    return torch.empty(0, device=device, dtype=floating[0].dtype if floating else None)


def _from_multihead(old: nn.Module, own: dict[str, Any]) -> None:
    assert isinstance(old, nn.MultiheadAttention)
    if type(old) is not nn.MultiheadAttention:
        raise Refusal(f"{type(old).__name__} is a subclass of nn.MultiheadAttention, whose forward may be another")
    if missing := [name for name in (*PROJECTIONS, "out_proj") if not hasattr(old, name)]:
        raise Refusal(f"it has no {missing[0]}")
    _refuse_unused_out_proj(old.out_proj)
    like = _like(old)
    new = SeTAttention(
        old.embed_dim, old.num_heads, old.dropout, old.in_proj_bias is not None, old.bias_k is not None,
        old.add_zero_attn, old.kdim, old.vdim, old.batch_first, like.device, like.dtype, **own,
    ).train(old.training)  # fmt: skip
    had = {*old._parameters, *old._buffers, *old._modules, *vars(old)}
    old._parameters.update({name: x for name, x in new._parameters.items() if name not in had})
    old._modules.update({name: x for name, x in new._modules.items() if name not in had})
    vars(old).update({name: x for name, x in vars(new).items() if name not in had})
    old.__class__ = SeTAttention


def _refuse_unused_out_proj(linear: nn.Module) -> None:
    """nn.MultiheadAttention reads weight and bias of its out_proj and never calls it, so what is in its forward has had
    no effect; SeT attention calls it."""
    kind = f"{type(linear).__module__}.{type(linear).__name__}"
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):
        raise Refusal(f"its out_proj is a {kind} whose forward was never called: merge or remove what it adds first")
    for name in ("weight", "bias"):
        computed = recomputed(linear, name)
        if computed is not None and not torch.allclose(computed, getattr(linear, name), atol=1e-6):
            raise Refusal(f"its out_proj was used without the normalisation of its {name}: remove that first")


class SeTTimmAttention(FloatInPython):
    """timm's `Attention` with its own projections, norms, gate and dropout; between them, SeT attention.

    Not built: an `Attention` with a `set_transport` becomes one.
    """

    num_heads: int
    set_transport: SetTransport
    qkv: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Dropout
    norm: nn.Module
    gate: nn.Module | None
    proj: nn.Module
    proj_drop: nn.Module

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x [B, N, C] -> [B, N, C]; attn_mask as `F.scaled_dot_product_attention` takes it."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        heads = self.set_transport(q, k, v, None, attn_mask, is_causal, self.attn_drop.p)
        y = heads.transpose(1, 2).flatten(2)
        if hasattr(self, "norm"):  # norm and gate came with later releases of timm
            y = self.norm(y)
        if getattr(self, "gate", None) is not None:
            assert self.gate is not None
            y = y * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(y))


TIMM_PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}


def _from_timm(old: nn.Module, own: dict[str, Any]) -> None:
    if unknown := {name for name, _ in old.named_children()} - TIMM_PARTS:
        raise Refusal(f"timm's Attention has parts unknown here: {', '.join(sorted(unknown))}")
    assert isinstance(old.num_heads, int)
    assert isinstance(old.head_dim, int)
    old.set_transport = SetTransport(old.num_heads, old.head_dim, _like(old), own).train(old.training)
    old.__class__ = SeTTimmAttention


def _from_transformers(old: nn.Module, own: dict[str, Any]) -> None:
    """Its projections call the attention that its config names, which becomes SeT attention."""
    from .transformers.attention import NAME

    if getattr(old, "is_causal", False) or getattr(old, "is_decoder", False):
        raise Refusal("it is a decoder's, with a cache: only encoders are replaced")
    width = getattr(old, "head_dim", None) or old.attention_head_size
    assert isinstance(old.num_attention_heads, int)
    assert isinstance(width, int)
    old.set_transport = SetTransport(old.num_attention_heads, width, _like(old), own).train(old.training)
    old.config._attn_implementation = NAME  # type: ignore[union-attr]
