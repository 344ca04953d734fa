"""Export a Hugging Face LLaMA, with an adapter or without, to one GGUF file for llama.cpp.

    python -m convert.export_gguf --input_dir alpaca_out --output_file model.gguf --outtype q8_0

Types are those llama.cpp's own converter would choose: vectors (norms, biases) stay float32, every matrix gets
--outtype, and for q8_0 a matrix whose rows do not divide into blocks of 32 is float16. Blocks of rows go from the
weight files to the GGUF file; no tensor is held whole unless an adapter is merged into it.
"""

import argparse
import contextlib
import errno
import importlib
import logging
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from alpaca.adapters import is_adapter, open_adapter
from alpaca.errors import InputError, MissingInput, MissingPackage, NotEnoughSpace, NumbersOverflow, run_command
from alpaca.hf_files import (
    check_overwrite,
    fsync,
    list_folder,
    locked,
    require_all_weights,
    require_apart,
    require_free_space,
)
from alpaca.merging import QUANTIZATIONS, MergedWeights, open_merged
from convert.base_model import find_base
from convert.command_line import byte_bar
from convert.gguf_model import LlamaShape, Shape, expected_tensors, kind_of, read_shape, rotary_divisors
from convert.gguf_tokenizer import Vocabulary, read_vocabulary
from convert.layout import rotary_pairs
from convert.pickled_weights import Weights, open_weights

logger = logging.getLogger(__name__)

OUTTYPES = ("f16", "bf16", "f32", "q8_0")
_TORCH_TYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_QUANTIZED_MAX = 127 * torch.finfo(torch.float16).max  # a block's scale is its largest value / 127, as float16
_BLOCK_BYTES = 4 << 20
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


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One tensor of the GGUF file: its name, shape, type ("f32", "q8_0", …), and where it is read from.

    num_rotary_heads: heads whose rows are reordered; None for all but the query and key projections.
    """

    name: str
    shape: Shape
    kind: str
    read: Callable[[], torch.Tensor]
    num_rotary_heads: int | None = None

    @property
    def num_bytes(self) -> int:
        elements = math.prod(self.shape)
        return elements // 32 * 34 if self.kind == "q8_0" else elements * _TORCH_TYPES[self.kind].itemsize


def export(config: ExportConfig) -> Path:
    """Run the export and return the file. Raises the errors of `alpaca.errors`; changes nothing then."""
    gguf = _import_gguf()
    check_overwrite(config.output_file, config.overwrite, is_folder=False)
    source = open_source(config)
    inputs = {"--input_dir": config.input_dir, "--adapter": config.adapter, "the base model": source.folder}
    require_apart(config.output_file, inputs)
    weights = source.weights
    shape = read_shape(source.folder, added_rows=weights.num_added_rows if isinstance(weights, MergedWeights) else 0)
    plan = plan_tensors(shape, weights, config.outtype)
    vocabulary = read_vocabulary(source.tokenizer_folder, num_rows=shape.vocab_size, model_folder=source.folder)
    require_free_space(config.output_file, sum(placed.num_bytes for placed in plan) + _SPARE_BYTES)
    with _replaced_file(config.output_file, overwrite=config.overwrite) as partial:
        writer = gguf.GGUFWriter(partial, "llama")
        add_model(writer, shape, name=source.name, outtype=config.outtype)
        add_vocabulary(writer, vocabulary)
        checksums = write_tensors(writer, plan)
        if isinstance(weights, MergedWeights):
            weights.require_change()
            logger.info("%s", weights.describe())
        verify(partial, writer, plan, checksums)
    return config.output_file


def _import_gguf():
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise MissingPackage(f"GGUF files need the package gguf ({error}): pip install gguf==0.19.0") from error


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
    weights: Weights = open_weights(folder)
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


def plan_tensors(shape: LlamaShape, weights: Weights, outtype: str) -> list[Placed]:
    """What the file will hold, in order. Raises InputError when the folder's tensors are not those of its config."""
    gguf = _import_gguf()
    expected = expected_tensors(shape)
    _check_tensors(expected, weights, shape)
    name_map = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.num_layers)
    plan = []
    if shape.rope["rope_type"] == "llama3":
        divisors = rotary_divisors(shape)
        plan.append(Placed(name="rope_freqs.weight", shape=tuple(divisors.shape), kind="f32", read=lambda: divisors))
    rotary = {"q_proj": shape.num_heads, "k_proj": shape.num_kv_heads}
    for hf_name, size in expected.items():
        placed = Placed(
            name=name_map.get_name(hf_name, try_suffixes=(".weight", ".bias")),
            shape=size,
            kind=kind_of(size, outtype),
            read=lambda name=hf_name: weights.tensor(name),
            num_rotary_heads=rotary.get(hf_name.split(".")[-2]),
        )
        plan.append(placed)
    return plan


