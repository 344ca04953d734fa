"""Empty folders of ended predictions go, everything else stays; the phases of a start are named with their seconds."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from alpaca.serving import housekeeping
from alpaca.serving.housekeeping import Phases, PredictionFolders
from tests.conftest import ROOT

NOW = 1_000_000.0
HOUR = 3600.0


class Clock:
    """Stands in for the module `time` where the code under test looks at it."""

    def __init__(self) -> None:
        self.now = NOW

    def time(self) -> float:
        return self.now

    monotonic = time


@pytest.fixture
def clock(monkeypatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(
        housekeeping, "time", SimpleNamespace(time=clock.time, monotonic=clock.monotonic, sleep=time.sleep)
    )
    return clock


def make_folder(root: Path, name: str, *, age_s: float, file: str | None = None) -> Path:
    """A prediction's folder as the runtime leaves it, last changed `age_s` before NOW."""
    folder = root / name
    for part in ("inputs", "outputs"):
        (folder / part).mkdir(parents=True)
    if file:
        (folder / file).write_text("x")
    os.utime(folder, (NOW - age_s, NOW - age_s))
    return folder


def names(root: Path) -> set[str]:
    return {folder.name for folder in root.iterdir()}


def test_old_empty_folders_go_and_all_others_stay(tmp_path, clock):
    make_folder(tmp_path, "old", age_s=HOUR)
    make_folder(tmp_path, "just old enough", age_s=601)
    make_folder(tmp_path, "young", age_s=599)
    make_folder(tmp_path, "with an output", age_s=HOUR, file="outputs/a.png")
    make_folder(tmp_path, "with a file", age_s=HOUR, file="a.txt")
    (tmp_path / "a plain file").write_text("x")
    os.utime(tmp_path / "a plain file", (0, 0))
    assert PredictionFolders(tmp_path).sweep() == 2
    assert names(tmp_path) == {"young", "with an output", "with a file", "a plain file"}
    assert (tmp_path / "with an output" / "outputs" / "a.png").read_text() == "x"


def test_folders_younger_than_a_running_prediction_stay(tmp_path, clock):
    clock.now = NOW - 2 * HOUR
    folders = PredictionFolders(tmp_path)
    with folders.running():
        clock.now = NOW
        make_folder(tmp_path, "its own", age_s=2 * HOUR)
        make_folder(tmp_path, "made while it runs", age_s=HOUR)
        make_folder(tmp_path, "made before", age_s=3 * HOUR)
        assert folders.sweep() == 1
        assert names(tmp_path) == {"its own", "made while it runs"}
    assert names(tmp_path) == set()  # its end was the occasion


def test_the_end_of_a_prediction_sweeps_now_and_then(tmp_path, clock):
    folders = PredictionFolders(tmp_path)
    make_folder(tmp_path, "old", age_s=HOUR)
    clock.now = NOW + 59
    with folders.running():
        pass
    assert names(tmp_path) == {"old"}
    clock.now = NOW + 61
    with pytest.raises(ValueError, match="failed"), folders.running():  # a failed prediction ends, too
        raise ValueError("failed")
    assert names(tmp_path) == set()
    make_folder(tmp_path, "old again", age_s=HOUR)
    with folders.running():
        pass
    assert names(tmp_path) == {"old again"}  # it was swept just before
    assert folders._started == []


def test_sweeps_at_once_are_safe_and_count_each_folder_once(tmp_path, clock):
    for index in range(300):
        make_folder(tmp_path, f"p{index}", age_s=HOUR)
    make_folder(tmp_path, "kept", age_s=HOUR, file="outputs/a")
    removed: list[int] = []
    start = threading.Barrier(4)

    def sweep() -> None:
        start.wait()
        removed.append(PredictionFolders(tmp_path).sweep())

    threads = [threading.Thread(target=sweep) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(removed) == 4
    assert sum(removed) == 300
    assert names(tmp_path) == {"kept"}


def test_predictions_at_once_keep_their_own_starts(tmp_path, clock):
    folders = PredictionFolders(tmp_path)
    inside, leave = threading.Barrier(9), threading.Event()

    def predict() -> None:
        with folders.running():
            inside.wait()
            leave.wait()

    threads = [threading.Thread(target=predict) for _ in range(8)]
    for thread in threads:
        thread.start()
    inside.wait()
    assert len(folders._started) == 8
    leave.set()
    for thread in threads:
        thread.join()
    assert folders._started == []


def test_no_folder_to_sweep(tmp_path):
    assert PredictionFolders(tmp_path / "nothing").sweep() == 0


def test_phases_are_named_in_order_with_their_seconds(clock):
    phases = Phases()
    assert str(phases) == ""
    for name, seconds in (("imports", 2.04), ("weights", 30.26), ("first request", 0.5)):
        clock.now += seconds
        phases.end(name)
    assert str(phases) == "imports 2.0 s, weights 30.3 s, first request 0.5 s"


def test_the_first_phase_may_have_begun_before(clock):
    phases = Phases(before_s=3.5)
    clock.now += 1
    phases.end("start and imports")
    clock.now += 2
    phases.end("weights")
    assert str(phases) == "start and imports 4.5 s, weights 2.0 s"


def test_the_age_of_this_process():
    """By a clock that both processes share, for the wall clock may be set meanwhile."""
    code = "import time; from alpaca.processes import process_age_s; print(process_age_s(), time.monotonic())"
    started = time.monotonic()
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    age, now = map(float, printed.split())
    assert age == pytest.approx(now - started, abs=0.1)


def wait_for(is_so) -> None:
    deadline = time.monotonic() + 5
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_folders_are_swept_while_nothing_ends(tmp_path):
    folders = PredictionFolders(tmp_path)
    for name in ("left by another run", "left later"):
        folder = make_folder(tmp_path, name, age_s=0)
        os.utime(folder, (time.time() - HOUR, time.time() - HOUR))
        if name == "left by another run":
            folders.keep_swept(every_s=0.02)
        wait_for(lambda: names(tmp_path) == set())


def test_a_worker_ends_when_the_runtime_is_killed():
    worker = "import time; from alpaca.processes import end_with_parent as end; end(every_s=0.05); "
    runtime = (
        "import subprocess, sys, time; "
        f"child = subprocess.Popen([sys.executable, '-c', {worker + 'print(1, flush=True); time.sleep(60)'!r}], "
        "stdout=subprocess.PIPE); child.stdout.readline(); print(child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", runtime], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert Path(f"/proc/{pid}").exists()
    parent.kill()
    parent.communicate()
    wait_for(lambda: not is_running(pid))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False
