"""How fast the recipe trains: padded as the original, without padding, and with the head on target tokens alone.

    python -m bench.train                     a random LLaMA of 20 M parameters on real examples; on a CPU a few minutes
    python -m bench.train --shape 7b          LLaMA-7B's shape on a GPU

padded:      the original's micro-batches: 4 random examples, padded on the right, logits for every position.
packed all:  the same examples end to end, micro-batches balanced by tokens, logits for every position.
packed:      and logits for target positions only: what train.py does, in `--numerics stanford`.
fast:        the same in `--numerics fast`; its losses are held against those of packed, step by step.
compiled, fast compiled: packed and fast with --compile_layers; the first step, in which it compiles, is left out.
lora, qlora: the same with adapters, where the base fits only so.

Each row is a process of its own that runs `alpaca.training.loop.train`, all of them the same optimizer steps on the same
examples in the same order; rows take turns, --rounds times. The rate counts useful tokens (no padding) in training
steps, the first left out; memory is the process's peak (on a GPU the allocator's). The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from alpaca.errors import InputError, run_command
from alpaca.hf_files import read_json
from bench.provenance import REAL, ROOT, provenance
from bench.random_model import SHAPES, write_random_llama

PACKAGES = ("torch", "transformers", "peft")
FULL, ADAPTER = ("padded", "packed all", "packed", "fast"), ("lora", "qlora")
ROWS = (*FULL, "compiled", "fast compiled", *ADAPTER)
TERA = 1e12


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """The command's flags."""

    shape: str
    steps: int
    rounds: int
    rows: tuple[str, ...]
    batch: int
    data_path: str
    checkpointing: bool
    memory_limit: str | None
    max_length: int


def main() -> None:
    config, row, folder = parse_flags()
    if row:
        print(json.dumps(run_row(config, row, folder)))
        return
    with tempfile.TemporaryDirectory(prefix="alpaca-bench-") as made:
        write_random_llama(Path(made), SHAPES[config.shape], torch.bfloat16 if config.shape == "7b" else torch.float32)
        runs = [(number, name) for number in range(config.rounds) for name in config.rows]
        found: dict[str, list[dict]] = {name: [] for name in config.rows}
        for _, name in tqdm(runs, desc="rows", unit="row"):
            found[name].append(in_own_process(name, Path(made)))
    results = {name: summarize(samples) for name, samples in found.items()}
    print(describe(results))
    flags = {**vars(config), "data_path": Path(config.data_path).name}  # where it lies says nothing elsewhere
    compared = compare_numerics(results)
    if compared:
        print(describe_numerics(compared))
    source = provenance("train", PACKAGES)
    print(json.dumps({"results": results, "numerics": compared, "config": flags, **source}))


# One row, in a process of its own


