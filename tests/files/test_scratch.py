"""Temporary folders, and those that killed processes leave."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from alpaca.files.locks import ScratchFolder
from tests.conftest import ROOT

HOLD = """
import time
from alpaca.files.locks import ScratchFolder
folder = ScratchFolder("mine-")
print(folder.path, flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def names(place: Path) -> set[str]:
    return {path.name for path in place.iterdir() if not path.name.startswith(".")}


def make_old(folder: Path) -> None:
    os.utime(folder.with_name(f".{folder.name}.alive"), (time.time() - 1000,) * 2)


def test_what_a_killed_process_left_goes_and_what_lives_stays(place):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD],
        cwd=ROOT, env={**os.environ, "TMPDIR": str(place)}, stdout=subprocess.PIPE, text=True,
    ) as owner:  # fmt: skip
        theirs = Path(owner.stdout.readline().strip())
        make_old(theirs)
        (place / "mine-of-somebody").mkdir()
        first = ScratchFolder("mine-")
        make_old(first.path)
        second = ScratchFolder("mine-")
        assert names(place) == {theirs.name, "mine-of-somebody", first.path.name, second.path.name}
        owner.kill()
    third = ScratchFolder("mine-")
    assert names(place) == {"mine-of-somebody", first.path.name, second.path.name, third.path.name}
    for folder in (first, second, third):
        folder.remove()
    assert [path.name for path in place.iterdir()] == ["mine-of-somebody"]
