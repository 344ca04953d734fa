"""Runs the endpoint as a process."""

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator

import httpx

from tests.deploy.gate.program import Program


class RunningEndpoint(Program):
    def __init__(self, targets: list[str], flags: list[str], environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "web.openai", "--port", "0", *flags]
        for target in targets:
            command += ["--target", target]
        super().__init__(command, environment, address=r"http://\S+(?=/v1)")

    def complete(self, prompt: str | list[str], **fields: object) -> httpx.Response:
        return self.client.post("/v1/completions", json={"model": "alpaca", "prompt": prompt, **fields})

    def is_healthy(self) -> bool:
        return self.client.get("/health").status_code == 200

    def figure(self, name: str) -> float:
        """A line of the figures' page; 0 where it is not there."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.client.get("/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0


def wait_for(is_so: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def running_endpoint(targets: list[str], *flags: str, **environment: str) -> Iterator[RunningEndpoint]:
    """An endpoint that has found a target up."""
    with contextlib.closing(RunningEndpoint(targets, list(flags), environment)) as endpoint:
        wait_for(endpoint.is_healthy)
        yield endpoint
