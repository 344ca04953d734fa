"""How fast the recipe trains, how much memory it takes, and what its losses are, way by way.

    python -m bench.train                     a random LLaMA of 20 M parameters on real examples; on a CPU some minutes
    python -m bench.train --peers             our rows beside transformers' Trainer, PEFT and TRL (bench/train_peers.py)
    python -m bench.train --shape 7b          LLaMA-7B's shape on a GPU

padded:      the original's micro-batches: 4 random examples, padded on the right, logits for every position.
packed all:  the same examples end to end, micro-batches balanced by tokens, logits for every position.
packed:      and logits for target positions only: what train.py does, in `--numerics stanford`.
fast:        the same in `--numerics fast`; its losses are held against those of packed, step by step.
fast 80GB:   and with the memory of one 80 GB card.
compiled, fast compiled: packed and fast with --compile_layers; the first step, in which it compiles, is left out.
lora, qlora: adapters; qlora with micro-batches of 2 and 7.4 GiB, the memory that torchtune gives for its own.

Each row is a process of its own that runs `alpaca.training.loop.train`, all of them the same optimizer steps on the same
examples in the same order; rows take turns, --rounds times. The rate counts useful tokens (no padding) in training
steps, the first left out, by the clock and on a CPU by the process's CPU time, too, which depends less on who else uses
the machine; memory is the process's peak beyond its imports (on a GPU the allocator's), beside the planned one. Nothing
is saved. The last line is one JSON object.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from alpaca import cpu_threads

cpu_threads.set_defaults()  # as train.py

import torch
from tqdm import tqdm

from alpaca.data.batching import step_examples
from alpaca.errors import InputError, run_command
from bench.machine import DEVICE, cpu_seconds, peak_anonymous_bytes
from bench.provenance import ROOT, find_real, provenance
from bench.random_model import SHAPES, write_random_llama
from bench.targets import Target, rounded
from bench.train_peers import OURS, PEERS, Work, make_peer_targets, make_work, run_peer

if TYPE_CHECKING:
    from alpaca.training.run import Run

PACKAGES = ("torch", "transformers", "peft")
ROWS: dict[str, dict[str, object]] = {  # what each changes of the recipe
    "padded": {"padding_free": False},
    "packed all": {},
    "packed": {},
    "fast": {"numerics": "fast"},
    "fast 80GB": {"numerics": "fast", "memory_limit": "80GB"},
    "compiled": {"compile_layers": True},
    "fast compiled": {"numerics": "fast", "compile_layers": True},
    "lora": {"method": "lora"},
    "qlora": {"method": "qlora", "per_device_train_batch_size": 2, "memory_limit": "7.4GiB"},
}
DEFAULT_ROWS = {
    "cpu": ("padded", "packed all", "packed", "fast", "lora"),
    "cuda": ("packed", "fast", "lora", "qlora", "fast 80GB", "fast compiled", "padded"),
}
PEER_ROWS = (*dict.fromkeys(OURS.values()), *PEERS)
RECIPE_TOKENS = 19.97e6  # of 3 epochs of the 52,002 examples


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
    learning_rate: float
    max_length: int
    budget_s: float


def main() -> None:
    config, row, folder = parse_flags()
    if row:
        print(json.dumps(run_row(config, row, folder)))
        return
    deadline = time.monotonic() + config.budget_s
    with tempfile.TemporaryDirectory(prefix="alpaca-bench-") as made:
        write_random_llama(Path(made), SHAPES[config.shape], torch.bfloat16 if config.shape == "7b" else torch.float32)
        runs = [(number, name) for number in range(config.rounds) for name in config.rows]
        found: dict[str, list[dict]] = {name: [] for name in config.rows}
        peers = PeerRows(config, Path(made))
        for _, name in tqdm(runs, desc="rows", unit="row"):
            run = peers.run if name in PEERS else in_own_process
            found[name].append(run(name, Path(made), seconds=deadline - time.monotonic()))
    results = {name: summarize(samples) for name, samples in found.items()}
    print(describe(results))
    compared = compare_numerics(results)
    if compared:
        print(describe_numerics(compared))
    targets = make_targets(results, shape=config.shape) + make_peer_targets(results)
    for target in targets:
        print(target.line())
    flags = {**vars(config), "data_path": Path(config.data_path).name}  # where it lies says nothing elsewhere
    print(json.dumps({
        "bench": "train", "results": results, "numerics": compared, "targets": [target.as_json() for target in targets],
        "other_failures": {name: result["failure"] for name, result in results.items() if "failure" in result},
        "config": flags, **provenance("train", PACKAGES),
    }))  # fmt: skip


# One row, in a process of its own


class PeerRows:
    """Rows of other programs, which share examples that are encoded once."""

    def __init__(self, config: BenchConfig, model: Path) -> None:
        self._config, self._model = config, model
        self._work: Work | None = None

    def run(self, name: str, folder: Path, *, seconds: float) -> dict:
        """A row's sample; a failure is a sample, too."""
        if seconds < 10:
            return {"failure": "no time was left"}
        names = ("data_path", "steps", "batch", "learning_rate", "max_length")
        if self._work is None:
            self._work = make_work(self._model, **{key: getattr(self._config, key) for key in names})
        return run_peer(name, self._work, folder, seconds=seconds)


