"""Does the shim see a missing barrier?  `python -m benchmarks.compiled.mutants` takes one after another away.

Every barrier and every wait of the CUDA kernels is removed, and replaced by the next weaker one, in one build that has
a switch for each; then the cases of barriers.py run.  Writes benchmarks/results/cuda_barriers.csv: what saw which
mutant.  One that nothing sees is a barrier to remove, unless UNSEEN says why not.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import multiprocessing
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from benchmarks.common import entry_point, shim
from benchmarks.common.hardware import ROOT
from benchmarks.compiled import barriers

KERNELS = ROOT / "csrc" / "cuda"
TABLE = ROOT / "benchmarks" / "results" / "cuda_barriers.csv"
BUILD = ROOT / "build" / "mutants"
DOOR, PEERS = "device.cuh", "peers.cuh"  # what the barriers are; every other file has those of the kernels
CALL = re.compile(r"\b(sync_block|peers\.sync|sync_cluster|sync_warp|copies_commit|copies_wait)(?:<(.*?)>)?\(\)")
FUNCTION = re.compile(r"SFK_DEVICE .*?(\w+)\(|(\w+_kernel)\(const")
WEAKER = {
    "sync_cluster": "sync_block()",
    "peers.sync": "sync_block()",
    "sync_block": "sync_warp()",
    "copies_wait": "copies_wait<{} + 1>()",
}
# Races are watched in one schedule; schedules go by who goes on first, each in both orders of threads.
RACES, SCHEDULES = "races", ("any", "warp", "block")
JUDGES = (RACES, *SCHEDULES)
NOTHING = ""
HOWS = ("removed", "weakened")
SECONDS = 300  # for all cases of one judge
# Mutants that nothing shows, and why their barrier stays.
UNSEEN: dict[str, str] = {}

SWITCH = """
#include <cstdlib>
// What stands at a place: 0 its barrier, 1 none, 2 a weaker one.
__attribute__((noinline, no_sanitize_thread)) inline int mutant(int place) {
  static const int chosen = std::atoi(std::getenv("SFK_MUTANT")), how = std::atoi(std::getenv("SFK_MUTATION"));
  return place == chosen ? how : 0;
}
"""


class Site(NamedTuple):
    """A barrier in the sources: the how-manieth of its kind in a function, as lines move."""

    file: str
    function: str
    call: str
    nth: int


class Mutant(NamedTuple):
    site: Site
    how: str  # removed or weakened

    def __str__(self) -> str:
        file, function, call, nth = self.site
        return f"{file} {function}: {call} {nth} {self.how}"


class Row(NamedTuple):
    """A mutant, and by each judge the first case in which it shows."""

    mutant: Mutant
    seen: dict[str, str]


def code(line: str) -> str:
    return line.partition("//")[0]


def visited(path: Path, visit: Callable[[Site, re.Match[str]], str]) -> str:
    """The file's text, with every barrier replaced by what `visit` makes of it."""
    function, counts, lines = "", Counter[tuple[str, str]](), []
    for line in path.read_text().splitlines(keepends=True):
        if found := FUNCTION.search(line):
            function = found[1] or found[2]

        def replacement(call: re.Match[str], function: str = function) -> str:
            counts[function, call[1]] += 1
            return visit(Site(path.name, function, call[1], counts[function, call[1]]), call)

        lines.append(CALL.sub(replacement, code(line)) + line[len(code(line)) :])
    return "".join(lines)


def sites(folder: Path = KERNELS) -> list[Site]:
    """Every barrier of the kernels."""
    found: list[Site] = []
    for path in sorted(folder.glob("*.cu*")):
        if path.name not in (DOOR, PEERS):
            visited(path, lambda site, call: found.append(site) or call[0])
    return found


def mutants() -> list[Mutant]:
    return [Mutant(s, how) for s in sites() for how in HOWS if how == HOWS[0] or s.call in WEAKER]


