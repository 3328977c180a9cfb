"""Every input check of the functional API: ValueError or TypeError naming the argument, what it got, what it wants.

Checks read shapes, dtypes, devices and Python numbers, never the values of a tensor: that would stall a GPU.  Only a
0-d tensor that stands where a Python number is meant is read, as `plain` says.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .problem import DTYPES, KERNELS

Size = int | str | None


def _show(shape: Sequence[Size]) -> str:
    return "[" + ", ".join("*" if s is None else str(s) for s in shape) + "]"


def _fits(value: Tensor, sizes: Sequence[Size]) -> bool:
    return value.ndim == len(sizes) and all(e is None or s == e for s, e in zip(value.shape, sizes, strict=True))


def tensor(name: str, value: Any, letters: str) -> Tensor:
    """`value` is a floating-point tensor with one dimension a letter: 'BHLD' wants four."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor [{', '.join(letters)}], got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name} must be a dense Tensor [{', '.join(letters)}], got layout {value.layout}")
    if value.ndim != len(letters):
        raise ValueError(f"{name} must have shape [{', '.join(letters)}], got {value.ndim}-D {list(value.shape)}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {value.dtype}")
    return value


def shape(name: str, value: Tensor, expected: Sequence[Size], why: str) -> None:
    """`value` has the expected sizes; None stands for any."""
    if not _fits(value, expected):
        raise ValueError(f"{name} must have shape {_show(expected)} ({why}), got {list(value.shape)}")


def heads(name: str, value: Tensor, of: str, key_heads: int) -> None:
    """`value` [B, H, ...] has as many heads as `of`, or a multiple of them."""
    if value.shape[1] == 0 or value.shape[1] % key_heads != 0:
        wants = f"a multiple of the {key_heads} heads of the {of}"
        raise ValueError(f"{name} must have H, {wants} (H of the {of}, or grouped), got {list(value.shape)}")


def same_dtype(first: str, a: Tensor, second: str, b: Tensor) -> None:
    if a.dtype != b.dtype:
        raise TypeError(f"{second} must have the dtype of {first}, {a.dtype}, got {b.dtype}")


def same_device(first: str, a: Tensor, /, **others: Any) -> None:
    for name, b in others.items():
        if isinstance(b, Tensor) and b.device != a.device:
            raise ValueError(f"{name} must be on the device of {first}, {a.device}, got {b.device}")


def nonempty(name: str, value: Tensor, letters: str, sizes: Sequence[int]) -> None:
    for letter, size in zip(letters, sizes, strict=True):
        if size == 0:
            raise ValueError(f"{name} must have {letter} > 0, got {list(value.shape)}")


def plain(value: Any) -> Any:
    """A NumPy scalar, or a 0-d array or tensor without gradient, as the Python number it holds; others as they are."""
    if type(value) in (bool, int, float, str):  # nearly always, and all that a tracer need follow
        return value
    scalar = getattr(value, "ndim", None) == 0 and not getattr(value, "requires_grad", False)
    return value.item() if scalar and hasattr(value, "item") else value


