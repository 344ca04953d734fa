"""Makes the difference of a fine-tuned model to its base, laid out as Stanford's, with a manifest to prove it by.

The folder is a Hugging Face model whose weights are tuned - raw in float32, where a raw model without [PAD] gets the
mean of its rows for it. Beside it lie a manifest and the residual, with which every bit of the tuned model comes back.
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from alpaca.errors import InputError, MissingInput
from alpaca.files.atomic import replaced_folder, write_json
from alpaca.files.outputs import check_overwrite, require_apart, require_free_space
from alpaca.files.progress import byte_bar
from alpaca.files.reading import list_folder, read_json
from alpaca.formats.diff.arithmetic import (
    Differences,
    Recovery,
    check_match,
    model_specs,
    open_model,
    total_bytes,
    with_dtype,
)
from alpaca.formats.diff.manifest import write_manifest
from alpaca.formats.diff.residual import RESIDUAL_NAME, ResidualWriter
from alpaca.formats.hf.folder import TensorSpec
from alpaca.formats.hf.writing import write_weights
from alpaca.text.sentencepiece import LLAMA_TOKENIZER_FILES
from alpaca.text.tiktoken import TIKTOKEN_FILE

logger = logging.getLogger(__name__)
SPARE_BYTES = 16 << 20  # configs, tokenizer, manifest, file system
_VOCABULARY_FILES = ("tokenizer.model", "tokenizer.json", "vocab.json", "spiece.model")  # one of them is a tokenizer
_COPIED_FILES = (
    *LLAMA_TOKENIZER_FILES, TIKTOKEN_FILE, "added_tokens.json", "vocab.json", "merges.txt", "spiece.model",
    "chat_template.jinja", "prompt_template.json", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DiffConfig:
    """The flags of `make_diff`."""

    path_raw: Path
    path_tuned: Path
    path_diff: Path
    device: str = "cpu"
    max_shard_size: int = 5 * 10**9
    overwrite: bool = False


# What both do first ---------------------------------------------------------------------------------------------


def copy_small_files(source: Path, target: Path) -> None:
    if not any((source / name).is_file() for name in _VOCABULARY_FILES):
        raise MissingInput(
            f"no tokenizer in {source} (found: {list_folder(source)}); copy the model's tokenizer files into it"
        )
    for name in _COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


# make_diff --------------------------------------------------------------------------------------------------------


def make_diff(config: DiffConfig) -> Path:
    """Write the diff folder and return it. After any error of `alpaca.errors` nothing has changed on disk."""
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
    require_free_space(config.path_diff, int(1.1 * total_bytes(specs)) + SPARE_BYTES)  # a tenth for the residual
    with replaced_folder(config.path_diff, overwrite=config.overwrite) as partial:
        copy_small_files(tuned.path, partial)
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
    """Recover the model from the written diff, without keeping it, so that no diff is published that does not work."""
    source = Recovery(path_raw, folder, dtype=None, check_sum=False)
    try:
        only_recover(source, keep=False, label="proving")
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


def only_recover(source: Recovery, *, keep: bool, label: str = "adding") -> dict[str, torch.Tensor] | None:
    """Read all tensors, which checks them, and keep them to test the model with."""
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
