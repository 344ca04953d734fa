"""Write a Hugging Face LLaMA as Meta ships one: consolidated.NN.pth, params.json, checklist.chk and tokenizer.model.

    python -m convert.export_state_dict_checkpoint --input_dir alpaca_out --output_dir ckpt

The way back from convert_llama_weights_to_hf, bit for bit, with or without an adapter merged on the way, for any size
and number of shards. Tensors go one at a time to all shards. Meta's code has no use for the tokens that fine-tuning
added (`[PAD]`): their rows are cut off, and it is said, unless --keep_added_tokens.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from alpaca.errors import run_command
from alpaca.formats.hf.folder import FLOAT_DTYPES
from alpaca.formats.hf.merging import QUANTIZATIONS
from alpaca.formats.meta.from_hf import ExportConfig, export
from convert.command_line import positive


def parse_arguments(arguments: list[str] | None = None) -> ExportConfig:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m convert.export_state_dict_checkpoint",
        description="Write a Hugging Face LLaMA as Meta ships one.",
        allow_abbrev=False,
    )
    add: Callable[..., argparse.Action] = parser.add_argument
    add("--input_dir", type=Path, default=Path("alpaca_out"), help="the model's folder, or an adapter's alone")
    add("--adapter", type=Path, help="folder of an adapter to merge on the way")
    add("--output_dir", type=Path, required=True, help="gets the checkpoint")
    add("--num_shards", type=positive, help="number of files (default: as Meta has it for the size, else 1)")
    add("--dtype", choices=["auto", *FLOAT_DTYPES], default="auto", help="auto: as in the model")
    add(
        "--base_quantization",
        choices=QUANTIZATIONS,
        help="precision of the adapter's base in training (default: as train.py wrote it down, else none)",
    )
    add("--tokenizer_model", type=Path, help="Meta's tokenizer.model (default: the model folder's)")
    add("--keep_added_tokens", action="store_true", help="keep embedding rows that tokenizer.model has no token for")
    add("--overwrite", action="store_true", help="replace an existing output")
    return ExportConfig(**vars(parser.parse_args(arguments)))


def main() -> None:
    config = parse_arguments()
    start = time.perf_counter()
    target = export(config)
    print(f"wrote {target} in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run_command(main)