def _check_tensors(expected: dict[str, Shape], weights: Weights, shape: LlamaShape) -> None:
    found = {spec.name: spec for spec in weights.specs() if not spec.name.endswith("rotary_emb.inv_freq")}
    if shape.ties_embeddings:
        found.pop("lm_head.weight", None)  # transformers does not read it, either
    require_all_weights(weights.path, expected.keys() - found.keys())
    unknown = sorted(found.keys() - expected.keys())
    if unknown:
        raise InputError(f"{weights.path} holds tensors that its config.json does not call for: {unknown[:5]}")
    for name, size in expected.items():
        if found[name].shape != size or not found[name].dtype.is_floating_point:
            raise InputError(
                f"{weights.path}: config.json makes {name} {list(size)} floats, "
                f"the file has {list(found[name].shape)} of {found[name].dtype}"
            )


def encoded_blocks(placed: Placed) -> Iterator[memoryview]:
    """A tensor's bytes in the file, some rows at a time. Raises NumbersOverflow for values its type cannot hold."""
    for rows in _row_blocks(placed.read(), placed.num_rotary_heads):
        encoded = _quantized(rows, placed) if placed.kind == "q8_0" else _cast(rows, placed)
        yield memoryview(encoded.reshape(-1).view("uint8"))


def _row_blocks(tensor: torch.Tensor, num_rotary_heads: int | None) -> Iterator[torch.Tensor]:
    step = max(1, _BLOCK_BYTES // (4 * math.prod(tensor.shape[1:])))
    if num_rotary_heads is None:
        yield from tensor.split(step)
        return
    pairs = rotary_pairs(tensor, num_rotary_heads)
    for heads in pairs.split(max(1, step * num_rotary_heads // len(tensor))):
        yield heads.reshape(-1, *tensor.shape[1:])


def _cast(rows: torch.Tensor, placed: Placed):
    """Rows as numpy's; bfloat16, which numpy lacks, as its bits."""
    cast = rows.to(_TORCH_TYPES[placed.kind]).contiguous()
    low, high = torch.aminmax(cast)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        _refuse(rows, placed)
    return cast.view(torch.int16).numpy() if placed.kind == "bf16" else cast.numpy()


def _quantized(rows: torch.Tensor, placed: Placed):
    rows = rows.float()
    low, high = torch.aminmax(rows)
    if not (low >= -_QUANTIZED_MAX and high <= _QUANTIZED_MAX):
        _refuse(rows, placed)
    gguf = _import_gguf()
    return gguf.quants.quantize(rows.numpy(), gguf.GGMLQuantizationType.Q8_0)


def _refuse(rows: torch.Tensor, placed: Placed) -> None:
    rows = rows.float()
    if not torch.isfinite(rows).all():
        raise NumbersOverflow(f"{placed.name} holds infinity or NaN: the model is damaged")
    raise NumbersOverflow(
        f"{placed.name} holds {rows.abs().max():g}, more than {placed.kind} can; pass --outtype bf16 or f32"
    )


# The file -------------------------------------------------------------------------------------------------------


def add_model(writer, shape: LlamaShape, *, name: str, outtype: str) -> None:
    """What llama.cpp must know of the model besides its tensors."""
    gguf = _import_gguf()
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[outtype]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(shape.max_context)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.ffn_width)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_width)
    writer.add_value_length(shape.head_width)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_rope_freq_base(float(shape.rope["rope_theta"]))
    if shape.rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(shape.rope["factor"]))


