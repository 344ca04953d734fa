"""What a person types: flags mirror settings, inputs are typed by the schema, the README's commands exist."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import local_predict
import pytest
import serve

from alpaca.errors import InputError, MissingInput
from alpaca.serving.settings import ServerSettings
from tests.conftest import ROOT

PROPERTIES = {
    "prompt": {"type": "string"},
    "n": {"type": "integer"},
    "top_p": {"type": "number"},
    "stream": {"type": "boolean"},
    "stop": {"type": "array", "items": {"type": "string"}},
}


def test_every_setting_is_a_flag():
    flags = []
    for item in dataclasses.fields(ServerSettings):
        named = {
            "dtype": "float32",
            "quantization": "nf4",
            "engine": "transformers",
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


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("stpo=x", "no input is named 'stpo'; did you mean stop"),
        ("zzz=x", "there are prompt, n, top_p"),
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


def test_readme_says_what_is_there():
    readme = (ROOT / "README.md").read_text()
    for command in re.findall(r"\bscript/[a-z_]+(?:\.py)?", readme):
        assert (ROOT / command).exists(), command
    first = next(i for i, line in enumerate(readme.splitlines()) if line.startswith("script/demo"))
    assert first < 30
    modules = set(re.findall(r"(?:python -m |\| `)((?:convert|bench|alpaca)\.[\w.]*)", readme))
    assert modules
    for module in modules:
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


def test_readme_lists_every_input_and_setting():
    from alpaca.serving.request import PredictionInputs

    readme = (ROOT / "README.md").read_text()
    for item in dataclasses.fields(PredictionInputs):
        assert f"`{item.name}`" in readme, item.name
    for item in dataclasses.fields(ServerSettings):
        assert f"`{item.metadata['variable']}`" in readme, item.name


@pytest.mark.slow
def test_demo_walks_the_whole_way():
    done = subprocess.run(
        [sys.executable, str(ROOT / "script" / "demo.py")], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "learned answers are word for word the data's" in done.stdout
    assert "(never seen" in done.stdout
