"""Swaps the attention of an existing model for SeT attention, in place, and says what it did and what it left."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..nn import SeTAttention
from .transport import SetTransport


@dataclass
class ReplacementReport:
    """By module name: the class that was replaced, and why what looks like attention was left."""

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"replaced {name}: {kind}" for name, kind in self.replaced.items()]
        return "\n".join([*lines, *(f"left {name}: {reason}" for name, reason in self.left.items())])


class Refusal(Exception):
    """Why a module cannot be replaced."""


def replace_attention(
    model: nn.Module, *, skip: Callable[[str, nn.Module], bool] | None = None, **own: Any
) -> ReplacementReport:
    """Replaces softmax attention in model by SeT attention with the same projections (the same Parameter objects).

    Known: `nn.MultiheadAttention`, timm's `Attention` (ViT and kin), and BERT and ViT of transformers.  References are
    new, so the model must be fine-tuned; place them first with `initialize_references(model, ...)`.  Hooks on a module
    that is replaced stay behind.

    Args:
        skip: of (name, module), whether to leave it.
        own: keyword arguments of `SeTAttention` beyond those of `nn.MultiheadAttention` (num_references, epsilon, ...).

    Raises:
        ValueError: model is itself an attention module, or position_dim is asked for (the model passes no positions).
    """
    if own.get("position_dim"):
        raise ValueError(f"position_dim must be 0: the model passes no positions, got {own['position_dim']}")
    if _rule_of(model) is not None:
        raise ValueError(f"model must contain attention modules, got an attention module: {type(model).__name__}")
    report, new = ReplacementReport(), {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        rule = _rule_of(module)
        if rule is None:
            continue
        if skip is not None and skip(name, module):
            report.left[name] = "skipped by the caller"
            continue
        try:
            if id(module) not in new:
                new[id(module)] = rule(module, own)
        except Refusal as refusal:
            report.left[name] = str(refusal)
            continue
        report.replaced[name] = type(module).__name__
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new[id(module)])
    _note_in_configurations(model, report, own)
    _name_the_unknown(model, report)
    return report


def _note_in_configurations(model: nn.Module, report: ReplacementReport, own: dict[str, Any]) -> None:
    """Models of transformers are saved with what was replaced in them."""
    base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
    if any(isinstance(module, base) or hasattr(module, "set_transport") for module in model.modules()) and base:
        from .transformers.conversion import note_conversion

        note_conversion(model, report.replaced, own)


Rule = Callable[[nn.Module, dict[str, Any]], nn.Module]


def _rule_of(module: nn.Module) -> Rule | None:
    """What replaces this kind of module.  A class that was never imported has no instances to look for."""
    if isinstance(module, nn.MultiheadAttention) and not isinstance(module, SeTAttention):
        return _from_multihead
    for path, name, rule in (
        ("timm.models.vision_transformer", "Attention", _from_timm),
        ("transformers.models.vit.modeling_vit", "ViTAttention", _from_transformers),
        ("transformers.models.bert.modeling_bert", "BertSelfAttention", _from_transformers),
    ):
        if type(module) is getattr(sys.modules.get(path), name, None) and not hasattr(module, "set_transport"):
            return rule
    return None


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


def _refuse_changed_weights(module: nn.Module) -> None:
    if nn.utils.parametrize.is_parametrized(module):
        raise Refusal("its weights are parametrized: remove the parametrizations first")


def _from_multihead(old: nn.Module, own: dict[str, Any]) -> nn.Module:
    assert isinstance(old, nn.MultiheadAttention)
    _refuse_changed_weights(old)
    if type(old) is not nn.MultiheadAttention:
        raise Refusal(f"{type(old).__name__} is a subclass of nn.MultiheadAttention, whose forward may be another")
    weight = old.out_proj.weight
    new = SeTAttention(
        old.embed_dim, old.num_heads, old.dropout, old.in_proj_bias is not None, old.bias_k is not None,
        old.add_zero_attn, old.kdim, old.vdim, old.batch_first, weight.device, weight.dtype, **own,
    )  # fmt: skip
    for name, parameter in old.named_parameters(recurse=False):
        setattr(new, name, parameter)
    new.out_proj = old.out_proj
    return new.train(old.training)


class SeTTimmAttention(nn.Module):
    """timm's `Attention` with its own projections, norms, gate and dropout; between them, SeT attention."""

    qkv: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Dropout
    norm: nn.Module
    gate: nn.Module | None
    proj: nn.Module
    proj_drop: nn.Module

    def __init__(self, old: nn.Module, own: dict[str, Any]) -> None:
        super().__init__()
        for name, child in old.named_children():
            self.add_module(name, child)
        H = old.num_heads
        assert isinstance(H, int)
        self.num_heads = H
        self.set_transport = SetTransport(H, self.qkv.out_features // (3 * H), self.qkv.weight, own)

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


def _from_timm(old: nn.Module, own: dict[str, Any]) -> nn.Module:
    _refuse_changed_weights(old)
    if unknown := {name for name, _ in old.named_children()} - TIMM_PARTS:
        raise Refusal(f"timm's Attention has parts unknown here: {', '.join(sorted(unknown))}")
    return SeTTimmAttention(old, own).train(old.training)


def _from_transformers(old: nn.Module, own: dict[str, Any]) -> nn.Module:
    """The module itself: its projections call the attention that its config names, which becomes SeT attention."""
    from .transformers.attention import NAME

    if getattr(old, "is_causal", False) or getattr(old, "is_decoder", False):
        raise Refusal("it is a decoder's, with a cache: only encoders are replaced")
    H = old.num_attention_heads
    assert isinstance(H, int)
    linear = next(child for child in old.children() if isinstance(child, nn.Linear))
    old.set_transport = SetTransport(H, linear.out_features // H, linear.weight, own).train(old.training)
    old.config._attn_implementation = NAME  # type: ignore[union-attr]
    return old
