"""train.py behind the real Cog server's train mode: data in, weights out, served again."""

import asyncio
import base64
import contextlib
import functools
import hashlib
import inspect
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

import train as train_module
from alpaca.data import records
from alpaca.errors import InputError
from alpaca.files.model_folders import is_weights
from alpaca.files.places import open_weights
from alpaca.formats.hf.adapters import open_adapter
from deploy import serve
from deploy.local_server import LocalServer, running_server

RECORDS = [{"instruction": f"Say {word}.", "output": f"{word}!"} for word in ("red", "green", "blue", "alpaca")]


class Uploads(ThreadingHTTPServer):
    """Keeps what is PUT, by its path, and gives it back."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _UploadHandler)
        self.url = f"http://127.0.0.1:{self.server_port}/trained"
        self.files: dict[str, bytes] = {}
        self.status = 200


class _UploadHandler(BaseHTTPRequestHandler):
    server: Uploads

    def log_message(self, *arguments) -> None:
        pass

    def do_PUT(self) -> None:
        if "Content-Length" in self.headers:
            content = self.rfile.read(int(self.headers["Content-Length"]))
        else:
            content = b"".join(self._chunks())
        self.server.files[self.path] = content
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()

    def do_GET(self) -> None:
        content = self.server.files[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        with contextlib.suppress(OSError):  # who only wants to know the version goes away
            self.wfile.write(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, llama_folder) -> Path:
    """A temporary folder for the servers, with a model that is large by its config, and has no weights."""
    folder = tmp_path_factory.mktemp("training")
    big = shutil.copytree(llama_folder, folder / "big", ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((big / "config.json").read_text())
    sizes = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 8, "dtype": "float16"}
    (big / "config.json").write_text(json.dumps({**config, **sizes}))
    (folder / "hollow").mkdir()
    (folder / "hollow" / "private.txt").touch()
    return folder


def environment(folder: Path, llama_folder: Path) -> dict[str, str]:
    models = f"tiny={llama_folder},big={folder / 'big'},hollow={folder / 'hollow'}"
    return {**os.environ, "ALPACA_BASE_MODELS": models, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def server(folder, llama_folder) -> Iterator[LocalServer]:
    with running_server(["--train"], env=environment(folder, llama_folder), on_failure=print) as server:
        yield server


@pytest.fixture(scope="module")
def uploads() -> Iterator[Uploads]:
    with Uploads() as uploads:
        thread = threading.Thread(target=uploads.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield uploads
        uploads.shutdown()
        thread.join()


def training_input(**changes) -> dict:
    data = base64.b64encode(json.dumps(RECORDS).encode()).decode()
    return {"data": f"data:application/json;base64,{data}", "model": "tiny", "global_batch_size": 4, **changes}


def train(server: LocalServer, **changes) -> dict:
    """One training. The runtime frees its slot just after its reply, so a 409 is tried again for a moment."""
    body = {"input": training_input(**changes)}
    for _ in range(50):
        reply = httpx.post(f"{server.url}/trainings", json=body, timeout=120)
        if reply.status_code != 409:
            break
        time.sleep(0.02)
    return reply.json()


def test_an_adapter_comes_back(server, folder, tmp_path):
    training = train(server, num_train_epochs=8, learning_rate=1, eval_fraction=0.25, train_on_inputs=True)
    assert training["status"] == "succeeded", training
    metrics, logs = training["metrics"], training["logs"]
    assert metrics["step"] == metrics["max_steps"] == 8
    floats = ("loss", "learning_rate", "tokens_per_second", "eval_loss", "eta_s")
    assert {name: type(metrics[name]) for name in floats} == dict.fromkeys(floats, float)
    assert metrics["tokens_per_second"] > 0
    assert "step 1/8: loss" in logs
    assert "step 8/8: loss" in logs
    assert logs.count("plan: peak memory") == logs.count("tokenizer: ") == 1
    assert logs.count("step ") < 16  # evaluations have a line each
    head, content = training["output"].split(",", 1)
    assert head.startswith("data:")
    (tmp_path / "weights.tar").write_bytes(base64.b64decode(content))
    with tarfile.open(tmp_path / "weights.tar") as tar:
        names = set(tar.getnames())
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.model", "tokenizer_config.json"} <= names
    assert "config.json" not in names
    adapter = open_adapter(open_weights(str(tmp_path / "weights.tar")))
    assert (adapter.rank, adapter.is_base) == (8, False)
    kept = [path.name for path in folder.glob("alpaca-training-*/*")]
    assert len(kept) == 1, "the archive itself, until the next training"
    assert kept[0].startswith("lora-")


def test_the_recipe_of_alpaca_lora(server):
    given = {"recipe": "alpaca-lora", "base_quantization": "none", "eval_fraction": 0.25, "max_steps": 1}
    training = train(server, **given, save_dtype="float16")
    assert training["status"] == "succeeded", training
    assert training["metrics"]["eval_loss"] > 0
    assert "(float16), verified" in training["logs"]


def test_preferences_are_trained_on(server):
    """With a number that JSON writes without a point; the rate is the objective's own."""
    pairs = [{"prompt": f"Say {word}.", "chosen": f"{word}!", "rejected": "no"} for word in ("red", "green", "blue")]
    data = "data:application/json;base64," + base64.b64encode(json.dumps(pairs).encode()).decode()
    training = train(server, data=data, objective="dpo", dpo_beta=1, max_steps=2)
    assert training["status"] == "succeeded", training
    assert "read as preferences" in training["logs"]
    content = base64.b64decode(training["output"].partition(",")[2])
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        config = json.load(tar.extractfile("train_config.json"))
    asked = {name: config[name] for name in ("objective", "dpo_beta", "learning_rate")}
    assert asked == {"objective": "dpo", "dpo_beta": 1.0, "learning_rate": 1e-5}
    refused = train(server, objective="kto", dpo_beta=0.2)
    assert "--dpo_beta is for --objective dpo, found --objective kto" in refused["error"]


