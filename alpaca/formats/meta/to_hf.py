"""From Meta's checkpoint to a Hugging Face folder.

Blocks of rows go from the memory-mapped pickles straight to safetensors: memory does not depend on the model's size,
and the values arrive bit for bit unless another type is asked for.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from alpaca.architecture.description import ModelDescription
from alpaca.errors import InputError, OutputExists
from alpaca.files.atomic import replaced_folder, write_json
from alpaca.files.outputs import check_overwrite, require_apart, require_free_space
from alpaca.files.progress import byte_bar
from alpaca.formats.hf.folder import FLOAT_DTYPES, TensorSpec, WeightsFolder
from alpaca.formats.hf.writing import write_weights
from alpaca.formats.meta import checkpoint as meta_files
from alpaca.formats.meta import layout, releases, sharding
from alpaca.text.chat.files import TEMPLATE_FILE, known_template
from alpaca.text.sentencepiece import LLAMA_TOKENIZER_FILES, SentencePieceTokenizer, is_sentencepiece
from alpaca.text.tiktoken import TIKTOKEN_FILE, TIKTOKEN_TOKENIZER_FILES, TiktokenModel, is_tiktoken

_CHAT_TEMPLATES = {"2": "llama2", **dict.fromkeys(("3", "3.1", "3.2"), "llama3")}
_SPARE_BYTES = 16 << 20  # configs, tokenizer, file system


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """The command's flags."""

    input_dir: Path
    model_size: str | None
    output_dir: Path
    llama_version: str | None
    instruct: bool
    num_shards: int | None
    dtype: str
    max_shard_size: int
    max_position_embeddings: int | None
    skip_checksums: bool
    overwrite: bool


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: every shard's tensors (memory-mapped), its shape and release, and what goes where.

    chat_template: the one of an Instruct or Chat release; None for base models.
    """

    shards: list[dict[str, torch.Tensor]]
    params: dict[str, object]
    shape: ModelDescription
    release: releases.Release
    placements: list[layout.Placement]
    tokenizer: SentencePieceTokenizer | TiktokenModel
    chat_template: Path | None = None

    @property
    def eos_ids(self) -> int | list[int]:
        """The value of eos_token_id in the configs: one id, or the list of all ids that end an answer."""
        ids = self.tokenizer.eos_ids if isinstance(self.tokenizer, TiktokenModel) else []
        return ids if len(ids) > 1 else self.tokenizer.eos_id


def convert(config: ConvertConfig) -> Path:
    """Run the conversion and return the model's folder. Raises the errors of `alpaca.errors`; writes nothing then."""
    folder = meta_files.find_checkpoint(config.input_dir, config.model_size)
    target = config.output_dir / output_name(folder, config.model_size)
    check_overwrite(target, config.overwrite)
    shard_files = meta_files.find_shards(folder)
    tokenizer_file = meta_files.find_tokenizer(config.input_dir, folder)
    for output in (target, config.output_dir / "tokenizer"):
        inputs = {"the checkpoint": folder, "the tokenizer": tokenizer_file, "--input_dir": config.input_dir}
        require_apart(output, inputs)
    if not config.skip_checksums:
        _verify_checksums(folder, tokenizer_file)
    source = open_source(folder, shard_files, tokenizer_file, config)
    specs = output_specs(source, FLOAT_DTYPES.get(config.dtype))
    check_tokenizer_folder(config, source)
    require_free_space(target, sum(spec.num_bytes for spec in specs) + _SPARE_BYTES)
    print(f"{folder}: {source.release.name}, {len(shard_files)} file(s), context {_context(source, config):,}")
    with replaced_folder(target, overwrite=config.overwrite) as partial:
        _write_model(partial, source, specs, config)
    with replaced_folder(config.output_dir / "tokenizer", overwrite=True) as partial:
        for name in _tokenizer_files(source):
            shutil.copyfile(target / name, partial / name)
    return target


