"""The pages' calls of a server, as they stand there, against the real one: only addresses are replaced."""

import contextlib
import http.server
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from deploy.local_server import LocalServer, running_server
from tests.conftest import ROOT
from tests.docs.pages import Block, all_blocks, read_blocks


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


WEBHOOK_PORT, OPENAI_PORT = free_port(), free_port()
WAYS = {
    "sync": "One answer",
    "stream": "A stream",
    "chat": "A conversation",
    "details": "Details",
    "webhook": "A webhook",
    "cancel": "Cancelling",
}
CALLING = ROOT / "docs" / "calling.md"


def calls(language: str) -> dict[str, str]:
    """calling.md's code by way: one block of a language below each heading, and none besides."""
    found = {block.heading: block.text for block in read_blocks(CALLING) if block.language == language}
    assert set(found) == set(WAYS.values()), f"calling.md: {language} blocks below {', '.join(found)}"
    assert sum(block.language == language for block in read_blocks(CALLING)) == len(WAYS)
    return {way: found[heading] for way, heading in WAYS.items()}


CURL, PYTHON = calls("sh"), calls("python")
ELSEWHERE = [
    block
    for block in all_blocks("sh", "python")
    if not block.place.startswith("docs/calling.md") and (block.language == "python" or "curl" in block.text)
]


@pytest.fixture(scope="module")
def adapter(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes the model's answers."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    base = LlamaForCausalLM.from_pretrained(llama_folder)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat_folder(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template."""
    folder = shutil.copytree(llama_folder, tmp_path_factory.mktemp("chat") / "alpaca_out")
    template = "{% for message in messages %}{{ bos_token }}{{ message.role }}: {{ message.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def server(chat_folder: Path, adapter: Path) -> Iterator[LocalServer]:
    flags = ["--weights", str(chat_folder), "--adapters", f"legal={adapter}", "--concurrency", "8"]
    flags += ["--webhooks", f"http://127.0.0.1:{WEBHOOK_PORT}/", "--openai_port", str(OPENAI_PORT)]
    with running_server(flags, on_failure=print) as server:
        yield server


def run(code: str, language: str, server: LocalServer) -> str:
    """What a block prints, once its addresses are those of the test."""
    code = code.replace("http://127.0.0.1:5000", server.url)
    code = code.replace("http://127.0.0.1:8000/v1", f"http://127.0.0.1:{OPENAI_PORT}/v1")
    code = code.replace("127.0.0.1:8000", f"127.0.0.1:{WEBHOOK_PORT}").replace('1", 8000', f'1", {WEBHOOK_PORT}')
    command = ["bash", "-euc", code] if language == "sh" else [sys.executable, "-c", code]
    for _ in range(20):  # curl does not try again after the 409 that follows a reply
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if "At capacity" not in done.stdout and "no model server is ready" not in done.stdout:
            break
        time.sleep(0.1)
    assert done.returncode == 0, done.stderr
    return done.stdout


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@needs_curl
def test_curl_gets_an_answer(server: LocalServer):
    prediction = json.loads(run(CURL["sync"], "sh", server))
    assert prediction["status"] == "succeeded"
    assert len(prediction["output"]) == 1


@needs_curl
def test_curl_gets_a_stream(server: LocalServer):
    text = run(CURL["stream"], "sh", server)
    assert text.count("event: output") > 5
    assert "event: completed" in text


@needs_curl
def test_curl_has_a_conversation(server: LocalServer):
    prediction = json.loads(run(CURL["chat"], "sh", server))
    assert prediction["status"] == "succeeded"
    assert prediction["metrics"]["prompt_tokens"] > 20


@needs_curl
def test_curl_gets_details(server: LocalServer):
    prediction = json.loads(run(CURL["details"], "sh", server))
    (document,) = map(json.loads, prediction["output"])
    assert len(document["logprobs"]) == document["output_tokens"] > 0
    assert {len(entry["top"]) for entry in document["logprobs"]} == {2}
    shown = next(b.text for b in read_blocks(CALLING) if b.heading == "Details" and b.language == "text")
    assert re.findall(r'"(\w+)":', shown)[:9] == [*list(document)[:8], "id"]


@needs_curl
def test_curl_asks_for_a_webhook(server: LocalServer):
    with receiver() as received:
        assert json.loads(run(CURL["webhook"], "sh", server))["status"] == "starting"
        deadline = time.monotonic() + 30
        while not received and time.monotonic() < deadline:
            time.sleep(0.05)
    assert [one["status"] for one in received] == ["succeeded"]
    assert received[0]["id"] == "job-1"


@needs_curl
def test_curl_cancels(server: LocalServer):
    before = server.log_text().count("tokens after")
    started, cancelled = run(CURL["cancel"], "sh", server).replace("}{", "}\n{").splitlines()
    assert json.loads(started)["status"] == "starting"
    assert json.loads(cancelled) == {}
    deadline = time.monotonic() + 10
    while not (found := re.search("Prediction cancelled.*job-2", server.log_text())) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert found
    assert server.log_text().count("tokens after") == before, "a cancelled prediction logs no totals"


def test_python_gets_an_answer(server: LocalServer):
    assert run(PYTHON["sync"], "python", server).strip()


def test_python_gets_a_stream(server: LocalServer):
    assert len(run(PYTHON["stream"], "python", server)) > 5


def test_python_has_a_conversation(server: LocalServer):
    assert len(run(PYTHON["chat"], "python", server)) > 20


def test_python_scores_texts(server: LocalServer):
    lines = run(PYTHON["details"], "python", server).splitlines()
    assert [float(line.split()[-1]) < 0 for line in lines] == [True, True]


def test_python_receives_a_webhook(server: LocalServer):
    assert run(PYTHON["webhook"], "python", server).startswith("succeeded [")


def test_python_cancels(server: LocalServer):
    assert run(PYTHON["cancel"], "python", server).strip() == "200"


@pytest.mark.parametrize("block", ELSEWHERE, ids=str)
def test_what_other_pages_ask(block: Block, server: LocalServer):
    printed = run(block.text, block.language, server)
    if block.language == "sh":
        answered = json.loads(printed)
        printed = answered["choices"][0]["message"]["content"] if "/v1/" in block.text else answered["status"]
        assert "/v1/" in block.text or printed == "succeeded"
    assert printed.strip()


def test_the_probe_tells_ready_from_failed(server: LocalServer, server_without_model: LocalServer):
    (block,) = all_blocks("yaml")
    manifest = yaml.safe_load(block.text)
    container = manifest["spec"]["template"]["spec"]["containers"][0]
    assert (
        container["readinessProbe"]["exec"] == container["livenessProbe"]["exec"] == container["startupProbe"]["exec"]
    )
    _, flag, code = container["startupProbe"]["exec"]["command"]

    def probe(url: str) -> int:
        command = [sys.executable, flag, code.replace("http://127.0.0.1:5000", url)]
        return subprocess.run(command, capture_output=True).returncode

    assert probe(server.url) == 0
    assert probe(server_without_model.url) == 1
    assert probe(f"http://127.0.0.1:{free_port()}") == 1  # nobody there


@contextlib.contextmanager
def receiver() -> Iterator[tuple[int, list[dict]]]:
    """A port, and the bodies that were posted to it."""
    received: list[dict] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", WEBHOOK_PORT), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield received
        finally:
            listening.shutdown()
            thread.join()
