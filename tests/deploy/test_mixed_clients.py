"""Clients of all kinds at once: for minutes on a model of some size, and while parts of the server are killed."""

import asyncio
import contextlib
import os
import random
import re
import signal
import string
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from bench.random_model import model_folder
from deploy.local_server import LocalServer, running_server
from tests.deploy.mixed_clients import MixedClients, make_questions

pytestmark = [pytest.mark.slow, pytest.mark.alone]

SECONDS = float(os.environ.get("ALPACA_ATTACK_SECONDS", "300"))
NUM_CLIENTS = 200
MB = 1e6


def parts(server: LocalServer) -> dict[str, psutil.Process]:
    """The server's three processes: the gate is the parent of the runtime, and that one of the worker."""
    gate = psutil.Process(server.process.pid)
    (runtime,) = gate.children()
    (worker,) = runtime.children()
    return {"gate": gate, "runtime": runtime, "worker": worker}


def memory(server: LocalServer) -> dict[str, float]:
    """MB that each part holds, shared libraries included."""
    return {name: process.memory_info().rss / MB for name, process in parts(server).items()}


@contextlib.contextmanager
def watched(server: LocalServer) -> Iterator[list[dict[str, float]]]:
    """What each part holds during the block, looked at each second."""
    found, ends = [memory(server)], threading.Event()

    def watch() -> None:
        while not ends.wait(1):
            found.append(memory(server))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield found
    finally:
        ends.set()
        watching.join()


def shown(megabytes: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.0f} MB" for name, value in megabytes.items())


def fill_cache(server: LocalServer) -> None:
    """Have the server touch the memory of its whole cache, with prompts of 144 tokens that nobody else has."""
    num_blocks = int(re.search(r"(\d+) blocks of 16 tokens", server.log_text())[1])
    letters = random.Random(0)

    def ask(number: int) -> None:
        prompt = " ".join(letters.choices(string.ascii_lowercase, k=143))
        prediction = server.predict({"prompt": prompt, "prompt_template": "{prompt}", "max_new_tokens": 1})
        assert prediction["metrics"]["prompt_tokens"] == 144

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(num_blocks // 9 + 1)))


def test_two_hundred_clients_get_the_answers_they_would_get_alone():
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(model_folder(None, "46m", "float32"))
        flags = ["--weights", str(folder), "--concurrency", "64", "--max_context", "160"]
        server = stack.enter_context(running_server(flags, on_failure=print))
        clients = MixedClients(server, make_questions(length=20), most_s=300)
        fill_cache(server)
        asyncio.run(clients.run(NUM_CLIENTS, seconds=SECONDS / 10))  # what the first requests allocate stays
        before, num_warm = memory(server), clients.tally.ends.total()
        with watched(server) as seen:
            asyncio.run(clients.run(NUM_CLIENTS, seconds=SECONDS))
        time.sleep(2)
        after, tally = memory(server), clients.tally
        print(f"\n{tally.report()}\n  {num_warm} of them before the memory was looked at")
        most = {name: max(moment[name] for moment in seen) for name in before}
        print(f"  memory before: {shown(before)}; most: {shown(most)}; after: {shown(after)}")
        print("  of the worker, in MB:", [round(moment["worker"]) for moment in seen[:: max(1, len(seen) // 20)]])
        assert tally.wrong == []
        assert set(tally.by_end()) == {"right", "left"}, "behind the gate nobody is refused, fails or hangs"
        health = server.request("/health-check")
        assert (health["status"], health["gate"]["restarts"]) == ("READY", 0)
        assert (health["gate"]["running"], health["gate"]["waiting"]) == (0, 0), "who left holds no place"
        # Of matrix products oneDNN keeps a kernel for each number of rows it met lately, and their coming and going in
        # the allocator levels off: in the second half hardly anything may be added.
        middle = seen[len(seen) // 2]
        assert {name: value for name, value in after.items() if value > before[name] + 300} == {}
        assert {name: value for name, value in after.items() if value > middle[name] + 60} == {}


# Kills ------------------------------------------------------------------------------------------------------------


class Besieged:
    """A server under clients that go on in a thread, while the test kills its parts."""

    def __init__(self, server: LocalServer) -> None:
        self.server = server
        self.clients = MixedClients(server, make_questions(length=12), most_s=60)
        self._thread = threading.Thread(target=lambda: asyncio.run(self.clients.run(24, seconds=150)))
        self._thread.start()

    def wait_for_answers(self, count: int = 40, *, within_s: float = 40) -> None:
        """Wait until so many more clients got the right answer."""
        begun, deadline = self.num_right, time.monotonic() + within_s
        while self.num_right < begun + count:
            assert time.monotonic() < deadline, self.clients.tally.report()
            time.sleep(0.05)

    @property
    def num_right(self) -> int:
        return self.clients.tally.by_end()["right"]

    def wait_for_restart(self, number: int) -> None:
        deadline = time.monotonic() + 40
        while True:
            health = self.server.request("/health-check")
            if health["gate"]["restarts"] == number and health["status"] in ("READY", "BUSY"):
                return
            assert time.monotonic() < deadline, health
            time.sleep(0.1)

    def end(self) -> None:
        """Wait until the last clients have their answers, or are told that there are none."""
        self.clients.stop()
        self._thread.join()


@pytest.fixture
def besieged(llama_folder: Path) -> Iterator[Besieged]:
    with running_server(["--weights", str(llama_folder), "--concurrency", "8"], on_failure=print) as server:
        besieged = Besieged(server)
        try:
            yield besieged
        finally:
            besieged.end()


def test_whatever_is_killed_the_answers_stay_right(besieged: Besieged, llama_folder: Path):
    server, tally = besieged.server, besieged.clients.tally
    besieged.wait_for_answers()
    parts(server)["worker"].kill()
    besieged.wait_for_restart(1)
    besieged.wait_for_answers()
    parts(server)["runtime"].kill()
    besieged.wait_for_restart(2)
    besieged.wait_for_answers()

    worker = parts(server)["worker"]
    worker.send_signal(signal.SIGSTOP)
    time.sleep(15)
    worker.send_signal(signal.SIGCONT)
    besieged.wait_for_answers()
    assert server.request("/health-check")["gate"]["restarts"] == 2, "a worker that was stopped for a while goes on"
    assert {"hung", "409", "500", "502"}.isdisjoint(tally.by_end()), tally.report()

    all_parts = list(parts(server).values())
    all_parts[0].kill()
    gone, left = psutil.wait_procs(all_parts, timeout=10)
    assert left == []
    assert len(gone) == 3
    besieged.end()
    print(f"\n{tally.report()}")
    assert tally.wrong == []
    assert tally.by_end()["hung"] == 0
    with running_server(["--weights", str(llama_folder), "--concurrency", "8"], on_failure=print) as again:
        for name, asked in besieged.clients.questions.items():
            assert again.predict(asked)["output"] == besieged.clients.known[name], name
