"""A teacher's answers, kept in a folder: run once, it need not be beside the students that learn from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..checkpoints import write_atomically
from .layers import recorded
from .matching import HIDDEN, LAYER, MASKS, OUTPUT, RECORDED, check_same_layers, output_of, tokens_of
from .students import Collate

SHARD, BATCH = 64, 16  # samples a file, and a call of the teacher
BY_TOKEN = "tokens."  # before the name of what has a row for each token that takes part
TOLD = "recording.json"


class Recording:
    """The answers in a folder that `record_teacher` has filled: of every sample those of the layers, one a call, the
    output and (where asked for) the hidden states, [L, ...] each, at the tokens that take part.

    `samples(data)` and `collate(collate)` stand for data and collate where a student learns.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        told = _told(folder)
        if told is None or _incomplete(folder):
            raise ValueError(f"{folder} holds no complete recording: make it, or go on, by record_teacher")
        self.told = told

    @property
    def layers(self) -> list[str]:
        return list(self.told["layers"])

    def check(self, teacher: nn.Module, samples: int, layers: Sequence[str], hidden: bool) -> None:
        """Raises ValueError where the recording is not of this teacher, data, or lacks what is asked for."""
        differing = [
            f"{name} is {self.told[name]}, now {now}"
            for name, now in (("teacher", fingerprint(teacher)), ("samples", samples))
            if self.told[name] != now
        ]
        if missing := [name for name in layers if name not in self.told["layers"]]:
            differing.append(f"it lacks the layer {missing[0]}")
        if hidden and not self.told["hidden"]:
            differing.append("it lacks hidden states")
        if differing:
            raise ValueError(f"{self.folder} is another recording: {differing[0]}; name another folder")

    def samples(self, data: Dataset) -> Dataset:
        """Of each sample also its number, which `collate` wants."""
        if len(data) != self.told["samples"]:  # type: ignore[arg-type]
            raise ValueError(f"{self.folder} is of {self.told['samples']} samples, got {len(data)}")  # type: ignore[arg-type]
        return _Numbered(data)

    def collate(self, collate: Collate, kinds: Sequence[str] = (LAYER, OUTPUT, HIDDEN)) -> Collate:
        """A batch of numbered samples, with what of these kinds the teacher answered to them; no other is read."""
        return partial(self._batch, collate, kinds)

    def _batch(self, collate: Collate, kinds: Sequence[str], rows: list[tuple[int, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = dict(collate([row for _, row in rows]))
        answers = [self._answers_to(number, kinds) for number, _ in rows]
        joined = {name: self._joined(name, [answer[name] for answer in answers], batch) for name in answers[0]}
        return {**batch, RECORDED: {name.removeprefix(BY_TOKEN): x for name, x in joined.items()}}

    def _joined(self, name: str, rows: list[Tensor], batch: dict[str, Any]) -> Tensor:
        """[B, L, ...] of each sample's [n, ...]; 0 at the tokens that take no part."""
        if not name.startswith(BY_TOKEN):
            return torch.stack(rows)
        mask = next(batch[name] for name in MASKS if name in batch)
        tokens = tokens_of(batch, mask[..., None])
        if tokens is None or [len(row) for row in rows] != tokens.sum(1).tolist():
            raise ValueError(f"{self.folder} is of other samples: their numbers of tokens differ from these")
        joined = rows[0].new_zeros((*tokens.shape, *rows[0].shape[1:]))
        joined[tokens] = torch.cat(rows)
        return joined

    def _answers_to(self, number: int, kinds: Sequence[str]) -> dict[str, Tensor]:
        file, asked = self._shards[number // SHARD], tuple(f"{kind}." for kind in kinds)
        names = {name: name.removeprefix(f"{number}.") for name in self._names[number]}
        chosen = {name: own for name, own in names.items() if own.removeprefix(BY_TOKEN).startswith(asked)}
        return {own: file.get_tensor(name) for name, own in chosen.items()}

    @cached_property
    def _shards(self) -> list[Any]:
        count = -(-self.told["samples"] // SHARD)
        return [safe_open(shard_of(self.folder, i), "pt") for i in range(count)]

    @cached_property
    def _names(self) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for file in self._shards:
            for name in file.keys():  # noqa: SIM118
                found.setdefault(int(name.partition(".")[0]), []).append(name)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "told": self.told}  # workers open the files anew


class _Numbered(Dataset):
    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.data[index]


def record_teacher(
    teacher: nn.Module, data: Dataset, collate: Collate, folder: Path, layers: Sequence[str], *, hidden: bool = False,
    dtype: torch.dtype | None = None, progress: Callable[[str], None] = print,
) -> Recording:  # fmt: skip
    """What the teacher answers to every sample of data, in files of 64 samples; those that are there are kept.

    Args:
        teacher: put in eval mode; on the device where it is.
        data, collate: as of `transfer_attention`, without shuffling.
        layers: names of its attention layers; hidden: also all hidden states (models of transformers).
        dtype: of what is kept; as it comes where None.

    Raises:
        ValueError: folder holds another recording, the teacher has no such layer, or a layer does not answer [B, ...].
    """
    check_same_layers(teacher, layers)
    size = len(data)  # type: ignore[arg-type]
    told = {
        "teacher": fingerprint(teacher),
        "samples": size,
        "layers": [*layers],
        "hidden": hidden,
        "dtype": str(dtype),
    }
    if (before := _told(folder)) not in (None, told):
        raise ValueError(f"{folder} holds another recording, {before}, not {told}: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / TOLD, json.dumps(told) + "\n")
    for first in range(0, size, SHARD):
        path = shard_of(folder, first // SHARD)
        if path.exists():
            continue
        rows = [(number, data[number]) for number in range(first, min(first + SHARD, size))]
        kept = dict(_answers(teacher.eval(), rows, collate, layers, hidden, dtype))
        save_file(kept, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
        progress(f"teacher: {min(first + SHARD, size)} of {size} samples recorded")
    return Recording(folder)


def recorded_by(
    teacher: nn.Module, data: Dataset, collate: Collate, folder: Path, layers: Sequence[str], hidden: bool, *,
    progress: Callable[[str], None] = print,
) -> Recording:  # fmt: skip
    """The recording in folder, where it is of this teacher and data and has at least what is asked for, else made."""
    if _told(folder) is not None and not _incomplete(folder):
        recording = Recording(folder)
        recording.check(teacher, len(data), layers, hidden)  # type: ignore[arg-type]
        return recording
    return record_teacher(teacher, data, collate, folder, layers, hidden=hidden, progress=progress)


def _answers(
    teacher: nn.Module, rows: list[tuple[int, Any]], collate: Collate, layers: Sequence[str], hidden: bool,
    dtype: torch.dtype | None,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """ "number.what" -> [n, ...] of each sample, and of each answer of the teacher to it."""
    device = next(teacher.parameters()).device
    for some in (rows[i : i + BATCH] for i in range(0, len(rows), BATCH)):
        batch = {name: x.to(device) for name, x in collate([row for _, row in some]).items()}
        with torch.no_grad(), recorded(teacher, layers) as (said, _):
            answer = teacher(**batch, **({"output_hidden_states": True} if hidden else {}))
        kind, output = output_of(answer)
        found = {f"{LAYER}.{name}.{i}": x for name in layers for i, x in enumerate(said[name])}
        found[f"{OUTPUT}.{kind}"] = output
        if hidden:
            found |= {f"{HIDDEN}.{i}": x for i, x in enumerate(answer.hidden_states)}
        for what, x in found.items():
            if x.shape[0] != len(some):
                raise ValueError(f"layers must answer batch first to be recorded: {what} is {[*x.shape]}")
            tokens = tokens_of(batch, x)
            for row, (number, _) in enumerate(some):
                one, how = (x[row], "") if tokens is None else (x[row][tokens[row]], BY_TOKEN)
                yield f"{number}.{how}{what}", one.to("cpu", dtype or x.dtype, copy=True).contiguous()


def _told(folder: Path) -> dict[str, Any] | None:
    """What the recording in folder says of itself."""
    try:
        return dict(json.loads((folder / TOLD).read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / TOLD} cannot be read: {error}") from error


def _incomplete(folder: Path) -> bool:
    told = _told(folder) or {"samples": 0}
    return not all(shard_of(folder, i).exists() for i in range(-(-told["samples"] // SHARD)))


def shard_of(folder: Path, number: int) -> Path:
    return folder / f"answers-{number:05d}.safetensors"


def fingerprint(teacher: nn.Module) -> str:
    """Of its class and of every weight."""
    digest = hashlib.sha256(type(teacher).__name__.encode())
    for name, x in teacher.state_dict().items():
        digest.update(name.encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
