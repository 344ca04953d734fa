"""Families: the engine against transformers' `generate`, on a random model of 40 to 60 million parameters of each.

    python -m bench.families                        all families; on two cores about 15 minutes
    python -m bench.families --families qwen3 phi3

Each model has its family's real number of tokens, and a process of its own. In each round `generate` answers eight
prompts one after the other, and the engine answers as many for one client and for eight at once; rates are medians of
the rounds, ratios medians of the rounds' ratios. The last line is one JSON object; each family's line stands as soon as
it is measured.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from alpaca import cpu_threads

cpu_threads.set_defaults()  # as predict.py

from transformers.utils import logging as transformers_logging

from alpaca.errors import run_command
from alpaca.serving.loading import load_engine
from alpaca.serving.settings import ServerSettings
from alpaca.text.loading import load_tokenizer
from bench.machine import others_cpu_seconds
from bench.provenance import ROOT, provenance
from bench.random_family import SIZES, write_random_family
from bench.random_model import model_folder
from bench.rows import Prompts, Row
from bench.targets import Target, rounded
from bench.ways import EngineWay, GenerateWay, Way, load_model

FAMILIES = ("llama", *SIZES)
_LEAST = {"engine 1": 1.3, "engine 8": 6.0}  # times the rate of `generate`
_PROMPT_TOKENS, _NEW_TOKENS, _NUM_REQUESTS = 64, 64, 8


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # in a child: one family's figures
    options = parser.parse_args(arguments)
    if options.alone:
        print(json.dumps(measure_family(options.families[0], options.dtype, options.rounds)))
        return
    origin = provenance("families", ("torch", "transformers"))
    found = {}
    for family in options.families:
        found[family] = _measure_in_child(family, options.dtype, options.rounds)
        print(family_line(family, found[family]), flush=True)
    targets = [target.as_json() for family, figures in found.items() for target in make_targets(family, figures)]
    print(json.dumps({"bench": "families", "dtype": options.dtype, "families": found, "targets": targets, **origin}))


def measure_family(family: str, dtype: str, num_rounds: int) -> dict[str, object]:
    """One family's rates in tokens a second, and how many times the rate of `generate` each is."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        if family == "llama":
            with model_folder(None, "46m", "float32") as folder:
                return _measure_folder(folder, dtype, num_rounds)
        write_random_family(Path(temporary), family)
        return _measure_folder(Path(temporary), dtype, num_rounds)


def _measure_folder(folder: Path, dtype: str, num_rounds: int) -> dict[str, object]:
    tokenizer = load_tokenizer(folder)
    engine = load_engine(folder, ServerSettings(weights=str(folder), dtype=dtype))
    try:
        own = EngineWay(engine)
        ways = {"generate": GenerateWay(load_model(folder, dtype), tokenizer), "engine 1": own, "engine 8": own}
        rounds, others = _run_rounds(ways, Prompts(tokenizer), num_rounds)
    finally:
        engine.close()
    ratios = {name: statistics.median(one[name] / one["generate"] for one in rounds) for name in _LEAST}
    return {
        "engine": type(engine).__name__,
        "tokens_per_s": {name: rounded(statistics.median(one[name] for one in rounds)) for name in ways},
        "times_generate": {name: rounded(ratio) for name, ratio in ratios.items()},
        "cores_of_other_programs": round(others, 2),
    }


def _run_rounds(ways: dict[str, Way], prompts: Prompts, num_rounds: int) -> tuple[list[dict[str, float]], float]:
    """Each round's rates, after a warm-up; and how many cores other programs took at most."""
    rounds, others = [], 0.0
    for number in range(-1, num_rounds):
        rates = {}
        for name, way in ways.items():
            row = _row(name, few=number < 0)
            before = others_cpu_seconds()
            sample = way.run(row, prompts.inputs(row, f"round {number}"))
            rates[name] = sample.rate
            others = max(others, (others_cpu_seconds() - before) / sample.seconds) if number >= 0 else 0.0
        rounds += [rates] if number >= 0 else []
    return rounds, others


def _row(name: str, *, few: bool) -> Row:
    new = 4 if few else _NEW_TOKENS
    return Row(
        name=name,
        way=name.partition(" ")[0],
        num_requests=_NUM_REQUESTS,
        clients=_NUM_REQUESTS if name == "engine 8" else 1,
        prompt_tokens=(_PROMPT_TOKENS, _PROMPT_TOKENS),
        new_tokens=(new, new),
    )


def _measure_in_child(family: str, dtype: str, num_rounds: int) -> dict[str, object]:
    command = [sys.executable, "-m", "bench.families", "--alone", "--families", family, "--dtype", dtype]
    command += ["--rounds", str(num_rounds)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"error": f"the measurement ended with status {done.returncode}; its words are above"}
    return json.loads(done.stdout.splitlines()[-1])


def make_targets(family: str, figures: dict) -> list[Target]:
    """What the engine should reach, in times of `generate`."""
    ratios = figures.get("times_generate", {})
    return [Target(label=f"{family}: {name}", value=ratios.get(name), least=least) for name, least in _LEAST.items()]


def family_line(family: str, figures: dict) -> str:
    """A family's figures in a line."""
    if "error" in figures:
        return f"{family:14}{figures['error']}"
    rates = "".join(f"{name} {rate:7.1f}   " for name, rate in figures["tokens_per_s"].items())
    missed = [target.label.partition(": ")[2] for target in make_targets(family, figures) if not target.is_met]
    ratios = ", ".join(f"{ratio:.2f}x" for ratio in figures["times_generate"].values())
    return f"{family:14}{rates}{ratios}{'  MISSED: ' + ', '.join(missed) if missed else ''}"


if __name__ == "__main__":
    run_command(main)
