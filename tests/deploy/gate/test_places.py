"""A runtime whose places are lost is started again; one that is used is left alone."""

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.deploy.gate.test_gate import RunningGate, running
from tests.samples import sampled

SOON = {"_STUCK_S": 1.0}
ASYNC = {"prefer": "respond-async"}


def restarts(gate: RunningGate) -> int:
    return gate.health()["gate"]["restarts"]


@pytest.mark.parametrize("how", sampled(["lose", "lose quietly"], "lose quietly"))
@pytest.mark.slow
def test_lost_places_come_back_and_who_waits_is_served(tmp_path, how):
    """More often than a runtime may die: this is no death."""
    with running(tmp_path, slots=1, bounds=SOON) as gate:
        for number in range(1, 5):
            assert gate.predict(how).json()["status"] == "failed"
            assert gate.predict(f"after {number}").json()["status"] == "succeeded"
            assert restarts(gate) == number
        assert gate.asked() == [text for number in range(1, 5) for text in (how, f"after {number}")]
        said = "the runtime took nothing for 1 s although nothing runs; starting it again\n"
        assert gate.output.count(said) == 4


def test_lost_places_come_back_where_nobody_waits(tmp_path):
    with running(tmp_path, slots=1, bounds=SOON) as gate:
        gate.predict("lose")
        assert gate.health()["status"] in ("READY", "BUSY")
        gate.wait_for(lambda: restarts(gate) == 1)


@pytest.mark.parametrize("id", sampled([None, "mine"], "mine"))
def test_what_runs_in_the_background_goes_on(tmp_path, id):
    with running(tmp_path, slots=1, bounds=SOON) as gate:
        path = f"/predictions/{id}" if id else "/predictions"
        body = {"input": {"prompt": "background 4"}}
        reply = gate.client.request("PUT" if id else "POST", path, json=body, headers=ASYNC)
        assert (reply.status_code, reply.json()["status"]) == (202, "starting")
        assert id in (None, reply.json()["id"])
        gate.wait_for(lambda: gate.health()["status"] == "BUSY")
        begun = time.monotonic()
        assert gate.predict("after").json()["status"] == "succeeded"
        assert time.monotonic() - begun > 2
        assert (restarts(gate), gate.asked()) == (0, ["background 4", "after"])


def test_what_ran_in_the_background_is_forgotten_when_it_has_ended(tmp_path):
    with running(tmp_path, slots=1, bounds=SOON) as gate:
        gate.client.post("/predictions", json={"input": {"prompt": "background 0.1"}}, headers=ASYNC)
        assert gate.predict("lose").json()["status"] == "failed"
        gate.wait_for(lambda: restarts(gate) == 1)


@pytest.mark.slow
def test_what_was_left_has_longer_to_end(tmp_path):
    """A client that leaves from the line, as everybody does where places are lost, gives nothing more time."""
    with running(tmp_path, slots=1, bounds=SOON) as gate:
        for prompt in ("linger 4", "after"):
            with pytest.raises(httpx.ReadTimeout):
                gate.predict(prompt, timeout=0.6)
        assert gate.predict("after").json()["status"] == "succeeded"
        assert (restarts(gate), gate.asked()) == (0, ["linger 4", "after"])
    with running(tmp_path, slots=1, bounds=SOON) as gate:
        gate.predict("lose")
        with pytest.raises(httpx.ReadTimeout):
            gate.predict("after", timeout=0.6)
        gate.wait_for(lambda: restarts(gate) == 1)


def test_what_runs_is_not_interrupted_for_a_lost_place(tmp_path):
    with running(tmp_path, slots=2, bounds=SOON) as gate, ThreadPoolExecutor(2) as pool:
        gate.predict("lose")
        asked = [pool.submit(gate.predict, f"sleep 3 {number}") for number in range(2)]
        assert [task.result().json()["status"] for task in asked] == ["succeeded"] * 2
        assert restarts(gate) == 0
