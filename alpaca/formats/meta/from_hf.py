"""From a Hugging Face LLaMA to a checkpoint as Meta ships one: consolidated.NN.pth, params.json and checklist.chk."""

import contextlib
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from alpaca.architecture.description import ModelDescription
from alpaca.architecture.inventory import check_tensors
from alpaca.architecture.tensors import hf_name, is_rotary_table
from alpaca.errors import InputError, MissingInput
from alpaca.files.atomic import replaced_folder, write_json
from alpaca.files.model_folders import is_adapter
from alpaca.files.outputs import check_overwrite, require_apart, require_free_space
from alpaca.files.progress import byte_bar
from alpaca.files.reading import list_folder
from alpaca.formats.hf.adapters import open_adapter
from alpaca.formats.hf.base_model import find_base
from alpaca.formats.hf.folder import FLOAT_DTYPES, TensorSpec, read_description, require_all_weights
from alpaca.formats.hf.merging import MergedWeights, open_merged
from alpaca.formats.hf.pickled import Weights, as_stored, open_model_weights
from alpaca.formats.meta import checkpoint as meta_files
from alpaca.formats.meta import layout, sharding
from alpaca.formats.meta import params as meta_params
from alpaca.formats.meta.torch_zip import TensorFileWriter
from alpaca.text.sentencepiece import SentencePieceTokenizer, is_sentencepiece
from alpaca.text.tiktoken import TIKTOKEN_FILE, TiktokenModel, is_tiktoken

_TABLES = (hf_name("embedding"), hf_name("head"))
_ROTARY_TABLE = "rope.freqs"  # LLaMA 1 and 2 ship it; the model computes it anew
_TOKENIZER_FILE = "tokenizer.model"
_SPARE_BYTES = 16 << 20  # params, tokenizer, pickles, file system


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The command's flags."""

    input_dir: Path
    adapter: Path | None
    output_dir: Path
    num_shards: int | None
    dtype: str
    base_quantization: str | None
    tokenizer_model: Path | None
    keep_added_tokens: bool
    overwrite: bool


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened model: where its tensors come from, its shape without the rows that are cut, and what goes where.

    num_cut: rows of the embedding that are left out.
    """

    weights: Weights | MergedWeights
    model: ModelDescription
    params: dict[str, object]
    shape: ModelDescription
    placements: list[layout.Placement]
    tokenizer_file: Path
    has_tiktoken: bool
    num_cut: int

    def tensor(self, placement: layout.Placement) -> torch.Tensor:
        """A whole tensor in Hugging Face's order, without the rows that are cut; a tied head is the embedding."""
        name = placement.hf_name
        if name == hf_name("head") and self.model.ties_embeddings:
            name = _TABLES[0]
        whole = self.weights.tensor(name)
        return whole[: self.shape.vocab_size] if name in _TABLES else whole


def export(config: ExportConfig) -> Path:
    """Write the checkpoint and return its folder. Raises the errors of `alpaca.errors`; writes nothing then."""
    check_overwrite(config.output_dir, config.overwrite)
    source = open_source(config)
    num_shards = config.num_shards or meta_params.usual_shards(source.shape)
    shards = shard_specs(source, num_shards, FLOAT_DTYPES.get(config.dtype))
    require_free_space(config.output_dir, sum(spec.num_bytes for specs in shards for spec in specs) + _SPARE_BYTES)
    _say(source, num_shards)
    with replaced_folder(config.output_dir, overwrite=config.overwrite) as partial:
        _write_shards(partial, source, shards)
        if isinstance(source.weights, MergedWeights):
            source.weights.require_change()
            print(source.weights.describe())
        write_json(partial / "params.json", source.params)
        shutil.copyfile(source.tokenizer_file, partial / _TOKENIZER_FILE)
        meta_files.write_checklist(partial / "tokenizer_checklist.chk", [partial / _TOKENIZER_FILE])
        files = [*meta_files.find_shards(partial), partial / "params.json"]
        with byte_bar(sum(file.stat().st_size for file in files), "md5") as bar:
            meta_files.write_checklist(partial / "checklist.chk", files, bar.update)
        _verify(partial, source, shards)
    return config.output_dir