def in_own_process(name: str, folder: Path) -> dict:
    """A row's sample; a failure is a sample, too."""
    command = [sys.executable, "-m", "bench.train", *sys.argv[1:], "--row", name, "--folder", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        return {"failure": done.stderr.strip()[-1500:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_row(config: BenchConfig, row: str, folder: Path) -> dict:
    """Train for `steps` steps and say how it went."""
    from alpaca.training import loop
    from alpaca.training.config import make_config

    if row == "packed all":
        loop.pack = pack_with_all_logits
    with tempfile.TemporaryDirectory() as out:
        flags = {
            "model_name_or_path": str(folder), "data_path": config.data_path, "output_dir": f"{out}/model",
            "max_steps": config.steps, "global_batch_size": config.batch, "padding_free": row != "padded",
            "save_strategy": "no", "report_to": "none", "gradient_checkpointing": config.checkpointing or "auto",
            "compile_layers": "compiled" in row,
            "model_max_length": config.max_length, "learning_rate": 1e-4,
        }  # fmt: skip
        if row.startswith("fast"):
            flags["numerics"] = "fast"
        if config.memory_limit:
            flags["memory_limit"] = config.memory_limit
        if row in ADAPTER:
            flags["method"] = row
        loop.train(make_config(flags))
        history = read_json(Path(out) / "model" / "trainer_state.json")["log_history"]
    return {
        "losses": [entry["loss"] for entry in history],
        "tokens_per_second": statistics.median(entry["tokens_per_second"] for entry in history[1:]),
        "peak_bytes": peak_memory(),
    }


def pack_with_all_logits(examples: list, *, pad_id: int):
    """`pack`, whose head then computes every position; those without a target carry no loss."""
    from dataclasses import replace

    from alpaca.data.batching import pack
    from alpaca.data.examples import MASKED_LABEL

    batch = pack(examples, pad_id=pad_id)
    ids = torch.full_like(batch.input_ids, MASKED_LABEL)
    ids[batch.target_positions] = batch.target_ids
    return replace(batch, target_positions=torch.arange(len(ids)), target_ids=ids)


def peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


# What came out


def summarize(samples: list[dict]) -> dict:
    """Medians over the rounds. The losses must not depend on the round."""
    good = [sample for sample in samples if "failure" not in sample]
    if not good:
        return {"failure": samples[0]["failure"]}
    return {
        "tokens_per_second": statistics.median(sample["tokens_per_second"] for sample in good),
        "peak_bytes": max(sample["peak_bytes"] for sample in good),
        "losses": good[0]["losses"],
    }


def compare_numerics(results: dict[str, dict]) -> dict[str, object] | None:
    """The losses of both numerics, step by step; None where a row was not run or failed."""
    both = {"stanford": results.get("packed", {}).get("losses"), "fast": results.get("fast", {}).get("losses")}
    if None in both.values():
        return None
    differences = [fast - stanford for stanford, fast in zip(both["stanford"], both["fast"], strict=True)]
    quarter = differences[-max(1, len(differences) // 4) :]
    return {
        **both,
        "largest_difference": max(differences, key=abs),
        "mean_difference_of_last_quarter": statistics.mean(quarter),
    }


def describe_numerics(compared: dict[str, object]) -> str:
    """Both runs' losses side by side, at ten steps at the most."""
    both = list(zip(compared["stanford"], compared["fast"], strict=True))
    stride = max(1, -(-len(both) // 10))
    lines = [f"{'step':<12}{'stanford':>10}{'fast':>10}{'fast - stanford':>17}"]
    for step in sorted({*range(0, len(both), stride), len(both) - 1}):
        stanford, fast = both[step]
        lines.append(f"{step + 1:<12}{stanford:>10.5f}{fast:>10.5f}{fast - stanford:>17.5f}")
    lines.append(
        f"largest difference {compared['largest_difference']:+.5f}; "
        f"mean of the last quarter {compared['mean_difference_of_last_quarter']:+.5f}"
    )
    return "\n".join(lines)


def describe(results: dict[str, dict]) -> str:
    """A table for people, each rate beside the padded recipe's."""
    base = results.get("padded", {}).get("tokens_per_second")
    lines = [f"{'row':<12}{'tokens/s':>10}{'ratio':>8}{'peak GB':>9}  losses"]
    for name, result in results.items():
        if "failure" in result:
            lines.append(f"{name:<12}failed: {result['failure'].splitlines()[-1]}")
            continue
        ratio = f"{result['tokens_per_second'] / base:.2f}" if base else "-"
        losses = f"{result['losses'][0]:.5f} … {result['losses'][-1]:.5f}"
        lines.append(
            f"{name:<12}{result['tokens_per_second']:>10.0f}{ratio:>8}{result['peak_bytes'] / 1e9:>9.2f}  {losses}"
        )
    return "\n".join(lines)


def parse_flags() -> tuple[BenchConfig, str | None, Path | None]:
    parser = argparse.ArgumentParser(description="Measure the training recipe.")
    real = REAL / "alpaca_4000.json"
    parser.add_argument("--shape", choices=tuple(SHAPES), default="20m")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--rows", default=",".join(FULL), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--batch", type=int, default=128, help="examples of an optimizer step")
    parser.add_argument("--data_path", default=str(real if real.is_file() else ROOT / "alpaca/data/sample.json"))
    parser.add_argument("--checkpointing", action="store_true", help="recompute all activations, not just what must be")
    parser.add_argument("--memory_limit", help='the most a row may take of the device ("80GB")')
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    row, folder = options.pop("row"), options.pop("folder")
    options["rows"] = tuple(name.strip() for name in options["rows"].split(","))
    unknown = set(options["rows"]) - set(ROWS)
    if unknown:
        raise InputError(f"--rows: unknown {', '.join(sorted(unknown))}; expected of {', '.join(ROWS)}")
    return BenchConfig(**options), row, folder


if __name__ == "__main__":
    run_command(main)
