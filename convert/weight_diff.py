"""Publish a fine-tuned model as its difference to a base that others must get for themselves, and put it back together.

    python -m convert.weight_diff make_diff --path_raw weights/llama-7b --path_tuned alpaca_out --path_diff diff
    python -m convert.weight_diff recover --path_raw weights/llama-7b --path_diff diff --path_tuned alpaca_out

Stanford's tool reads the folder that make_diff writes, and recover reads Stanford's.
"""

import argparse
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

from alpaca.errors import run_command
from alpaca.files.reading import parse_size
from alpaca.formats.diff.making import DiffConfig, make_diff
from alpaca.formats.diff.recovering import RecoverConfig, recover
from alpaca.formats.hf.folder import FLOAT_DTYPES


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"expected True or False, found {text!r}")
    return text.lower() in ("true", "1")


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, found {text!r}")
    return text


def _add_flags(parser: argparse.ArgumentParser) -> Callable[..., argparse.Action]:
    """Flags may be spelt with - for _, as the original's parser has it."""

    def add(flag: str, **options) -> argparse.Action:
        return parser.add_argument(*dict.fromkeys([flag, "--" + flag[2:].replace("_", "-")]), **options)

    add("--path_raw", type=Path, required=True, help="the base model, a Hugging Face folder")
    add("--device", type=_device, default="cpu", help="where recover's test inference runs; sums are taken on the CPU")
    add("--max_shard_size", default="5GB", help="largest safetensors file")
    add("--overwrite", action="store_true", help="replace an existing output")
    return add


def parse_arguments(arguments: list[str] | None = None) -> DiffConfig | RecoverConfig:
    """The command line, as python-fire read the original's."""
    parser = argparse.ArgumentParser(
        prog="python -m convert.weight_diff",
        description="Make a weight difference, or recover a model from one.",
        allow_abbrev=False,
    )
    tasks = parser.add_subparsers(dest="task", required=True)
    add = _add_flags(tasks.add_parser("make_diff", help="tuned - raw", allow_abbrev=False))
    add("--path_tuned", type=Path, required=True, help="the fine-tuned model")
    add("--path_diff", type=Path, required=True, help="gets the difference")
    add = _add_flags(tasks.add_parser("recover", help="raw + diff", allow_abbrev=False))
    add("--path_diff", type=Path, required=True, help="the difference, Stanford's or make_diff's")
    add("--path_tuned", type=Path, help="gets the model; left out, nothing is written, only checked")
    add(
        "--test_inference",
        type=_truth,
        nargs="?",
        const=True,
        help="let the model answer one prompt (default: where memory allows)",
    )
    add(
        "--check_integrity_naively",
        type=_truth,
        nargs="?",
        const=True,
        default=True,
        help="for a diff without a manifest: compare the published sum, which only Stanford's 7B diff has",
    )
    add("--dtype", choices=["auto", *FLOAT_DTYPES], default="auto", help="auto: as tuned, or float32 for old diffs")
    values = vars(parser.parse_args(arguments))
    kind = DiffConfig if values.pop("task") == "make_diff" else RecoverConfig
    return kind(**{**values, "max_shard_size": parse_size(values["max_shard_size"])})


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = parse_arguments()
    start = time.perf_counter()
    target = make_diff(config) if isinstance(config, DiffConfig) else recover(config)
    seconds = time.perf_counter() - start
    print(f"wrote {target} in {seconds:.1f} s" if target else f"recovered, wrote nothing, in {seconds:.1f} s")


if __name__ == "__main__":
    run_command(main)
