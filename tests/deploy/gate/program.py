"""A server in a process of its own, as tests start and end it."""

import os
import re
import subprocess
import threading

import httpx

from tests.conftest import ROOT


class Program:
    """url: where it listens, which its first line says.   client: asks it.   output: what it has printed since."""

    def __init__(self, command: list[str], environment: dict[str, str], *, address: str = r"http://\S+") -> None:
        self.process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        line = self.process.stdout.readline()
        found = re.search(address, line)
        assert found, line + self.process.stdout.read()
        self.url = found[0]
        self.output: list[str] = []
        self.reader = threading.Thread(target=lambda: self.output.extend(self.process.stdout), daemon=True)
        self.reader.start()
        self.client = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def stop(self) -> int:
        """End it by SIGTERM; its exit status."""
        self.process.terminate()
        status = self.process.wait(timeout=15)
        self.reader.join()
        return status

    def close(self) -> None:
        """End it by SIGKILL, if it has not ended, and all that is held of it."""
        self.process.kill()
        self.process.wait()
        self.reader.join()
        self.process.stdout.close()
        self.client.close()
