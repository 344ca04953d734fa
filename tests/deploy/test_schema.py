"""predict.py's literals, the schema made of them, and cog.yaml: what `cog build` would read, held without it."""

import ast
import dataclasses
import json
import re

import pytest
import yaml

from alpaca.serving.request import PredictionInputs
from deploy import schema
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


def test_schema_has_bounds_defaults_order_and_streaming():
    made = schema.build_schema()
    properties = made["components"]["schemas"]["Input"]["properties"]
    assert "required" not in made["components"]["schemas"]["Input"]  # prompt or messages
    assert properties["messages"]["items"] == {"type": "object"}
    assert [entry["x-order"] for entry in properties.values()] == list(range(len(properties)))
    for item in dataclasses.fields(PredictionInputs):
        entry = properties[item.name]
        assert (entry.get("minimum"), entry.get("maximum")) == (item.metadata.get("ge"), item.metadata.get("le"))
    assert properties["stop"]["items"] == {"type": "string"}
    assert properties["seed"]["nullable"] is True
    deprecated = {name for name, entry in properties.items() if entry.get("deprecated")}
    assert deprecated == {"max_length", "max_tokens"}  # listed only so that Cog hands them over: see describe_unused
    output = made["components"]["schemas"]["Output"]
    assert (output["type"], output["x-cog-array-type"]) == ("array", "iterator")
    assert "x-cog-array-display" not in output  # clients would join n completions into one
    assert made["paths"]["/predictions"]["post"]["x-cog-streaming"] is True
    assert "x-cog-streaming" not in made["paths"]["/trainings"]["post"]
    json.dumps(made)


def test_the_schema_is_whole_openapi():
    """Each operation says how it answers, and each part of a path what it is."""
    for path, operations in schema.build_schema()["paths"].items():
        for operation in operations.values():
            assert operation["responses"]
            declared = [entry["name"] for entry in operation.get("parameters", ()) if entry["in"] == "path"]
            assert declared == re.findall(r"{(\w+)}", path)


# cog.yaml: what script/check does not look at ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config() -> dict:
    return yaml.safe_load((ROOT / "cog.yaml").read_text())


def test_cog_yaml_is_for_a_gpu_and_names_what_the_schema_is_made_of(config):
    assert config["build"]["gpu"] is True
    assert (config["predict"], config["train"]) == (schema.PREDICTOR, schema.TRAINER)


def test_concurrency_is_what_the_predictor_says(config):
    variables = dict(line.split("=", 1) for line in config["environment"])
    tree = ast.parse((ROOT / "predict.py").read_text())
    decorators = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "concurrent"
    ]
    assert [ast.unparse(node) for node in decorators] == [f"concurrent(max={variables['COG_MAX_CONCURRENCY']})"]


def test_installed_sdk_is_the_pinned_one(config):
    from importlib.metadata import version

    assert version("cog") == version("coglet") == config["build"]["sdk_version"]


def test_requirements_are_the_tested_ones():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert "torch==2.11.0" in lines  # the newest in Cog 0.23.1's matrix
    assert "transformers==5.17.0" in lines
    names = [line.split("==")[0] for line in lines]
    assert len(set(names)) == len(names)


def test_dockerignore_keeps_what_the_image_needs():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert {"unconverted-weights", ".git", ".venv", "**/checkpoint-*"} <= set(ignored)
    needed = {
        "predict.py",
        "train.py",
        "alpaca",
        "convert",
        "deploy",
        "weights",
        "alpaca_out",
        "requirements.txt",
        "cog.yaml",
    }
    assert not needed & set(ignored)