def write(path: Path, text: str) -> None:
    """Where it changes anything: make compiles what is newer."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def mutated() -> Path:
    """A copy of the sources with a switch at every barrier."""
    places = {site: place for place, site in enumerate(sites())}

    def switch(site: Site, call: re.Match[str]) -> str:
        weak = WEAKER.get(site.call, "void()").format(call[2])
        at = f"mutant({places[site]})"
        return f"({at} == 0 ? {call[0]} : {at} == 2 ? {weak} : void())"

    copy = BUILD / "csrc"
    for path in copy.rglob("*"):
        if path.is_file() and not (ROOT / "csrc" / path.relative_to(copy)).exists():
            path.unlink()
    for path in (ROOT / "csrc").rglob("*"):
        to = copy / path.relative_to(ROOT / "csrc")
        if path.parent == KERNELS and path.name == DOOR:
            write(to, path.read_text().replace("#pragma once", "#pragma once" + SWITCH, 1))
        elif path.parent == KERNELS and path.suffix in (".cu", ".cuh") and path.name != PEERS:
            write(to, visited(path, switch))
        elif path.is_file():
            write(to, path.read_text())
    return copy


def examine(
    module: ModuleType, judge: str, cases: Sequence[str], expected: dict[str, str], say: Callable[[object], None]
) -> None:
    """Says every case before it runs, and NOTHING after the last where no case has shown the mutant."""
    schedules = [name for name in module.SCHEDULES if name.startswith(judge)]
    for name in cases:
        say(name)
        case = barriers.CASES[name]
        if judge == RACES and barriers.race(module, case):
            return
        if schedules and barriers.deviating(module, case, schedules, expected[name]):
            return
    say(NOTHING)


def digests(module: ModuleType, say: Callable[[object], None]) -> None:
    say({name: barriers.digest(case) for name, case in barriers.CASES.items()})


def last_word(place: int, how: str, target: Callable[..., None], *arguments: object) -> Any:
    """What a process says last that runs `target` with one barrier gone: it may die of that, or never end."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def child() -> None:
        os.environ["SFK_MUTANT"], os.environ["SFK_MUTATION"] = str(place), str(1 + HOWS.index(how))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the shim's own last words
        try:
            target(*arguments, theirs.send)
        except Exception as error:
            theirs.send(error)

    process = context.Process(target=child)
    process.start()
    theirs.close()
    word, end = None, time.monotonic() + SECONDS
    with contextlib.suppress(EOFError):
        while ours.poll(max(0.0, end - time.monotonic())):
            word = ours.recv()
    process.kill()
    process.join()
    if isinstance(word, Exception):
        raise word
    return word


def examined(place: int, mutant: Mutant, expected: dict[str, str]) -> dict[str, str]:
    """Judge -> the first case in which it sees the mutant, each in a process of its own.

    Schedules are asked about the case that has a race, about all of them only where none has.
    """
    race = last_word(place, mutant.how, examine, module(), RACES, list(barriers.CASES), expected)
    seen, cases = {RACES: race}, [race] if race else list(barriers.CASES)
    for judge in SCHEDULES:
        seen[judge] = last_word(place, mutant.how, examine, module(), judge, cases, expected)
    return seen


@functools.cache
def module() -> ModuleType:
    """The build with the switches, in place of the backend's."""
    built = shim.cuda_shim(mutated(), BUILD / "shim")
    shim.install(built)
    return built


def rows(chosen: list[Mutant], jobs: int) -> Iterator[Row]:
    """All mutants, judged as they come."""
    module()
    expected = last_word(-1, HOWS[0], digests, module())
    if failed := last_word(-1, HOWS[0], examine, module(), RACES, list(barriers.CASES), expected):
        raise RuntimeError(f"the kernels themselves have a race in {failed!r}")
    places = {site: place for place, site in enumerate(sites())}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        found = [pool.submit(examined, places[mutant.site], mutant, expected) for mutant in chosen]
        for mutant, result in zip(chosen, found, strict=True):
            yield Row(mutant, result.result())


def committed() -> list[Row]:
    with TABLE.open() as file:
        return [
            Row(
                Mutant(Site(row["file"], row["function"], row["call"], int(row["nth"])), row["mutant"]),
                {judge: row[judge] for judge in JUDGES},
            )
            for row in csv.DictReader(file)
        ]


def save(path: Path, found: list[Row]) -> None:
    """In the order of the sources."""
    places = {mutant: place for place, mutant in enumerate(mutants())}
    found = sorted(found, key=lambda row: places[row.mutant])
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Site._fields, "mutant", *JUDGES, "why"])
        for mutant, seen in found:
            writer.writerow([*mutant.site, mutant.how, *seen.values(), UNSEEN.get(str(mutant), "")])


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled.mutants", description=__doc__)
    parser.add_argument("--out", type=Path, default=TABLE, help="file to write (default: the committed table)")
    parser.add_argument("--only", default="", help="a regular expression: mutants to judge; the other rows stay")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time (default: all cores)")
    arguments = parser.parse_args(argv)
    for tool in ("g++", "make"):
        if shutil.which(tool) is None:
            raise entry_point.NotHereError(f"needs {tool} on PATH")
    torch.set_num_threads(1)
    chosen = [m for m in mutants() if re.search(arguments.only, str(m))]
    found: list[Row] = []
    for row in rows(chosen, arguments.jobs):
        found.append(row)
        seen = ", ".join(f"{judge} in {case!r}" for judge, case in row.seen.items() if case)
        print(f"{row.mutant}: {seen or UNSEEN.get(str(row.mutant), 'NOT SEEN')}", flush=True)
    rest = set(mutants()) - set(chosen)
    save(arguments.out, found + [row for row in (committed() if rest else []) if row.mutant in rest])
    unseen = [row for row in found if not any(row.seen.values())]
    print(f"{len(found)} mutants, {len(found) - len(unseen)} seen")
    return int(any(str(row.mutant) not in UNSEEN for row in unseen))


if __name__ == "__main__":
    entry_point.run("benchmarks.compiled.mutants", main)
