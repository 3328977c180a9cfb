"""The two losses of attention transfer, as modules that a trainer may train: layer by layer, and end to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Answers, taught
from .layers import recorded as seen

POOLINGS = ("mean", "first")
MASKS = ("attention_mask", "src_key_padding_mask")
RECORDED = "recorded"  # of a batch: what the teacher answered to it, by LAYER.name.call, OUTPUT.kind and HIDDEN.number
LAYER, OUTPUT, HIDDEN = "layer", "output", "hidden"
Recorded = dict[str, Tensor] | None


class _Matching(nn.Module):
    """Teacher and student side by side.  The teacher is no submodule: it is neither trained nor saved.  Both stay in
    eval mode: what the student is to match has no dropout.

    Its state are the parameters that learn, and no others.
    """

    learns_values = True  # whether fused projections of queries, keys and values learn whole
    reads: tuple[str, ...] = ()  # which kinds of a recording's answers
    accepts_loss_kwargs = False  # Trainer averages over the steps of an accumulated batch itself

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        super().__init__()
        self.student = student.eval()
        self._outside = (teacher.eval(),)

    @property
    def teacher(self) -> nn.Module:
        return self._outside[0]

    def train(self, mode: bool = True) -> _Matching:
        return super().train(False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> _Matching:
        self.teacher._apply(fn)
        return super()._apply(fn, recurse)

    def state_dict(  # type: ignore[override]
        self, *args: Any, prefix: str = "", keep_vars: bool = False, **kwargs: Any
    ) -> dict[str, Any]:  # fmt: skip
        learned = {f"{prefix}{name}": p for name, p in self.named_parameters() if p.requires_grad}
        return learned if keep_vars else {name: p.detach() for name, p in learned.items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        own = self.state_dict(keep_vars=True)
        if own.keys() != state_dict.keys():
            differing = sorted(own.keys() ^ state_dict.keys())
            raise ValueError(f"the checkpoint must hold what learns here, they differ in {', '.join(differing[:3])}")
        for name, parameter in own.items():
            parameter.copy_(state_dict[name])
        return nn.modules.module._IncompatibleKeys([], [])


class LayerMatching(_Matching):
    """Every layer on the teacher's own inputs.  forward(**inputs) -> {"loss"}: the mean over the layers of
    Σ‖o − o*‖²/Σ‖o*‖², o* the teacher's answer, o the student's to the same input, over the tokens that take part.

    The student goes on with o*, so no error of one layer reaches the next, and gradients stay within a layer.
    """

    learns_values = False
    reads = (LAYER,)

    def __init__(self, teacher: nn.Module, student: nn.Module, layers: Sequence[str]) -> None:
        super().__init__(teacher, student)
        check_same_layers(teacher, layers)
        self.layers = list(layers)

    def forward(self, recorded: Recorded = None, **inputs: Tensor) -> dict[str, Tensor]:
        said = self._asked(inputs) if recorded is None else self._read(recorded)
        with taught(self.student, self.layers, said) as (own, _):
            self.student(**inputs)
        errors = [
            relative_error(o, t, tokens_of(inputs, t))
            for name in self.layers
            for o, t in zip(own[name], said[name], strict=True)
        ]
        if not errors:
            raise ValueError(f"the model called none of the layers {', '.join(self.layers)}")
        return {"loss": torch.stack(errors).mean()}

    @torch.no_grad()
    def _asked(self, inputs: dict[str, Tensor]) -> Answers:
        with seen(self.teacher, self.layers) as (said, _):
            self.teacher(**inputs)
        return said

    def _read(self, recorded: dict[str, Tensor]) -> Answers:
        """What the layers answered, in the order of their calls."""
        calls = {name: sum(key.startswith(f"{LAYER}.{name}.") for key in recorded) for name in self.layers}
        return {name: [recorded[f"{LAYER}.{name}.{i}"] for i in range(calls[name])] for name in self.layers}


class OutputMatching(_Matching):
    """The whole model.  forward(**inputs) -> {"loss"}: the relative squared error of the output; of logits, also their
    Kullback–Leibler divergence; of hidden states, also 1 − the cosine of what `pooling` makes of them.

    Args:
        pooling: "mean" over the tokens that take part, or "first" token.
        hidden: also the mean relative squared error of all hidden states (models of transformers).
    """

    reads = (OUTPUT, HIDDEN)

    def __init__(self, teacher: nn.Module, student: nn.Module, pooling: str = "mean", hidden: bool = False) -> None:
        super().__init__(teacher, student)
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        self.pooling, self.hidden = pooling, hidden

    def forward(self, recorded: Recorded = None, **inputs: Tensor) -> dict[str, Tensor]:
        kind, t, states = self._asked(inputs) if recorded is None else self._read(recorded)
        got = self.student(**inputs, **self._more())
        o = output_of(got)[1]
        tokens = tokens_of(inputs, t)
        loss = relative_error(o, t, tokens)
        if kind == "logits":
            loss = loss + divergence(o, t, tokens)
        else:
            a, b = (pool(wide(x), tokens, self.pooling) for x in (o, t))
            loss = loss + (1 - F.cosine_similarity(a, b, dim=-1)).mean()
        if self.hidden:
            pairs = list(zip(got.hidden_states, states, strict=True))[1:]  # the first are embeddings
            loss = loss + torch.stack([relative_error(o, t, tokens_of(inputs, t)) for o, t in pairs]).mean()
        return {"loss": loss}

    def _more(self) -> dict[str, bool]:
        return {"output_hidden_states": True} if self.hidden else {}

    @torch.no_grad()
    def _asked(self, inputs: dict[str, Tensor]) -> tuple[str, Tensor, list[Tensor]]:
        """Of the teacher: whether it gives logits, what it gives, and its hidden states where they count."""
        answer = self.teacher(**inputs, **self._more())
        return *output_of(answer), list(answer.hidden_states) if self.hidden else []

    def _read(self, recorded: dict[str, Tensor]) -> tuple[str, Tensor, list[Tensor]]:
        (name,) = (name for name in recorded if name.startswith(f"{OUTPUT}."))
        count = sum(name.startswith(f"{HIDDEN}.") for name in recorded)
        states = [recorded[f"{HIDDEN}.{i}"] for i in range(count)] if self.hidden else []
        return name.removeprefix(f"{OUTPUT}."), recorded[name], states


def check_same_layers(teacher: nn.Module, layers: Sequence[str]) -> None:
    """Raises ValueError where the teacher is of another architecture than the student."""
    known = {name for name, _ in teacher.named_modules()}
    if missing := [name for name in layers if name not in known]:
        raise ValueError(f"teacher must have the student's architecture, it has no {missing[0]}")


def output_of(answer: Any) -> tuple[str, Tensor]:
    """What is compared, and whether it is logits: of a model of transformers its logits, else its last hidden states;
    of another the tensor that it returns."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(answer, name, None), Tensor):
            return ("logits" if name == "logits" else "hidden"), getattr(answer, name)
    first = answer[0] if isinstance(answer, (tuple, list)) and answer else answer
    if not isinstance(first, Tensor):
        raise TypeError(f"the model must return a tensor, logits or last_hidden_state, got {type(answer).__name__}")
    return "hidden", first


