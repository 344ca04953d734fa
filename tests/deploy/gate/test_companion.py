"""A program beside the gate: it knows the gate's address, ends with it, and its end is the gate's."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT

# Writes down how it was started and what ends it.
BESIDE = """
import json, os, pathlib, signal, sys, time
notes = pathlib.Path(sys.argv[1])
def end(number, frame):
    notes.with_suffix(".ended").write_text(str(number))
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
notes.with_suffix(".part").write_text(json.dumps([os.getpid(), sys.argv[2:]]))
notes.with_suffix(".part").rename(notes)
time.sleep(60)
"""


class Started:
    """A gate with a program beside it, which has started."""

    def __init__(self, folder: Path) -> None:
        self.notes, log = folder / "notes.json", folder / "asked.txt"
        log.touch()
        command = [sys.executable, "-m", "tests.deploy.gate.run_gate", str(log), "{}", "{}"]
        command.append(json.dumps([sys.executable, "-c", BESIDE, str(self.notes)]))
        environment = {**os.environ, "SLOTS": "1", "COG_MAX_CONCURRENCY": "1"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.url = re.search(r"http://\S+", self.process.stdout.readline())[0]
        wait_for(self.notes.exists)
        number, self.arguments = json.loads(self.notes.read_text())
        self.beside = psutil.Process(number)


def wait_for(is_so, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def started(tmp_path) -> Iterator[Started]:
    started = Started(tmp_path)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait()
        started.process.stdout.close()


def test_one_signal_ends_both(started):
    assert started.arguments == ["--target", started.url]
    started.process.terminate()
    assert started.process.wait(timeout=10) == 0
    assert started.notes.with_suffix(".ended").read_text() == str(int(signal.SIGTERM))
    assert not started.beside.is_running()


def test_it_does_not_outlive_a_gate_that_is_killed(started):
    started.process.kill()
    ended, running_on = psutil.wait_procs([started.beside], timeout=10)
    assert (ended, running_on) == ([started.beside], [])
    assert not started.notes.with_suffix(".ended").exists()  # by the kernel: the gate could say nothing


def test_its_end_is_the_gates(started):
    started.beside.kill()
    assert started.process.wait(timeout=10) == 1
