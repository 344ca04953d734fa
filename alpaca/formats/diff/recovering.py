"""Recovers a fine-tuned model from a base and a difference, and proves it bit by bit."""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from alpaca.errors import InputError, NotEnoughSpace
from alpaca.files.atomic import replaced_folder, write_json
from alpaca.files.outputs import check_overwrite, require_apart, require_free_space
from alpaca.files.progress import byte_bar
from alpaca.formats.diff.arithmetic import Recovery, total_bytes
from alpaca.formats.diff.making import SPARE_BYTES, copy_small_files, only_recover
from alpaca.formats.diff.manifest import Stored, differing, dtype_name
from alpaca.formats.diff.trying import try_model
from alpaca.formats.hf.folder import FLOAT_DTYPES, TensorSpec, WeightsFolder
from alpaca.formats.hf.writing import write_weights
from alpaca.memory import free_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RecoverConfig:
    """The flags of `recover`. test_inference: whether to test the model; None tests it where memory allows."""

    path_raw: Path
    path_diff: Path
    path_tuned: Path | None = None
    device: str = "cpu"
    test_inference: bool | None = None
    check_integrity_naively: bool = True
    dtype: str = "auto"
    max_shard_size: int = 5 * 10**9
    overwrite: bool = False


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
        require_free_space(target, total_bytes(source.specs) + SPARE_BYTES)
    source.check_base()
    tensors: dict[str, torch.Tensor] | None = None
    if target:
        with replaced_folder(target, overwrite=config.overwrite) as partial:
            _write_recovered(partial, source, config)
    else:
        tensors = only_recover(source, keep=wants_test)
    if wants_test:
        print(try_model(target or config.path_diff, config.device, tensors, source.config))
    return target


def _cast(source: Recovery, spec: TensorSpec, written: dict[str, Stored]) -> Iterator[torch.Tensor]:
    """A recovered tensor in the type in which it is written; its digest is noted on the way."""
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
    copy_small_files(source.diff.path, folder)
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


# Trying the model -------------------------------------------------------------------------------------------------


def _plan_test(config: RecoverConfig, source: Recovery) -> bool:
    """Whether to test the model. Raises NotEnoughSpace when a test was asked for and memory is short."""
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