def in_own_process(name: str, folder: Path, *, seconds: float) -> dict:
    """A row's sample; a failure is a sample, too."""
    if seconds < 10:
        return {"failure": "no time was left"}
    command = [sys.executable, "-m", "bench.train", *sys.argv[1:], "--row", name, "--folder", str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failure": f"ended after {seconds:.0f} s"}
    if done.returncode:
        return {"failure": done.stderr.strip()[-1500:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_row(
    config: BenchConfig, row: str, folder: Path, *, on_step: Callable[[list[float]], None] | None = None
) -> dict:
    """Train for `steps` steps and say how it went. In each step `on_step` hears the rates of the steps before it."""
    from alpaca.training import gradients, loop
    from alpaca.training.configuration.config import make_config
    from alpaca.training.planning.plan import count_flops, share_of_peak

    if row == "packed all":
        gradients.pack = pack_with_all_logits
    runs, prepare = [], loop.prepare
    loop.prepare = lambda *arguments: runs.append(prepare(*arguments)) or runs[0]
    loop.finish = lambda run, **rest: None

    used: list[float] = []  # CPU seconds at each step's end

    def tell(entry: dict[str, object]) -> None:
        used.append(cpu_seconds())
        if on_step:
            on_step([past["tokens_per_second"] for past in runs[0].progress.log_history])

    with tempfile.TemporaryDirectory() as out:
        loop.train(make_config({
            "model_name_or_path": str(folder), "data_path": config.data_path, "output_dir": f"{out}/model",
            "max_steps": config.steps, "global_batch_size": config.batch, "model_max_length": config.max_length,
            "learning_rate": config.learning_rate, "save_strategy": "no", "report_to": "none", "num_samples": 0,
            **({"gradient_checkpointing": True} if config.checkpointing else {}), **ROWS[row],
        }), on_step=tell)  # fmt: skip
    run, history = runs[0], runs[0].progress.log_history
    rate = statistics.median(entry["tokens_per_second"] for entry in history[1:])
    memory, plan = run.plan.memory, run.plan
    once = count_flops(plan.shape, dataclasses.replace(plan.setup, num_checkpointed=0), plan.work)
    return {
        "losses": [entry["loss"] for entry in history],
        "tokens_per_second": rate,
        "tokens_per_cpu_second": rate_of_cpu(run, used),
        "share_of_peak": rounded(share_of_peak(run.plan, rate)),
        "flops_per_token": once / plan.work.num_tokens,
        "peak_bytes": run.memory.peak_bytes(),
        "process_peak_bytes": peak_anonymous_bytes(),
        "planned_bytes": memory.peak_bytes - (memory.overhead_bytes if DEVICE == "cuda" else 0),  # CUDA's own
        "layers_recomputed": run.plan.setup.num_checkpointed,
    }


def rate_of_cpu(run: "Run", used: list[float]) -> float:
    """Useful tokens a second of CPU time. used: by the end of each step; the first is left out."""
    batch = run.settings.batch

    def tokens(step: int) -> int:
        indices = step_examples(len(run.data), global_batch_size=batch.global_batch_size, seed=batch.seed, step=step)
        return int(run.data.lengths[indices].sum())

    steps = range(1, len(used))
    return statistics.median(tokens(step) / (used[step] - used[step - 1]) for step in steps)


def pack_with_all_logits(examples: list, *, pad_id: int):
    """`pack`, whose head then computes every position; those without a target carry no loss."""
    from dataclasses import replace

    from alpaca.data.batching import pack
    from alpaca.data.examples import MASKED_LABEL

    batch = pack(examples, pad_id=pad_id)
    ids = torch.full_like(batch.input_ids, MASKED_LABEL)
    ids[batch.target_positions] = batch.target_ids
    return replace(batch, target_positions=torch.arange(len(ids)), target_ids=ids)


# What came out


def summarize(samples: list[dict]) -> dict:
    """Medians over the rounds. The losses must not depend on the round."""
    good = [sample for sample in samples if "failure" not in sample]
    if not good:
        return {"failure": samples[0]["failure"]}
    return {
        **good[0],
        **{key: statistics.median(sample[key] for sample in good) for key in good[0] if key.startswith("tokens_per_")},
        **{key: max(sample[key] for sample in good) for key in ("peak_bytes", "process_peak_bytes")},
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


def make_targets(results: dict[str, dict], *, shape: str) -> list[Target]:
    """What the project aims at; on a GPU for LLaMA-7B's shape."""

    def figure(row: str, name: str) -> float | None:
        return results.get(row, {}).get(name)

    def over(row: str, base: str, name: str) -> float | None:
        mine, other = figure(row, name), figure(base, name)
        return mine / other if mine and other else None

    rows = [row for row, result in results.items() if "failure" not in result]
    planned = {
        row: abs(results[row]["peak_bytes"] / results[row]["planned_bytes"] - 1) for row in rows if row not in PEERS
    }
    worst = max(planned.values(), default=None)
    ratio = over("packed", "padded", "tokens_per_second")
    if DEVICE == "cpu":
        return [
            Target(label="packed / padded, useful tokens/s", value=ratio, least=2.0),
            Target(
                label="packed all / padded: of no padding alone",
                value=over("packed all", "padded", "tokens_per_second"),
            ),
            Target(label="largest error of a planned peak", value=worst, most=0.15),
        ]
    targets = [
        Target(label="packed / padded, useful tokens/s", value=ratio),
        Target(label="largest error of a planned peak", value=worst, most=0.10),
    ]
    if shape != "7b":
        return targets
    seconds = {row: RECIPE_TOKENS / rate if (rate := figure(row, "tokens_per_second")) else None for row in ROWS}
    quantized = figure("qlora", "peak_bytes")
    return [
        *targets,
        Target(label="the whole recipe, stanford, s", value=seconds["packed"], most=2333),
        Target(label="the whole recipe, fast, s", value=seconds["fast"], most=1800),
        Target(label="the whole recipe, fast within 80 GB, s", value=seconds["fast 80GB"]),
        Target(label="lora, useful tokens/s", value=figure("lora", "tokens_per_second"), least=14_800),
        Target(label="qlora, peak GiB", value=quantized / 2**30 if quantized else None, most=7.4),
        Target(label="compiled / not, fast", value=over("fast compiled", "fast", "tokens_per_second")),
    ]


def describe(results: dict[str, dict]) -> str:
    """A table for people, each rate beside the padded recipe's."""
    base = results.get("padded", {}).get("tokens_per_second")
    head = f"{'tokens/s':>10}{'by CPU s':>10}{'ratio':>8}{'of peak':>9}{'peak GB':>9}{'planned':>9}  losses"
    lines = [f"{'row':<18}{head}"]
    for name, result in results.items():
        if "failure" in result:
            lines.append(f"{name:<18}failed: {result['failure'].splitlines()[-1]}")
            continue
        rate, by_cpu, share = (
            result.get(key) for key in ("tokens_per_second", "tokens_per_cpu_second", "share_of_peak")
        )
        ratio, share = f"{rate / base:.2f}" if base else "-", f"{share:.0%}" if share else "-"
        planned = f"{result['planned_bytes'] / 1e9:.2f}" if "planned_bytes" in result else "-"
        sizes = f"{result['peak_bytes'] / 1e9:>9.2f}{planned:>9}"
        losses = f"{result['losses'][0]:.5f} … {result['losses'][-1]:.5f}"
        lines.append(f"{name:<18}{rate:>10.0f}{by_cpu:>10.0f}{ratio:>8}{share:>9}{sizes}  {losses}")
    return "\n".join(lines)


def parse_flags() -> tuple[BenchConfig, str | None, Path | None]:
    parser = argparse.ArgumentParser(description="Measure the training recipe.")
    data = find_real("alpaca_4000.json") or ROOT / "alpaca" / "data" / "sample.json"
    parser.add_argument("--shape", choices=tuple(SHAPES), default="20m")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--rows", help=f"of {', '.join((*ROWS, *PEERS))}")
    parser.add_argument("--peers", action="store_true", help=f"the rows {', '.join(PEER_ROWS)}; on a CPU")
    parser.add_argument("--batch", type=int, default=128, help="examples of an optimizer step")
    parser.add_argument("--data_path", default=str(data))
    parser.add_argument("--checkpointing", action="store_true", help="recompute all activations, not just what must be")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--budget_s", type=float, default=3600.0, help="no row starts, or goes on, after this")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    row, folder = options.pop("row"), options.pop("folder")
    with_peers = options.pop("peers")
    if with_peers and DEVICE == "cuda":
        raise InputError("--peers measures on a CPU; on a GPU they are rows of script/bench_gpu train")
    usual = PEER_ROWS if with_peers else DEFAULT_ROWS[DEVICE]
    options["rows"] = tuple(name.strip() for name in options["rows"].split(",")) if options["rows"] else usual
    unknown = set(options["rows"]) - {*ROWS, *PEERS}
    if unknown:
        raise InputError(f"--rows: unknown {', '.join(sorted(unknown))}; expected of {', '.join((*ROWS, *PEERS))}")
    return BenchConfig(**options), row, folder


if __name__ == "__main__":
    run_command(main)
