"""A part's rows outlive whatever ends the part: rows that fail, jobs that hang, a budget that runs out, SIGKILL."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.gpu.jobs import JobPlan, run_stages
from bench.gpu.record import Record
from bench.targets import Target
from tests.conftest import ROOT

MODULE = "tests.bench.gpu_jobs"


def plan(name: str, *, limit_s: float = 30.0) -> JobPlan:
    return JobPlan(name=name, limit_s=limit_s, least_s=0.1, module=MODULE)


def make_record(folder: Path) -> Record:
    def targets(rows) -> list[Target]:
        return [Target(label="two", value=rows.get("two", {}).get("value"), least=2)]

    return Record(folder / "gpu-test.json", {"bench": "gpu test"}, make_targets=targets)


def run(record: Record, *stages: tuple[JobPlan, ...], seconds: float = 30.0) -> dict[str, dict]:
    """The rows in the file by their names, after some stages."""
    run_stages("test", stages, record, deadline=time.monotonic() + seconds, environment=os.environ)
    return rows_of(record.path)


def rows_of(path: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads(path.read_text())["rows"]}


def test_file_is_whole_after_each_row(tmp_path):
    record = make_record(tmp_path)
    assert json.loads(record.path.read_text())["rows"] == []
    record.put({"name": "two", "value": 1})
    record.put({"name": "one", "value": 1})
    record.put({"name": "two", "value": 2})  # grown
    found = json.loads(record.path.read_text())
    assert found["rows"] == [{"name": "two", "value": 2}, {"name": "one", "value": 1}]
    assert (found["is_finished"], found["targets"][0]["is_met"]) == (False, True)
    record.fail("two", "out of memory")
    record.put_facts({"card": "H100"})
    record.finish()
    found = json.loads(record.path.read_text())
    assert found["rows"][0] == {"name": "two", "value": 2, "failure": "out of memory"}
    assert (found["is_finished"], found["card"], found["bench"]) == (True, "H100", "gpu test")
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-test.json"]  # nothing partial is left


def test_a_row_that_fails_stops_no_other(tmp_path):
    rows = run(make_record(tmp_path), (plan("middle"),))
    assert rows == {
        "first": {"name": "first", "value": 1},
        "second": {"name": "second", "failure": "MemoryError: no room"},
        "third": {"name": "third", "value": 3},
    }
    assert "MemoryError: no room" in (tmp_path / "test-middle.log").read_text()


def test_a_job_that_ends_badly_stops_no_other(tmp_path):
    rows = run(make_record(tmp_path), (plan("badly"),), (plan("rows"),))
    assert rows["badly"]["failure"].startswith("status 3 after ")
    assert rows["badly"]["failure"].endswith("the last words")
    assert [rows[name]["value"] for name in ("before", "one", "two")] == [1, 1, 2]


def test_a_job_that_hangs_is_ended_with_all_it_started(tmp_path, monkeypatch):
    monkeypatch.setenv("HANGING", str(tmp_path / "ids"))
    rows = run(make_record(tmp_path), (plan("hang", limit_s=1.5), plan("rows")))
    assert rows["hang"]["failure"].endswith("its time was over")
    assert {"before", "hanging", "one", "two"} <= rows.keys()
    wait_until_gone((tmp_path / "ids").read_text())
    assert "noise" in (tmp_path / "test-hang.log").read_text()  # and not among the rows


def test_what_the_budget_has_no_room_for_is_left_out(tmp_path):
    start = time.monotonic()
    rows = run(make_record(tmp_path), (plan("hang"),), (plan("rows"),), seconds=1.5)
    assert time.monotonic() - start < 15
    assert rows["before"] == {"name": "before", "value": 1}
    assert "its time was over" in rows["hang"]["failure"]
    assert rows["rows"]["left_out"] == "0 s were left; it needs 0.1"


KILLED = """
import os, sys, time
from pathlib import Path
from bench.gpu.jobs import run_stages
from tests.bench.test_gpu_record import make_record, plan
record = make_record(Path(sys.argv[1]))
run_stages("test", [[plan("hang")]], record, deadline=time.monotonic() + 60, environment=os.environ)
"""


def test_a_part_killed_midway_leaves_its_rows_and_no_process(tmp_path):
    environment = {**os.environ, "HANGING": str(tmp_path / "ids"), "PYTHONPATH": str(ROOT)}
    part = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, env=environment)
    wait_for(lambda: (tmp_path / "gpu-test.json").is_file() and "hanging" in rows_of(tmp_path / "gpu-test.json"))
    part.send_signal(signal.SIGKILL)
    assert part.wait() == -signal.SIGKILL
    assert list(rows_of(tmp_path / "gpu-test.json")) == ["before", "hanging"]
    wait_until_gone((tmp_path / "ids").read_text())


def wait_until_gone(ids: str) -> None:
    wait_for(lambda: not any(is_running(int(number)) for number in ids.split()))


def is_running(number: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def wait_for(holds) -> None:
    end = time.monotonic() + 20
    while not holds():
        if time.monotonic() > end:
            pytest.fail("what was waited for did not come about within 20 s")
        time.sleep(0.02)
