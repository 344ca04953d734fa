"""Merge an adapter into its base model: a Hugging Face folder of its own, tokenizer included.

    python -m convert.export_hf_checkpoint --base_model weights/llama-7b --adapter alpaca_out --output_dir merged

takes LoRA, DoRA and rsLoRA adapters of LLaMA, OPT or BLOOM. Tensors are merged one at a time in float32 on their way to
disk; a base that was trained on in 8 or 4 bit is quantized and read back first, since the adapter corrects that one.
Where memory allows, the merged model's logits are then held against PEFT's unmerged ones.
"""

import argparse
import os
import time
from pathlib import Path

from alpaca.errors import run_command
from alpaca.files.reading import parse_size
from alpaca.formats.hf.export import ExportConfig, export
from alpaca.formats.hf.folder import FLOAT_DTYPES
from alpaca.formats.hf.merging import QUANTIZATIONS


def parse_arguments(arguments: list[str] | None = None) -> ExportConfig:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m convert.export_hf_checkpoint",
        description="Merge an adapter into its base model: a Hugging Face folder.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--base_model",
        help="folder of the base model (default: the environment's BASE_MODEL, else what the adapter names)",
    )
    add("--adapter", type=Path, default=Path("alpaca_out"), help="folder of the adapter")
    add("--output_dir", type=Path, required=True, help="gets the merged model")
    add("--dtype", choices=["auto", *FLOAT_DTYPES], default="auto", help="auto: as in the base")
    add("--max_shard_size", default="5GB", help="largest safetensors file")
    add(
        "--base_quantization",
        choices=QUANTIZATIONS,
        help="precision of the base in training (default: as train.py wrote it down, else none)",
    )
    add(
        "--check_logits",
        choices=["auto", "always", "never"],
        default="auto",
        help="compare the merged model's logits with PEFT's unmerged ones; auto: where memory allows",
    )
    add("--overwrite", action="store_true", help="replace an existing output")
    values = vars(parser.parse_args(arguments))
    values["max_shard_size"] = parse_size(values["max_shard_size"])
    return ExportConfig(**values, environment_base_model=os.environ.get("BASE_MODEL") or None)


def main() -> None:
    config = parse_arguments()
    start = time.perf_counter()
    target = export(config)
    print(f"wrote {target} in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run_command(main)
