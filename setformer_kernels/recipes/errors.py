"""What stops a recipe: input that does not fit."""

from __future__ import annotations


class RecipeError(Exception):
    """Names the file or argument, what it holds and what was expected."""

    def __str__(self) -> str:
        # a DataLoader raises what stopped its worker anew, with the worker's traceback for a message
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()
