"""A Hugging Face LLaMA, with an adapter or without, as one GGUF file: what goes in, in which order and type."""

import contextlib
import errno
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from alpaca.architecture.description import ModelDescription
from alpaca.architecture.inventory import check_tensors
from alpaca.architecture.tensors import module_name
from alpaca.errors import InputError, MissingInput, NotEnoughSpace, undisturbed
from alpaca.files.atomic import fsync
from alpaca.files.locks import locked
from alpaca.files.model_folders import is_adapter
from alpaca.files.outputs import check_overwrite, require_apart, require_free_space
from alpaca.files.reading import list_folder
from alpaca.formats.gguf.model import kind_of, rotary_divisors, supports
from alpaca.formats.gguf.tensors import Placed, import_gguf
from alpaca.formats.gguf.tokenizer import read_vocabulary
from alpaca.formats.gguf.writer import add_model, add_vocabulary, verify, write_tensors
from alpaca.formats.hf.adapters import open_adapter
from alpaca.formats.hf.base_model import find_base
from alpaca.formats.hf.folder import FLOAT_DTYPES, read_description
from alpaca.formats.hf.merging import MergedWeights, open_merged
from alpaca.formats.hf.pickled import Weights, as_stored, open_model_weights

logger = logging.getLogger(__name__)
OUTTYPES = ("f16", "bf16", "f32", "q8_0")
_SPARE_BYTES = 64 << 20  # tokens, merges, file system


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The command's flags."""

    input_dir: Path
    adapter: Path | None
    output_file: Path
    outtype: str
    base_quantization: str | None
    overwrite: bool


@dataclass(frozen=True)
class Source:
    """An opened model: `folder` has config.json; `tokenizer_folder` may be the adapter's."""

    folder: Path
    weights: Weights
    tokenizer_folder: Path
    name: str


def export(config: ExportConfig) -> Path:
    """Run the export and return the file. Raises the errors of `alpaca.errors`; changes nothing then."""
    gguf = import_gguf()
    check_overwrite(config.output_file, config.overwrite, is_folder=False)
    source = open_source(config)
    inputs = {"--input_dir": config.input_dir, "--adapter": config.adapter, "the base model": source.folder}
    require_apart(config.output_file, inputs)
    weights = source.weights
    model = _read_model(source)
    plan = plan_tensors(model, weights, config.outtype)
    vocabulary = read_vocabulary(source.tokenizer_folder, num_rows=model.vocab_size, model_folder=source.folder)
    require_free_space(config.output_file, sum(placed.num_bytes for placed in plan) + _SPARE_BYTES)
    with _replaced_file(config.output_file, overwrite=config.overwrite) as partial:
        writer = gguf.GGUFWriter(partial, "llama")
        add_model(writer, model, name=source.name, outtype=config.outtype)
        add_vocabulary(writer, vocabulary)
        checksums = write_tensors(writer, plan)
        if isinstance(weights, MergedWeights):
            weights.require_change()
            logger.info("%s", weights.describe())
        verify(partial, writer, plan, checksums)
    return config.output_file


# What goes in ---------------------------------------------------------------------------------------------------


def open_source(config: ExportConfig) -> Source:
    """The model with its adapter, if there is one. Raises MissingInput, InputError.

    An adapter's merge is computed in float32 and rounded once, to the file's type. The tokenizer is the adapter's where
    it holds one: that is the one it was trained with.
    """
    folder, adapter = config.input_dir, config.adapter
    if adapter is None and is_adapter(folder):
        adapter = folder
        found = find_base(open_adapter(adapter), flag="--input_dir, beside --adapter")
        folder = found.folder
        logger.info("base: %s", found.note)
    weights: Weights = open_model_weights(folder, dtype=torch.float32)  # what was saved quantized is rounded once, too
    if adapter is None:
        return Source(folder, weights, folder, folder.resolve().name)
    if not is_adapter(adapter):
        raise MissingInput(f"--adapter {adapter} has no adapter_config.json; found there: {list_folder(adapter)}")
    merged = open_merged(
        weights,
        adapter,
        quantization=config.base_quantization,
        dtype=torch.float32,
        device="cuda" if torch.cuda.is_available() else "cpu",
        base_is_named=config.adapter is not None,
    )
    has_tokenizer = any((adapter / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))
    return Source(folder, merged, adapter if has_tokenizer else folder, adapter.resolve().name)


# The tensors ----------------------------------------------------------------------------------------------------


def _read_model(source: Source) -> ModelDescription:
    """The model in the source's folder, with the embedding rows that an adapter adds. Raises InputError."""
    model = read_description(source.folder, only="llama")
    if reason := supports(model):
        raise InputError(f"{source.folder}: {reason}")
    added = source.weights.num_added_rows if isinstance(source.weights, MergedWeights) else 0
    return as_stored(model.with_vocab(model.vocab_size + added), source.weights)


def plan_tensors(model: ModelDescription, weights: Weights, outtype: str) -> list[Placed]:
    """What the file will hold, in order. Raises InputError when the folder's tensors are not those of its config."""
    gguf = import_gguf()
    _check_tensors(model, weights)
    name_map = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.num_layers)
    plan = []
    if model.rope.kind == "llama3":
        divisors = rotary_divisors(model)
        plan.append(Placed(name="rope_freqs.weight", shape=tuple(divisors.shape), kind="f32", read=lambda: divisors))
    heads_of = {"query": model.num_heads, "key": model.num_kv_heads}
    rotary = {module_name(role, layer): heads for layer in range(model.num_layers) for role, heads in heads_of.items()}
    for name, shape in model.tensor_shapes().items():
        placed = Placed(
            name=name_map.get_name(name, try_suffixes=(".weight", ".bias")),
            shape=shape,
            kind=kind_of(shape, outtype),
            read=lambda name=name: weights.tensor(name),
            num_rotary_heads=rotary.get(name.rpartition(".")[0]),
        )
        plan.append(placed)
    return plan


def _check_tensors(model: ModelDescription, weights: Weights) -> None:
    specs = weights.specs()
    check_tensors(model, {spec.name: spec.shape for spec in specs}, where=str(weights.path))
    whole = [spec for spec in specs if not spec.dtype.is_floating_point]
    if whole:
        raise InputError(
            f"{weights.path}: {whole[0].name} is {whole[0].dtype}, expected floats ({', '.join(FLOAT_DTYPES)})"
        )


@contextlib.contextmanager
def _replaced_file(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new file beside `target`, which takes its place when the block ends without an error, else is removed.

    Raises OutputExists, NotEnoughSpace.
    """
    partial = target.with_name(f".{target.name}.partial")
    with locked(target):
        check_overwrite(target, overwrite, is_folder=False)
        try:
            yield partial
            partial.replace(target)
            fsync(target.parent)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise NotEnoughSpace(f"the disk ran full while {target} was written; nothing was changed") from error
        finally:
            with undisturbed():
                partial.unlink(missing_ok=True)
