"""Publish a fine-tuned model as its difference to a base that others must get for themselves, and put it back together.

    python -m convert.weight_diff make_diff --path_raw weights/llama-7b --path_tuned alpaca_out --path_diff diff
    python -m convert.weight_diff recover --path_raw weights/llama-7b --path_diff diff --path_tuned alpaca_out

The folder is laid out as Stanford's: a Hugging Face model whose weights are tuned - raw in float32, where a raw model
without [PAD] gets the mean of its rows for it. The original tool reads it, and `recover` reads the original's. Beside
it lie a manifest and the residual, with which `recover` gives back every bit of the tuned model and proves it.
Tensors pass in blocks from memory-mapped files to the output: memory does not depend on the model's size.
"""

import argparse
import hashlib
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from alpaca.errors import InputError, MissingInput, NotEnoughSpace, run_command
from alpaca.hf_files import (
    FLOAT_DTYPES,
    TensorSpec,
    WeightsFolder,
    check_overwrite,
    list_folder,
    parse_size,
    read_json,
    replaced_folder,
    require_apart,
    require_free_space,
    write_json,
    write_weights,
)
from alpaca.memory import free_memory
from alpaca.prompts import alpaca_prompt
from alpaca.tiktoken_files import TIKTOKEN_FILE
from alpaca.tokenizer import LLAMA_TOKENIZER_FILES, load_tokenizer
from convert.command_line import byte_bar
from convert.diff_arithmetic import (
    Differences,
    Recovery,
    check_match,
    model_specs,
    open_model,
    total_bytes,
    with_dtype,
)
from convert.diff_manifest import Stored, differing, dtype_name, write_manifest
from convert.diff_residual import RESIDUAL_NAME, ResidualWriter

logger = logging.getLogger(__name__)

