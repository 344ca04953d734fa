"""A part's jobs, each a process of its own: one that runs out of memory, hangs or loses the card ends alone.

A job's rows come through a pipe, one JSON line each, and are on the disk before the next is measured. A job ends with
whoever started it, even by SIGKILL: it waits for the end of its standard input, and then takes its whole group along.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.record import Record
from bench.provenance import ROOT

_GRACE_S = 2.0  # between SIGTERM and SIGKILL
_TAIL_BYTES = 1500  # of a job's log in the row that says how it failed


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """A job of a part: at most `limit_s` seconds, and not begun with fewer than `least_s` left."""

    name: str
    limit_s: float
    least_s: float = 10.0
    module: str = ""  # that has it in its JOBS; the part's own by default


def run_stages(
    part: str, stages: Sequence[Sequence[JobPlan]], record: Record, *, deadline: float, environment: Mapping[str, str]
) -> None:
    """Run stage after stage, the jobs of one side by side, until `deadline` (of time.monotonic)."""
    for stage in stages:
        jobs = [
            threading.Thread(target=run_job, args=(part, plan, record, deadline, environment), daemon=True)
            for plan in stage
        ]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()


def run_job(part: str, plan: JobPlan, record: Record, deadline: float, environment: Mapping[str, str]) -> None:
    """One job to its end or to its limit; how it ended is a row where it ended badly."""
    seconds = min(plan.limit_s, deadline - time.monotonic())
    if seconds < plan.least_s:
        record.put({"name": plan.name, "left_out": f"{max(seconds, 0):.0f} s were left; it needs {plan.least_s:g}"})
        return
    log = record.path.with_name(f"{part}-{plan.name}.log")
    start = time.monotonic()
    print(f"{plan.name}: at most {seconds:.0f} s", file=sys.stderr, flush=True)
    with open(log, "w", encoding="utf-8") as errors:
        module = plan.module or f"bench.gpu.part_{part}"
        job = _Job(module, plan.name, seconds=seconds, errors=errors, environment=environment)
        try:
            status = job.follow(record, seconds=seconds)
        finally:
            job.kill()
    took = time.monotonic() - start
    print(f"{plan.name}: {took:.1f} s{'' if status == 0 else f', status {status}'}", file=sys.stderr, flush=True)
    if status is None:
        record.fail(plan.name, f"ended after {took:.0f} s: its time was over")
    elif status:
        record.fail(plan.name, f"status {status} after {took:.0f} s: {_tail(log)}")


class _Job:
    """A child process, the pipe its rows come through, and the pipe whose end tells it that nobody listens."""

    def __init__(
        self, module: str, name: str, *, seconds: float, errors: object, environment: Mapping[str, str]
    ) -> None:
        command = [sys.executable, "-m", "bench.gpu.child", module, name, f"{seconds:.1f}"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            text=True, start_new_session=True,
        )  # fmt: skip

    def follow(self, record: Record, *, seconds: float) -> int | None:
        """Put the job's rows as they come; its exit status, or None where its time was over."""
        reader = threading.Thread(target=self._read, args=(record,), daemon=True)
        reader.start()
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._end()
            status = None
        reader.join(timeout=5)
        return status

    def _read(self, record: Record) -> None:
        with self._process.stdout as lines:
            for line in lines:
                with contextlib.suppress(ValueError):  # a line that was cut off
                    message = json.loads(line)
                    if "facts" in message:
                        record.put_facts(message["facts"])
                    else:
                        record.put(message["row"])

    def _end(self) -> None:
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_S)
        self.kill()

    def kill(self) -> None:
        """End the job and all it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-_TAIL_BYTES:].strip()
