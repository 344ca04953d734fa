"""Convert Meta's LLaMA checkpoint to a Hugging Face folder.

    python -m convert.convert_llama_weights_to_hf --input_dir unconverted-weights --model_size 7B --output_dir weights

reads unconverted-weights/7B/ and unconverted-weights/tokenizer.model, and writes weights/llama-7b/ (self-contained)
and weights/tokenizer/. LLaMA 1 and 2, Code Llama, Llama 3 to 3.3, in the layouts Meta ships each; which of them it is,
is read from the files.
"""

import argparse
import time
from pathlib import Path

from alpaca.errors import run_command
from alpaca.files.reading import parse_size
from alpaca.formats.hf.folder import FLOAT_DTYPES
from alpaca.formats.meta import releases
from alpaca.formats.meta.to_hf import ConvertConfig, convert
from convert.command_line import positive


def parse_arguments(arguments: list[str] | None = None) -> ConvertConfig:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m convert.convert_llama_weights_to_hf",
        description="Convert Meta's LLaMA checkpoint to Hugging Face format.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--input_dir", type=Path, default=Path("unconverted-weights"), help="the checkpoint, or the folder it lies in")
    add("--model_size", help="its folder's name in input_dir, or the size in it: 7B (default: the only one there is)")
    add("--output_dir", type=Path, default=Path("weights"), help="gets llama-SIZE/ and tokenizer/")
    add("--llama_version", choices=releases.VERSIONS, help="the release, where the files do not say it")
    add(
        "--instruct",
        action="store_true",
        help="an Instruct or Chat release: with its chat template, and the end of a turn ends an answer "
        "(default: by the folder's name)",
    )
    add("--num_shards", type=positive, help="checked against the files")
    add("--dtype", choices=["auto", *FLOAT_DTYPES], default="auto", help="auto: as in the checkpoint")
    add("--max_shard_size", default="5GB", help="largest safetensors file")
    add(
        "--max_position_embeddings",
        type=positive,
        help="context length (default: max_seq_len of params.json, or the release's)",
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
