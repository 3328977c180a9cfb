"""ListOps by the rules of the Long Range Arena generator (Tay et al., ICLR 2021), at lengths up to 512.

An expression is a digit, or an operator with 2 to 10 arguments and a closing bracket, nested at most 10 deep; above the
depth limit a node is an operator with probability 1/4. Its value is a digit. Expressions too short or too long are
drawn again, and none occurs twice. The Long Range Arena takes lengths from 500 to 2000, `ARENA`.
"""

from __future__ import annotations

import random

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
END = "]"
PAD = 0  # the token that is not there
VOCABULARY = {word: 1 + i for i, word in enumerate((*"0123456789", *OPERATORS, END))}
MAX_DEPTH, MAX_ARGUMENTS, OPERATOR_PROBABILITY = 10, 10, 0.25
MIN_LENGTH, MAX_LENGTH = 10, 512
ARENA = (500, 2000)


def expression(rng: random.Random, depth: int = 1) -> list[str]:
    """A random expression as its words."""
    if depth >= MAX_DEPTH or rng.random() > OPERATOR_PROBABILITY:
        return [rng.choice("0123456789")]
    arguments = [expression(rng, depth + 1) for _ in range(rng.randint(2, MAX_ARGUMENTS))]
    return [rng.choice(OPERATORS), *(word for argument in arguments for word in argument), END]


def apply(operator: str, arguments: list[int]) -> int:
    """MIN, MAX, the median rounded down, or the sum modulo 10."""
    if operator == "[MED":
        ordered, n = sorted(arguments), len(arguments)
        return (ordered[(n - 1) // 2] + ordered[n // 2]) // 2
    if operator == "[SM":
        return sum(arguments) % 10
    return min(arguments) if operator == "[MIN" else max(arguments)


def value(words: list[str]) -> int:
    """The digit an expression stands for."""
    open_calls: list[tuple[str, list[int]]] = [("", [])]
    for word in words:
        if word in OPERATORS:
            open_calls.append((word, []))
            continue
        result = apply(*open_calls.pop()) if word == END else int(word)
        open_calls[-1][1].append(result)
    return open_calls[0][1][0]


def samples(
    count: int, seed: int, lengths: tuple[int, int] = (MIN_LENGTH, MAX_LENGTH)
) -> list[tuple[list[int], int]]:  # fmt: skip
    """`count` different expressions within the length limits: their tokens, and their values."""
    rng, seen = random.Random(seed), set()
    found: list[tuple[list[int], int]] = []
    while len(found) < count:
        words = expression(rng)
        if not lengths[0] <= len(words) <= lengths[1] or (text := " ".join(words)) in seen:
            continue
        seen.add(text)
        found.append(([VOCABULARY[word] for word in words], value(words)))
    return found