def output_name(folder: Path, model_size: str | None) -> str:
    """The model folder's name: llama-7b for 7B; a name that has llama in it as it is, in lower case."""
    name = (model_size or _own_name(folder)).lower()
    return name if "llama" in name else f"llama-{name}"


def _own_name(folder: Path) -> str:
    """The checkpoint's name: its folder's, or that of the Hugging Face repository it lies in."""
    folder = folder.absolute()
    return folder.parent.name if folder.name == "original" else folder.name


def open_source(folder: Path, shard_files: list[Path], tokenizer_file: Path, config: ConvertConfig) -> Source:
    """Open the shards and hold them against params.json, the flags and the tokenizer. Raises InputError."""
    if config.num_shards not in (None, len(shard_files)):
        raise InputError(f"--num_shards {config.num_shards}, but {folder} holds {len(shard_files)} consolidated.*.pth")
    shards = [meta_files.open_shard(path) for path in shard_files]
    params = meta_files.read_params(folder)
    shape, axis = layout.read_shape(params, [{n: tuple(t.shape) for n, t in shard.items()} for shard in shards])
    releases.check_size(config.model_size or _own_name(folder), shape)
    _check_dtypes(layout.placements(shape), shards)
    shape = replace(shape, ties_embeddings=_ties_embeddings(params, shape, axis, shards))
    release = releases.find_release(
        params,
        requested=config.llama_version,
        has_tiktoken=is_tiktoken(tokenizer_file),
        is_tied=shape.ties_embeddings,
    )
    is_instruct = config.instruct or any(word in _own_name(folder).lower() for word in ("instruct", "chat"))
    tokenizer = _open_tokenizer(tokenizer_file, release, is_instruct=is_instruct)
    if tokenizer.size != shape.vocab_size:
        raise InputError(
            f"{tokenizer_file} has {tokenizer.size} tokens, the checkpoint's embedding {shape.vocab_size} rows: "
            "this is another model's tokenizer"
        )
    placements = layout.placements(shape, embedding_axis=axis)
    template = _find_chat_template(release) if is_instruct else None
    return Source(shards, params, shape, release, placements, tokenizer, template)


def _find_chat_template(release: releases.Release) -> Path | None:
    """The format of conversations that the Chat and Instruct models of a release were trained on."""
    name = _CHAT_TEMPLATES.get(release.version)
    return None if name is None else known_template(name).file


def _open_tokenizer(
    file: Path, release: releases.Release, *, is_instruct: bool
) -> SentencePieceTokenizer | TiktokenModel:
    if is_tiktoken(file):
        return TiktokenModel(file, version=release.version, instruct=is_instruct)
    if not is_sentencepiece(file):
        raise InputError(
            f"{file} is not a SentencePiece model (LLaMA 1, 2) and not a tiktoken file (Llama 3); expected Meta's own"
        )
    return SentencePieceTokenizer(file)


def _check_dtypes(placements: list[layout.Placement], shards: list[dict[str, torch.Tensor]]) -> None:
    for place in placements:
        found = {shard[place.meta_name].dtype for shard in shards}
        if len(found) > 1 or not found <= set(FLOAT_DTYPES.values()):
            names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
            raise InputError(
                f"{place.meta_name!r} is {names}; expected one of {', '.join(FLOAT_DTYPES)} in all shards. "
                "Quantized checkpoints are not converted: take the release in bfloat16"
            )


def _ties_embeddings(
    params: dict[str, object], shape: ModelDescription, axis: int, shards: list[dict[str, torch.Tensor]]
) -> bool:
    """Whether the head is the embedding: it is not there, or a copy of it, where a release has it so (Llama 3.2)."""
    if shape.ties_embeddings or not releases.scales_rope(params):
        return shape.ties_embeddings
    places = layout.placements(shape, embedding_axis=axis)
    return sharding.are_equal(places[0], places[-1], shards)