def integer(name: str, value: Any, low: int | None = None) -> int:
    """`value` as an int, ≥ low where that is given."""
    whole = plain(value)
    if isinstance(whole, bool) or not isinstance(whole, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int{'' if low is None else f' ≥ {low}'}, got {_kind(value)}")
    if low is not None and whole < low:
        raise ValueError(f"{name} must be ≥ {low}, got {whole}")
    return int(whole)


def number(name: str, value: Any, low: float, high: float = math.inf, open_low: bool = False) -> float:
    """`value` as a float in [low, high] ((low, high] if `open_low`), never infinite."""
    return _bounded(name, _real(name, value, "a float"), low, high, open_low)


def _real(name: str, value: Any, wants: str) -> float:
    """`value` as a float of any size."""
    real = plain(value)
    if isinstance(real, bool) or not isinstance(real, (int, float, numbers.Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be {wants}, got {_kind(value)}")
    return float(real)


def _bounded(name: str, value: float, low: float, high: float, open_low: bool) -> float:
    if not (low <= value <= high and value < math.inf) or (open_low and value == low):
        wants = f"{'> ' if open_low else '≥ '}{low:g}" + ("" if math.isinf(high) else f" and ≤ {high:g}")
        raise ValueError(f"{name} must be finite and {wants}, got {value}")
    return value


def _kind(value: Any) -> str:
    """What a wrong number is, for its message."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"a Tensor {list(value.shape)} of {value.dtype}" + (" that requires grad" if value.requires_grad else "")


def hyperparameter(
    name: str, value: Any, heads: int, low: float, high: float, open_low: bool = False
) -> float | Tensor:  # fmt: skip
    """A number as `number` takes it, or a floating-point tensor [H] or [], whose values are not read."""
    if not isinstance(value, Tensor) or (value.ndim == 0 and not value.is_floating_point()):
        return _bounded(name, _real(name, value, "a float or a tensor [H]"), low, high, open_low)
    if not (_fits(value, (heads,)) or value.ndim == 0) or not value.is_floating_point():
        raise ValueError(
            f"{name} must be a float or a floating-point tensor [H] = [{heads}], got {value.dtype} {list(value.shape)}"
        )
    return value


def iterations(value: Any) -> int:
    return integer("num_iters", value, 0)


def probability(name: str, value: Any) -> float:
    p = _real(name, value, "a float in [0, 1]")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {p}")
    return p


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """`value` as one of the strings there are to choose from."""
    text = plain(value)
    if not isinstance(text, str) or text not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return choices[choices.index(text)]


def text(name: str, value: Any) -> str:
    """`value` as a string, whose meaning is checked where it is known."""
    string = plain(value)
    if not isinstance(string, str):
        raise ValueError(f"{name} must be a string, got {_kind(value)}")
    return string


def kernel(value: Any) -> str:
    return choice("kernel", value, KERNELS)


def flag(name: str, value: Any) -> bool:
    """`value` as a bool."""
    truth = plain(value)
    if not isinstance(truth, bool):
        raise TypeError(f"{name} must be a bool, got {_kind(value)}")
    return truth


def mask(name: str, value: Any, allowed: Sequence[Sequence[int]]) -> None:
    """A bool (True takes part) or floating-point (log mass) mask of one of the allowed shapes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a bool or floating-point Tensor, got {type(value).__name__}")
    if value.dtype != torch.bool and not value.is_floating_point():
        raise TypeError(f"{name} must be bool (True takes part) or floating point (log mass), got {value.dtype}")
    if not any(_fits(value, s) for s in allowed):
        raise ValueError(f"{name} must have shape {' or '.join(_show(s) for s in allowed)}, got {list(value.shape)}")


def offsets(name: str, value: Any) -> Tensor:
    """Offsets [N + 1], int32 or int64."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be an int32 or int64 Tensor [N + 1], got {got}")
    if value.ndim != 1 or value.shape[0] == 0:
        raise ValueError(f"{name} must have shape [N + 1], got {list(value.shape)}")
    return value


def offsets_within(name: str, value: Tensor, total: int, what: str) -> None:
    """On the CPU, where reading them waits for nobody: offsets count up from 0 to at most `total`."""
    if value.device.type != "cpu":
        return
    first, last = int(value[0]), int(value[-1])
    if first != 0:
        raise ValueError(f"{name} must begin with 0, got {first}")
    if bool((value[1:] < value[:-1]).any()):
        raise ValueError(f"{name} must not decrease, got {value.tolist() if value.numel() <= 32 else 'a lower offset'}")
    if last > total:
        raise ValueError(f"{name} must end at most at the {total} {what}, got {last}")


def positions(tokens: dict[str, tuple[Any, int, int]], reference: Any, heads: int, m: int) -> None:
    """`tokens`: name -> (value, B, N), each [N, P] or [B, N, P]; `reference` [H, M, P]; all given or none."""
    given = {**{name: value for name, (value, _, _) in tokens.items()}, "reference_position": reference}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return
    if missing:
        raise ValueError(f"{' and '.join(given)} go together: {', '.join(missing)} missing")
    p = tensor("reference_position", reference, "HMP").shape[-1]
    shape("reference_position", reference, (heads, m, None), "H and M of the references")
    for name, (value, b, n) in tokens.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor [N, P] or [B, N, P], got {type(value).__name__}")
        if not (_fits(value, (n, p)) or _fits(value, (b, n, p))):
            raise ValueError(f"{name} must have shape {[n, p]} or {[b, n, p]}, got {list(value.shape)}")
        if value.requires_grad:
            raise ValueError(f"{name} gets no gradient, but requires_grad is set: pass {name}.detach()")
