"""Convert Meta's LLaMA checkpoint to a Hugging Face folder.

    python -m convert.convert_llama_weights_to_hf --input_dir unconverted-weights --model_size 7B --output_dir weights

reads unconverted-weights/7B/ and unconverted-weights/tokenizer.model, and writes weights/llama-7b/ (self-contained)
and weights/tokenizer/. Blocks of rows go from the memory-mapped pickles straight to safetensors: memory does not depend
on the model's size, and the values arrive bit for bit unless --dtype asks for another type.
"""

import argparse
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from alpaca.errors import InputError, OutputExists, run_command
from alpaca.hf_files import (
    FLOAT_DTYPES,
    TensorSpec,
    WeightsFolder,
    check_overwrite,
    parse_size,
    replaced_folder,
    require_free_space,
    write_json,
    write_weights,
)
from alpaca.tokenizer import LLAMA_TOKENIZER_FILES, SentencePieceTokenizer, is_sentencepiece
from convert import layout, meta_files

LLAMA_1_CONTEXT = 2048
_SPARE_BYTES = 16 << 20  # configs, tokenizer, file system


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """The command's flags."""

    input_dir: Path
    model_size: str
    output_dir: Path
    dtype: str
    max_shard_size: int
    max_position_embeddings: int | None
    skip_checksums: bool
    overwrite: bool


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: every shard's tensors (memory-mapped), its shape, and what goes where."""

    shards: list[dict[str, torch.Tensor]]
    params: dict[str, object]
    shape: layout.ModelShape
    placements: list[layout.Placement]
    tokenizer: SentencePieceTokenizer


def convert(config: ConvertConfig) -> Path:
    """Run the conversion and return the model's folder. Raises the errors of `alpaca.errors`; writes nothing then."""
    folder = meta_files.find_checkpoint(config.input_dir, config.model_size)
    target = config.output_dir / f"llama-{config.model_size.lower()}"
    check_overwrite(target, config.overwrite)
    shard_files = meta_files.find_shards(folder)
    tokenizer_file = meta_files.find_tokenizer(config.input_dir, folder)
    if not config.skip_checksums:
        _verify_checksums(folder, tokenizer_file)
    source = open_source(folder, shard_files, tokenizer_file)
    specs = output_specs(source, FLOAT_DTYPES.get(config.dtype))
    check_tokenizer_folder(config, source)
    require_free_space(target, sum(spec.num_bytes for spec in specs) + _SPARE_BYTES)
    with replaced_folder(target, overwrite=config.overwrite) as partial:
        _write_model(partial, source, specs, config)
    with replaced_folder(config.output_dir / "tokenizer", overwrite=True) as partial:
        for name in LLAMA_TOKENIZER_FILES:
            shutil.copyfile(target / name, partial / name)
    return target


def open_source(folder: Path, shard_files: list[Path], tokenizer_file: Path) -> Source:
    """Open the shards and hold them against params.json and the tokenizer. Raises InputError."""
    shards = [meta_files.open_shard(path) for path in shard_files]
    params = meta_files.read_params(folder)
    shape, axis = layout.read_shape(params, [{n: tuple(t.shape) for n, t in shard.items()} for shard in shards])
    if not is_sentencepiece(tokenizer_file):
        raise InputError(f"{tokenizer_file} is not a SentencePiece model; expected Meta's LLaMA tokenizer.model")
    tokenizer = SentencePieceTokenizer(tokenizer_file)
    if tokenizer.size != shape.vocab_size:
        raise InputError(
            f"{tokenizer_file} has {tokenizer.size} tokens, the checkpoint's embedding {shape.vocab_size} rows: "
            "this is another model's tokenizer"
        )
    return Source(shards, params, shape, layout.placements(shape, embedding_axis=axis), tokenizer)


def output_specs(source: Source, dtype: torch.dtype | None) -> list[TensorSpec]:
    """Names, shapes and types of what will be written; `dtype` None keeps each tensor's own."""
    first = source.shards[0]
    return [
        TensorSpec(name=place.hf_name, shape=place.shape, dtype=dtype or first[place.meta_name].dtype)
        for place in source.placements
    ]


