"""Say before `cog push` what would fail after it: cog.yaml, pins, schema, the image, weights, the card's memory.

    script/check                      what cog.yaml serves, in the image as it would be built now
    script/check --card 24GB          and whether a card of that memory holds it
    script/check --json               one JSON object, for CI

Exit status 1 when something would fail; warnings alone are 0, unless --strict is given.
"""

import argparse
import ast
import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from alpaca.errors import InputError, run_command
from alpaca.files.reading import parse_size
from alpaca.serving.settings import ServerSettings
from deploy.check_weights import Image, check_weights, named_places
from deploy.findings import Finding, Findings, collect, error, gigabytes, ok, warning
from deploy.image_files import ImageFile, list_image_files

ROOT = Path(__file__).resolve().parent.parent

# Of Cog 0.23.1, whose loader passes over a key that it does not know.
_KEYS = {"build", "image", "model", "run", "predict", "train", "concurrency", "environment", "observability", "weights"}
_BUILD_KEYS = {
    "gpu", "cuda", "cudnn", "python_version", "python_requirements", "sdk_version", "run", "system_packages",
}  # fmt: skip
_FORBIDDEN_VARIABLES = re.compile(
    r"(PYTHONPATH|PATH|LD_LIBRARY_PATH|PYTHONUNBUFFERED|HF_ENDPOINT|HF_HUB_ENABLE_HF_TRANSFER)$"
    r"|(CUDA|NVIDIA|NV|REPLICATE|R8|PGET|KUBERNETES|OTEL|COG_TRACE)_"
)
_NEWEST_TORCH = (2, 11)  # that Cog 0.23.1 knows the CUDA version of
_LARGE_LAYER = 10 * 10**9
_NOT_SERVED = re.compile(
    r"consolidated\.\d+\.pth|optimizer.*\.(pt|pth|bin|safetensors)|.*\.distcp|pytorch_model.*\.bin|.*\.(gguf|tar|tgz|zip)"
)


# cog.yaml and pins ------------------------------------------------------------------------------------------------


def read_config(file: Path) -> tuple[dict[str, Any], list[Finding]]:
    """Read cog.yaml and report the keys that Cog ignores. `build` is then a mapping, `environment` a list of texts."""
    try:
        text = file.read_text(encoding="utf-8")
        node, config = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as reason:
        return {}, [error("cog.yaml", f"{file.name} cannot be read: {reason}")]
    if not isinstance(config, dict):
        return {}, [error("cog.yaml", f"{file.name}: expected keys and values, found {type(config).__name__}")]
    found = [error("cog.yaml", text) for text in _duplicate_keys(node)]
    for key, expected, empty in (("build", dict, {}), ("environment", list, [])):
        if not isinstance(config.setdefault(key, empty) or empty, expected):
            kind = "keys and values" if expected is dict else "a list, one - NAME=value a line"
            found.append(error("cog.yaml", f"{key}: expected {kind}, found {config[key]!r}"))
            config[key] = empty
        config[key] = config[key] or empty
    for line in config["environment"]:
        if not isinstance(line, str) or "=" not in line:
            found.append(error("cog.yaml", f"environment: expected NAME=value, found {line!r}"))
    config["environment"] = [line for line in config["environment"] if isinstance(line, str) and "=" in line]
    return {str(key): value for key, value in config.items()}, found


def _duplicate_keys(node: yaml.Node | None, path: str = "") -> Iterator[str]:
    """Keys that stand twice: PyYAML takes the last without a word, where Cog's reader stops."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _duplicate_keys(item, path)
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            name, line = f"{path}{key.value}", key.start_mark.line + 1
            if name in first:
                yield f"{name} stands twice, in lines {first[name]} and {line}: keep one of them"
            first.setdefault(name, line)
            yield from _duplicate_keys(value, f"{name}.")


def environment_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The variables that the image sets."""
    return dict(line.partition("=")[::2] for line in config["environment"])


