"""The runtime makes a folder for each prediction in the temporary folder. Where that is full the gate passes none on.

The server runs in a mount namespace of its own, whose temporary folder is a tmpfs of few megabytes and few files.
"""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deploy.local_server import LocalServer, running_server
from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.alone]

CONCURRENCY = 4
ASKED = {"prompt": "Name a bird.", "temperature": 0, "max_new_tokens": 8, "min_new_tokens": 8}
MOUNTS = 'mount --bind "$0" /mnt && mount -t tmpfs -o size=64m,nr_inodes=2000 tmpfs /tmp && exec "$@"'
WITHIN = ["unshare", "--mount", "--propagation", "private", "sh", "-c", MOUNTS]


class CrampedServer:
    """A server and its temporary folder, which nobody else sees."""

    def __init__(self, server: LocalServer) -> None:
        self.server = server
        self.folder = Path(f"/proc/{server.process.pid}/root/tmp")
        self.predictions = self.folder / "coglet" / "predictions"
        self.expected = server.predict(ASKED)["output"]

    def ask(self) -> httpx.Response:
        return httpx.post(f"{self.server.url}/predictions", json={"input": ASKED}, timeout=10)

    def is_answered(self) -> bool:
        reply = self.ask()
        return reply.status_code == 200 and reply.json().get("output") == self.expected

    def is_refused(self) -> bool:
        reply = self.ask()
        return (reply.status_code, reply.headers.get("retry-after")) == (503, "5")

    def gate(self) -> dict:
        return self.server.request("/health-check")["gate"]

    def fill_with_files(self) -> list[Path]:
        made: list[Path] = []
        while os.statvfs(self.folder).f_ffree:
            made.append(self.folder / f"file-{len(made)}")
            made[-1].touch()
        return made

    def fill_with_old_folders(self) -> None:
        """As if so many predictions had ended an hour ago: what is younger is not swept."""
        number = 0
        while os.statvfs(self.folder).f_ffree:
            folder = self.predictions / f"old-{number}"
            folder.mkdir()
            os.utime(folder, (time.time() - 3600,) * 2)
            number += 1


@pytest.fixture
def cramped(llama_folder: Path) -> Iterator[CrampedServer]:
    within = [*WITHIN, str(llama_folder)]
    if ROOT.is_relative_to("/tmp") or subprocess.run([*within, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount, and a checkout outside of /tmp")
    flags = ["--weights", "/mnt", "--concurrency", str(CONCURRENCY), "--max_context", "256"]
    with running_server(flags, within=within, on_failure=print) as server:
        yield CrampedServer(server)


def test_without_bytes_nothing_is_lost(cramped: CrampedServer):
    """Its folders need none on a tmpfs; a large input, which the runtime writes into them, does."""
    large = cramped.folder / "large"
    free = os.statvfs(cramped.folder)
    large.write_bytes(bytes(free.f_bavail * free.f_frsize))
    assert cramped.gate()["temporary_folder_free_bytes"] < 4096
    assert "too little room" in cramped.gate()["problem"]
    assert all(cramped.is_refused() for _ in range(2 * CONCURRENCY))
    large.unlink()
    assert cramped.gate()["problem"] is None
    assert all(cramped.is_answered() for _ in range(2 * CONCURRENCY))
    assert cramped.gate()["restarts"] == 0


def test_a_folder_that_was_full_takes_no_place_for_ever(cramped: CrampedServer):
    made = cramped.fill_with_files()
    assert cramped.gate()["temporary_folder_free_files"] == 0
    assert "too few further files" in cramped.gate()["problem"]
    assert all(cramped.is_refused() for _ in range(2 * CONCURRENCY))
    for file in made:
        file.unlink()
    assert all(cramped.is_answered() for _ in range(2 * CONCURRENCY))
    assert cramped.gate()["restarts"] == 0


def test_the_sweep_makes_room(cramped: CrampedServer):
    cramped.fill_with_old_folders()
    assert cramped.is_refused()
    deadline = time.monotonic() + 75  # it sweeps each minute
    while cramped.gate()["problem"] is not None:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert all(cramped.is_answered() for _ in range(2 * CONCURRENCY))
