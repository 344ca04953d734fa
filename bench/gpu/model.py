"""LLaMA-7B's shape with random weights, made on the card: nothing of 13 GB is written or read where no row needs it.

The engine and the trainer are the product's own, with a folder whose weights file is a hole; only the place where
they would read tensors is handed drawn ones. Rows that measure the reading itself, and quantised loading by
bitsandbytes, get a folder with real bytes (`filled_folder`).
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from alpaca.serving.engine import Engine
from alpaca.serving.housekeeping import Phases
from alpaca.serving.hugging_face.shared_weights import as_transformers
from alpaca.serving.llama import weights as serving_weights
from alpaca.serving.loading import load_engine
from alpaca.serving.settings import ServerSettings
from bench.machine import DEVICE
from bench.random_model import SHAPES, Shape, random_tensor, write_hollow_llama, write_random_llama

KEEP_VARIABLE = "ALPACA_BENCH_KEEP"
SHARED_MEMORY = Path("/dev/shm")


@contextlib.contextmanager
def hollow_folder(shape: str, dtype: str) -> Iterator[Path]:
    """A model folder whose weights are to be drawn."""
    with tempfile.TemporaryDirectory(prefix="alpaca-hollow-") as name:
        write_hollow_llama(Path(name), SHAPES[shape], getattr(torch, dtype))
        yield Path(name)


class DrawnWeights:
    """In place of the engine's reader of weight files: each tensor is drawn on the device when it is asked for."""

    def __init__(self, weights: object, *_: object, **__: object) -> None:
        self._specs = {spec.name: spec for spec in weights.specs()}
        self._shape = _shape_of(self._specs)
        self._generator = torch.Generator(DEVICE).manual_seed(0)

    def __enter__(self) -> "DrawnWeights":
        return self

    def __exit__(self, *exception: object) -> None: ...

    def take(self, name: str) -> torch.Tensor:
        """The tensor of that name."""
        return random_tensor(self._specs[name], self._shape, self._generator)


def _shape_of(specs: dict) -> Shape:
    """Width and number of layers, which the drawing looks at; heads it does not."""
    width = specs["model.norm.weight"].shape[0]
    num_layers = sum(name.endswith("input_layernorm.weight") for name in specs)
    ffn_width = specs["model.layers.0.mlp.up_proj.weight"].shape[0]
    return Shape(width=width, num_layers=num_layers, num_heads=0, ffn_width=ffn_width)


@contextlib.contextmanager
def drawn_weights() -> Iterator[None]:
    """A block in which the engine draws its weights instead of reading them."""
    reader = serving_weights._ReadAhead
    serving_weights._ReadAhead = DrawnWeights
    try:
        yield
    finally:
        serving_weights._ReadAhead = reader


def open_engine(
    folder: Path, *, dtype: str, quantization: str = "none", concurrency: int, memory_fraction: float
) -> tuple[Engine, dict[str, float]]:
    """The product's engine on drawn weights, warm; and the seconds of each phase of its start."""
    phases = Phases()
    settings = ServerSettings(
        weights=str(folder), engine="llama", dtype=dtype, quantization=quantization, concurrency=concurrency,
        memory_fraction=memory_fraction,
    )  # fmt: skip
    with drawn_weights():
        engine = load_engine(folder, settings, phases)
    return engine, seconds_of(phases)


def seconds_of(phases: Phases) -> dict[str, float]:
    """Phase by phase."""
    return {name: round(seconds, 2) for name, seconds in phases._seconds.items()}


def twin_of(engine: Engine, folder: Path, dtype: str) -> PreTrainedModel:
    """transformers' model over the engine's own weights; where these are packed (a CPU), over random ones."""
    twin = as_transformers(engine._runner.model, folder)
    if twin is None:
        twin = drawn_model(folder, dtype)
    # No text of a random model ends by chance: every row has its full length.
    twin.generation_config.eos_token_id = None
    return twin


def drawn_model(folder: Path, dtype: str, *, attention: str | None = None) -> PreTrainedModel:
    """transformers' model of the folder's config on the device, with transformers' own random weights.

    attention: by transformers' name of it; None for its own choice.
    """
    config = AutoConfig.from_pretrained(folder)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), **({"attn_implementation": attention} if attention else {})
        )
    model.generation_config.eos_token_id = None
    return model.eval()


class DrawnAutoModel:
    """In place of AutoModelForCausalLM in the trainer: models on the device, unless they are to be quantised."""

    @staticmethod
    def from_pretrained(
        folder: str | Path, *, dtype: torch.dtype, output_loading_info: bool = False, **loading: object
    ) -> object:
        """As transformers' own."""
        if loading:  # quantised: bitsandbytes reads the folder
            return AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, output_loading_info=output_loading_info, **loading
            )
        model = drawn_model(Path(folder), str(dtype).removeprefix("torch."))
        return (model, {"missing_keys": set()}) if output_loading_info else model


# A folder with real bytes


@contextlib.contextmanager
def filled_folder(shape: str, dtype: str) -> Iterator[Path]:
    """A model folder with real weights, in memory where there is room; one that an earlier part has left is taken.

    It is removed in the end, unless ALPACA_BENCH_KEEP is set: a next part on the same machine then has it.
    """
    num_bytes = 2 * 10**10 if shape == "7b" else 10**9
    folder = _roomy_place(num_bytes) / f"alpaca-bench-{os.getuid()}-{shape}-{dtype}"
    is_whole = folder / ".whole"
    if not (is_whole.is_file() and folder.stat().st_uid == os.getuid()):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        write_random_llama(folder, SHAPES[shape], getattr(torch, dtype))
        is_whole.touch()
    try:
        yield folder
    finally:
        if not os.environ.get(KEEP_VARIABLE):
            shutil.rmtree(folder, ignore_errors=True)


def _roomy_place(num_bytes: int) -> Path:
    """/dev/shm where it and the memory behind it have room, else the folder for temporary files."""
    has_room = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > num_bytes
    return SHARED_MEMORY if has_room and _available_memory() > 3 * num_bytes else Path(tempfile.gettempdir())


def _available_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