def open_source(config: ExportConfig) -> Source:
    """Open the model, the adapter and the tokenizer, and hold them against each other."""
    base, adapter = config.input_dir, config.adapter
    if adapter is None and is_adapter(base):
        adapter = base
        found = find_base(open_adapter(adapter), flag="--input_dir, beside --adapter")
        base = found.folder
        print(f"base: {found.note}")
    tokenizer_file = _find_tokenizer(config, [folder for folder in (adapter, base) if folder])
    inputs = {"--input_dir": config.input_dir, "--adapter": adapter, "the base model": base}
    require_apart(config.output_dir, {**inputs, "the tokenizer": tokenizer_file})
    model = read_description(base, only="llama")
    if reason := meta_params.supports(model):
        raise InputError(f"{base}: {reason}")
    weights = _open_tensors(config, base, adapter)
    model = as_stored(model, weights)
    num_tokens, has_tiktoken = _count_tokens(tokenizer_file)
    stored = _stored_rows(weights)
    if stored < num_tokens:
        raise InputError(
            f"{tokenizer_file} has {num_tokens} tokens, the embedding of {base} {stored} rows: "
            "this is another model's tokenizer"
        )
    num_rows = stored if config.keep_added_tokens else num_tokens
    shape = meta_params.meta_shape(model, num_rows=num_rows)
    placements = layout.placements(shape, embedding_axis=0 if has_tiktoken else 1)
    _check_tensors(weights, model.with_vocab(stored))
    params = meta_params.make_params(model, shape, has_tiktoken=has_tiktoken, known_vocab=num_rows == num_tokens)
    return Source(
        weights=weights, model=model, params=params, shape=shape, placements=placements,
        tokenizer_file=tokenizer_file, has_tiktoken=has_tiktoken, num_cut=stored - num_rows,
    )  # fmt: skip


def _open_tensors(config: ExportConfig, base: Path, adapter: Path | None) -> Weights | MergedWeights:
    """The base's tensors, with the adapter merged into them as they are read."""
    weights = open_model_weights(base)
    if adapter is None:
        return weights
    return open_merged(
        weights,
        adapter,
        quantization=config.base_quantization,
        dtype=FLOAT_DTYPES.get(config.dtype),
        device="cuda" if torch.cuda.is_available() else "cpu",
        base_is_named=config.adapter is not None,
    )


def _find_tokenizer(config: ExportConfig, folders: list[Path]) -> Path:
    """Meta's own file: the one named, else beside the adapter or the base. Raises MissingInput."""
    if config.tokenizer_model is not None:
        if not config.tokenizer_model.is_file():
            raise MissingInput(f"no file {config.tokenizer_model}; --tokenizer_model names Meta's tokenizer.model")
        return config.tokenizer_model
    files = (folder / name for folder in folders for name in (_TOKENIZER_FILE, TIKTOKEN_FILE))
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        listed = "; ".join(f"in {folder}: {list_folder(folder)}" for folder in folders)
        raise MissingInput(f"no {_TOKENIZER_FILE} ({listed}): Meta's code reads no other; name it by --tokenizer_model")
    return found


def _count_tokens(file: Path) -> tuple[int, bool]:
    """The tokens Meta's own tokenizer has, and whether it is Llama 3's kind."""
    if is_tiktoken(file):
        return TiktokenModel(file).size, True
    if is_sentencepiece(file):
        return SentencePieceTokenizer(file).size, False
    raise InputError(f"{file} is neither a SentencePiece model (LLaMA 1, 2) nor a tiktoken file (Llama 3)")


def _stored_rows(weights: Weights | MergedWeights) -> int:
    rows = next((spec.shape[0] for spec in weights.specs() if spec.name == _TABLES[0]), None)
    if rows is None:
        require_all_weights(weights.path, [_TABLES[0]])
    return rows or 0


def _check_tensors(weights: Weights | MergedWeights, model: ModelDescription) -> None:
    """Every tensor that config.json calls for is there, in its shape and in one float dtype. Raises InputError."""
    specs = weights.specs()
    check_tensors(model, {spec.name: spec.shape for spec in specs}, where=str(weights.path))
    for spec in specs:
        if spec.dtype not in FLOAT_DTYPES.values() and not is_rotary_table(spec.name):
            raise InputError(f"{weights.path}: {spec.name} is {spec.dtype}, expected one of {', '.join(FLOAT_DTYPES)}")