def check_config(root: Path, config: dict[str, Any]) -> Findings:
    """Keys, versions, references and environment, by the rules of Cog 0.23.1."""
    build = config["build"]
    for unknown in sorted((config.keys() - _KEYS) | {f"build.{key}" for key in build.keys() - _BUILD_KEYS}):
        yield error("cog.yaml", f"Cog passes over the unknown key {unknown}: a typing error?")
    version = build.get("python_version")
    if not isinstance(version, str) or not re.fullmatch(r"3\.1[0-4]", version):
        yield error("cog.yaml", f'build.python_version must be a quoted text such as "3.12"; found {version!r}')
    if not build.get("gpu"):
        yield warning("cog.yaml", "build.gpu is not true: the image gets no CUDA")
    if not build.get("sdk_version"):
        yield warning("cog.yaml", "build.sdk_version is not set: the newest runtime is taken, which no test has seen")
    for name in environment_of(config):
        if _FORBIDDEN_VARIABLES.match(name):
            yield error("cog.yaml", f"environment: Cog refuses to set {name}")
    if "run" in config and "predict" in config:
        yield error("cog.yaml", "run and predict name the same thing: keep one of them")
    for key in ("run", "predict", "train"):
        if key in config:
            yield from _check_reference(root, key, str(config[key]))
    yield ok("cog.yaml", f"python {version}, CUDA {build.get('cuda', 'by torch')}, runtime {build.get('sdk_version')}")


def _check_reference(root: Path, key: str, reference: str) -> Findings:
    file, _, name = reference.partition(":")
    if not (root / file).is_file():
        yield error("cog.yaml", f"{key}: there is no {file}")
        return
    tree, reason = _parse(root / file)
    if tree is None:
        yield error("cog.yaml", f"{key}: {file} is no Python: {reason}")
    elif name not in {getattr(node, "name", None) for node in tree.body}:
        yield error("cog.yaml", f"{key}: {file} has no {name or 'name after the colon'}")


def _parse(file: Path) -> tuple[ast.Module | None, str]:
    """A file's syntax tree, or why it has none."""
    try:
        return ast.parse(file.read_text(encoding="utf-8"), filename=file.name), ""
    except (SyntaxError, ValueError) as reason:  # ValueError: not UTF-8, or null bytes
        return None, str(reason)


def check_pins(root: Path, config: dict[str, Any]) -> Findings:
    """Check that each requirement is pinned to one version, and torch to one whose CUDA version Cog knows."""
    name = str(config["build"].get("python_requirements") or "")
    if not (root / name).is_file():
        yield error("pins", f"build.python_requirements: there is no file {name}")
        return
    lines = [line.partition("#")[0].strip() for line in (root / name).read_text(encoding="utf-8").splitlines()]
    pins = dict(line.split("==", 1) for line in lines if re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!-]+", line))
    for line in lines:
        if line and line.split("==")[0] not in pins:
            yield error("pins", f"{name}: {line!r} is no exact pin (name==version); Cog strips markers and drops -e")
    torch = pins.get("torch")
    version = re.match(r"(\d+)\.(\d+)", torch or "")
    if torch is None:
        yield error("pins", f"{name} has no torch: Cog would take CUDA 11.8")
    elif version is None:
        yield error("pins", f"{name}: torch=={torch} is no version: expected one such as torch==2.11.0")
    elif tuple(map(int, version.groups())) > _NEWEST_TORCH and not config["build"].get("cuda"):
        yield error("pins", f"torch {torch} is newer than Cog knows: set build.cuda, or take 2.11.0")
    yield ok("pins", f"{len(pins)} packages, torch {torch}")


# Schema -----------------------------------------------------------------------------------------------------------


def silent_traps(source: str, function: str) -> Iterator[str]:
    """Yield the inputs of a function that Cog's static pass would drop or change without a message."""
    functions = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    node = next((node for node in functions if node.name == function), None)
    if node is None:
        yield f"there is no function {function}"
        return
    arguments = [argument for argument in node.args.args if argument.arg != "self"]
    for argument in arguments:
        if argument.annotation is None:
            yield f"{argument.arg} has no type and disappears"
    for argument, call in zip(arguments[len(arguments) - len(node.args.defaults) :], node.args.defaults, strict=True):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Input"):
            yield f"{argument.arg}: its default must be a call of Input by that name"
            continue
        if call.args:
            yield f"{argument.arg}: a default by position makes it required"
        for keyword in call.keywords:
            yield from _keyword_traps(argument.arg, keyword)


