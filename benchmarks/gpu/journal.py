"""The journal of a run: lines of JSON to which every process appends what it begins and what becomes of it.

What a process found before it died, hung or was stopped is in there, and so is the name of what it was at; a process
that is started again leaves that out, and what was done.  Records:

    about                      the machine and the software
    step, canary, profile      what became of a step, of a backend's canary; one metric of one kernel
    chip                       what the CUDA C++ backend lays problems out for
    worker with plan           what a process is to do: rows that say "out of time" until they are measured, or names
    worker with begin          an item and, within it, an entry; `of` is the row that is FAILED if it does not end
    worker with row, end, lost a measured row; an item that is done; an item or entry that was not survived, and why
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.common.results import FAILED, OK, SKIPPED, UNAVAILABLE, Row

Record = dict[str, Any]
DEFAULTS = {field.name: field.default for field in fields(Row)}
# Of two rows about the same thing the one whose status comes first stands; of equals the later one.
STANDING = (OK, FAILED, UNAVAILABLE, SKIPPED)


class Journal:
    """One file, of which every process has its own object."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._heard = self.size()

    def size(self) -> int:
        """Bytes so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def write(self, **record: Any) -> None:
        """Append a record, in one write: lines of several processes do not mix."""
        line = (json.dumps(record) + "\n").encode()
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line)
        finally:
            os.close(file)

    def read(self, since: int = 0, until: int | None = None) -> list[Record]:
        """The records between two sizes, without a line that was cut off."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(since)
            data = file.read() if until is None else file.read(max(until - since, 0))
        return list(_parsed(data))

    def follow(self) -> list[Record]:
        """The records since the last call, or since this object was made."""
        if self.size() <= self._heard:
            return []
        with self.path.open("rb") as file:
            file.seek(self._heard)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._heard += len(whole)
        return list(_parsed(whole))


def _parsed(data: bytes) -> Iterator[Record]:
    for line in data.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def written(row: Row) -> Record:
    """A row without its empty cells."""
    return {name: value for name, value in asdict(row).items() if value != DEFAULTS[name] and value == value}  # not NaN


def identity(row: Row) -> tuple[Any, ...]:
    """What a row is about."""
    return row.case, row.impl, row.mode, row.metric, row.T, row.B, row.H, row.L, row.M, row.D, row.dtype, row.backend


def rows(records: Iterable[Record]) -> list[Row]:
    """The rows that stand, in the order in which they came; what was planned and not reached comes last."""
    found: dict[tuple[Any, ...], Row] = {}
    for record in records:
        given = [record["row"]] if "row" in record else [row for row in record.get("plan", []) if isinstance(row, dict)]
        for cells in given:
            row = Row(**cells)
            before = found.get(identity(row))
            if before is None or STANDING.index(row.status) <= STANDING.index(before.status):
                found.pop(identity(row), None)
                found[identity(row)] = row
    return sorted(found.values(), key=lambda row: row.status == SKIPPED)


class Log:
    """One worker's entries, and what its earlier processes left there."""

    def __init__(self, journal: Journal, worker: str) -> None:
        self.journal, self.worker = journal, worker
        self.ended: set[str] = set()
        self.lost_entries: dict[str, dict[str, str]] = {}  # item -> entry -> why
        self.open: Record = {}
        self.planned: list[Any] | None = None
        for record in journal.read():
            if record.get("worker") != worker:
                continue
            if "plan" in record:
                self.planned = record["plan"]
            elif "end" in record:
                self.ended.add(record["end"])
            elif "lost" in record:
                self.lost_entries.setdefault(record["lost"], {})[record["entry"]] = record["why"]

    def plan(self, items: list[Any]) -> None:
        """What is to be done, written once for all processes of a worker."""
        if self.planned is None:
            self.planned = items
            self.journal.write(worker=self.worker, plan=items)

    def over(self, item: str, entry: str = "") -> bool:
        """Whether an item, or an entry of it, is done or was not survived."""
        return item in self.ended or entry in self.lost_entries.get(item, ())

    def begin(self, item: str, entry: str = "", row: Row | None = None) -> None:
        """From here on an accident is this item's, or this entry's."""
        self.open = {"begin": item, "entry": entry, **({} if row is None else {"of": written(row)})}
        self.journal.write(worker=self.worker, **self.open)

    def row(self, row: Row) -> None:
        self.journal.write(worker=self.worker, row=written(row))

    def end(self, item: str, **more: Any) -> None:
        """The item is done; `more` is what became of it where that is no row."""
        self.open = {}
        self.journal.write(worker=self.worker, end=item, **more)

    def lost(self, why: str) -> None:
        """What was begun is given up."""
        write_lost(self.journal, self.worker, self.open, why)
        self.open = {}


def write_lost(journal: Journal, worker: str, begun: Record, why: str) -> None:
    """What a worker had begun did not end: it is named, and its row says why it is empty."""
    row = {}
    if "of" in begun:
        failed = replace(Row(**begun["of"]), status=FAILED, note=why[:300])
        row = {"row": written(failed)}
    journal.write(worker=worker, lost=begun["begin"], entry=begun.get("entry", ""), why=why, **row)
