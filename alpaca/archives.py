"""Where weights are found, for prediction and training alike."""

from pathlib import Path

from alpaca.errors import InputError, MissingInput
from alpaca.hf_files import list_folder

TRAINED = Path("alpaca_out")


def find_weights(weights: str | None) -> Path:
    """The model folder to serve: `weights` when given (COG_WEIGHTS), else what train.py left in alpaca_out.

    Raises MissingInput naming the step that makes the folder, InputError for what cannot be opened yet.
    """
    if weights and "://" in weights:
        raise InputError(f"weights must be a folder on this machine for now; download {weights} and give its path")
    folder = Path(weights) if weights else TRAINED
    if folder.is_file():
        raise InputError(f"weights must be a folder for now; unpack {folder} and give the folder")
    if not folder.is_dir() or not (folder / "config.json").is_file():
        raise MissingInput(f"no model in {folder} (found: {list_folder(folder)}). {_next_step(weights)}")
    return folder


def _next_step(weights: str | None) -> str:
    if weights:
        return "COG_WEIGHTS must name a folder with config.json, safetensors and tokenizer, such as weights/llama-7b"
    return (
        "Fine-tune one first (python train.py --model_name_or_path weights/llama-7b --data_path … --output_dir "
        "alpaca_out), or set COG_WEIGHTS to a model folder such as weights/llama-7b"
    )
