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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "script")]

from image_files import ImageFile, list_image_files  # noqa: E402

from alpaca.adapters import is_adapter, open_adapter  # noqa: E402
from alpaca.archives import TRAINED  # noqa: E402
from alpaca.errors import AlpacaError, InputError, NotEnoughSpace, run_command  # noqa: E402
from alpaca.hf_files import WeightsFolder, parse_size, require_all_weights  # noqa: E402

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
_NOT_SERVED = re.compile(r"consolidated\.\d+\.pth|optimizer.*|.*\.distcp|pytorch_model.*\.bin|.*\.(gguf|tar|tgz|zip)")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found: "ok", a "warning", or an "error" that would fail after the push."""

    level: str
    topic: str
    text: str


Findings = Iterator[Finding]


def ok(topic: str, text: str) -> Finding:
    return Finding(level="ok", topic=topic, text=text)


def warning(topic: str, text: str) -> Finding:
    return Finding(level="warning", topic=topic, text=text)


def error(topic: str, text: str) -> Finding:
    return Finding(level="error", topic=topic, text=text)


# cog.yaml and pins ------------------------------------------------------------------------------------------------


def check_config(root: Path, config: dict[str, Any]) -> Findings:
    """Keys, versions, references and environment, by the rules of Cog 0.23.1."""
    build = config.get("build") or {}
    for unknown in sorted((config.keys() - _KEYS) | {f"build.{key}" for key in build.keys() - _BUILD_KEYS}):
        yield error("cog.yaml", f"Cog passes over the unknown key {unknown}: a typing error?")
    version = build.get("python_version")
    if not isinstance(version, str) or not re.fullmatch(r"3\.1[0-4]", version):
        yield error("cog.yaml", f'build.python_version must be a quoted text such as "3.12"; found {version!r}')
    if not build.get("gpu"):
        yield warning("cog.yaml", "build.gpu is not true: the image gets no CUDA")
    if not build.get("sdk_version"):
        yield warning("cog.yaml", "build.sdk_version is not set: the newest runtime is taken, which no test has seen")
    for line in config.get("environment") or ():
        name = str(line).partition("=")[0]
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
    names = {getattr(node, "name", None) for node in ast.parse((root / file).read_text(encoding="utf-8")).body}
    if name not in names:
        yield error("cog.yaml", f"{key}: {file} has no {name or 'name after the colon'}")


def check_pins(root: Path, config: dict[str, Any]) -> Findings:
    """Every requirement is one exact version, and torch one whose CUDA Cog knows."""
    name = (config.get("build") or {}).get("python_requirements")
    if not name or not (root / name).is_file():
        yield error("pins", f"build.python_requirements: there is no file {name}")
        return
    lines = [line.partition("#")[0].strip() for line in (root / name).read_text(encoding="utf-8").splitlines()]
    pins = dict(line.split("==", 1) for line in lines if re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!-]+", line))
    for line in lines:
        if line and line.split("==")[0] not in pins:
            yield error("pins", f"{name}: {line!r} is no exact pin (name==version); Cog strips markers and drops -e")
    torch = pins.get("torch")
    if torch is None:
        yield error("pins", f"{name} has no torch: Cog would take CUDA 11.8")
    elif tuple(map(int, torch.split("+")[0].split(".")[:2])) > _NEWEST_TORCH and not config["build"].get("cuda"):
        yield error("pins", f"torch {torch} is newer than Cog knows: set build.cuda, or take 2.11.0")
    yield ok("pins", f"{len(pins)} packages, torch {torch}")


# Schema -----------------------------------------------------------------------------------------------------------


def silent_traps(source: str, function: str) -> Iterator[str]:
    """What Cog's static pass over a function's inputs would drop or turn around without a word."""
    node = next(
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == function
    )
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
            yield from _keyword_traps(argument.arg, keyword, source)


def _keyword_traps(name: str, keyword: ast.keyword, source: str) -> Iterator[str]:
    try:
        ast.literal_eval(keyword.value)
    except ValueError:
        yield f"{name}: {keyword.arg} must be a literal; {ast.unparse(keyword.value)} is dropped"
    if keyword.arg == "description":
        written = ast.get_source_segment(source, keyword.value) or ""
        if not isinstance(keyword.value, ast.Constant) or "\n" in written:
            yield f"{name}: description must be one text on one line"


def check_schema(root: Path, config: dict[str, Any]) -> Findings:
    """The inputs survive Cog's static pass, and the schema can be made."""
    found = False
    for key in ("run", "predict", "train"):
        file, _, name = str(config.get(key, "")).partition(":")
        if not (root / file).is_file() or not name:
            continue
        source = (root / file).read_text(encoding="utf-8")
        for trap in silent_traps(source, "train" if key == "train" else "run"):
            found = True
            yield error("schema", f"{file}: {trap}")
    if not found:
        from schema import build_schema

        inputs = build_schema()["components"]["schemas"]["Input"]["properties"]
        yield ok("schema", f"{len(inputs)} inputs")


# Files of the image -----------------------------------------------------------------------------------------------


def check_files(files: list[ImageFile]) -> Findings:
    """Sizes, layers, and what has no business in the image."""
    total = sum(file.num_bytes for file in files)
    separate = [file for file in files if file.is_separate]
    in_layers = sum(file.num_bytes for file in separate)
    for file in files:
        size = gigabytes(file.num_bytes)
        if _NOT_SERVED.fullmatch(file.path.name):
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


def gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 10**7 else f"{num_bytes / 1e6:.2f} MB"


# Weights ----------------------------------------------------------------------------------------------------------


def served_folder(config: dict[str, Any]) -> str:
    """What the image serves: COG_WEIGHTS of cog.yaml's environment, else train.py's output."""
    environment = dict(str(line).partition("=")[::2] for line in config.get("environment") or ())
    return environment.get("COG_WEIGHTS") or str(TRAINED)


