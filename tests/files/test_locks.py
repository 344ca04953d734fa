"""Locks between processes: who is refused, who waits, and what a killed process leaves."""

import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from alpaca.errors import InputError, OutputExists
from alpaca.files.locks import locked, waiting_lock
from tests.conftest import ROOT

HOLD = """
import sys, time
from pathlib import Path
from alpaca.files.locks import locked, waiting_lock
with locked(Path(sys.argv[1])), waiting_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds both locks of tmp_path/out."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_writer_is_refused_while_the_first_lives(holder, tmp_path: Path):
    with pytest.raises(OutputExists, match=r"another process is writing \S*out now"):  # noqa: SIM117
        with locked(tmp_path / "out"):
            pass
    assert (tmp_path / ".out.lock").exists()  # the refused writer must not remove the file that the other one holds


def test_a_killed_process_blocks_nobody(holder, tmp_path: Path):
    holder.kill()
    holder.wait()
    assert (tmp_path / ".out.lock").exists()
    with locked(tmp_path / "out"), waiting_lock(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".out.waiting"]


def test_a_second_maker_waits_and_says_so(holder, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    threading.Timer(0.2, holder.kill).start()
    with waiting_lock(tmp_path / "out"):
        assert holder.wait(timeout=5) != 0
    assert [text for text in caplog.messages if "waiting for it" in text] == [
        f"another process makes {tmp_path / 'out'} now; waiting for it"
    ]


def test_threads_of_one_process_wait_for_each_other(tmp_path: Path):
    order: list[str] = []
    started = threading.Event()

    def hold() -> None:
        with waiting_lock(tmp_path / "out"):
            started.set()
            threading.Event().wait(0.3)
            order.append("first")

    thread = threading.Thread(target=hold)
    thread.start()
    assert started.wait(5)
    with waiting_lock(tmp_path / "out"):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_an_error_in_the_block_releases_both_locks(tmp_path: Path):
    for lock in (locked, waiting_lock):
        with pytest.raises(InputError, match="inside"), lock(tmp_path / "out"):
            raise InputError("inside")
        with lock(tmp_path / "out"):
            pass
