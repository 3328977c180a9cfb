"""Models of transformers whose attention was replaced: their configuration says so, and they are built again by it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ..convert import replace_attention
from ..transport import OWN_DEFAULTS, SetTransport
from .attention import SAVED_NAME
from .initialization import draw_missing
from .parallel import name_transports

LOADER = "setformer_kernels.models.transformers.from_pretrained"
FORMAT = 1  # of what is noted: a package that knows an older one alone must not read it


def note_conversion(model: nn.Module, names: Iterable[str], own: dict[str, Any]) -> None:
    """Writes into the configurations of transformers' models what was replaced in model, by name, and with what.

    `config.setformer["layers"]` maps names within the model that the configuration is of to arguments of
    `replace_attention`; `config.attn_implementation` stands in config.json for processes without this package.
    """
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in own.items()}
    for name in names:
        module: Any = model.get_submodule(name)
        config = getattr(module, "config", None)
        around = _around(model, name)
        if not around and isinstance(config, PretrainedConfig):
            around = {id(config): ("", config)}
        for prefix, owner in around.values():
            layers = getattr(owner, "setformer", {}).get("layers", {})
            layers = {**layers, name.removeprefix(prefix): plain}
            owner.setformer = {"load_with": LOADER, "format": FORMAT, "layers": layers}
            owner.attn_implementation = SAVED_NAME
        if config is not None and id(config) in around:
            # `model.set_attn_implementation` would make it softmax again
            module.config = copy.copy(config)
            module.config._attn_implementation_internal = config._attn_implementation


def _around(model: nn.Module, name: str) -> dict[int, tuple[str, Any]]:
    """The configurations of transformers' models around the module called name, each once, with the prefix of the
    innermost model that it is of: parts with a configuration of their own are saved within the whole's, a copy."""
    found: dict[int, tuple[str, Any]] = {}
    parts = name.split(".")
    for i in range(len(parts)):
        prefix = ".".join(parts[:i])
        around = model.get_submodule(prefix)
        if isinstance(around, PreTrainedModel):
            found[id(around.config)] = (f"{prefix}." if prefix else "", around.config)
    return found


def convert_as_noted(model: PreTrainedModel) -> None:
    """Replaces again what `model.config.setformer` says.

    Raises:
        ValueError: it was written by a newer release, or names what cannot be SeT attention in these releases.
    """
    noted = getattr(model.config, "setformer", None)
    if not noted:
        return
    _check_noted(noted)
    names: dict[tuple[tuple[str, Any], ...], set[str]] = {}
    for name, own in noted["layers"].items():
        names.setdefault(tuple(sorted(own.items())), set()).add(name)
    for own, among in names.items():

        def skip(name: str, _: nn.Module, among: set[str] = among) -> bool:
            return not any(f".{name}".endswith(f".{noted}") for noted in among)

        report = replace_attention(model, skip=skip, **dict(own))
        for name, why in report.left.items():
            if not skip(name, model):
                raise ValueError(
                    f"config.setformer must name attention that this release of transformers"
                    f" ({transformers.__version__}) lets replace, got {name}: {why}; load it with the release that"
                    f" saved it ({getattr(model.config, 'transformers_version', 'unknown')})"
                )


def _check_noted(noted: Any) -> None:
    if not isinstance(noted, dict) or not isinstance(noted.get("layers"), dict):
        raise ValueError(f"config.setformer must be what replace_attention wrote, got {noted!r}")
    if noted.get("format", FORMAT) > FORMAT:
        raise ValueError(
            f"config.setformer must be of format {FORMAT} or older, got {noted['format']}: the model was saved by a"
            " newer release of setformer-kernels, upgrade it"
        )
    for name, own in noted["layers"].items():
        if unknown := own.keys() - OWN_DEFAULTS.keys():
            raise ValueError(
                f"config.setformer must have arguments that this release of setformer-kernels knows, got"
                f" {', '.join(sorted(unknown))} for {name}: upgrade it"
            )


def from_pretrained(path: str, **kwargs: Any) -> PreTrainedModel:
    """The model saved after `replace_attention`, of the class it was saved from, its SeT attention included.

    Args:
        path: a folder or a name on the Hub, with kwargs, as `PreTrainedModel.from_pretrained` takes them.

    Raises:
        ValueError: what is saved there is not such a model.
    """
    config = AutoConfig.from_pretrained(path, **{name: kwargs[name] for name in HUB_ARGUMENTS & kwargs.keys()})
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if not getattr(config, "setformer", None) or kind is None:
        raise ValueError(
            f"path must hold a model of transformers that was saved after replace_attention, got {path!r} with"
            f" architectures={config.architectures} and setformer={getattr(config, 'setformer', None)}"
        )
    return kind.from_pretrained(path, **kwargs)


HUB_ARGUMENTS = {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"}


def _after(method: Callable[..., None], first: Callable[..., bool | None]) -> Callable[..., None]:
    """method, after first(*args), or in its place where that returns True."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> None:
        if not first(*args, **kwargs):
            method(*args, **kwargs)

    return call


def _before(method: Callable[..., None], last: Callable[[Any], None]) -> Callable[..., None]:
    """method, and then last(self)."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        method(self, *args, **kwargs)
        last(self)

    return call


def _draw_transport(model: PreTrainedModel, module: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether module is SeT attention, whose parameters that a checkpoint lacks are then drawn as its own are."""
    if not isinstance(module, SetTransport) or getattr(module, "_is_hf_initialized", False):
        return False
    draw_missing(module)
    module._is_hf_initialized = True  # type: ignore[assignment]
    return True


# transformers has no door for a model whose modules are exchanged between its constructor and its weights but the one
# for quantizers, and that one marks the model as quantized: no `.float()`, no training.
PreTrainedModel.post_init = _before(_after(PreTrainedModel.post_init, convert_as_noted), name_transports)
PreTrainedModel._initialize_weights = _after(PreTrainedModel._initialize_weights, _draw_transport)
