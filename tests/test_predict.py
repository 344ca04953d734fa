"""The Predictor behind the real Cog server, over HTTP: what clients see."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from local_server import LocalServer, ServerFailedError, running_server

from tests.conftest import ROOT

RAW = {"prompt": "", "prompt_template": "{prompt}"}
LONG = {**RAW, "max_new_tokens": 400, "min_new_tokens": 400, "seed": 1, "stream": True}


@pytest.fixture(scope="module")
def server(llama_folder) -> Iterator[LocalServer]:
    with running_server(["--weights", str(llama_folder), "--concurrency", "16"], on_failure=print) as server:
        yield server


def sse_events(url: str, input: dict, *, stop_after: int | None = None) -> list[tuple[float, str, dict]]:
    """(seconds since the request, event, data) of a streamed prediction; hangs up after `stop_after` outputs."""
    headers = {"Accept": "text/event-stream"}
    while True:
        start = time.monotonic()
        with httpx.stream("POST", f"{url}/predictions", json={"input": input}, headers=headers, timeout=60) as reply:
            if reply.status_code != 409:  # a slot is freed just after its last reply
                return list(read_events(reply, start, stop_after))
        time.sleep(0.01)


def read_events(reply: httpx.Response, start: float, stop_after: int | None) -> Iterator[tuple[float, str, dict]]:
    assert reply.status_code == 200, reply.read()
    name, outputs = "", 0
    for line in reply.iter_lines():
        if line.startswith("event:"):
            name = line.removeprefix("event:").strip()
        elif line.startswith("data:"):
            yield time.monotonic() - start, name, json.loads(line.removeprefix("data:"))
            outputs += name == "output"
            if outputs == stop_after:
                return


def chunks(events: list[tuple[float, str, dict]]) -> list[str]:
    return [data["chunk"] for _, name, data in events if name == "output"]


def test_published_text_over_http(tmp_path, real):
    from convert.convert_llama_weights_to_hf import convert, parse_arguments

    flags = ["--input_dir", str(real / "unconverted-weights"), "--model_size", "260K", "--output_dir", str(tmp_path)]
    folder = convert(parse_arguments(flags))
    expected = (real / "stories260k-greedy.txt").read_text().rstrip("\n")
    with running_server(["--weights", str(folder)], on_failure=print) as server:
        prediction = server.predict({**RAW, "temperature": 0, "max_new_tokens": 256})
        assert prediction["output"] == [expected]
        events = sse_events(server.url, {**RAW, "temperature": 0, "max_new_tokens": 256, "stream": True})
        assert "".join(chunks(events)) == expected


def test_one_item_per_completion_and_metrics(server):
    prediction = server.predict({"prompt": "hi", "n": 3, "max_new_tokens": 8, "seed": 0})
    assert prediction["status"] == "succeeded"
    assert len(prediction["output"]) == 3
    metrics = prediction["metrics"]
    assert metrics["seed"] == 0
    assert metrics["prompt_tokens"] > 20
    assert 0 < metrics["output_tokens"] <= 24
    assert {"cached_tokens", "queue_s", "time_to_first_token_s", "tokens_per_second"} <= metrics.keys()


def test_seed_repeats_an_answer_and_is_drawn_when_absent(server):
    asked = {"prompt": "hi", "max_new_tokens": 12}
    first = server.predict(asked)
    again = server.predict({**asked, "seed": first["metrics"]["seed"]})
    other = server.predict(asked)
    assert again["output"] == first["output"]
    assert other["metrics"]["seed"] != first["metrics"]["seed"]


def test_pieces_are_the_whole_answer(server):
    asked = {**RAW, "max_new_tokens": 60, "seed": 5}
    whole = server.predict(asked)["output"]
    pieces = server.predict({**asked, "stream": True})["output"]
    assert len(whole) == 1
    assert len(pieces) > 5
    assert "".join(pieces) == whole[0]
    half = whole[0][len(whole[0]) // 2 :][:4]
    assert server.predict({**asked, "stop": [half]})["output"] == [whole[0][: whole[0].index(half)]]


def test_first_event_comes_before_half_of_the_time(server):
    events = sse_events(server.url, LONG)
    arrivals = [at for at, name, _ in events if name == "output"]
    assert len(arrivals) > 100
    assert arrivals[0] < arrivals[-1] / 2
    assert len(set(arrivals)) > 100  # and the others as they come
    assert events[-1][1] == "completed"
    assert events[-1][2]["status"] == "succeeded"
    assert events[-1][2]["output"] == chunks(events)


def test_sixteen_clients_at_once_wait_in_line_and_get_their_own_answers(server):
    def ask(i: int) -> None:
        answers[i] = "".join(
            chunks(sse_events(server.url, {**LONG, "max_new_tokens": 20, "min_new_tokens": 20, "seed": i % 4}))
        )

    answers: dict[int, str] = {}
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 16
    assert all(answers[i] == answers[i % 4] for i in range(16))
    assert len(set(answers.values())) == 4


def test_cancel_stops_the_engine(server):
    long = {**LONG, "max_new_tokens": 2000, "min_new_tokens": 2000, "stream": False}
    address = f"{server.url}/predictions/to-cancel"
    assert httpx.put(address, json={"input": long}, headers={"Prefer": "respond-async"}).status_code == 202
    time.sleep(0.3)
    assert httpx.post(f"{address}/cancel").status_code == 200
    queue_s = server.predict({**RAW, "max_new_tokens": 1})["metrics"]["queue_s"]
    assert queue_s < 0.5  # 2,000 tokens take seconds


def test_cancelled_stream_ends_as_canceled(server):
    events: list = []
    long = {**LONG, "max_new_tokens": 2000, "min_new_tokens": 2000}
    address = f"{server.url}/predictions/stream-1"

    def read() -> None:
        headers = {"Accept": "text/event-stream"}
        with httpx.stream("PUT", address, json={"input": long}, headers=headers, timeout=60) as reply:
            events.extend(line for line in reply.iter_lines() if line.startswith("data:"))

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(0.5)
    assert httpx.post(f"{address}/cancel").status_code == 200
    reader.join(timeout=5)
    assert not reader.is_alive()
    last = json.loads(events[-1].removeprefix("data:"))
    assert last["status"] == "canceled"
    assert 0 < len(events) < 1500


def test_disconnect_stops_the_engine(server):
    sse_events(server.url, {**LONG, "max_new_tokens": 2000, "min_new_tokens": 2000}, stop_after=3)
    assert server.predict({**RAW, "max_new_tokens": 1})["metrics"]["queue_s"] < 0.5


def test_prints_land_in_the_right_prediction(server):
    logs: dict[int, str] = {}

    def ask(seed: int) -> None:
        logs[seed] = server.predict({**RAW, "max_new_tokens": 20, "seed": seed})["logs"]

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(101, 107)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(logs) == 6
    for seed, log in logs.items():
        assert log.count("seed") == 1
        assert f"seed {seed}" in log


def test_too_long_a_prompt_fails_naming_both_lengths(server):
    prediction = server.predict({"prompt": "word " * 3000})
    assert prediction["status"] == "failed"
    assert "tokens long and the model's context is 2048" in prediction["error"]


@pytest.mark.parametrize(
    "input",
    [{}, {"prompt": "x", "n": 6}, {"prompt": "x", "temperature": "hot"}, {"prompt": "x", "stop": "a"}, {"prompt": 3},
     {"prompt": "x", "seed": -1}],
)  # fmt: skip
def test_the_schema_refuses_bad_inputs(server, input):
    refused = httpx.post(f"{server.url}/predictions", json={"input": input})
    assert refused.status_code == 422
    assert refused.json()["detail"]


def test_combinations_are_refused_with_a_reason(server):
    prediction = server.predict({"prompt": "x", "stream": True, "n": 2})
    assert prediction["status"] == "failed"
    assert "use it with n = 1" in prediction["error"]


def test_health_and_schema(server):
    assert server.request("/health-check")["status"] == "READY"
    assert server.request("/openapi.json") == json.loads((ROOT / ".cog" / "openapi_schema.json").read_text())


def test_setup_without_weights_says_which_step_is_missing(tmp_path):
    server = LocalServer(["--weights", str(tmp_path / "nothing")])
    with pytest.raises(ServerFailedError, match=r"no model in .*nothing"):
        server.wait_until("READY", timeout_s=60)
    assert httpx.post(f"{server.url}/predictions", json={"input": {"prompt": "x"}}).status_code == 503
    server.stop()


def test_one_signal_stops_server_and_worker(llama_folder):
    import psutil

    server = LocalServer(["--weights", str(llama_folder)])
    server.wait_until("READY")
    family = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    assert len(family) >= 2
    assert server.stop() in (0, -15)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def test_script_predict_ended_by_a_signal_leaves_no_server(llama_folder):
    import psutil

    command = [sys.executable, str(ROOT / "script" / "local_predict.py"), "--weights", str(llama_folder)]
    process = subprocess.Popen([*command, "-i", "prompt=x"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (children := psutil.Process(process.pid).children(recursive=True)) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=30) == 143
    _, alive = psutil.wait_procs(children, timeout=10)
    assert children
    assert not alive


def test_script_predict_prints_what_cog_predict_does(llama_folder):
    command = [sys.executable, str(ROOT / "script" / "local_predict.py"), "--weights", str(llama_folder)]
    inputs = [
        "-i",
        "prompt=tell me something about รามาเกียรติ์",
        "-i",
        "max_new_tokens=5",
        "-i",
        "stop=a",
        "-i",
        "stop=b",
    ]
    done = subprocess.run([*command, *inputs, "-i", "seed=1"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    output = json.loads(done.stdout)
    assert isinstance(output, list)
    assert len(output) == 1
    wrong = subprocess.run([*command, "-i", "promt=x"], capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 1
    assert "no input is named 'promt'; did you mean prompt?" in wrong.stderr
