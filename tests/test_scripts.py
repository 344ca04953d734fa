"""What a person types: flags mirror settings, inputs are typed by the schema, the pages list them."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alpaca.errors import InputError, MissingInput
from alpaca.serving.settings import ServerSettings
from deploy import local_predict, serve
from tests.conftest import ROOT

PROPERTIES = {
    "prompt": {"type": "string"},
    "n": {"type": "integer"},
    "top_p": {"type": "number"},
    "stream": {"type": "boolean"},
    "stop": {"type": "array", "items": {"type": "string"}},
    "stops": {"type": "integer", "deprecated": True},
}


def test_every_setting_is_a_flag():
    flags = []
    for item in dataclasses.fields(ServerSettings):
        named = {
            "dtype": "float32",
            "quantization": "nf4",
            "engine": "transformers",
            "beam_search": "copy",
            "weights": "/w",
            "base_model": "/b",
            "adapters": "name=/a",
            "max_context": "9",
        }
        value = named.get(item.name, "1")
        flags += [f"--{item.name}", value]
    made = serve.runtime_environment(serve.parse_arguments(flags), {})
    for item in dataclasses.fields(ServerSettings):
        assert made[item.metadata["variable"]] in flags or float(made[item.metadata["variable"]]) == 1


def test_runtime_environment_defaults_and_precedence():
    made = serve.runtime_environment(serve.parse_arguments([]), {"PATH": "/bin", "COG_WEIGHTS": "mine"})
    assert made["COG_MAX_CONCURRENCY"] == "64"
    assert made["COG_WEIGHTS"] == "mine"
    assert made["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)  # its worker is `python`
    made = serve.runtime_environment(serve.parse_arguments(["--weights", "other", "--train"]), dict(made))
    assert (made["COG_WEIGHTS"], made["COG_MAX_CONCURRENCY"]) == (
        str(Path("other").absolute()),
        "64",
    )  # as in the image
    assert (serve.parse_arguments([]).host, serve.parse_arguments([]).port) == ("127.0.0.1", 5000)


def test_relative_weights_start_where_the_caller_stands():
    made = serve.runtime_environment(serve.parse_arguments(["--weights", "w"]), {"ALPACA_CALLER": "/somewhere"})
    assert made["COG_WEIGHTS"] == "/somewhere/w"


def test_bad_settings_end_before_the_server_starts():
    with pytest.raises(InputError, match="ALPACA_MEMORY_FRACTION must be above 0"):
        serve.runtime_environment(serve.parse_arguments(["--memory_fraction", "7"]), {})


def test_inputs_are_typed_by_the_schema(tmp_path):
    (tmp_path / "text").write_text("from a file")
    pairs = [f"prompt=@{tmp_path / 'text'}", "n=2", "top_p=0.5", "stream=True", "stop=a=b", "stop="]
    assert local_predict.parse_inputs(pairs, PROPERTIES) == {
        "prompt": "from a file", "n": 2, "top_p": 0.5, "stream": True, "stop": ["a=b", ""],
    }  # fmt: skip
    assert local_predict.parse_inputs(["just text"], PROPERTIES) == {"prompt": "just text"}


OBJECTS = {
    "messages": {"type": "array", "items": {"type": "object"}},
    "schema": {"type": "object"},
}


def test_objects_are_given_as_json(tmp_path):
    user, system = {"role": "user", "content": "ก"}, {"role": "system", "content": "x"}
    (tmp_path / "chat.json").write_text(json.dumps([system, user]), encoding="utf-8")
    for pairs, expected in [
        ([f"messages={json.dumps([user])}"], {"messages": [user]}),
        ([f"messages={json.dumps(system)}", f"messages={json.dumps([user])}"], {"messages": [system, user]}),
        ([f"messages=@{tmp_path / 'chat.json'}", 'schema={"a": 1}'], {"messages": [system, user], "schema": {"a": 1}}),
    ]:
        assert local_predict.parse_inputs(pairs, OBJECTS) == expected
    for pair, message in [
        ("messages=hi", "messages must be JSON: Expecting value.*found 'hi'"),
        ("messages=3", "messages must be a list of objects; found '3'"),
        ("schema=[]", r"schema must be an object; found '\[\]'"),
    ]:
        with pytest.raises(InputError, match=message):
            local_predict.parse_inputs([pair], OBJECTS)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("stpo=x", "no input is named 'stpo'; did you mean stop"),
        ("stops=1", "no input is named 'stops'; did you mean stop"),
        ("zzz=x", "there are prompt, n, top_p, stream, stop$"),
        ("n=two", "n must be of type integer; found 'two'"),
        ("stream=maybe", "stream must be of type boolean"),
    ],
)
def test_bad_inputs(pair, message):
    with pytest.raises(InputError, match=message):
        local_predict.parse_inputs([pair], PROPERTIES)
    with pytest.raises(MissingInput, match="no file nowhere"):
        local_predict.parse_inputs(["prompt=@nowhere"], PROPERTIES)


def test_scripts_are_executable_and_ci_runs_the_tests():
    for name in ("setup", "demo", "test", "lint", "serve", "predict", "check"):
        assert os.access(ROOT / "script" / name, os.X_OK), name
    assert "script/test" in (ROOT / ".ci" / "run").read_text()


# script/setup, in a copy of its own and with an interpreter that installs nothing ------------------------------------

FAKE_PYTHON = """#!/usr/bin/env bash
if [ "$1" != -m ]; then exec {python} "$@"; fi
mkdir -p .venv/bin
echo new > .venv/content
case "$(cat what-happens)" in
  fails) echo "no such package" >&2; exit 1 ;;
  killed) kill -9 $PPID; sleep 0.1 ;;
  works) printf '#!/bin/sh\\n' > .venv/bin/python; chmod +x .venv/bin/python ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What script/setup reads, without an environment."""
    folder = tmp_path / "checkout"
    (folder / "script").mkdir(parents=True)
    for name in ("script/setup", "requirements.txt", "pyproject.toml", "cog.yaml"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "python").write_text(FAKE_PYTHON.format(python=sys.executable))
    (folder / "python").chmod(0o755)
    return folder


def set_up(checkout: Path, happens: str) -> subprocess.CompletedProcess[str]:
    (checkout / "what-happens").write_text(happens)
    environment = {**os.environ, "PYTHON": str(checkout / "python")}
    return subprocess.run(["bash", "script/setup"], cwd=checkout, env=environment, capture_output=True, text=True)


def make_environment(folder: Path) -> None:
    folder.mkdir()
    (folder / "content").write_text("old\n")
    (folder / "stamp").write_text("of other requirements\n")


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text().strip() for path in folder.iterdir() if path.is_file()}


def test_setup_leaves_a_linked_environment_alone(checkout: Path, tmp_path: Path):
    make_environment(tmp_path / "others")
    before = content(tmp_path / "others")
    (checkout / ".venv").symlink_to(tmp_path / "others")
    done = set_up(checkout, "works")
    assert done.returncode == 1
    assert f"error: .venv is a link to {tmp_path / 'others'}" in done.stderr
    assert "Remove the link (rm .venv)" in done.stderr
    assert (checkout / ".venv").is_symlink()
    assert content(tmp_path / "others") == before
    (checkout / ".venv").unlink()
    assert set_up(checkout, "works").returncode == 0
    shutil.copy(checkout / ".venv" / "stamp", tmp_path / "others" / "stamp")
    shutil.rmtree(checkout / ".venv")
    (checkout / ".venv").symlink_to(tmp_path / "others")
    assert set_up(checkout, "fails").returncode == 0  # it is current: used, not changed


@pytest.mark.parametrize("happens", ["fails", "killed"])
def test_a_setup_that_ends_early_leaves_the_environment_that_was(happens: str, checkout: Path):
    make_environment(checkout / ".venv")
    before = content(checkout / ".venv")
    assert set_up(checkout, happens).returncode != 0
    failed = set_up(checkout, "fails")
    assert failed.returncode == 1
    assert "no such package" in failed.stderr
    assert "error: the environment was not made (the one from before is back)" in failed.stderr
    assert content(checkout / ".venv") == before
    assert not (checkout / ".venv.old").exists()
    assert set_up(checkout, "works").returncode == 0
    assert content(checkout / ".venv")["content"] == "new"
    assert not (checkout / ".venv.old").exists()
    assert set_up(checkout, "fails").returncode == 0  # instant: the stamp is current


def test_a_first_setup_that_fails_leaves_none(checkout: Path):
    failed = set_up(checkout, "fails")
    assert failed.returncode == 1
    assert "error: the environment was not made (there is none now)" in failed.stderr
    assert not (checkout / ".venv").exists()


# The pages -----------------------------------------------------------------------------------------------------------


def test_the_readme_begins_with_a_command():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert next(i for i, line in enumerate(lines) if line.startswith("script/demo")) < 30


def test_the_serving_page_lists_every_input_and_setting():
    from alpaca.serving.request import PredictionInputs

    text = (ROOT / "docs" / "serving.md").read_text()
    for item in dataclasses.fields(PredictionInputs):
        assert f"`{item.name}`" in text, item.name
    for item in dataclasses.fields(ServerSettings):
        assert f"| `{item.metadata['variable']}` | `--{item.name}` |" in text, item.name


@pytest.mark.slow
def test_demo_walks_the_whole_way():
    done = subprocess.run(
        [sys.executable, str(ROOT / "script" / "demo.py")], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "learned answers are word for word the data's" in done.stdout
    assert "(never seen" in done.stdout


def endpoint(flags: list[str], environment: dict[str, str]) -> list[str]:
    return serve.endpoint_command(serve.parse_arguments(flags), environment)


def test_openais_api_is_started_for_this_server():
    assert endpoint([], {"COG_WEIGHTS": "/w/storyteller"}) == []
    environment = {"COG_WEIGHTS": "/w/storyteller/", "ALPACA_API_KEYS": "first,second"}
    command = endpoint(["--openai_port", "8000", "--host", "0.0.0.0", "--allowed_hosts", "a.org"], environment)
    assert command[1:] == [
        "-m", "web.openai", "--host", "0.0.0.0", "--port", "8000", "--model_name", "storyteller",
        "--allowed_hosts", "a.org",
    ]  # fmt: skip
    assert environment["ALPACA_SERVER_TOKEN"] == "first"


@pytest.mark.parametrize(
    ("weights", "name"),
    [({}, "alpaca_out"), ({"COG_WEIGHTS": "https://me:hush@host/a/llama.tar?token=secret"}, "llama.tar")],
)
def test_openais_api_names_the_model_and_no_secret(weights, name):
    assert endpoint(["--openai_port", "0"], weights)[-1] == name


@pytest.mark.parametrize("flag", ["--bare", "--train"])
def test_openais_api_needs_predictions_and_the_gate(flag):
    with pytest.raises(InputError, match="--openai_port goes with predictions through the gate"):
        endpoint(["--openai_port", "8000", flag], {})
