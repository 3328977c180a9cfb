"""What a replacement says it did, and what a rule raises for what it leaves."""

from __future__ import annotations

from dataclasses import dataclass, field


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