def output_specs(source: Source, dtype: torch.dtype | None) -> list[TensorSpec]:
    """Names, shapes and types of what will be written; `dtype` None keeps each tensor's own."""
    first = source.shards[0]
    return [
        TensorSpec(name=place.hf_name, shape=place.shape, dtype=dtype or first[place.meta_name].dtype)
        for place in source.placements
    ]


def check_tokenizer_folder(config: ConvertConfig, source: Source) -> None:
    """Raise OutputExists when output_dir/tokenizer holds another model's tokenizer and may not be overwritten."""
    folder = config.output_dir / "tokenizer"
    existing = [folder / name for name in ("tokenizer.model", TIKTOKEN_FILE) if (folder / name).is_file()]
    if not existing:
        check_overwrite(folder, config.overwrite)
    elif existing[0].read_bytes() != source.tokenizer.model_file.read_bytes() and not config.overwrite:
        raise OutputExists(f"{existing[0]} is another model's; pass --overwrite, or choose another --output_dir")


def _tokenizer_files(source: Source) -> tuple[str, ...]:
    names = TIKTOKEN_TOKENIZER_FILES if isinstance(source.tokenizer, TiktokenModel) else LLAMA_TOKENIZER_FILES
    return names if source.chat_template is None else (*names, TEMPLATE_FILE)


def _verify_checksums(folder: Path, tokenizer_file: Path) -> None:
    sums = meta_files.read_checklist(folder / "checklist.chk")
    sums |= meta_files.read_checklist(tokenizer_file.parent / "tokenizer_checklist.chk")
    moved = sums.get(folder / "tokenizer.model")
    if moved and not (folder / "tokenizer.model").is_file():  # the one that is used stands a level up
        sums[tokenizer_file] = sums.pop(folder / "tokenizer.model")
    if not sums:
        return
    total = sum(path.stat().st_size for path in sums if path.is_file())
    with byte_bar(total, "checking md5") as bar:
        meta_files.verify_checksums(sums, bar.update)


def _write_model(folder: Path, source: Source, specs: list[TensorSpec], config: ConvertConfig) -> None:
    with byte_bar(sum(spec.num_bytes for spec in specs), "converting") as bar:
        place_of = {place.hf_name: place for place in source.placements}

        def read(spec: TensorSpec) -> Iterator[torch.Tensor]:
            place = place_of[spec.name]
            return sharding.row_blocks(place, [shard[place.meta_name] for shard in source.shards], spec.dtype)

        write_weights(folder, specs, read, max_shard_size=config.max_shard_size, progress=bar.update)
    context = _context(source, config)
    write_json(folder / "config.json", model_config(source, specs[0].dtype, context))
    ends = {"bos_token_id": source.tokenizer.bos_id, "eos_token_id": source.eos_ids}
    write_json(folder / "generation_config.json", ends)
    source.tokenizer.save(folder, max_length=context)
    if source.chat_template is not None:
        shutil.copyfile(source.chat_template, folder / TEMPLATE_FILE)
    written = {spec.name: spec for spec in WeightsFolder(folder).specs()}
    assert written == {spec.name: spec for spec in specs}


def _context(source: Source, config: ConvertConfig) -> int:
    return config.max_position_embeddings or layout.positive(source.params, "max_seq_len", source.release.context)


def model_config(source: Source, dtype: torch.dtype, context: int) -> dict[str, object]:
    """config.json of a LlamaForCausalLM; rope and dtype under today's and yesterday's keys."""
    shape, dtype_name = source.shape, str(dtype).removeprefix("torch.")
    scaling = source.release.rope_scaling.config() if source.release.rope_scaling else {"rope_type": "default"}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.width,
        "intermediate_size": shape.ffn_width,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_width,
        "max_position_embeddings": context,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope.theta,
        "rope_parameters": {**scaling, "rope_theta": shape.rope.theta},
        "rope_scaling": scaling if source.release.rope_scaling else None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": shape.ties_embeddings,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": source.tokenizer.bos_id,
        "eos_token_id": source.eos_ids,
        "pad_token_id": source.tokenizer.pad_id,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
    }
