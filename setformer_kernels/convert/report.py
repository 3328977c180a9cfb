"""What a transfer did: tables, files and a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..models.convert import ReplacementReport
from .hybrid import Converted
from .measuring import HeadError

# After k-means, after the layers learned, with some of them softmax again, after the model learned.
PLACED, MATCHED, HYBRID, TUNED = "placed", "matched", "hybrid", "tuned"


@dataclass
class TransferReport:
    """By the moment ("placed", "matched", "hybrid", "tuned"): errors by layer and head, on the teacher's inputs, and
    what the outputs have in common with the teacher's (`output_agreement`); the curve of hybrids, where it was asked
    for; the layers that were converted in the end; the moment whose model was returned, the last one unless stage 2
    made it worse."""

    replacement: ReplacementReport
    layers: dict[str, list[HeadError]] = field(default_factory=dict)
    outputs: dict[str, dict[str, float]] = field(default_factory=dict)
    curve: list[Converted] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    returned: str = PLACED

    def __str__(self) -> str:
        parts = [_table(["outputs", *_keys(self.outputs)], [
            [moment, *(f"{values.get(name, float('nan')):.4f}" for name in _keys(self.outputs))]
            for moment, values in self.outputs.items()
        ])]  # fmt: skip
        if self.outputs and self.returned != list(self.outputs)[-1]:
            parts.append(f"Stage 2 made it worse, and was undone: the model is that of {self.returned!r}.")
        if self.layers:
            moments = list(self.layers)
            rows = [
                [name, *(" ".join(f"{e.error:.3f}" for e in self.layers[m] if e.layer == name) for m in moments)]
                for name in dict.fromkeys(e.layer for e in self.layers[moments[0]])
            ]
            parts.append(_table(["layer: error of each head", *moments], rows))
        if self.curve:
            rows = [
                [str(count), step.layer, f"{step.alone:.4f}", f"{step.error:.4f}", _yes(step.layer in self.converted)]
                for count, step in enumerate(self.curve, 1)
            ]
            parts.append(_table(["layers", "the last one", "its error alone", "error", "converted"], rows))
        parts += [f"left {name}: {reason}" for name, reason in self.replacement.left.items()]
        return "\n\n".join(parts)

    def write(self, folder: Path, picture: bool = True) -> None:
        """report.md, layers.csv, outputs.csv, curve.csv where there is one, and report.png where matplotlib is."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.md").write_text(f"{self}\n", encoding="utf-8")
        heads = [(moment, *error) for moment, errors in self.layers.items() for error in errors]
        _write_csv(folder / "layers.csv", ("moment", "layer", "head", "error"), heads)
        outputs = [(moment, *pair) for moment, values in self.outputs.items() for pair in values.items()]
        _write_csv(folder / "outputs.csv", ("moment", "name", "value"), outputs)
        if self.curve:
            steps = [(i, *step, step.layer in self.converted) for i, step in enumerate(self.curve, 1)]
            _write_csv(folder / "curve.csv", ("layers", "layer", "alone", "error", "converted"), steps)
        if not picture:
            return
        try:
            from .picture import draw
        except ModuleNotFoundError:  # matplotlib is an extra
            return
        draw(self, folder / "report.png")


def _keys(outputs: dict[str, dict[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for values in outputs.values() for name in values))


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