def add_vocabulary(writer, vocabulary: Vocabulary) -> None:
    """The tokenizer."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for name, token_id in vocabulary.token_ids.items():
        getattr(writer, f"add_{name}_token_id")(token_id)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.adds_space)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


@dataclass
class _Stream:
    """What GGUFWriter.write_tensor_data asks of an array, `nbytes` and `tofile`, without the array."""

    placed: Placed
    progress: Callable[[int], object]
    checksum: int = field(default=0, init=False)

    @property
    def nbytes(self) -> int:
        return self.placed.num_bytes

    def tofile(self, file) -> None:
        written = 0
        for block in encoded_blocks(self.placed):
            file.write(block)
            self.checksum = zlib.crc32(block, self.checksum)
            written += len(block)
            self.progress(len(block))
        assert written == self.nbytes, self.placed


def write_tensors(writer, plan: list[Placed]) -> list[int]:
    """Write the file, fsynced and closed, and return each tensor's CRC-32."""
    gguf = _import_gguf()
    for placed in plan:
        kind = gguf.GGMLQuantizationType[placed.kind.upper()]
        writer.add_tensor_info(placed.name, placed.shape, None, placed.num_bytes, raw_dtype=kind)
    checksums = []
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with byte_bar(sum(placed.num_bytes for placed in plan), "exporting") as bar:
            for placed in plan:
                stream = _Stream(placed, bar.update)
                writer.write_tensor_data(stream)
                checksums.append(stream.checksum)
        writer.flush()
        os.fsync(writer.fout[0].fileno())
    finally:
        with contextlib.suppress(OSError):  # of a full disk; it was raised above
            writer.close()
    return checksums


def verify(path: Path, writer, plan: list[Placed], checksums: list[int]) -> None:
    """Read the file as others will and compare all of it with what was meant. Raises InputError."""
    reader = _open_reader(path)
    wrong = [key for key, value in writer.kv_data[0].items() if not _reads_back(reader.get_field(key), value.value)]
    with byte_bar(sum(placed.num_bytes for placed in plan), "verifying") as bar:
        for placed, checksum, tensor in zip(plan, checksums, reader.tensors, strict=True):
            said = (tensor.name, tuple(reversed(tensor.shape.tolist())), tensor.tensor_type.name.lower())
            if said != (placed.name, placed.shape, placed.kind) or zlib.crc32(tensor.data) != checksum:
                wrong.append(placed.name)
            bar.update(placed.num_bytes)
    if wrong:
        raise InputError(
            f"the file reads back otherwise than it was written ({', '.join(wrong[:5])}): the disk may be failing. "
            "Nothing was changed; write it to another disk"
        )


def _open_reader(path: Path):
    """gguf's reader on plain arrays: it keeps two for each token and merge, which as np.memmap weigh thrice as much."""
    gguf = _import_gguf()

    class Reader(gguf.GGUFReader):
        @property
        def data(self):
            return self._data

        @data.setter
        def data(self, mapped) -> None:
            self._data = mapped.view(type=np.ndarray)

    return Reader(path)


def _reads_back(found, meant: object) -> bool:
    if found is None:
        return False
    contents = found.contents()
    if isinstance(meant, float) or (isinstance(meant, list) and meant and isinstance(meant[0], float)):
        return bool(torch.equal(torch.tensor(contents, dtype=torch.float32), torch.tensor(meant, dtype=torch.float32)))
    return contents == meant


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
            partial.unlink(missing_ok=True)


# The command ----------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None = None) -> ExportConfig:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m convert.export_gguf",
        description="Export a Hugging Face LLaMA to a GGUF file for llama.cpp.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--input_dir", type=Path, default=Path("alpaca_out"), help="the model's folder, or an adapter's alone")
    add("--adapter", type=Path, help="folder of an adapter to merge on the way")
    add("--output_file", type=Path, required=True, help="such as model.gguf")
    add("--outtype", choices=OUTTYPES, default="f16", help="of the matrices (vectors are f32); default: f16")
    add(
        "--base_quantization",
        choices=QUANTIZATIONS,
        help="precision of the adapter's base in training (default: as train.py wrote it down, else none)",
    )
    add("--overwrite", action="store_true", help="replace an existing output")
    return ExportConfig(**vars(parser.parse_args(arguments)))


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("gguf").setLevel(logging.WARNING)
    config = parse_arguments()
    start = time.perf_counter()
    target = export(config)
    print(f"wrote {target} ({target.stat().st_size / 1e9:.2f} GB) in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run_command(main)
