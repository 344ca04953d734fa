"""What adapters cost a server that computes them unmerged: --clients requests at once, in one run on the same weights.

    python -m bench.adapters                   a random LLaMA of 45 M parameters, rank 8 on all seven projections
    python -m bench.adapters --shape 7b --dtype bfloat16      on a GPU

plain:  an engine without adapters.
none:   an engine with four adapters, whose requests use none of them; as quick as plain, and as after a merge.
one:    all requests use the same adapter.
four:   the requests use four adapters in turn, in the same steps.

Every case takes its turn in each of --rounds rounds, the first of them another each time, on prompts that no other has;
rates count generated tokens over seconds with the prompts' prefill, and are medians; ratios to "none", which computes
on the same weights in memory, are medians of the rounds' ratios. adapter_share is what one adapter's bytes are of the
projections' weights: what its reading costs at least. The last line is one JSON object.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from alpaca import cpu_threads

cpu_threads.set_defaults()  # as predict.py

import torch
from safetensors.torch import save_file

from alpaca.architecture.tensors import FUSED, LAYER
from alpaca.errors import run_command
from alpaca.files.atomic import write_json
from alpaca.files.model_folders import CONFIG_NAME
from alpaca.serving.engine import Engine
from alpaca.serving.loading import load_engine
from alpaca.serving.settings import BARE_BASE, DTYPES, QUANTIZATIONS, ServerSettings
from alpaca.text.loading import load_tokenizer
from bench.machine import DEVICE, describe_device, others_cpu_seconds
from bench.provenance import provenance
from bench.random_model import SHAPES, Shape, model_folder, random_llama_specs
from bench.rows import Prompts, Row, Sample
from bench.ways import EngineWay

PACKAGES = ("torch", "transformers")
_NAMES = ("a", "b", "c", "d")
CASES = {"plain": (None,), "none": (BARE_BASE,), "one": ("a",), "four": _NAMES}
_PROJECTIONS = tuple(f"{LAYER[role].hf}.weight" for roles in FUSED.values() for role in roles)
_GPU_MEMORY_FRACTION = 0.45  # of what is free: two engines are loaded


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """The command's flags."""

    shape: str
    dtype: str
    quantization: str
    rank: int
    clients: int
    prompt_tokens: int
    new_tokens: int
    rounds: int


def main() -> None:
    config = parse_flags()
    origin = {**provenance("adapters", PACKAGES), "device": describe_device()}
    with model_folder(None, config.shape, config.dtype) as base, tempfile.TemporaryDirectory() as place:
        folders = {name: Path(place) / name for name in _NAMES}
        for seed, folder in enumerate(folders.values()):
            write_random_adapter(folder, SHAPES[config.shape], rank=config.rank, seed=seed)
        samples = measure(config, base, ",".join(f"{name}={folder}" for name, folder in folders.items()))
    figures = summarize(samples)
    for case, values in figures.items():
        print(f"{case:8}{values['tokens_per_second']:9.1f} tokens/s  {values['of_none']:.3f} of none")
    share = adapter_share(SHAPES[config.shape], config.rank)
    print(json.dumps({**origin, **dataclasses.asdict(config), "adapter_share": round(share, 5), "cases": figures}))


def measure(config: BenchConfig, base: Path, adapters: str) -> dict[str, list[Sample]]:
    """Each case's samples, one a round."""
    row = Row(
        name="adapters", way="engine", num_requests=config.clients, clients=config.clients,
        prompt_tokens=(config.prompt_tokens,) * 2, new_tokens=(config.new_tokens,) * 2,
    )  # fmt: skip
    prompts = Prompts(load_tokenizer(base))
    samples: dict[str, list[Sample]] = {case: [] for case in CASES}
    with contextlib.ExitStack() as stack:
        plain, adapted = (load(config, base, given, stack) for given in (None, adapters))
        for number in range(-1, config.rounds):  # the first warms up
            for case in rotated(list(CASES), number):
                names = CASES[case]
                sample = run(row, prompts, plain if case == "plain" else adapted, names, seed=f"{case} {number}")
                if number >= 0:
                    samples[case].append(sample)
                    print(f"round {number + 1}  {case:8}{sample.rate:9.1f} tokens/s", file=sys.stderr, flush=True)
    return samples


def rotated(cases: list[str], number: int) -> list[str]:
    """In a round's order."""
    first = number % len(cases)
    return cases[first:] + cases[:first]


def load(config: BenchConfig, base: Path, adapters: str | None, stack: contextlib.ExitStack) -> Engine:
    settings = ServerSettings(
        dtype=config.dtype, quantization=config.quantization, adapters=adapters, engine="llama",
        memory_fraction=_GPU_MEMORY_FRACTION if DEVICE == "cuda" else ServerSettings.memory_fraction,
    )  # fmt: skip
    engine = load_engine(base, settings)
    stack.callback(engine.close)
    return engine


def run(row: Row, prompts: Prompts, engine: Engine, names: tuple[str | None, ...], *, seed: str) -> Sample:
    """One round of one case."""
    inputs = [
        dataclasses.replace(values, replicate_weights=names[at % len(names)])
        for at, values in enumerate(prompts.inputs(row, seed))
    ]
    start, before = time.monotonic(), others_cpu_seconds()
    sample = EngineWay(engine).run(row, inputs)
    sample.others_cores = max(0.0, (others_cpu_seconds() - before) / (time.monotonic() - start))
    assert sample.num_tokens == row.num_requests * row.new_tokens[1]
    return sample


def summarize(samples: dict[str, list[Sample]]) -> dict[str, dict[str, float]]:
    without = [sample.rate for sample in samples["none"]]
    return {
        case: {
            "tokens_per_second": round(statistics.median(sample.rate for sample in own), 1),
            "of_none": round(statistics.median(s.rate / rate for s, rate in zip(own, without, strict=True)), 4),
            "others_cores": round(statistics.median(sample.others_cores for sample in own), 2),
        }
        for case, own in samples.items()
    }


def adapter_share(shape: Shape, rank: int) -> float:
    """Elements of an adapter over those of the weights it changes."""
    sizes = [spec.shape for spec in random_llama_specs(shape, torch.float32) if spec.name.endswith(_PROJECTIONS)]
    return sum(rank * (rows + columns) for rows, columns in sizes) / sum(rows * columns for rows, columns in sizes)


def write_random_adapter(folder: Path, shape: Shape, *, rank: int, seed: int) -> None:
    """An adapter folder as PEFT writes it, of all seven projections."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for spec in random_llama_specs(shape, torch.float32):
        if spec.name.endswith(_PROJECTIONS):
            num_outputs, width = spec.shape
            name = f"base_model.model.{spec.name.removesuffix('.weight')}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, width, generator=generator) / math.sqrt(width)
            tensors[f"{name}.lora_B.weight"] = torch.randn(num_outputs, rank, generator=generator) / 8
    save_file(tensors, folder / "adapter_model.safetensors")
    write_json(folder / CONFIG_NAME, {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank})


def parse_flags() -> BenchConfig:
    parser = argparse.ArgumentParser(prog="bench.adapters", description="What adapters cost a server.")
    parser.add_argument("--shape", choices=SHAPES, default="46m")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16" if DEVICE == "cuda" else "float32")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="none")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    return BenchConfig(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_command(main)
