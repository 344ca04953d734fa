"""Export a Hugging Face LLaMA, with an adapter or without, to one GGUF file for llama.cpp.

    python -m convert.export_gguf --input_dir alpaca_out --output_file model.gguf --outtype q8_0

Types are those llama.cpp's own converter would choose: vectors (norms, biases) stay float32, every matrix gets
--outtype, and for q8_0 a matrix whose rows do not divide into blocks of 32 is float16.
"""

import argparse
import logging
import time
from pathlib import Path

from alpaca.errors import run_command
from alpaca.formats.gguf.export import OUTTYPES, ExportConfig, export
from alpaca.formats.hf.merging import QUANTIZATIONS


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
