"""What stops a recipe: input that does not fit."""

from __future__ import annotations


class RecipeError(Exception):
    """Names the file or argument, what it holds and what was expected."""
