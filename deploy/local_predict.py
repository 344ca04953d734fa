"""Does the work of `cog predict` without Docker: start the server, make one prediction, print its output, stop.

    script/predict -i prompt="tell me something about รามาเกียรติ์" -i temperature=0

A list is given by repeating its name (-i stop=a -i stop=b), a list of objects as JSON
(-i messages='[{"role": "user", "content": "hi"}]'), a text from a file as name=@file. Logs go to stderr.

    script/predict --input prompts.jsonl --output answers.jsonl

answers a file of predictions, a JSON object of inputs a line (`batch`); the same command goes on after a stop.
"""

import argparse
import contextlib
import difflib
import json
import os
import sys
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from alpaca.errors import InputError, MissingInput, run_command
from deploy.batch import Inputs, Prediction, answer_file, refusal
from deploy.local_server import ServerFailedError, running_server, stop_children_on_sigterm
from deploy.serve import parse_arguments, runtime_environment

ROOT = Path(__file__).resolve().parent.parent

_LONGEST_S = 24 * 3600.0  # that one prediction of a file may take
_TRUTH = {"true": True, "false": False, "1": True, "0": False}


def parse_inputs(pairs: list[str], properties: dict[str, Any]) -> dict[str, Any]:
    """Inputs from "name=value" texts, typed as the schema's `properties` say. Raises InputError, MissingInput."""
    properties = {name: entry for name, entry in properties.items() if not entry.get("deprecated")}
    inputs: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            name, text = "prompt", pair
        if name not in properties:
            near = difflib.get_close_matches(name, properties, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(properties)}"
            raise InputError(f"no input is named {name!r}{hint}")
        value = _typed(name, _text(text), properties[name])
        if properties[name]["type"] == "array":
            inputs.setdefault(name, []).extend(value if isinstance(value, list) else [value])
        else:
            inputs[name] = value
    return inputs


def _text(text: str) -> str:
    if not text.startswith("@"):
        return text
    file = Path(os.environ.get("ALPACA_CALLER", "."), text[1:])
    if not file.is_file():
        raise MissingInput(f"no file {file} (a value that starts with @ names a file)")
    return file.read_text(encoding="utf-8")


def _typed(name: str, text: str, entry: dict[str, Any]) -> Any:
    kind = entry["type"] if entry["type"] != "array" else entry["items"]["type"]
    if kind == "object":
        return _json(name, text, entry["type"])
    try:
        if kind == "boolean":
            return _TRUTH[text.lower()]
        return {"integer": int, "number": float, "string": str}[kind](text)
    except (ValueError, KeyError):
        raise InputError(f"{name} must be of type {kind}; found {text!r}") from None


def _json(name: str, text: str, kind: str) -> Any:
    """An object, or where a list of them is meant, the list or one of it."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{name} must be JSON: {error}; found {text!r}") from None
    if not isinstance(value, (dict, list) if kind == "array" else dict):
        raise InputError(f"{name} must be {'a list of objects' if kind == 'array' else 'an object'}; found {text!r}")
    return value


@contextlib.contextmanager
def _asking(serve_flags: list[str]) -> Iterator[Callable[[Inputs], Prediction]]:
    """A server, as what makes a prediction of inputs."""
    with running_server(serve_flags) as server:

        def predict(inputs: Inputs) -> Prediction:
            try:
                return server.predict(inputs, timeout_s=_LONGEST_S)
            except urllib.error.HTTPError as error:
                return refusal(error)

        yield predict


def _answer_file(source: str, target: str, serve_flags: list[str]) -> None:
    environment = runtime_environment(parse_arguments(serve_flags), dict(os.environ))
    concurrency = int(environment["COG_MAX_CONCURRENCY"])  # more would only wait in line
    here = Path(os.environ.get("ALPACA_CALLER", "."))
    num_all, num_failed = answer_file(here / source, here / target, _asking(serve_flags), concurrency=concurrency)
    print(f"{num_all:,} predictions in {target}, {num_failed:,} of them failed", file=sys.stderr)


def main() -> None:
    stop_children_on_sigterm()
    parser = argparse.ArgumentParser(prog="script/predict", description="One prediction, without Docker.")
    parser.add_argument("-i", "--input", action="append", default=[], metavar="NAME=VALUE", help="an input")
    parser.add_argument(
        "--output", metavar="FILE", help="answer the lines of the file that --input names, into this one"
    )
    parser.add_argument("--json", action="store_true", help="print the whole prediction, metrics and logs included")
    options, serve_flags = parser.parse_known_args()
    if options.output and (len(options.input) != 1 or options.json):
        parser.error("--output goes with one --input, the file of the predictions to make, and without --json")
    try:
        if options.output:
            _answer_file(options.input[0], options.output, serve_flags)
            return
        with running_server(serve_flags) as server:
            schema = server.request("/openapi.json")["components"]["schemas"]["Input"]
            prediction = server.predict(parse_inputs(options.input, schema["properties"]))
    except ServerFailedError as error:
        sys.exit(f"error: {error}")
    except urllib.error.HTTPError as error:
        sys.exit(f"error: {error.code}: {error.read().decode(errors='replace')}")
    except OSError as error:  # the server is gone, or --output cannot be written
        sys.exit(f"error: {error}")
    print(prediction.get("logs", ""), end="", file=sys.stderr)
    if prediction["status"] != "succeeded" and not options.json:
        sys.exit(f"error: {prediction.get('error') or prediction['status']}")
    print(json.dumps(prediction if options.json else prediction["output"], indent=2, ensure_ascii=False))


if __name__ == "__main__":
    run_command(main)