def shard_specs(source: Source, num_shards: int, dtype: torch.dtype | None) -> list[list[TensorSpec]]:
    """What each file will hold; all hold the same shapes. Raises InputError where a tensor does not divide."""
    own = {spec.name: spec.dtype for spec in source.weights.specs()}
    try:
        specs = [
            TensorSpec(
                name=place.meta_name,
                shape=layout.shard_shape(place, num_shards),
                dtype=dtype or own.get(place.hf_name, own[_TABLES[0]]),
            )
            for place in source.placements
        ]
    except InputError as error:
        raise InputError(f"{error}; choose another --num_shards") from error
    if not source.has_tiktoken:
        width = source.shape.head_width // 2
        specs.append(TensorSpec(name=_ROTARY_TABLE, shape=(width,), dtype=specs[0].dtype))
    return [specs for _ in range(num_shards)]


def rotary_table(shape: ModelDescription) -> torch.Tensor:
    """The frequencies as Meta's model.py computes them, float32 [d/2]."""
    d = shape.head_width
    return 1.0 / (shape.rope.theta ** (torch.arange(0, d, 2)[: d // 2].float() / d))


def _write_shards(folder: Path, source: Source, shards: list[list[TensorSpec]]) -> None:
    total = sum(spec.num_bytes for specs in shards for spec in specs)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(byte_bar(total, "exporting"))
        files = [
            stack.enter_context(TensorFileWriter(folder / f"consolidated.{rank:02d}.pth", specs))
            for rank, specs in enumerate(shards)
        ]
        for place in source.placements:
            whole = sharding.metas_order(place, source.tensor(place))
            for rank, file in enumerate(files):
                file.write(sharding.shard_part(place, whole, rank, len(files)), bar.update)
        if not source.has_tiktoken:
            for file in files:
                file.write(rotary_table(source.shape), bar.update)


def _verify(folder: Path, source: Source, shards: list[list[TensorSpec]]) -> None:
    """Open the files as the converter will; the first and last layer and what is outside must be what was meant."""
    opened = [meta_files.open_shard(file) for file in meta_files.find_shards(folder)]
    assert len(opened) == len(shards)
    shapes = [{name: tuple(tensor.shape) for name, tensor in shard.items()} for shard in opened]
    found, _ = layout.read_shape(meta_files.read_params(folder), shapes)
    assert replace(found, ties_embeddings=source.shape.ties_embeddings) == source.shape, (found, source.shape)
    inner = tuple(f"layers.{number}." for number in range(1, source.shape.num_layers - 1))
    for place in source.placements:
        if place.meta_name.startswith(inner):
            continue
        parts = [shard[place.meta_name] for shard in opened]
        meant, row = source.tensor(place).to(parts[0].dtype), 0
        for block in sharding.row_blocks(place, parts, parts[0].dtype):
            block = block.reshape(-1, *meant.shape[1:])
            if not torch.equal(block, meant[row : row + len(block)]):
                raise InputError(f"{folder}: {place.meta_name} reads back as other values; is the disk damaged?")
            row += len(block)


def _say(source: Source, num_shards: int) -> None:
    release = meta_params.release_of(source.model, source.params, has_tiktoken=source.has_tiktoken)
    print(f"{source.weights.path}: {num_shards} shard{'s' * (num_shards > 1)}, {source.shape.vocab_size} tokens")
    if isinstance(source.weights, MergedWeights):
        quantized = source.weights.quantization
        note = "" if quantized == "none" else f", the base taken as {quantized} has it, as in training"
        print(f"merging: {source.weights.adapter.describe()}{note}")
    if source.num_cut:
        first = source.shape.vocab_size
        print(
            f"left out: {source.num_cut} embedding rows from id {first} on, for which {source.tokenizer_file} has no "
            "token (fine-tuning added them, [PAD] for one); --keep_added_tokens keeps them"
        )
    context = source.model.max_context
    if context != release.context:
        print(
            f"params.json cannot say that the context is {context}: {release.name} has {release.context}; "
            f"on the way back give --max_position_embeddings {context}"
        )