def check_uploads(train: Callable[..., dict], uploads: Uploads, folder: Path) -> str:
    """Train whole models, of which one cannot be uploaded. Returns the first's address."""
    uploads.status = 200
    training = train(method="full", num_train_epochs=40, learning_rate=3e-3)
    assert training["status"] == "succeeded", training
    again = train(method="full", max_steps=1)
    too_large = train(method="full", model="big")
    uploads.status = 507
    failed = train(method="full", max_steps=1)
    assert failed["status"] == "failed"
    assert "HTTP 507; check the address; while this server runs, and until its next" in failed["error"]
    kept = Path(failed["error"].rpartition(" ")[2])
    assert is_weights(open_weights(str(kept))), "a failed upload loses no training"
    assert "archive" not in too_large["error"], "with uploads this size is not refused"
    assert "no model*.safetensors" in too_large["error"]
    assert again["output"] != training["output"], "a later training overwrites none"
    content = uploads.files[training["output"].removeprefix(uploads.url.removesuffix("/trained"))]
    (folder / "uploaded.tar").write_bytes(content)
    assert {"config.json", "model.safetensors"} <= {
        path.name for path in open_weights(str(folder / "uploaded.tar")).iterdir()
    }
    return training["output"]


@pytest.mark.slow
def test_a_whole_model_is_uploaded_and_served_by_its_address(folder, llama_folder, uploads):
    env = environment(folder, llama_folder)
    with running_server(["--train", "--upload_url", uploads.url], env=env, on_failure=print) as server:
        address = check_uploads(functools.partial(train, server), uploads, folder)
    with running_server(["--weights", address], env=env, on_failure=print) as predictor:
        prediction = predictor.predict({"prompt": "Say alpaca.", "temperature": 0})
        assert "downloading http://127.0.0.1" in predictor.log_text()
    assert prediction["output"] == ["alpaca!"]