def tokens_of(inputs: dict[str, Any], x: Tensor) -> Tensor | None:
    """Which tokens of x [B, L, ...] take part, [B, L]; None where all do."""
    mask, padding = (inputs.get(name) for name in MASKS)
    if mask is None and padding is not None:
        mask = padding == 0  # bool: True is padding; float: −∞ is
    if mask is None or x.dim() < 3 or mask.shape != x.shape[:2]:
        return None
    return mask != 0


def wide(x: Tensor) -> Tensor:
    """float32, or the float64 that x has."""
    return x if x.dtype == torch.float64 else x.float()


def chosen(x: Tensor, tokens: Tensor | None) -> Tensor:
    """x [B, L, ...] at the tokens [B, L] that take part, [n, ...]."""
    return wide(x) if tokens is None else wide(x[tokens])


def relative_error(x: Tensor, target: Tensor, tokens: Tensor | None) -> Tensor:
    """Σ‖x − target‖²/Σ‖target‖²."""
    x, target = chosen(x, tokens), chosen(target, tokens)
    return (x - target).square().sum() / target.square().sum().clamp_min(1e-20)


def divergence(logits: Tensor, target: Tensor, tokens: Tensor | None) -> Tensor:
    """KL(softmax(target) ‖ softmax(logits)) [nats], the mean over rows."""
    p, q = (chosen(x, tokens).flatten(0, -2).log_softmax(-1) for x in (target, logits))
    return F.kl_div(q, p, log_target=True, reduction="batchmean")


def pool(x: Tensor, tokens: Tensor | None, how: str = "mean") -> Tensor:
    """x [B, L, E] -> [B, E]; what has no tokens stays."""
    if x.dim() != 3:
        return x
    if how == "first":
        return x[:, 0]
    if tokens is None:
        return x.mean(1)
    weight = tokens[..., None].to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp_min(1)
