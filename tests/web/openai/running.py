"""Runs the endpoint as a process."""

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import httpx

from tests.conftest import ROOT


class RunningEndpoint:
    """url: where it listens.   client: asks it.   output: what it has printed."""

    def __init__(self, targets: list[str], flags: list[str], environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "web.openai", "--port", "0", *flags]
        for target in targets:
            command += ["--target", target]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+(?=/v1)", line)
        assert found, line + self.process.stdout.read()
        self.url = found[0]
        self.output: list[str] = []
        self._reader = threading.Thread(target=lambda: self.output.extend(self.process.stdout), daemon=True)
        self._reader.start()
        self.client = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def complete(self, prompt: str | list[str], **fields: object) -> httpx.Response:
        return self.client.post("/v1/completions", json={"model": "alpaca", "prompt": prompt, **fields})

    def is_healthy(self) -> bool:
        return self.client.get("/health").status_code == 200

    def figure(self, name: str) -> float:
        """A line of the figures' page; 0 where it is not there."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.client.get("/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def stop(self) -> int:
        self.process.terminate()
        status = self.process.wait(timeout=15)
        self._reader.join()
        return status


def wait_for(is_so: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def running_endpoint(targets: list[str], *flags: str, **environment: str) -> Iterator[RunningEndpoint]:
    """An endpoint that has found a target up."""
    endpoint = RunningEndpoint(targets, list(flags), environment)
    try:
        wait_for(endpoint.is_healthy)
        yield endpoint
    finally:
        endpoint.process.kill()
        endpoint.process.wait()
        endpoint._reader.join()
        endpoint.process.stdout.close()
        endpoint.client.close()