def train_here(**changes) -> dict:
    """One training by train.py's own function, as the server calls it, in this process."""
    given = training_input(**changes)
    parameters = inspect.signature(train_module.train).parameters.items()
    values = {name: given.get(name, parameter.default.default) for name, parameter in parameters}
    try:
        return {"status": "succeeded", "output": asyncio.run(train_module.train(**values))}
    except Exception as error:
        return {"status": "failed", "error": str(error)}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_an_uploaded_model_answers_what_it_learned(folder, llama_folder, uploads, tmp_path, monkeypatch):
    """The same without servers: train.py's function, and the engine of the predictions."""
    from alpaca.serving.detokenize import CompletionText
    from alpaca.serving.engine import complete_texts
    from alpaca.serving.loading import load_engine
    from alpaca.serving.request import PredictionInputs, make_request
    from alpaca.serving.settings import ServerSettings

    monkeypatch.setenv("ALPACA_BASE_MODELS", environment(folder, llama_folder)["ALPACA_BASE_MODELS"])
    monkeypatch.setenv("ALPACA_UPLOAD_URL", uploads.url)
    read, original = [], records.read_bytes
    monkeypatch.setattr(records, "read_bytes", lambda path, **given: read.append(path) or original(path, **given))
    address = check_uploads(train_here, uploads, tmp_path)
    assert len(read) == len(set(read)) == 4, "each training reads its data once"
    engine = load_engine(open_weights(address), ServerSettings())
    try:
        inputs = PredictionInputs.from_mapping({"prompt": "Say alpaca.", "temperature": 0})
        request = make_request(inputs, engine.tokenizer, max_context=engine.max_context)
        texts = [CompletionText(engine.tokenizer, request.prompt_ids, stop=inputs.stop, strip_leading=True)]
        assert list(complete_texts(engine.submit(request), texts)) == ["alpaca!"]
    finally:
        engine.close()