def check_weights(root: Path, served: str, files: list[ImageFile]) -> Findings:
    """They are there, whole, in the image, and have a tokenizer."""
    if "://" in served:
        yield warning("weights", "COG_WEIGHTS is a URL: every start downloads it, and nothing of it was looked at")
        return
    folder = root / served.removeprefix("/src/")
    if folder.is_file():
        yield warning("weights", f"{served} is an archive, unpacked at every start: put the folder into the image")
        return
    if is_adapter(folder):
        adapter = open_adapter(folder)
        yield ok("weights", adapter.describe())
        yield from _check_in_image(folder, root, files)
        yield from check_weights(root, adapter.base_name or "(no base named)", files)
        return
    if not (folder / "config.json").is_file():
        yield error("weights", f"no model in {served}: train one into {TRAINED}, or set COG_WEIGHTS in cog.yaml")
        return
    yield from _check_whole(folder)
    yield from _check_in_image(folder, root, files)


def _check_whole(folder: Path) -> Findings:
    from alpaca.serving.llama import LlamaConfig, UnsupportedModelError
    from alpaca.serving.weights import check_tensors
    from alpaca.tokenizer import load_tokenizer

    weights = WeightsFolder(folder)
    specs = weights.specs()
    try:
        config = LlamaConfig.read(folder)
        check_tensors(weights, config)
        load_tokenizer(folder).require_rows(config.vocab_size, folder)
        engine = "the LLaMA engine"
    except UnsupportedModelError as unsupported:
        require_all_weights(folder, [])
        load_tokenizer(folder)
        engine = f"transformers ({unsupported})"
    size = gigabytes(sum(spec.num_bytes for spec in specs))
    yield ok("weights", f"{folder.name}: {len(specs)} tensors, {size}, whole; served by {engine}")


def _check_in_image(folder: Path, root: Path, files: list[ImageFile]) -> Findings:
    if not folder.resolve().is_relative_to(root.resolve()):
        yield error("weights", f"{folder} lies outside of the project and does not go into the image")
        return
    there = {file.path for file in files}
    inside = PurePosixPath(folder.relative_to(root).as_posix())
    needed = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".model")]
    for path in needed:
        if inside / path.name not in there:
            yield error("weights", f".dockerignore keeps {inside / path.name} out of the image")
        elif path.is_symlink():
            yield error("weights", f"{inside / path.name} is a link, which goes into the image without what it names")


# Memory of the card -----------------------------------------------------------------------------------------------


def check_memory(root: Path, config: dict[str, Any], served: str, card: str) -> Findings:
    """The memory plan of the chosen card, with the settings of cog.yaml's environment."""
    import torch

    from alpaca.memory import CUDA_CONTEXT_BYTES
    from alpaca.serving.llama import LlamaConfig, UnsupportedModelError
    from alpaca.serving.plan import plan_memory, weights_bytes
    from alpaca.serving.settings import ServerSettings

    environment = dict(str(line).partition("=")[::2] for line in config.get("environment") or ())
    settings = ServerSettings.from_environment(environment)
    folder = root / served.removeprefix("/src/")
    if is_adapter(folder):
        folder = root / open_adapter(folder).base_name
    if not (folder / "config.json").is_file():  # said by check_weights
        return
    try:
        model = LlamaConfig.read(folder)
    except UnsupportedModelError:
        yield warning("memory", f"{served} is served by transformers, whose memory is not planned")
        return
    dtype = getattr(torch, settings.dtype or "bfloat16")
    weights = weights_bytes(model, dtype, settings.quantization)
    free = parse_size(card) - weights - CUDA_CONTEXT_BYTES
    try:
        if free <= 0:
            raise NotEnoughSpace(
                f"the weights take {gigabytes(weights)} and CUDA itself {gigabytes(CUDA_CONTEXT_BYTES)}"
            )
        plan = plan_memory(model, settings, free_bytes=free, device="cuda", dtype=dtype)
    except NotEnoughSpace as reason:
        yield error("memory", f"{card}: {reason}")
        return
    lengths = sorted({min(512, plan.max_context), plan.max_context})
    at_once = ", ".join(f"{plan.num_requests(length)} requests of {length} tokens" for length in lengths)
    uses = f"weights {gigabytes(weights)}, cache {gigabytes(plan.kv_bytes)}"
    yield ok("memory", f"{card}: {uses}; at once {at_once}")


# The command ------------------------------------------------------------------------------------------------------


def check(root: Path, *, card: str | None = None) -> list[Finding]:
    """All findings on the project in `root`."""
    import yaml

    try:
        config = yaml.safe_load((root / "cog.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as reason:
        raise InputError(f"{root / 'cog.yaml'} cannot be read: {reason}") from reason
    if not isinstance(config, dict):
        raise InputError(f"{root / 'cog.yaml'}: expected keys and values, found {type(config).__name__}")
    files, served = list_image_files(root), served_folder(config)
    checks: list[tuple[str, Callable[[], Findings]]] = [
        ("cog.yaml", lambda: check_config(root, config)),
        ("pins", lambda: check_pins(root, config)),
        ("schema", lambda: check_schema(root, config)),
        ("image", lambda: check_files(files)),
        ("weights", lambda: check_weights(root, served, files)),
    ]
    if card:
        checks.append(("memory", lambda: check_memory(root, config, served, card)))
    return [finding for topic, run in checks for finding in _collect(topic, run)]


def _collect(topic: str, run: Callable[[], Findings]) -> Findings:
    """A check's findings; what it cannot read is one of them."""
    try:
        yield from run()
    except AlpacaError as reason:
        yield error(topic, str(reason))


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
