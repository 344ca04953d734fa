"""A file of predictions: answers in order, many at once, and a stopped run goes on where it was."""

import contextlib
import json
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from alpaca.errors import InputError, MissingInput
from deploy import batch, local_predict
from deploy.local_server import LocalServer, running_server


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def test_as_many_at_once_as_asked_and_in_order():
    running, most, lock = 0, 0, threading.Lock()

    def predict(inputs: dict) -> dict:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.03 if inputs["number"] % 5 == 0 else 0.005)
        with lock:
            running -= 1
        return {"status": "succeeded", "output": [str(inputs["number"])]}

    records = [{"number": number} for number in range(60)]
    found = list(batch.answer_all(records, predict, concurrency=6))
    assert [inputs for inputs, _ in found] == records
    assert [prediction["output"] for _, prediction in found] == [[str(number)] for number in range(60)]
    assert most == 6


@pytest.mark.parametrize("cut", [1, 7, None])
def test_a_stopped_run_goes_on_behind_the_last_whole_line(tmp_path, capsys, cut):
    """Stopped by an error at the 14th; then perhaps the last line is torn, as by a kill."""
    texts = [f"number {number} \u2028 🦙" for number in range(20)]
    source = write(tmp_path / "prompts.jsonl", [{"prompt": text} for text in texts])
    target = tmp_path / "answers.jsonl"
    asked: list[str] = []

    def predict(inputs: dict) -> dict:
        asked.append(inputs["prompt"])
        if len(asked) == 14:
            raise ConnectionError("the server is gone")
        return {"status": "succeeded", "output": [inputs["prompt"].upper()], "metrics": {"output_tokens": 2}}

    with pytest.raises(ConnectionError, match="the server is gone"):
        batch.answer_file(source, target, contextlib.nullcontext(predict), concurrency=1)
    before = target.read_bytes()
    assert before.count(b"\n") == 13
    if cut:
        target.write_bytes(before[:-cut])
    assert batch.answer_file(source, target, contextlib.nullcontext(predict), concurrency=1) == (20, 0)
    assert target.read_bytes().startswith(before)
    assert [line["output"] for line in read(target)] == [[text.upper()] for text in texts]
    assert len(asked) <= 20 + 1 + batch._AHEAD + bool(cut)  # nothing that was written is asked for again
    whole = target.read_bytes()
    num_asked = len(asked)
    assert batch.answer_file(source, target, contextlib.nullcontext(predict), concurrency=1) == (20, 0)
    assert (target.read_bytes(), len(asked)) == (whole, num_asked)
    assert "20 of 20 answered" in capsys.readouterr().err


def test_answers_to_other_inputs_are_left_alone(tmp_path):
    source = write(tmp_path / "prompts.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    target = write(tmp_path / "answers.jsonl", [{"inputs": {"prompt": "a"}, "status": "succeeded"}, {"inputs": {}}])
    content = target.read_bytes()
    with pytest.raises(InputError, match=r"answers\.jsonl, line 2 answers other inputs than those of .*prompts\.jsonl"):
        batch.answer_file(source, target, None, concurrency=1)  # None: nor is a server started
    assert target.read_bytes() == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n\n{"prompt": \n', r"line 3: expected a JSON object"),
        (b'["a"]\n', r"line 1: expected a JSON object; found \[\"a\"\]"),
        (b"\xff\n", "expected UTF-8"),
    ],
)
def test_lines_that_are_no_objects_are_named(tmp_path, content, message):
    source = tmp_path / "prompts.jsonl"
    source.write_bytes(content)
    with pytest.raises(InputError, match=message):
        batch.read_inputs(source)
    with pytest.raises(MissingInput, match=r"no file .*nothing\.jsonl"):
        batch.read_inputs(tmp_path / "nothing.jsonl")


@pytest.fixture(scope="module")
def server(llama_folder):
    with running_server(["--weights", str(llama_folder), "--concurrency", "4"], on_failure=print) as server:
        yield server


@pytest.mark.slow
def test_script_predict_answers_a_file(server: LocalServer, tmp_path, monkeypatch, capsys):
    asked = {"prompt_template": "{prompt}", "temperature": 0, "max_new_tokens": 8, "min_new_tokens": 8}
    records = [{**asked, "prompt": f"{number} alpacas", "n": 1 + number % 2} for number in range(12)]
    records[3:3] = [{"prompt": "x", "n": 2, "stream": True}, {"prompt": "x", "max_new_tokens": -1}]
    write(tmp_path / "prompts.jsonl", records)
    monkeypatch.setattr(local_predict, "running_server", lambda flags: contextlib.nullcontext(server))
    monkeypatch.setattr(local_predict, "stop_children_on_sigterm", lambda: None)
    monkeypatch.setenv("ALPACA_CALLER", str(tmp_path))
    flags = ["--input", "prompts.jsonl", "--output", "answers.jsonl", "--concurrency", "4"]
    monkeypatch.setattr(sys, "argv", ["script/predict", *flags])
    local_predict.main()
    lines = read(tmp_path / "answers.jsonl")
    assert [line["inputs"] for line in lines] == records
    assert [line["status"] for line in lines] == ["succeeded"] * 3 + ["failed"] * 2 + ["succeeded"] * 9
    for line in lines:
        reply = httpx.post(f"{server.url}/predictions", json={"input": line["inputs"]}, timeout=60)
        if line["status"] == "succeeded":
            assert line["output"] == reply.json()["output"]
            assert line["metrics"]["output_tokens"] == 8 * line["inputs"]["n"]
    assert "with n = 1" in lines[3]["error"]
    assert "max_new_tokens" in lines[4]["error"]
    assert "14 predictions in answers.jsonl, 2 of them failed" in capsys.readouterr().err
    for wrong in (["--input", "a", "--input", "b"], [], ["--input", "a", "--json"]):
        monkeypatch.setattr(sys, "argv", ["script/predict", "--output", "c", *wrong])
        with pytest.raises(SystemExit, match="2"):
            local_predict.main()


def test_files_are_looked_at_before_a_server_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(local_predict, "running_server", lambda flags: pytest.fail("a server was started"))
    monkeypatch.setattr(local_predict, "stop_children_on_sigterm", lambda: None)
    monkeypatch.setenv("ALPACA_CALLER", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["script/predict", "--input", "prompts.jsonl", "--output", "no/answers.jsonl"])
    with pytest.raises(SystemExit, match=r"error: no file .*prompts\.jsonl"):
        local_predict.main()
    write(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    with pytest.raises(SystemExit, match=r"error: .*No such file or directory: '.*answers\.jsonl'"):
        local_predict.main()


@pytest.mark.slow
def test_a_server_that_is_gone_is_an_error_and_no_traceback(tmp_path, monkeypatch):
    class Gone:
        def predict(self, inputs: dict, *, timeout_s: float) -> dict:
            raise ConnectionResetError("it has ended")

    write(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    monkeypatch.setattr(local_predict, "running_server", lambda flags: contextlib.nullcontext(Gone()))
    monkeypatch.setattr(local_predict, "stop_children_on_sigterm", lambda: None)
    monkeypatch.setenv("ALPACA_CALLER", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["script/predict", "--input", "prompts.jsonl", "--output", "answers.jsonl"])
    with pytest.raises(SystemExit, match="error: it has ended"):
        local_predict.main()
