"""The names of files by which a folder is known to hold a model or an adapter."""

from pathlib import Path

# What serving needs of a training's output, a model's or an adapter's: no checkpoints, logs or plots.
MODEL_FILES = ("*.safetensors", "*.json", "tokenizer.model", "tokenizer.tiktoken", "*.jinja", "*.txt", "loss.png")
MODEL_CONFIGS = ("config.json", "adapter_config.json")


def is_weights(folder: Path) -> bool:
    """Whether a folder holds a model or an adapter, by its config file."""
    return (folder / "config.json").is_file() or is_adapter(folder)


CONFIG_NAME = "adapter_config.json"


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter, rather than a whole model."""
    return (Path(folder) / CONFIG_NAME).is_file()