def test_too_large_an_archive_is_refused_before_training(server, folder):
    training = train(server, model="big", method="full")
    assert training["status"] == "failed"
    assert (
        "expected an archive of at most 268 MB, found that method full makes one of about 552 MB" in training["error"]
    )
    assert (
        "Use method lora or qlora, which return an adapter; or start the server with --upload-url" in training["error"]
    )
    assert "step" not in training["logs"]
    assert "no model*.safetensors" in train(server, model="big")["error"], (
        "an adapter is small: it fails for want of weights"
    )
    assert not list(folder.glob("alpaca-training-*"))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_estimate_is_what_others_count(folder, tmp_path, method):
    """The size by the plan's own count, against the parameters that transformers and PEFT make of the same config."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from alpaca.training import service

    given = {"recipe": "alpaca-7b", "method": method, "data": "an upload", "model": "big"}
    if method == "lora":
        given |= {"lora_target_modules": "all-linear", "lora_r": 3}
    config = service._make_config(
        given, base=folder / "big", data_path=tmp_path / "none.json", output_dir=tmp_path / "out"
    )
    model_config = AutoConfig.from_pretrained(folder / "big")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
        if method == "lora":
            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=3, target_modules="all-linear"))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    rows = 2 * 2048 if method == "full" else 0  # [PAD] in embedding and head
    others = service._estimate_archive(config) - {"full": 2, "lora": 4}[method] * (trained + rows)
    assert 2**20 < others < 2**21, "the tokenizer and JSON files"


def test_the_worker_knows_the_upload_address(monkeypatch):
    from alpaca.training import service

    monkeypatch.delenv("ALPACA_UPLOAD_URL", raising=False)
    assert service._upload_address() is None
    monkeypatch.setenv("ALPACA_UPLOAD_URL", "https://host/y")
    assert service._upload_address() == "https://host/y"
    options = serve.parse_arguments(["--train", "--upload_url", "https://host/x"])
    assert serve.runtime_environment(options, {})["ALPACA_UPLOAD_URL"] == "https://host/x"
    assert serve.runtime_command(options)[-2:] == ["--upload-url", "https://host/x"]
    for flags in (["--upload-url", "https://host/z"], ["--upload-url=https://host/z"]):
        command = [sys.executable, "-c", "print(flush=True); input()", *flags]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
            parent.stdout.readline()  # its command line is its own by now
            monkeypatch.setattr(service.os, "getppid", lambda parent=parent: parent.pid)
            assert service._upload_address() == "https://host/z"
            parent.communicate(b"\n")
    for flags, found in (
        (["--upload_url", "https://host/x"], "no --train"),
        (["--train", "--upload_url", "s3://x"], "another scheme"),
    ):
        with pytest.raises(InputError, match=f"found {found}; predictions return no files"):
            serve.runtime_command(serve.parse_arguments(flags))


BAD_UPLOAD_ADDRESSES = ("http://[", "http://host:port/x", "https://me:a/b@host/x")


@pytest.mark.parametrize("address", [*BAD_UPLOAD_ADDRESSES, "ftp://x/y"])
def test_an_upload_address_that_cannot_work_is_found_before_the_training(monkeypatch, address):
    from alpaca.training import service

    monkeypatch.setenv("ALPACA_UPLOAD_URL", address)
    values = {"model": "weights/none", "data": "none.json"}
    with pytest.raises(InputError, match=r"the server's upload address: expected an http or https .*with another$"):
        service.serve_training(values, stop=threading.Event(), record=lambda name, value: None)
    if address in BAD_UPLOAD_ADDRESSES:
        with pytest.raises(InputError, match="--upload_url: expected an http or https address with a host"):
            serve.runtime_command(serve.parse_arguments(["--train", "--upload_url", address]))


def test_whatever_ends_an_upload_the_archive_is_named(monkeypatch, tmp_path):
    from alpaca.training import service

    failures = [(UnicodeError("odd"), RuntimeError), (InputError("odd"), InputError), (InputError("odd"), InputError)]

    def fail(*arguments, on_piece) -> str:
        raise failures[0][0]

    monkeypatch.setenv("ALPACA_UPLOAD_URL", "https://host/x")
    monkeypatch.setattr(service, "upload", fail)
    archive, stop = tmp_path / "w.tar", threading.Event()
    while len(failures) > 1:
        with pytest.raises(failures[0][1], match=f"odd.*; while this server runs.* stays here as {archive}$"):
            service._deliver(archive, stop)
        del failures[0]
    stop.set()
    with pytest.raises(InputError, match=r"^odd$"):
        service._deliver(archive, stop)


def test_bad_input_fails_with_its_reason(server, llama_folder):
    broken = base64.b64encode(b'[{"instruction": "x"}]').decode()
    training = train(server, data=f"data:application/json;base64,{broken}")
    assert training["status"] == "failed"
    assert "output" in training["error"]
    for data in ("/etc/passwd", "../README.md", "http://127.0.0.1:1/d.json"):
        assert (
            train(server, data=data)["error"]
            .partition("data: ")[2]
            .startswith(("expected the examples", "the operator"))
        )
    for model in (str(llama_folder), "/etc", "http://127.0.0.1:1/w.tar"):
        training = train(server, model=model)
        assert f"(such names: tiny, big, hollow), found '{model}'" in training["error"]
    for model in ("weights/" + "a" * 300, "weights/a\0b"):
        assert ", found 'weights/a" in train(server, model=model)["error"]
    hollow = train(server, model="hollow")
    assert "hollow. model must name a folder with config.json" in hollow["error"]
    assert "private" not in json.dumps(hollow), "clients may not list folders"
    nested = base64.b64encode(b"[" * 100_000).decode()
    training = train(server, data=f"data:application/json;base64,{nested}")
    assert "found invalid JSON: maximum recursion depth" in training["error"]
    assert "Traceback" not in training["logs"]
    none_left = train(server, eval_fraction=0.99)
    assert "--eval_fraction 0.99 holds out 4 of 4 examples of data, and leaves none" in none_left["error"]
    assert "/alpaca-training-" not in json.dumps(none_left), "clients learn no paths"
    body = {"input": training_input(recipe="other")}
    assert httpx.post(f"{server.url}/trainings", json=body).status_code == 422


def test_cancel_stops_the_training(server, folder):
    body = {"input": training_input(max_steps=100_000)}
    address = f"{server.url}/trainings/long"
    assert httpx.put(address, json=body, headers={"Prefer": "respond-async"}).status_code == 202
    deadline = time.monotonic() + 30
    while not list(folder.glob("alpaca-training-*/alpaca_out/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    second = train(server)
    assert "a training is running already" in second["error"]
    assert httpx.post(f"{address}/cancel").status_code == 200
    done = train(server, max_steps=1)  # at once: it waits for the end of the one that was cancelled
    assert done["status"] == "succeeded", done
    assert len(list(folder.glob("alpaca-training-*"))) == 1, "nothing of the cancelled training is left"
