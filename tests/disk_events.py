"""What a program asks of the disk, in order: which files and folders it fsyncs, and what it renames.

A test cannot cut the power; it can see that the data was on the disk before the rename, and the rename before the end.
"""

import os
from pathlib import Path

import pytest

Event = tuple[str, str]  # ("fsync", name) or ("rename", the new name); names are relative to the watched folder


def is_change(event: str, arguments: tuple) -> bool:
    """Whether an audit event of Python's is about to change the file system; `arguments[0]` is the path."""
    if event == "open":
        return isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")


def watch_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """A list that grows with each fsync and rename of what lies in `folder`, and of the folder itself (".")."""
    events: list[Event] = []
    _watch_fsync(folder, events, monkeypatch)
    for name in ("rename", "replace"):
        _watch_rename(folder, name, events, monkeypatch)
    return events


def _watch_fsync(folder: Path, events: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115  it is a str that the events hold
        fsync(descriptor)
        events.append(("fsync", os.path.relpath(path, folder)))

    monkeypatch.setattr(os, "fsync", watched)


def _watch_rename(folder: Path, name: str, events: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    rename = getattr(os, name)

    def watched(source: str | Path, target: str | Path, **options: int) -> None:
        rename(source, target, **options)
        events.append(("rename", os.path.relpath(target, folder)))

    monkeypatch.setattr(os, name, watched)


def until_rename_to(events: list[Event], name: str) -> list[str]:
    """Names of what was fsynced before something took this name."""
    return [fsynced for kind, fsynced in events[: events.index(("rename", name))] if kind == "fsync"]