def _keyword_traps(name: str, keyword: ast.keyword) -> Iterator[str]:
    try:
        ast.literal_eval(keyword.value)
    except ValueError:
        yield f"{name}: {keyword.arg} must be a literal; {ast.unparse(keyword.value)} is dropped"
    if keyword.arg == "description":
        is_on_one_line = keyword.value.lineno == keyword.value.end_lineno
        if not isinstance(keyword.value, ast.Constant) or not is_on_one_line:
            yield f"{name}: description must be one text on one line"


def check_schema(root: Path, config: dict[str, Any]) -> Findings:
    """The inputs survive Cog's static pass, and the schema can be made."""
    found = False
    for key in ("run", "predict", "train"):
        if key not in config:
            continue
        file = str(config[key]).partition(":")[0]
        if not (root / file).is_file() or _parse(root / file)[0] is None:  # said by check_config
            return
        for trap in silent_traps((root / file).read_text(encoding="utf-8"), "train" if key == "train" else "run"):
            found = True
            yield error("schema", f"{file}: {trap}")
    if not found:
        yield _build_schema()


def _build_schema() -> Finding:
    from deploy.schema import build_schema

    try:
        inputs = build_schema()["components"]["schemas"]["Input"]["properties"]
    except Exception as reason:  # it runs the project's own modules
        return error("schema", f"the schema cannot be made: {type(reason).__name__}: {reason}")
    return ok("schema", f"{len(inputs)} inputs")


# Files of the image -----------------------------------------------------------------------------------------------


def check_files(files: list[ImageFile], served: set[str]) -> Findings:
    """Check the image's size, layers, and files that do not belong in it. served: paths that the environment names."""
    total = sum(file.num_bytes for file in files)
    separate = [file for file in files if file.is_separate]
    in_layers = sum(file.num_bytes for file in separate)
    for file in files:
        size = gigabytes(file.num_bytes)
        if _NOT_SERVED.fullmatch(file.path.name) and str(file.path) not in served:
            hint = "move it away, or name it in .dockerignore"
            yield warning("image", f"{file.path} ({size}) goes in and is not served: {hint}")
        elif file.num_bytes > _LARGE_LAYER:
            hint = "several files (--max_shard_size 5GB) are sent and retried apart"
            yield warning("image", f"{file.path} is one layer of {size}: {hint}")
    text = f"{len(files)} files, {gigabytes(total)}"
    if separate:
        text += (
            f"; with --separate-weights {len(separate)} layers of weights ({gigabytes(in_layers)}) apart from the code"
        )
    yield ok("image", text)


# The command ------------------------------------------------------------------------------------------------------


def check(root: Path, *, card: str | None = None) -> list[Finding]:
    """All findings on the project in `root`."""
    config, found = read_config(root / "cog.yaml")
    if not config:
        return found
    for topic, findings in (
        ("cog.yaml", check_config(root, config)),
        ("pins", check_pins(root, config)),
        ("schema", check_schema(root, config)),
        ("image", _check_image(root, config, card)),
    ):
        found += collect(topic, findings)
    return found


def _check_image(root: Path, config: dict[str, Any], card: str | None) -> Findings:
    """Its files, and what it serves of them."""
    try:
        settings = ServerSettings.from_environment(environment_of(config))
    except InputError as reason:
        yield error("cog.yaml", f"environment: {reason}")
        settings = None
    places = named_places(settings).values() if settings else ()
    served = {str(PurePosixPath(place.removeprefix("/src/"))) for place in places}
    try:
        files = list_image_files(root)
        yield from check_files(files, served)
    except InputError as reason:
        files = None
        yield error("image", str(reason))
    if settings:
        yield from check_weights(Image(root=root, settings=settings, files=files), card=card)


def main() -> None:
    parser = argparse.ArgumentParser(description="Say before cog push what would fail after it.")
    parser.add_argument("--card", help='memory of the GPU it will run on, such as "24GB"')
    parser.add_argument("--strict", action="store_true", help="warnings fail, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.card:
        parse_size(options.card)
    findings = check(ROOT, card=options.card)
    failing = {"error", "warning"} if options.strict else {"error"}
    failed = any(finding.level in failing for finding in findings)
    if options.json:
        print(json.dumps({"passed": not failed, "findings": [dataclasses.asdict(finding) for finding in findings]}))
    else:
        for finding in findings:
            print(f"{finding.level:8} {finding.topic:9} {finding.text}")
        print("not ready to push" if failed else "ready to push")
    sys.exit(failed)


if __name__ == "__main__":
    run_command(main)
