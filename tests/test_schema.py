"""predict.py's literals, the schema made of them, and cog.yaml: what `cog build` would read, held without it."""

import ast
import dataclasses
import json

import pytest
import schema
import yaml

from alpaca.serving.request import PredictionInputs
from tests.conftest import ROOT


def input_calls(file: str, function: str) -> dict[str, ast.Call]:
    """Each parameter's Input(...) call in the source."""
    tree = ast.parse((ROOT / file).read_text())
    node = next(
        n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n.name == function
    )
    names = [argument.arg for argument in node.args.args if argument.arg != "self"]
    assert all(argument.annotation for argument in node.args.args if argument.arg != "self")
    return dict(zip(names, node.args.defaults, strict=True))


def keywords(call: ast.Call) -> dict[str, object]:
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


def test_literals_equal_the_dataclass():
    calls = input_calls("predict.py", "run")
    fields = {item.name: item for item in dataclasses.fields(PredictionInputs)}
    assert list(calls) == list(fields)
    for name, call in calls.items():
        said, item = keywords(call), fields[name]
        default = None if item.default is dataclasses.MISSING else item.default
        assert said.get("default") == (list(default) if isinstance(default, tuple) else default), name
        assert (said.get("ge"), said.get("le")) == (item.metadata.get("ge"), item.metadata.get("le")), name


@pytest.mark.parametrize(("file", "function"), [("predict.py", "run"), ("train.py", "train")])
def test_static_traps(file, function):
    """Cog's static pass drops what is not a plain literal, silently."""
    for name, call in input_calls(file, function).items():
        assert isinstance(call.func, ast.Name), f"{name}: Input must be called by its bare name"
        assert call.func.id == "Input"
        assert not call.args, f"{name}: a positional default makes the input required"
        for keyword in call.keywords:
            ast.literal_eval(keyword.value)  # neither a constant's name nor an expression
            if keyword.arg == "description":
                assert isinstance(keyword.value, ast.Constant)
                source = ast.get_source_segment((ROOT / file).read_text(), keyword.value)
                assert source.count("\n") == 0, f"{name}: one string literal"
        assert "description" in keywords(call), name


def test_schema_has_bounds_defaults_order_and_streaming():
    made = schema.build_schema()
    properties = made["components"]["schemas"]["Input"]["properties"]
    assert made["components"]["schemas"]["Input"]["required"] == ["prompt"]
    assert [entry["x-order"] for entry in properties.values()] == list(range(len(properties)))
    for item in dataclasses.fields(PredictionInputs):
        entry = properties[item.name]
        assert (entry.get("minimum"), entry.get("maximum")) == (item.metadata.get("ge"), item.metadata.get("le"))
    assert properties["stop"]["items"] == {"type": "string"}
    assert properties["seed"]["nullable"] is True
    output = made["components"]["schemas"]["Output"]
    assert (output["type"], output["x-cog-array-type"]) == ("array", "iterator")
    assert "x-cog-array-display" not in output  # clients would join n completions into one
    assert made["paths"]["/predictions"]["post"]["x-cog-streaming"] is True
    assert "x-cog-streaming" not in made["paths"]["/trainings"]["post"]
    json.dumps(made)


# cog.yaml ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config() -> dict:
    return yaml.safe_load((ROOT / "cog.yaml").read_text())


def test_cog_yaml_is_valid(config):
    # The keys Cog 0.23.1's schema knows; its loader ignores others without a word.
    assert config.keys() <= {
        "build",
        "image",
        "model",
        "run",
        "predict",
        "train",
        "concurrency",
        "environment",
        "weights",
    }
    build = config["build"]
    assert build.keys() <= {
        "gpu",
        "cuda",
        "cudnn",
        "python_version",
        "python_requirements",
        "sdk_version",
        "run",
        "system_packages",
    }
    assert build["gpu"] is True
    assert build["python_version"] == "3.12"  # a string: 3.10 would be 3.1
    assert isinstance(build["cuda"], str)
    assert (ROOT / build["python_requirements"]).is_file()


@pytest.mark.parametrize("key", ["predict", "train"])
def test_references_exist(config, key):
    file, name = config[key].split(":")
    tree = ast.parse((ROOT / file).read_text())
    assert name in [getattr(node, "name", None) for node in tree.body]
    assert config[key] in (schema.PREDICTOR, schema.TRAINER)


def test_environment_is_allowed_and_agrees(config):
    variables = dict(line.split("=", 1) for line in config["environment"])
    forbidden = (
        "PYTHONPATH",
        "PATH",
        "LD_LIBRARY_PATH",
        "CUDA_",
        "NVIDIA_",
        "HF_ENDPOINT",
        "REPLICATE_",
        "R8_",
        "COG_TRACE_",
    )
    assert not [name for name in variables if name.startswith(forbidden)]
    tree = ast.parse((ROOT / "predict.py").read_text())
    decorators = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "concurrent"
    ]
    assert [ast.unparse(node) for node in decorators] == [f"concurrent(max={variables['COG_MAX_CONCURRENCY']})"]


def test_installed_sdk_is_the_pinned_one(config):
    from importlib.metadata import version

    assert version("cog") == version("coglet") == config["build"]["sdk_version"]


def test_requirements_are_exact_and_plain():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = [line.split("==")[0] for line in lines]
    assert all(line.count("==") == 1 and not set(line) & set(";<>@ ") for line in lines)  # Cog strips markers
    assert "torch==2.11.0" in lines  # the newest in Cog 0.23.1's matrix
    assert "transformers==5.17.0" in lines
    assert len(set(names)) == len(names)


def test_dockerignore_keeps_what_the_image_needs():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert {"unconverted-weights", ".git", ".venv", "**/checkpoint-*"} <= set(ignored)
    needed = {"predict.py", "train.py", "alpaca", "convert", "weights", "alpaca_out", "requirements.txt", "cog.yaml"}
    assert not needed & set(ignored)
