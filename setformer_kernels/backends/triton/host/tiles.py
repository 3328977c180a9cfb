"""Tile sizes: one table, with the reason beside each number; no length ever enters it."""

from __future__ import annotations

import functools
import importlib.metadata
import os
from typing import NamedTuple

# Whether kernels run in Python, on CPU tensors; Triton reads the same variable when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _release() -> tuple[int, ...]:
    """Major and minor number of the installed Triton, without importing it."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # not there, or under another name, as in builds of torch for AMD
        return ()
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


RELEASE = _release()  # empty where it is not known


class Tile(NamedTuple):
    """How one kernel is cut."""

    rows: int  # tokens per step of a program's loop
    depth: int  # head dims per product: longer ones are summed, or split over programs
    warps: int
    stages: int  # of the software pipeline
    wgmma: bool = False  # whether products may be Hopper's asynchronous ones, see HOPPER
    across: bool = False  # whether warps share the references, not the tokens, see `primitives.tokens_by`
    # Whether tiles are computed anew, and rows read anew, rather than held in registers.
    frugal: bool = False
    resident: int = 4  # programs that a multiprocessor's registers and shared memory hold at a time
    keys: int = 0  # per step of the kernels under a mask, whose rows are queries; 0: as many as rows
    # That a thread may have, where ptxas rather spills a little than take more; 0: as many as it takes.
    registers: int = 0


MAX_REFERENCES = 256  # a row of logits stays in one tile, so that the row update needs no second pass
MAX_HEAD_DIM = 256
MIN_BLOCK = 16  # the smallest side of a tensor-core product


def padded(n: int) -> int:
    """The next power of two that a tile can have as a side."""
    return max(MIN_BLOCK, 1 << (n - 1).bit_length())


def power_of_two(n: int) -> int:
    """The next power of two, the padded side of something that enters no product."""
    return 1 << max(0, n - 1).bit_length()


# Kinds of kernel, by what a program holds across its loop: "row" kernels hold no accumulator (read, features),
# "column" kernels hold [M] or [M, depth] sums (transport), "gradient" kernels hold [M, depth] sums beside two tiles.
# "pooling" is the last pass of the column kernels, which sums values beside the column sums.
# Those with "_placed" and "masked_far" have positions, or factors that are wider than the tokens.
# "across" and those with "_log" are in the log domain or have warps across the references: peaks beside every sum.
# Sizes: "small" M, D, E ≤ 64; "medium" ≤ 128; "large" beyond.  "wide", of medium size with M ≤ 64, and "many", of large
# size with M > 128, are cut as "medium" and "large" where the tables say nothing of their own.  "half" and "single" are
# the token's bytes.
DEFAULT: dict[tuple[str, str, str], Tile] = {
    # [rows, M] float32 logits are the largest tile a thread holds: rows · M / (32 · warps) registers each.
    ("row", "small", "half"): Tile(64, 64, 4, 2),
    ("row", "medium", "half"): Tile(64, 64, 4, 2),
    ("row_placed", "medium", "half"): Tile(64, 64, 8, 2),  # of four warps up to 470 bytes spill (Triton 3.9)
    ("row", "large", "half"): Tile(32, 32, 8, 1),
    ("row", "small", "single"): Tile(16, 32, 4, 1),
    ("row", "medium", "single"): Tile(16, 32, 4, 1),
    ("row", "large", "single"): Tile(16, 16, 8, 1),
    ("column", "small", "half"): Tile(64, 64, 4, 2),
    ("column", "medium", "half"): Tile(128, 64, 8, 2, resident=2),
    ("column", "large", "half"): Tile(32, 32, 8, 1),
    ("column", "small", "single"): Tile(32, 16, 4, 1),
    ("column", "medium", "single"): Tile(32, 32, 8, 1, resident=2),
    ("column", "large", "single"): Tile(16, 16, 8, 1),
    ("across", "small", "half"): Tile(32, 64, 4, 2),
    ("across", "medium", "half"): Tile(64, 64, 8, 2),
    # Half precision: [references, rows] products of 16 or 32 tokens; eight warps, as [M, depth] sums spill on four.  A
    # second program fits beside one only in the passes that hold no such sums.
    ("gradient", "small", "half"): Tile(32, 64, 8, 2, across=True, resident=2),
    ("gradient", "medium", "half"): Tile(16, 64, 8, 1, across=True, resident=2),
    ("gradient", "large", "half"): Tile(16, 64, 8, 1, across=True, resident=2),
    # 64 dims at a time spill up to 3.4 KB under masks, and 400 to 700 bytes of Hopper where these leave 100 to 160.
    ("gradient_log", "many", "half"): Tile(16, 32, 8, 1, across=True, resident=2),
    ("columns_backward_log", "many", "half"): Tile(16, 64, 8, 1, across=True, resident=2),  # spills nothing with these
    ("gradient", "small", "single"): Tile(16, 32, 8, 1, across=True, resident=2),
    ("gradient", "medium", "single"): Tile(16, 32, 8, 1, across=True, resident=2),
    ("gradient", "large", "single"): Tile(16, 16, 8, 1, across=True, resident=2),
    # Frugal, as it spills up to 128 bytes (Blackwell): by the model that costs a fifth where nothing spills.
    ("keys_backward_placed", "medium", "half"): Tile(16, 64, 8, 1, across=True, frugal=True, resident=2),
    # "linearised" hold 64 columns of [M, M] sums beside float32 tiles.
    ("linearised", "small", "half"): Tile(16, 64, 4, 1, across=True, resident=3),
    ("linearised", "medium", "half"): Tile(16, 32, 8, 1, across=True, resident=2),
    ("linearised", "large", "half"): Tile(16, 32, 8, 1, across=True, resident=1),
    ("linearised", "small", "single"): Tile(16, 32, 4, 1, across=True, resident=3),
    ("linearised", "medium", "single"): Tile(16, 32, 8, 1, across=True, resident=2),
    ("linearised", "large", "single"): Tile(16, 16, 8, 1, across=True, resident=1),
    # "chunk": the causal kernels hold several [rows, M] tiles at once and no sums across a loop.
    # Eight warps take 3.6 times as long over the sums of chunks, and over nothing less (forward, H200).
    ("chunk", "small", "half"): Tile(32, 64, 4, 1),
    ("step", "small", "half"): Tile(32, 64, 8, 1),
    ("chunk", "medium", "half"): Tile(32, 32, 8, 1),
    ("chunk", "large", "half"): Tile(16, 32, 8, 1),
    # Of 256 references, 32 dims at a time spill up to 1.9 KB in the forward pass, with 2.6 times the instructions, and
    # 4.3 KB in the gates'.  The queries' backward pass spills 1 to 1.5 KB with any.
    ("chunk", "many", "half"): Tile(16, 16, 8, 1),
    ("chunk_gates", "many", "half"): Tile(16, 16, 8, 1),
    ("chunk", "small", "single"): Tile(16, 32, 8, 1),
    ("chunk", "medium", "single"): Tile(16, 32, 8, 1),
    ("chunk", "large", "single"): Tile(16, 16, 8, 1),
    ("chunk_backward", "small", "half"): Tile(32, 64, 4, 1),
    ("chunk_backward", "medium", "half"): Tile(16, 32, 8, 1),
    ("chunk_backward", "large", "half"): Tile(16, 32, 8, 1),
    ("chunk_backward", "small", "single"): Tile(16, 32, 4, 1),
    ("chunk_backward", "medium", "single"): Tile(16, 32, 8, 1),
    ("chunk_backward", "large", "single"): Tile(16, 16, 8, 1),
    # "masked" walk tiles of `keys` beside [queries, M] sums and [queries, E] outputs: operands that many products share
    # stay in registers, so tiles are small.  "masked_keys_backward" hold [keys, M] and [keys, E] sums.
    ("masked", "small", "half"): Tile(32, 64, 4, 1),
    # Of eight warps the sums spill up to 430 bytes; with half the dims at a time a third block spills 56 (Triton 3.9).
    ("masked", "wide", "half"): Tile(32, 128, 4, 1, registers=255),
    ("masked", "medium", "half"): Tile(32, 64, 8, 1, registers=255),
    ("masked", "large", "half"): Tile(16, 64, 8, 1),
    ("masked", "small", "single"): Tile(16, 32, 4, 1),
    ("masked", "medium", "single"): Tile(16, 32, 8, 1),
    ("masked", "large", "single"): Tile(16, 16, 8, 1),
    ("masked_backward", "small", "half"): Tile(16, 64, 4, 1, keys=32),
    ("masked_backward", "medium", "half"): Tile(16, 64, 8, 1, keys=64, registers=255),
    ("masked_backward", "large", "half"): Tile(16, 64, 8, 1),
    ("masked_backward", "small", "single"): Tile(16, 32, 8, 1),
    ("masked_backward", "medium", "single"): Tile(16, 32, 8, 1),
    ("masked_backward", "large", "single"): Tile(16, 16, 8, 1),
    # The keys' programs have `keys` of them, for all queries.  With squares of 16 and eight warps, most of which then
    # hold what others hold, the two took 2.7 times as long (H200).
    # Far: with factors of two bfloat16 each, beside tokens of 16 bits.  By the model, of four warps, two blocks, the
    # keys take a third of the cycles of eight.  Beside 64 references 64 keys a tile are 7 % fewer cycles a key in the
    # forward pass, but spill up to 40 bytes (Blackwell); beside the keys' sums of 128, 32 queries spill 80 to 150 and
    # 64 keys up to 40 (Triton 3.9).
    ("masked_keys_backward", "small", "half"): Tile(16, 64, 4, 1, keys=32),
    ("masked_keys_backward", "wide", "half"): Tile(16, 64, 4, 1, keys=32),
    ("masked_keys_backward", "medium", "half"): Tile(16, 64, 8, 1, keys=32),
    # With a bound of ptxas's own, 128 registers, up to 56 bytes spill in float16; so where `registers` is below.
    ("masked_far", "small", "half"): Tile(32, 64, 4, 1, registers=255),
    ("masked_far", "wide", "half"): Tile(32, 64, 8, 1, keys=64, registers=255),
    ("masked_keys", "medium", "half"): Tile(16, 64, 8, 1, across=True, resident=2, registers=255),
    ("masked_far", "medium", "half"): Tile(32, 64, 8, 1, keys=64),
    ("masked_far_backward", "small", "half"): Tile(16, 64, 4, 1, keys=32, registers=255),
    ("masked_far_backward", "wide", "half"): Tile(16, 64, 4, 1, keys=32, registers=255),
    ("masked_far_backward", "medium", "half"): Tile(16, 64, 8, 1, keys=64),
    ("masked_far_keys_backward", "small", "half"): Tile(16, 64, 4, 1, keys=32, registers=255),
    ("masked_far_keys_backward", "wide", "half"): Tile(16, 64, 4, 1, keys=32, registers=255),
    ("masked_far_keys_backward", "medium", "half"): Tile(16, 64, 8, 1, keys=32),
    ("masked_far_mask_backward", "small", "half"): Tile(16, 64, 8, 1, keys=64, registers=255),
    ("masked_far_mask_backward", "medium", "half"): Tile(16, 64, 8, 1, keys=64),
    # With positions, 64 columns at a time spill up to 360 bytes beside 128 references.
    ("masked_far_tokens", "wide", "half"): Tile(16, 64, 8, 1, across=True, resident=2, registers=255),
    ("masked_far_tokens", "medium", "half"): Tile(16, 32, 8, 1, across=True, resident=2, registers=255),
    ("masked_far_tokens", "many", "half"): Tile(16, 16, 8, 1, across=True, resident=2),
    # "masked_logs": tiles of 16 queries and `rows` keys, with M numbers for each pair; the backward holds more of them.
    ("masked_logs", "small", "half"): Tile(4, 64, 8, 1),
    ("masked_logs", "medium", "half"): Tile(2, 64, 8, 1, registers=255),
    ("masked_logs", "large", "half"): Tile(1, 32, 8, 1),
    ("masked_logs", "small", "single"): Tile(4, 32, 8, 1),
    ("masked_logs", "medium", "single"): Tile(2, 32, 8, 1),
    ("masked_logs", "large", "single"): Tile(1, 16, 8, 1),
    ("masked_logs_backward", "small", "half"): Tile(2, 64, 8, 1, registers=255),
    ("masked_logs_backward", "medium", "half"): Tile(1, 64, 8, 1),
    ("masked_logs_backward", "large", "half"): Tile(1, 32, 8, 1),
    ("masked_logs_keys_backward", "medium", "half"): Tile(1, 64, 8, 1, registers=255),
    # One key spills 16 bytes on Ampere.
    ("masked_logs_mask_backward", "medium", "half"): Tile(2, 64, 8, 1, registers=255),
    ("masked_logs_backward", "small", "single"): Tile(2, 32, 8, 1),
    ("masked_logs_backward", "medium", "single"): Tile(1, 32, 8, 1),
    ("masked_logs_backward", "large", "single"): Tile(1, 16, 8, 1),
    # "features" hold [rows, R] sums over blocks of `depth` landmarks; "features_backward" the [depth, R] and [depth, D]
    # sums of such a block, or [rows, D] ones: 16 rows keep the widest within 99 KiB of shared memory.
    ("features", "small", "half"): Tile(64, 64, 4, 2),
    ("features", "medium", "half"): Tile(64, 64, 4, 2),
    ("features", "large", "half"): Tile(32, 64, 8, 1),
    ("features", "small", "single"): Tile(32, 32, 4, 1),
    ("features", "medium", "single"): Tile(32, 32, 4, 1),
    ("features", "large", "single"): Tile(32, 32, 8, 1),
    ("features_backward", "small", "half"): Tile(32, 64, 4, 1),
    ("features_backward", "medium", "half"): Tile(32, 32, 8, 1),
    ("features_backward", "large", "half"): Tile(32, 32, 8, 1),
    ("features_backward", "small", "single"): Tile(32, 32, 4, 1),
    ("features_backward", "medium", "single"): Tile(32, 32, 8, 1),
    ("features_backward", "large", "single"): Tile(16, 32, 8, 1),
}
# Kinds that are cut as another where the tables say nothing of their own.
LIKE = {
    "row_placed": "row",
    "across": "column",
    "pooling": "column",
    "read_backward": "gradient",
    "keys_backward": "gradient",
    "columns_backward": "gradient",
    "step": "chunk",
    "chunk_queries": "chunk_backward",
    "chunk_gates": "chunk_backward",
    "gradient_log": "gradient",
    "read_backward_log": "gradient_log",
    "keys_backward_log": "gradient_log",
    "columns_backward_log": "gradient_log",
    "read_backward_placed": "read_backward_log",
    "keys_backward_placed": "keys_backward_log",
    "columns_backward_placed": "columns_backward_log",
    "masked_tokens": "gradient_log",
    "masked_keys": "gradient",
    "masked_far_tokens": "masked_tokens",
    "masked_keys_backward": "masked_backward",
    "masked_mask_backward": "masked_backward",
    "masked_far": "masked",
    "masked_far_backward": "masked_backward",
    "masked_far_mask_backward": "masked_far_backward",
    "masked_far_keys_backward": "masked_keys_backward",
    "masked_logs_keys_backward": "masked_logs_backward",
    "masked_logs_mask_backward": "masked_logs_backward",
}
# With 227 KiB of shared memory, 128 head dims stay in one product: nothing of the references is loaded twice.
# Asynchronous products (wgmma): of 16 bits in the forward pass, 1.8 times as fast with them at 16384 tokens (H100), of
# float32, whose three parts spill beside mma.sync, and in two of the backward passes.  Not everywhere: ptxas 12.8 (of
# Triton 3.6) loses descriptors of their operands where there are many, which gave wrong gradients and illegal addresses
# on that GPU.  `benchmarks.compiled.resources` finds lost descriptors in what it compiles.
HOPPER: dict[tuple[str, str, str], Tile] = {
    **{key: t._replace(wgmma=True, across=False) for key, t in DEFAULT.items() if key[2] == "single"},
    # Three stages: 7 % of the forward pass at 16384 tokens, 4 % at 1024 of eight batch elements (H100).
    ("row", "small", "half"): Tile(64, 64, 4, 3, wgmma=True),
    ("column", "small", "half"): Tile(64, 64, 4, 3, wgmma=True),
    ("pooling", "small", "half"): Tile(64, 64, 4, 3, wgmma=True, resident=2),
    ("row", "medium", "half"): Tile(64, 128, 4, 2, wgmma=True),
    ("row_placed", "medium", "half"): Tile(64, 128, 8, 2),
    # Four warps of 64 rows: eight of 128, 32 dims at a time, take 1.6 and 1.9 times as long (H200, M = 64 and 128).
    ("column", "medium", "half"): Tile(64, 128, 4, 2, wgmma=True),
    ("column", "wide", "half"): Tile(64, 128, 4, 2, wgmma=True),
    # 128 rows beside the values' sums are 255 registers; 32 rows of four warps take 1.9 times as long (H200, before the
    # loop kept what is invariant in it).
    ("pooling", "medium", "half"): Tile(128, 64, 8, 2, wgmma=True, resident=1),
    ("pooling", "wide", "half"): Tile(64, 128, 4, 2, wgmma=True, resident=2),
    # Half the head dims at a time: without wgmma the operands are registers too.
    ("across", "small", "half"): Tile(32, 32, 4, 2),
    # Backward, warps hold rows of their own: sums over a row stay in a warp, and a step has many rows for its dozen
    # barriers.  16 rows, with references shared among warps, took 1.9, 2.3 and 2.7 times as long on an H100, and
    # 1.7 times in the one pass of medium size that holds no sums of [M, depth].
    # Four warps of 64 rows take 10 % less than eight of 128 here, but spill 112 bytes.
    ("read_backward", "small", "half"): Tile(128, 64, 8, 1, wgmma=True, resident=1),
    ("columns_backward", "small", "half"): Tile(64, 64, 4, 3, wgmma=True, resident=3),
    # mma.sync takes as long as wgmma; eight warps of 128 rows spill and take 5 % longer.  Frugal: with dv after v dz,
    # or the keys read again before the iterations, up to 64 bytes spill.
    ("keys_backward", "small", "half"): Tile(64, 64, 4, 1, frugal=True, resident=2),
    ("columns_backward", "medium", "half"): Tile(64, 128, 8, 1, wgmma=True, resident=1),
    # All head dims at once: in two programs of 64 each the plan is made twice.
    ("read_backward", "medium", "half"): Tile(16, 128, 8, 1, across=True, resident=1),
    ("read_backward", "wide", "half"): Tile(32, 128, 8, 1, across=True, resident=1),
    ("keys_backward", "medium", "half"): Tile(32, 128, 8, 1, across=True, frugal=True, resident=1),
    ("keys_backward", "wide", "half"): Tile(32, 128, 8, 1, across=True, resident=1),
    # What is left, logits that are not known to lie close together: of four warps and 16 rows two blocks share a
    # multiprocessor without spilling.
    ("gradient", "small", "half"): Tile(16, 64, 4, 1, across=True, resident=2),
    ("gradient_log", "small", "half"): Tile(16, 32, 4, 2, across=True, resident=2),
    # Frugal, as in float16 it spills 8 bytes beside all other operands.
    ("keys_backward_placed", "small", "half"): Tile(16, 32, 4, 2, across=True, frugal=True, resident=2),
    ("chunk_backward", "small", "single"): Tile(16, 32, 8, 1, wgmma=True),
    # In products of 32 columns the queries' pass holds parts of several at once, and spills 40 bytes where they have
    # everything; of 128, 8 with gates and positions.  Of 64 or 128 the gates' pass spills 550 to 600, and takes 14
    # times the cycles by the model.
    ("chunk_backward", "medium", "half"): Tile(16, 64, 8, 1),
    ("chunk_gates", "medium", "half"): Tile(16, 32, 8, 1),
    # The queries' pass of 64 references spills 530 bytes with 64 dims at a time.
    ("chunk_backward", "wide", "half"): Tile(16, 128, 8, 1),
    ("chunk_gates", "wide", "half"): Tile(16, 32, 8, 1),
}
# With the tiles above 8 to 64 bytes spill under Triton 3.6.  Here and below, fewer dims at a time repeat the plan.
HOPPER_EARLIER: dict[tuple[str, str, str], Tile] = {
    ("row_placed", "medium", "half"): DEFAULT["row_placed", "medium", "half"],
    ("read_backward_placed", "medium", "half"): Tile(16, 32, 8, 2, across=True, resident=2),
    ("chunk_backward", "medium", "half"): Tile(16, 64, 8, 1, registers=255),
    ("chunk_gates", "small", "half"): Tile(32, 32, 4, 1),
    ("across", "large", "half"): Tile(32, 32, 8, 1, registers=255),
}
# With the tiles above these passes spill 8 to 352 bytes of Triton 3.9.0, with these none: counted in machine code, not
# timed.  3.7 needs none of these; 3.8 was not looked at.
HOPPER_LATER: dict[tuple[str, str, str], Tile] = {
    ("pooling", "medium", "half"): Tile(128, 32, 8, 2, wgmma=True, resident=1),
    ("read_backward", "medium", "half"): Tile(32, 32, 8, 1, wgmma=True, across=True, resident=1),
    ("read_backward", "wide", "half"): Tile(32, 128, 8, 1, wgmma=True, across=True, resident=1),
    ("keys_backward", "small", "half"): Tile(64, 64, 4, 1, wgmma=True, frugal=True, resident=2),
    ("keys_backward", "medium", "half"): Tile(16, 128, 8, 1, across=True, frugal=True, resident=1),
    ("read_backward_log", "medium", "half"): Tile(16, 64, 8, 1, wgmma=True, across=True, resident=2),
    ("keys_backward_log", "small", "half"): Tile(16, 32, 4, 2, across=True, resident=2, registers=255),
    ("read_backward_placed", "small", "half"): Tile(16, 32, 8, 2, across=True, resident=2),
    ("read_backward_placed", "medium", "half"): Tile(16, 32, 8, 2, wgmma=True, across=True, resident=2),
    ("keys_backward_log", "medium", "half"): Tile(16, 64, 8, 1, wgmma=True, across=True, resident=2),
    ("across", "small", "half"): Tile(32, 32, 4, 1),
    ("across", "medium", "half"): Tile(64, 32, 8, 2),
    ("chunk_backward", "small", "half"): Tile(32, 64, 4, 1, wgmma=True),
    ("chunk_backward", "medium", "half"): Tile(16, 64, 8, 1, wgmma=True),
    ("masked_far", "medium", "half"): Tile(32, 64, 8, 1),
    ("across", "large", "half"): HOPPER_EARLIER["across", "large", "half"],
}
# Likewise: 8 to 40 bytes under 3.6, 16 under 3.9.
AMPERE_EARLIER: dict[tuple[str, str, str], Tile] = {
    ("chunk_queries", "small", "half"): Tile(32, 32, 4, 1),
    ("masked_backward", "small", "half"): Tile(16, 64, 4, 1, keys=32, registers=255),
    ("across", "small", "half"): Tile(32, 32, 4, 2),
    ("read_backward_placed", "medium", "half"): Tile(16, 32, 8, 2, across=True, resident=2),
}
AMPERE_LATER: dict[tuple[str, str, str], Tile] = {
    ("row", "medium", "half"): Tile(64, 64, 4, 2),
    ("read_backward_placed", "medium", "half"): AMPERE_EARLIER["read_backward_placed", "medium", "half"],
}
# Beside more shared memory than the smaller GPUs have: in one stage positions spill 8 bytes.
AMPERE_LARGE: dict[tuple[str, str, str], Tile] = {
    ("read_backward_log", "medium", "half"): Tile(16, 64, 8, 2, across=True, resident=2),
}
# 64 rows would go to tcgen05, whose results live in tensor memory: by the model the exponentials are then taken twice.
BLACKWELL = {key: t for key, t in HOPPER.items() if key[2] == "single" or key[1] in ("medium", "large")} | {
    # Hopper's, and four warps of any, spill beside tcgen05.
    ("pooling", "medium", "half"): Tile(32, 64, 8, 2, wgmma=True, resident=2),
    ("row", "small", "half"): Tile(32, 64, 4, 2),
    ("row", "medium", "half"): Tile(32, 64, 4, 2),
    ("row_placed", "medium", "half"): Tile(32, 64, 4, 2),
    ("column", "small", "half"): Tile(32, 64, 4, 2),
    ("column", "medium", "half"): Tile(32, 64, 8, 2, resident=2),
    ("across", "small", "half"): Tile(32, 64, 4, 2),
    # In two stages the positions' pass spills up to 88 bytes.
    ("across", "medium", "half"): Tile(64, 64, 8, 1),
    ("gradient", "small", "half"): Tile(32, 64, 8, 2, across=True, resident=2),
    ("gradient_log", "small", "half"): Tile(16, 64, 8, 2, across=True, resident=2, registers=255),
    # Of four warps two blocks share a multiprocessor; eight with positions spill 88 bytes.
    ("masked_tokens", "small", "half"): Tile(16, 32, 4, 2, across=True, resident=2, registers=255),
    # Half the head dims at a time take 1.3 times the cycles by the model, and spill 40 bytes under Triton 3.9.
    ("chunk", "medium", "half"): Tile(32, 128, 8, 1),
    ("step", "medium", "half"): DEFAULT["chunk", "medium", "half"],
    # Four warps hold twice as much of a chunk each, and spill up to 64 bytes where gates are differentiated.
    ("chunk_backward", "small", "half"): Tile(32, 64, 8, 1, registers=255),
    ("chunk_backward", "wide", "half"): DEFAULT["chunk_backward", "medium", "half"],
    ("chunk_backward", "medium", "half"): Tile(16, 64, 8, 1, registers=255),
    ("masked_keys_backward", "wide", "half"): Tile(16, 64, 8, 1, keys=32),
    ("masked_keys_backward", "medium", "half"): Tile(16, 64, 8, 1, keys=64),
    ("read_backward_log", "many", "half"): DEFAULT["gradient", "large", "half"],  # 80 bytes instead of 488
}
# The other way round: 8 bytes of Triton 3.6, where 3.7 and 3.9 spill 56 with this.  The next: see `registers`; with the
# tables' tiles, the last two spill 24.
BLACKWELL_EARLIER: dict[tuple[str, str, str], Tile] = {
    ("chunk_backward", "medium", "half"): Tile(16, 128, 8, 1, registers=255),
    ("read_backward_log", "medium", "half"): Tile(16, 64, 8, 1, across=True, resident=2, registers=255),
    ("row_placed", "medium", "half"): Tile(32, 64, 8, 2),
    ("across", "medium", "half"): Tile(64, 32, 8, 1),
    ("masked_far_tokens", "medium", "half"): Tile(16, 16, 8, 2, across=True, resident=2, registers=255),
}
BLACKWELL_LATER: dict[tuple[str, str, str], Tile] = {
    ("across", "large", "half"): HOPPER_EARLIER["across", "large", "half"],  # 8 bytes
}
# Without wgmma the operands are registers too: half the head dims at a time keep them within 255.
AMPERE: dict[tuple[str, str, str], Tile] = {
    ("row", "medium", "half"): Tile(64, 32, 4, 2),
    ("column", "medium", "half"): Tile(64, 32, 8, 2, resident=2),
    # With 256 references 32 columns at a time spill 8 bytes.
    ("across", "large", "half"): Tile(32, 16, 8, 1),
    ("gradient", "medium", "single"): Tile(16, 16, 8, 1, across=True, resident=2),
    ("gradient_log", "small", "single"): Tile(16, 16, 8, 1, across=True, resident=2),
    ("masked_tokens", "small", "half"): Tile(16, 64, 8, 2, across=True, resident=2, registers=255),
    ("chunk", "medium", "single"): Tile(16, 16, 8, 1),
}
# A wavefront has 64 lanes: half as many hold a tile.
AMD = {key: t._replace(warps=max(1, t.warps // 2), registers=0) for key, t in (DEFAULT | AMPERE).items()}
AMD["chunk_backward", "small", "half"] = DEFAULT["chunk_backward", "small", "half"]  # gfx90a spills on fewer wavefronts
OVERRIDES: dict[str, dict[tuple[str, str, str], Tile]] = {
    "sm_80": AMPERE
    | AMPERE_LARGE
    | (AMPERE_EARLIER if () < RELEASE < (3, 7) else {})
    | (AMPERE_LATER if RELEASE >= (3, 8) else {}),
    "sm_90": HOPPER | (HOPPER_EARLIER if () < RELEASE < (3, 7) else {}) | (HOPPER_LATER if RELEASE >= (3, 8) else {}),
    "sm_100": BLACKWELL
    | (BLACKWELL_EARLIER if () < RELEASE < (3, 7) else {})
    | (BLACKWELL_LATER if RELEASE >= (3, 8) else {}),
    "amd": AMD,
    "default": AMPERE,
}
INTERPRETER = Tile(
    64, 64, 4, 1, across=True
)  # a step costs the same at any size: few steps, yet several at the lengths tested


@functools.cache
def size_of(widest: int, references: int | None = None) -> str:
    """The size of a problem; `widest` is max(M, D, E), of which M is `references` where that makes a difference."""
    if widest > 128:
        return "many" if references is not None and references > 128 else "large"
    return "small" if widest <= 64 else "medium" if references is None or references > 64 else "wide"


NEAR = {"wide": ("wide", "medium"), "many": ("many", "large")}  # sizes that a size is cut as, the nearest first


def tile(kind: str, family: str, widest: int, itemsize: int, references: int | None = None) -> Tile:
    """The tile of a kind of kernel on a device family; see `size_of`."""
    if family == "interpreter":
        return INTERPRETER
    return shipped(family, (kind, size_of(widest, references), "half" if itemsize == 2 else "single"))


def _likes(kind: str) -> tuple[str, ...]:
    return (kind, *_likes(LIKE[kind])) if kind in LIKE else (kind,)


# A kind, and those that it is like, the nearest first.
LIKES = {kind: _likes(kind) for kind in (*LIKE, *LIKE.values())}


def shipped(family: str, key: tuple[str, str, str]) -> Tile:
    """The tile of a row (kind, size, bytes): the family's own, that of all, or that of what kind or size is like."""
    kind, size, width = key
    own = OVERRIDES[family]
    for near in NEAR.get(size, (size,)):
        for like in LIKES.get(kind, (kind,)):
            found = own.get((like, near, width)) or DEFAULT.get((like, near, width))
            if found:
                return found
    raise KeyError(key)
