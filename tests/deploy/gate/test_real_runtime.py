"""What the gate says and does in the runtime's place, beside Cog's own runtime with a model."""

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from deploy.local_server import LocalServer, running_server

RAW = {"prompt": "", "prompt_template": "{prompt}"}
LONG = {**RAW, "max_new_tokens": 2000, "min_new_tokens": 2000}
EVENTS = {"accept": "text/event-stream"}

pytestmark = pytest.mark.slow  # a server each; test_gate.py has a stand-in for the runtime


@pytest.fixture(scope="module")
def server(llama_folder) -> Iterator[LocalServer]:
    with running_server(["--weights", str(llama_folder), "--concurrency", "1"], on_failure=print) as server:
        yield server


def wait_for(server: LocalServer, running: int, waiting: int) -> None:
    deadline = time.monotonic() + 20
    while [server.request("/health-check")["gate"][name] for name in ("running", "waiting")] != [running, waiting]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def put(server: LocalServer, id: str, values: dict, **headers: str) -> httpx.Response:
    return httpx.put(f"{server.url}/predictions/{id}", json={"input": values}, headers=headers, timeout=60)


def cancel(server: LocalServer, id: str) -> httpx.Response:
    return httpx.post(f"{server.url}/predictions/{id}/cancel", timeout=20)


def last_event(reply: httpx.Response) -> tuple[str, dict]:
    name, data = reply.text.strip().split("\n\n")[-1].split("\n")
    return name, json.loads(data.removeprefix("data: "))


@pytest.mark.parametrize("headers", [{}, EVENTS])
def test_one_that_waits_is_canceled_and_asked_for_again_as_one_that_runs(server, headers):
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(put, server, "runs", LONG, **headers)
        wait_for(server, 1, 0)
        time.sleep(0.5)  # well within its answer
        waiting = pool.submit(put, server, "waits", LONG, **headers)
        wait_for(server, 1, 1)
        states = [put(server, name, LONG) for name in ("runs", "waits")]
        replies = [cancel(server, name) for name in ("waits", "runs")]
        by_runtime, by_gate = running.result(), waiting.result()
    assert [state.status_code for state in states] == [202, 202]
    assert [state.json()["status"] for state in states] == ["processing", "starting"]
    assert states[0].json().keys() == states[1].json().keys()
    assert [(reply.status_code, reply.json()) for reply in replies] == [(200, {})] * 2
    assert (by_gate.status_code, by_gate.headers["content-type"]) == (200, by_runtime.headers["content-type"])
    (name, theirs), (own_name, own) = [
        last_event(reply) if headers else ("", reply.json()) for reply in (by_runtime, by_gate)
    ]
    assert (own_name, own["status"]) == (name, theirs["status"])
    assert own.keys() == theirs.keys() - {"output"}
    assert put(server, "next", {**RAW, "max_new_tokens": 2}).json()["status"] == "succeeded"


def test_what_runs_in_the_background_is_found_by_an_input_that_is_none(server):
    """So `Places` asks for it: with the only place taken it is told what runs, and later starts nothing."""
    path = f"{server.url}/predictions"
    reply = httpx.post(path, json={"input": LONG}, headers={"prefer": "respond-async"}, timeout=20)
    states = [httpx.put(f"{path}/{reply.json()['id']}", json={"input": []}, timeout=20)]
    assert (reply.status_code, states[0].status_code, states[0].json()["status"]) == (202, 202, "processing")
    assert cancel(server, reply.json()["id"]).status_code == 200
    deadline = time.monotonic() + 20
    while states[-1].status_code == 202:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        states.append(httpx.put(f"{path}/{reply.json()['id']}", json={"input": []}, timeout=20))
    assert states[-1].status_code == 422
    assert server.request("/health-check")["gate"]["running"] == 0


def test_a_killed_runtime_answers_who_ran_and_who_waited_after_its_restart(server):
    values = {**RAW, "max_new_tokens": 300, "min_new_tokens": 300, "temperature": 0}
    whole = put(server, "before", values).json()["output"]
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(put, server, f"k{number}", values) for number in range(3)]
        wait_for(server, 1, 2)
        time.sleep(0.3)
        (runtime,) = psutil.Process(server.process.pid).children()
        os.kill(runtime.pid, signal.SIGKILL)
        assert [task.result().json()["output"] for task in asked] == [whole] * 3
    assert server.request("/health-check")["gate"]["restarts"] == 1
