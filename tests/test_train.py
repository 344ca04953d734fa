"""train.py behind the real Cog server's train mode: data in, weights out, served again."""

import base64
import json
import time
from pathlib import Path

import httpx
import pytest
from local_server import running_server

RECORDS = [{"instruction": f"Say {word}.", "output": f"{word}!"} for word in ("red", "green", "blue", "alpaca")]


@pytest.fixture(scope="module")
def server():
    with running_server(["--train"], on_failure=print) as server:
        yield server


def training_input(llama_folder: Path, tmp_path: Path, **changes) -> dict:
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    data = base64.b64encode((tmp_path / "data.json").read_bytes()).decode()
    return {
        "data": f"data:application/json;base64,{data}",
        "model": str(llama_folder),
        "global_batch_size": 4,
        **changes,
    }


def test_weights_come_back_and_are_served(server, llama_folder, tmp_path):
    body = {"input": training_input(llama_folder, tmp_path, num_train_epochs=40, learning_rate=3e-3)}
    training = httpx.post(f"{server.url}/trainings", json=body, timeout=120).json()
    assert training["status"] == "succeeded", training
    assert training["metrics"]["step"] == training["metrics"]["max_steps"] == 40
    assert "step 40/40: loss" in training["logs"]
    head, content = training["output"].split(",", 1)
    assert head.startswith("data:")
    (tmp_path / "weights.tar").write_bytes(base64.b64decode(content))
    with running_server(["--weights", str(tmp_path / "weights.tar")], on_failure=print) as predictor:
        prediction = predictor.predict({"prompt": "Say alpaca.", "temperature": 0})
    assert prediction["output"] == ["alpaca!"]


def test_bad_data_fails_with_its_reason(server, llama_folder, tmp_path):
    body = training_input(llama_folder, tmp_path)
    broken = base64.b64encode(b'[{"instruction": "x"}]').decode()
    training = httpx.post(
        f"{server.url}/trainings", json={"input": {**body, "data": f"data:application/json;base64,{broken}"}}
    ).json()
    assert training["status"] == "failed"
    assert "output" in training["error"]
    refused = httpx.post(f"{server.url}/trainings", json={"input": {**body, "recipe": "other"}})
    assert refused.status_code == 422


def test_cancel_stops_the_training(server, llama_folder, tmp_path):
    body = {"input": training_input(llama_folder, tmp_path, max_steps=100_000)}
    address = f"{server.url}/trainings/long"
    assert httpx.put(address, json=body, headers={"Prefer": "respond-async"}).status_code == 202
    time.sleep(1.5)
    second = httpx.post(f"{server.url}/trainings", json=body, timeout=60).json()
    assert "a training is running already" in second["error"]
    assert httpx.post(f"{address}/cancel").status_code == 200
    deadline = time.monotonic() + 20
    done = {"error": "a training is running already"}
    while "running already" in (done.get("error") or "") and time.monotonic() < deadline:
        time.sleep(0.2)
        short = {"input": {**body["input"], "max_steps": 1}}
        done = httpx.post(f"{server.url}/trainings", json=short, timeout=60).json()
    assert done["status"] == "succeeded"