_SPARE_BYTES = 16 << 20  # configs, tokenizer, manifest, file system
_VOCABULARY_FILES = ("tokenizer.model", "tokenizer.json", "vocab.json", "spiece.model")  # one of them is a tokenizer
_COPIED_FILES = (
    *LLAMA_TOKENIZER_FILES, TIKTOKEN_FILE, "added_tokens.json", "vocab.json", "merges.txt", "spiece.model",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip
_TEST_INSTRUCTION = "List three technologies that make life easier."
_TEST_TOKENS = 100


@dataclass(frozen=True, kw_only=True)
class DiffConfig:
    """make_diff's flags."""

    path_raw: Path
    path_tuned: Path
    path_diff: Path
    device: str = "cpu"
    max_shard_size: int = 5 * 10**9
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class RecoverConfig:
    """recover's flags. test_inference: None tries the model where memory allows."""

    path_raw: Path
    path_diff: Path
    path_tuned: Path | None = None
    device: str = "cpu"
    test_inference: bool | None = None
    check_integrity_naively: bool = True
    dtype: str = "auto"
    max_shard_size: int = 5 * 10**9
    overwrite: bool = False


# What both do first ---------------------------------------------------------------------------------------------


def _copy_small_files(source: Path, target: Path) -> None:
    if not any((source / name).is_file() for name in _VOCABULARY_FILES):
        raise MissingInput(
            f"no tokenizer in {source} (found: {list_folder(source)}); copy the model's tokenizer files into it"
        )
    for name in _COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


# make_diff --------------------------------------------------------------------------------------------------------


def make_diff(config: DiffConfig) -> Path:
    """Write the diff folder and return it. Raises the errors of `alpaca.errors`; nothing is changed then."""
    require_apart(config.path_diff, {"--path_raw": config.path_raw, "--path_tuned": config.path_tuned})
    if config.path_raw.resolve() == config.path_tuned.resolve():
        raise InputError(f"--path_raw and --path_tuned are the same folder, {config.path_raw}; expected different ones")
    check_overwrite(config.path_diff, config.overwrite)
    raw, tuned = open_model(config.path_raw), open_model(config.path_tuned)
    check_match(raw, tuned)
    tuned_config = read_json(tuned.path / "config.json")
    if tuned_config.get("tie_word_embeddings"):
        logger.warning("%s ties its embeddings: the original tool would add them twice; use this one", tuned.path)
    specs = {name: replace(spec, dtype=torch.float32) for name, spec in model_specs(tuned).items()}
    require_free_space(config.path_diff, int(1.1 * total_bytes(specs)) + _SPARE_BYTES)  # a tenth for the residual
    with replaced_folder(config.path_diff, overwrite=config.overwrite) as partial:
        _copy_small_files(tuned.path, partial)
        with byte_bar(total_bytes(specs), "subtracting") as bar, open(partial / RESIDUAL_NAME, "wb") as file:
            differences = Differences(raw, tuned, ResidualWriter(file))
            write_weights(
                partial,
                list(specs.values()),
                differences.read,
                max_shard_size=config.max_shard_size,
                progress=bar.update,
            )
        write_json(partial / "config.json", with_dtype(tuned_config, torch.float32))
        write_manifest(partial, differences.manifest(tuned_config))
        _prove(config.path_raw, partial)
    _log_residual(differences.residual, specs)
    return config.path_diff


def _prove(path_raw: Path, folder: Path) -> None:
    """Recover the model from what was written, without keeping it: nobody is handed a diff that does not work."""
    source = Recovery(path_raw, folder, dtype=None, check_sum=False)
    try:
        _only_recover(source, keep=False, label="proving")
    except InputError as error:
        raise InputError(
            f"the diff cannot be read back as written: is the disk failing? Nothing is kept: {error}"
        ) from error


def _log_residual(residual: ResidualWriter, specs: Mapping[str, TensorSpec]) -> None:
    share = residual.num_elements / max(1, total_bytes(specs) // 4)
    logger.info(
        "%s holds what float32 lost: %d elements (%.2f %%) in %.1f MB",
        RESIDUAL_NAME, residual.num_elements, 100 * share, residual.num_bytes / 1e6,
    )  # fmt: skip


# recover ----------------------------------------------------------------------------------------------------------


def recover(config: RecoverConfig) -> Path | None:
    """Write the tuned model and return its folder; without `path_tuned` only check that it can be recovered.

    Raises the errors of `alpaca.errors`; nothing is changed then.
    """
    target = config.path_tuned
    if target:
        require_apart(target, {"--path_raw": config.path_raw, "--path_diff": config.path_diff})
        check_overwrite(target, config.overwrite)
    source = Recovery(
        config.path_raw,
        config.path_diff,
        dtype=FLOAT_DTYPES.get(config.dtype),
        check_sum=config.check_integrity_naively,
    )
    wants_test = _plan_test(config, source)
    if target:
        require_free_space(target, total_bytes(source.specs) + _SPARE_BYTES)
    source.check_base()
    tensors: dict[str, torch.Tensor] | None = None
    if target:
        with replaced_folder(target, overwrite=config.overwrite) as partial:
            _write_recovered(partial, source, config)
    else:
        tensors = _only_recover(source, keep=wants_test)
    if wants_test:
        print(try_model(target or config.path_diff, config.device, tensors, source.config))
    return target


def _cast(source: Recovery, spec: TensorSpec, written: dict[str, Stored]) -> Iterator[torch.Tensor]:
    """A recovered tensor in the type it is written in, noting its digest."""
    digest = hashlib.sha256() if source.manifest is None or spec.dtype != source.own_dtype(spec.name) else None
    for block in source.read(spec.name):
        block = block.to(spec.dtype)
        if digest:
            digest.update(block.view(torch.uint8).numpy())
        yield block
    hexdigest = digest.hexdigest() if digest else source.manifest.tensors[spec.name].tuned.sha256
    written[spec.name] = Stored(dtype=dtype_name(spec.dtype), shape=spec.shape, sha256=hexdigest)


def _write_recovered(folder: Path, source: Recovery, config: RecoverConfig) -> None:
    """Write the model, then read all of it back and compare."""
    _copy_small_files(source.diff.path, folder)
    written: dict[str, Stored] = {}
    with byte_bar(total_bytes(source.specs), "adding") as bar:
        write_weights(
            folder,
            list(source.specs.values()),
            lambda spec: _cast(source, spec, written),
            max_shard_size=config.max_shard_size,
            progress=bar.update,
        )
    source.check_result()
    write_json(folder / "config.json", source.config)
    with byte_bar(total_bytes(source.specs), "verifying") as bar:
        wrong = differing(WeightsFolder(folder), written, bar.update)
    if wrong:
        raise InputError(f"{', '.join(wrong[:5])} cannot be read back as written: is the disk failing? Nothing is kept")


def _only_recover(source: Recovery, *, keep: bool, label: str = "adding") -> dict[str, torch.Tensor] | None:
    """Go through all tensors for the checks in it; keep them for a test of the model."""
    kept: dict[str, torch.Tensor] = {}
    with byte_bar(total_bytes(source.specs), label) as bar:
        for name, spec in source.specs.items():
            parts = []
            for block in source.read(name):
                if keep:
                    parts.append(block.to(spec.dtype))
                bar.update(block.numel() * spec.dtype.itemsize)
            if keep:
                kept[name] = torch.cat(parts).view(spec.shape)
    source.check_result()
    return kept if keep else None


# Trying the model -------------------------------------------------------------------------------------------------


def _plan_test(config: RecoverConfig, source: Recovery) -> bool:
    """Whether the model will be tried. Raises NotEnoughSpace when that was asked for and memory is short."""
    if config.test_inference is False:
        return False
    if config.device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"--device {config.device} is asked for and no GPU is there; leave it out")
    needed, free = int(1.1 * total_bytes(source.specs)) + (1 << 30), free_memory(torch.device(config.device))
    if needed <= free:
        return True
    problem = f"trying the model needs {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free"
    if config.test_inference:
        raise NotEnoughSpace(f"{problem}; pass --test_inference False")
    logger.warning("%s: it is recovered and checked, but not tried", problem)
    return False


def try_model(folder: Path, device: str, tensors: dict[str, torch.Tensor] | None, config: Mapping[str, object]) -> str:
    """What the model answers, greedily, to the original's test prompt (with its CR-LF line ends).

    folder: of the tokenizer, and of the model where `tensors` is None.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    if tensors is None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    else:
        model_config = AutoConfig.for_model(**config)
        kind, dtype = MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)], next(iter(tensors.values())).dtype
        model = kind.from_pretrained(None, config=model_config, state_dict=tensors, dtype=dtype)
    tokenizer = load_tokenizer(folder)
    prompt = alpaca_prompt(_TEST_INSTRUCTION).replace("\n", "\r\n")
    ids = torch.tensor([tokenizer.prefix_ids + tokenizer.encode(prompt)], device=device)
    out = model.to(device).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=_TEST_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.fill_id,
    )
    return f"Input: {prompt}\nCompletion: {tokenizer.decode(out[0, ids.shape[1] :].tolist())}"


# The command ------------------------------------------------------------------------------------------------------


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