def check_tokenizer_folder(config: ConvertConfig, source: Source) -> None:
    """Raise OutputExists when output_dir/tokenizer holds another model's tokenizer and may not be overwritten."""
    existing = config.output_dir / "tokenizer" / "tokenizer.model"
    if existing.is_file() and existing.read_bytes() != source.tokenizer.model_file.read_bytes():
        if not config.overwrite:
            raise OutputExists(f"{existing} is another model's; pass --overwrite, or choose another --output_dir")
    elif not existing.is_file():
        check_overwrite(config.output_dir / "tokenizer", config.overwrite)


def _verify_checksums(folder: Path, tokenizer_file: Path) -> None:
    sums = meta_files.read_checklist(folder / "checklist.chk")
    sums |= meta_files.read_checklist(tokenizer_file.parent / "tokenizer_checklist.chk")
    if not sums:
        return
    total = sum(path.stat().st_size for path in sums if path.is_file())
    with _byte_bar(total, "checking md5") as bar:
        meta_files.verify_checksums(sums, bar.update)


def _write_model(folder: Path, source: Source, specs: list[TensorSpec], config: ConvertConfig) -> None:
    with _byte_bar(sum(spec.num_bytes for spec in specs), "converting") as bar:
        place_of = {place.hf_name: place for place in source.placements}

        def read(spec: TensorSpec) -> Iterator[torch.Tensor]:
            place = place_of[spec.name]
            return layout.row_blocks(place, [shard[place.meta_name] for shard in source.shards], spec.dtype)

        write_weights(folder, specs, read, max_shard_size=config.max_shard_size, progress=bar.update)
    context = config.max_position_embeddings or layout.positive(source.params, "max_seq_len", LLAMA_1_CONTEXT)
    write_json(folder / "config.json", model_config(source, specs[0].dtype, context))
    bos, eos = source.tokenizer.bos_id, source.tokenizer.eos_id
    write_json(folder / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos})
    source.tokenizer.save(folder, max_length=context)
    written = {spec.name: spec for spec in WeightsFolder(folder).specs()}
    assert written == {spec.name: spec for spec in specs}


def model_config(source: Source, dtype: torch.dtype, context: int) -> dict[str, object]:
    """config.json of a LlamaForCausalLM; rope and dtype under today's and yesterday's keys."""
    shape, dtype_name = source.shape, str(dtype).removeprefix("torch.")
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
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": source.tokenizer.bos_id,
        "eos_token_id": source.tokenizer.eos_id,
        "pad_token_id": source.tokenizer.pad_id,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
    }


def _byte_bar(total: int, label: str) -> tqdm:
    return tqdm(total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1000, mininterval=0.5)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")
    return int(text)


def parse_arguments(arguments: list[str] | None = None) -> ConvertConfig:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m convert.convert_llama_weights_to_hf",
        description="Convert Meta's LLaMA checkpoint to Hugging Face format.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--input_dir", type=Path, default=Path("unconverted-weights"), help="holds SIZE/ and tokenizer.model")
    add("--model_size", required=True, help="the folder's name in input_dir, such as 7B")
    add("--output_dir", type=Path, default=Path("weights"), help="gets llama-SIZE/ and tokenizer/")
    add("--dtype", choices=["auto", *FLOAT_DTYPES], default="auto", help="auto: as in the checkpoint")
    add("--max_shard_size", default="5GB", help="largest safetensors file")
    add(
        "--max_position_embeddings",
        type=_positive,
        help="context length (default: max_seq_len of params.json, or 2048)",
    )
    add("--skip_checksums", action="store_true", help="do not compare the files with checklist.chk")
    add("--overwrite", action="store_true", help="replace an existing output")
    values = vars(parser.parse_args(arguments))
    return ConvertConfig(**{**values, "max_shard_size": parse_size(values["max_shard_size"])})


def main() -> None:
    config = parse_arguments()
    start = time.perf_counter()
    target = convert(config)
    print(f"wrote {target} and {config.output_dir / 'tokenizer'} in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run_command(main)
