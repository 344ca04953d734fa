"""What a part has measured so far: one JSON file, whole after every row, whatever ends the part and when."""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from bench.targets import Target

Row = dict[str, object]


class Record:
    """The rows and facts of one part; each change is on the disk before the call returns. Safe for several threads.

    `make_targets` is asked after each change, so that a part that is killed has its targets, too.
    """

    def __init__(
        self, path: Path, head: Mapping[str, object], *, make_targets: Callable[[dict[str, Row]], list[Target]]
    ) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}  # by name, in the order in which they came first
        self._head = dict(head)
        self._make_targets = make_targets
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._write(is_finished=False)

    @property
    def targets(self) -> list[Target]:
        return self._make_targets(self.rows)

    @property
    def failures(self) -> dict[str, str]:
        """What each row that failed failed with."""
        return {name: str(row["failure"]) for name, row in self.rows.items() if "failure" in row}

    def put(self, row: Row) -> None:
        """Add a row, or replace the one of the same name: a row that grows is put again and again."""
        with self._lock:
            self.rows[str(row["name"])] = row
            self._write(is_finished=False)

    def fail(self, name: str, reason: str) -> None:
        """Say of a row why it has no more than it has."""
        with self._lock:
            self.rows[name] = {**self.rows.get(name, {"name": name}), "failure": reason}
            self._write(is_finished=False)

    def put_facts(self, facts: Mapping[str, object]) -> None:
        """Add what is true of the whole part: the card, versions, where kernels came from."""
        with self._lock:
            self._head |= facts
            self._write(is_finished=False)

    def fact(self, name: str) -> object:
        """A fact, or None."""
        with self._lock:
            return self._head.get(name)

    def finish(self) -> None:
        """Say that no more rows will come."""
        with self._lock:
            self._write(is_finished=True)

    def _write(self, *, is_finished: bool) -> None:
        content = {
            **self._head,
            "is_finished": is_finished,
            "seconds": round(time.monotonic() - self._start, 1),
            "targets": [target.as_json() for target in self.targets],
            "rows": list(self.rows.values()),
        }
        write_aside(self.path, (json.dumps(content, indent=1) + "\n").encode())


def write_aside(path: Path, content: bytes) -> None:
    """Write a file under another name, fsync it, and rename it: whoever looks finds the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
