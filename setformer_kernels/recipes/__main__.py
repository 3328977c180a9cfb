"""`python -m setformer_kernels.recipes COMMAND ...`: train and evaluate SeTformers on data in the standard formats."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "classify": "images in an ImageFolder tree (ImageNet-1K's layout); top-1 and top-5 accuracy",
    "glue": "the nine GLUE tasks from their TSV files; each task's own metrics",
    "lm": "a causal language model of text or bytes; bits per byte and perplexity",
    "detect": "object detection with Mask R-CNN in COCO's format; mAP of boxes and masks",
    "segment": "semantic segmentation with UPerNet in ADE20K's format; mean IoU",
    "convert": "a saved model of transformers on SeT attention, taught by its softmax; error by layer and head",
    "samples": "writes small data sets in these formats",
}
PROGRAM = "python -m setformer_kernels.recipes"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 with a message on stderr where the input does not fit."""
    parser = argparse.ArgumentParser(PROGRAM, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    choices = "\n".join(f"{name:<10}{text}" for name, text in COMMANDS.items())
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=choices)
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its own arguments; --help lists them")
    chosen = parser.parse_args(arguments)
    try:
        recipe = importlib.import_module(f".{chosen.command}", __package__)
    except ModuleNotFoundError as missing:
        print(f"error: {missing.name} is missing: pip install 'setformer-kernels[recipes]'", file=sys.stderr)
        return 2
    own = argparse.ArgumentParser(f"{PROGRAM} {chosen.command}", description=recipe.__doc__)
    recipe.add_arguments(own)
    from .errors import RecipeError

    try:
        recipe.run(own.parse_args(chosen.rest))
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
