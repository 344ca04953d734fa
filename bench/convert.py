"""Each converter against the way of the original tools, and against `cp`, in one run on the same files.

    python -m bench.convert                     # --direction to_hf
    python -m bench.convert --direction merge

to_hf is measured against transformers' last converter (4.46.3, in an environment of its own in .bench/), merge and
to_meta (with an adapter) against alpaca-lora's way, make_diff and recover against Stanford's (`convert_originals`),
gguf against `cp` alone: llama.cpp's converter is in no package.

Makes models of --gigabytes, then in turn, --rounds times: `cp` of the input followed by fsync, ours, theirs. Seconds
are of the whole process, imports included; ours ends with its fsyncs, theirs makes none, so its files are fsynced
after it and the sum is given too. Memory is the largest anonymous resident memory of the process and its children
(page cache of memory maps not counted). Checksums, the check of logits and the test inference of `recover` are left
out; checksums of to_hf are timed apart. The files are in the page cache for all. The last line is one JSON object.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

from alpaca.errors import MissingInput, run_command
from alpaca.files.outputs import require_free_space
from alpaca.formats.hf.folder import TensorSpec, WeightsFolder
from alpaca.formats.hf.writing import write_weights
from alpaca.formats.meta import checkpoint as meta_files
from alpaca.formats.meta import layout
from alpaca.text.sentencepiece import SentencePieceTokenizer
from bench.environments import environment
from bench.provenance import ROOT, find_real, provenance
from bench.random_model import Shape, write_random_llama

WORK = ROOT / ".bench"
THEIR_VERSION = "4.46.3"
THEIR_PACKAGES = [f"transformers=={THEIR_VERSION}", "accelerate", "sentencepiece", "protobuf", "numpy"]
DIRECTIONS = ("to_hf", "to_meta", "merge", "make_diff", "recover", "gguf")
_WIDTH, _HEADS, _MULTIPLE_OF = 2048, 16, 256


@dataclass
class Run:
    """One process's figures; all rounds of one way are a list of these."""

    seconds: float
    peak_anonymous_bytes: int = 0
    sync_seconds: float = field(default=0.0)


@dataclass(frozen=True)
class Case:
    """One direction on files that are there. theirs: None where there is no original tool to run."""

    source: Path
    ours: Callable[[], Run]
    theirs: Callable[[], Run] | None
    baseline: str


def main() -> None:
    options = parse_flags()
    require_free_space(WORK, int(8 * options.gigabytes * 1e9))
    case = make_to_hf(options) if options.direction == "to_hf" else make_other(options)
    runs: dict[str, list[Run]] = {"ours": [], "theirs": [], "cp": []}
    for _ in tqdm(range(options.rounds), desc="rounds"):
        runs["cp"].append(run_copy(case.source))
        runs["ours"].append(case.ours())
        if case.theirs:
            runs["theirs"].append(case.theirs())
    extra = {}
    if options.direction == "to_hf":
        with_checksums = run_ours(case.source, checksums=True).seconds
        extra["checksums_s"] = round(with_checksums - statistics.median(run.seconds for run in runs["ours"]), 2)
    report(options, case, {way: rounds for way, rounds in runs.items() if rounds}, extra)
    shutil.rmtree(WORK / "convert")


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--direction", choices=DIRECTIONS, default="to_hf")
    parser.add_argument("--gigabytes", type=float, default=1.3, help="size of the model")
    parser.add_argument("--num_shards", type=int, default=2, help="of to_hf's checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    tokenizer = find_real("llama-tokenizer/tokenizer.model")
    parser.add_argument("--tokenizer", type=Path, default=tokenizer, required=tokenizer is None)
    options = parser.parse_args()
    if not options.tokenizer.is_file():
        raise MissingInput(f"no tokenizer at {options.tokenizer}; name a SentencePiece tokenizer.model by --tokenizer")
    return options


# What is measured -----------------------------------------------------------------------------------------------


def make_to_hf(options: argparse.Namespace) -> Case:
    python = their_environment()
    source = make_checkpoint(options.gigabytes, options.num_shards, options.tokenizer)
    theirs = f"transformers {THEIR_VERSION}"
    return Case(source, lambda: run_ours(source), lambda: run_theirs(source, python, options.num_shards), theirs)


def make_other(options: argparse.Namespace) -> Case:
    """The directions that start from Hugging Face folders: a base, and an adapter, a tuned model or a difference."""
    direction, base = options.direction, make_model("base", options.gigabytes)
    given = {"base": base}
    if direction in ("merge", "to_meta"):
        given["adapter"] = fresh("adapter")
        run_original("adapter", {"base": base}, given["adapter"])
    elif direction in ("make_diff", "recover"):
        given["tuned"] = make_model("tuned", options.gigabytes, like=base)
        given["diff"] = fresh("diff")
        if direction == "recover":
            watch([sys.executable, *our_command("make_diff", given, given["diff"])])

    def ours() -> Run:
        return watch([sys.executable, *our_command(direction, given, fresh("ours"))])

    if direction == "gguf":
        return Case(base, ours, None, "none")
    baseline = "alpaca-lora's way" if "adapter" in given else "Stanford's way"
    return Case(base, ours, lambda: run_original(direction, given, fresh("theirs")), baseline)


def our_command(direction: str, given: dict[str, Path], target: Path) -> list[str]:
    """Arguments of python for one of our commands, its checks beyond the work itself switched off."""
    base, adapter, tuned, diff = (str(given.get(name)) for name in ("base", "adapter", "tuned", "diff"))
    words = {
        "to_meta": ["export_state_dict_checkpoint", "--input_dir", base, "--adapter", adapter, "--output_dir"],
        "merge": ["export_hf_checkpoint", "--check_logits", "never", "--base_model", base, "--adapter", adapter,
                  "--output_dir"],
        "make_diff": ["weight_diff", "make_diff", "--path_raw", base, "--path_tuned", tuned, "--path_diff"],
        "recover": ["weight_diff", "recover", "--test_inference", "false", "--path_raw", base, "--path_diff", diff,
                    "--path_tuned"],
        "gguf": ["export_gguf", "--input_dir", base, "--output_file"],
    }[direction]  # fmt: skip
    return ["-m", f"convert.{words[0]}", *words[1:], str(target / "model.gguf" if direction == "gguf" else target)]


def run_original(way: str, given: dict[str, Path], target: Path) -> Run:
    words = [word for name, path in given.items() for word in (f"--{name}", str(path))]
    command = [sys.executable, "-m", "bench.convert_originals", way, *words, "--output", str(target)]
    run = watch(command)
    return replace(run, sync_seconds=sync(target))


def run_ours(source: Path, *, checksums: bool = False) -> Run:
    flags = ["--input_dir", str(source.parent), "--model_size", source.name, "--output_dir", str(fresh("ours"))]
    flags += [] if checksums else ["--skip_checksums"]
    return watch([sys.executable, "-m", "convert.convert_llama_weights_to_hf", *flags])


def run_theirs(source: Path, python: Path, num_shards: int) -> Run:
    target = fresh("theirs")
    command = [str(python), "-m", "transformers.models.llama.convert_llama_weights_to_hf", "--input_dir", str(source)]
    run = watch([*command, "--output_dir", str(target), "--num_shards", str(num_shards)])
    return replace(run, sync_seconds=sync(target))


def run_copy(source: Path) -> Run:
    target = fresh("copy")
    start = time.perf_counter()
    subprocess.run(["cp", *map(str, weight_files(source)), str(target)], check=True)
    sync(target)
    return Run(time.perf_counter() - start)


def weight_files(source: Path) -> list[Path]:
    return sorted([*source.glob("*.pth"), *source.glob("*.safetensors")])


def sync(folder: Path) -> float:
    """fsync all files of a folder; the seconds it took."""
    start = time.perf_counter()
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    return time.perf_counter() - start


def watch(command: list[str]) -> Run:
    """Run a command to its end and measure it."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    peak = [0]
    watcher = threading.Thread(target=_watch_memory, args=(process, peak))
    watcher.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - start
    watcher.join()
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{output.decode(errors='replace')[-3000:]}")
    return Run(seconds, peak[0])


def _watch_memory(process: subprocess.Popen, peak: list[int]) -> None:
    while process.poll() is None:
        try:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            peak[0] = max(peak[0], sum(_anonymous_bytes(member.pid) for member in family))
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            continue
        time.sleep(0.005)


def _anonymous_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


# What it needs --------------------------------------------------------------------------------------------------


def their_environment() -> Path:
    """The last transformers that has a converter."""
    release = torch.__version__.split("+")[0]
    return environment(f"transformers-{THEIR_VERSION}", THEIR_PACKAGES, torch=release)


def make_model(name: str, gigabytes: float, *, like: Path | None = None) -> Path:
    """A random float16 LLaMA in Hugging Face format; `like` another: its values, each a little off."""
    folder = fresh(name)
    shape = Shape(
        width=_WIDTH,
        num_layers=num_layers(gigabytes, 32000),
        num_heads=_HEADS,
        ffn_width=layout.ffn_width(_WIDTH, 256, None),
    )
    write_random_llama(folder, shape, torch.float16)
    if like is not None:
        weights, generator = WeightsFolder(like), torch.Generator().manual_seed(1)

        def near(spec: TensorSpec) -> list[torch.Tensor]:
            return [weights.tensor(spec.name) + (torch.randn(spec.shape, generator=generator) * 1e-3).half()]

        write_weights(folder, weights.specs(), near, max_shard_size=5 * 10**9)
    return folder


def num_layers(gigabytes: float, vocab_size: int) -> int:
    """How many layers of LLaMA-7B's proportions, half as wide, make up the size in float16."""
    per_layer = 2 * (4 * _WIDTH * _WIDTH + 3 * _WIDTH * layout.ffn_width(_WIDTH, _MULTIPLE_OF, None))
    return max(1, round((gigabytes * 1e9 - 2 * 2 * vocab_size * _WIDTH) / per_layer))


def make_checkpoint(gigabytes: float, num_shards: int, tokenizer: Path) -> Path:
    """A random float16 LLaMA of LLaMA-7B's proportions, half as wide, with as many layers as the size asks for."""
    vocab_size = SentencePieceTokenizer(tokenizer).size
    shape = layout.describe(
        width=_WIDTH, num_layers=num_layers(gigabytes, vocab_size), num_heads=_HEADS, num_kv_heads=_HEADS,
        ffn_width=layout.ffn_width(_WIDTH, _MULTIPLE_OF, None), vocab_size=vocab_size, norm_eps=1e-6, rope_theta=1e4,
    )  # fmt: skip
    folder = fresh("source") / "bench"
    folder.mkdir()
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(num_shards)]
    for place in layout.placements(shape):
        whole = torch.randn(place.shape, generator=torch.Generator().manual_seed(0)).mul_(0.02).half()
        for shard, part in zip(shards, split(whole, place, num_shards), strict=True):
            shard[place.meta_name] = part.clone()
    params = {"dim": _WIDTH, "multiple_of": _MULTIPLE_OF, "n_heads": _HEADS, "n_layers": shape.num_layers}
    meta_files.write_checkpoint(folder, shards, {**params, "norm_eps": 1e-6, "vocab_size": -1})
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    return folder


def split(whole: torch.Tensor, place: layout.Placement, num_shards: int) -> list[torch.Tensor]:
    return [whole] * num_shards if place.split_axis is None else list(whole.chunk(num_shards, dim=place.split_axis))


def fresh(name: str) -> Path:
    """An empty folder of the benchmark's."""
    folder = WORK / "convert" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


# The report -----------------------------------------------------------------------------------------------------


def report(options: argparse.Namespace, case: Case, runs: dict[str, list[Run]], extra: dict[str, object]) -> None:
    size = sum(path.stat().st_size for path in weight_files(case.source))
    seconds = {way: statistics.median(run.seconds for run in rounds) for way, rounds in runs.items()}
    memory = {way: max(run.peak_anonymous_bytes for run in rounds) for way, rounds in runs.items()}
    for way in runs:
        rate = size / seconds[way] / 1e9
        print(f"{way:7}{seconds[way]:7.2f} s  {rate:5.2f} GB/s  peak anonymous memory {memory[way] / 1e6:7.0f} MB")
    figures = {
        "bench": "convert",
        "direction": options.direction,
        "checkpoint_bytes": size,
        "num_shards": options.num_shards if options.direction == "to_hf" else 1,
        "ours_s": round(seconds["ours"], 2),
        "cp_with_fsync_s": round(seconds["cp"], 2),
        "share_of_cp_rate": round(seconds["cp"] / seconds["ours"], 3),
        "ours_peak_anonymous_mb": round(memory["ours"] / 1e6),
        **extra,
        **_against_theirs(runs, seconds, memory),
        "rounds_s": {way: [round(run.seconds, 2) for run in rounds] for way, rounds in runs.items()},
        "baseline": case.baseline,
    }
    print(json.dumps({**figures, **provenance("convert", ("torch", "safetensors", "transformers", "peft"))}))


def _against_theirs(runs: dict[str, list[Run]], seconds: dict[str, float], memory: dict[str, int]) -> dict[str, object]:
    if "theirs" not in runs:
        return {}
    return {
        "theirs_s": round(seconds["theirs"], 2),
        "theirs_with_fsync_s": round(statistics.median(run.seconds + run.sync_seconds for run in runs["theirs"]), 2),
        "time_ratio": round(seconds["ours"] / seconds["theirs"], 3),
        "memory_ratio": round(memory["ours"] / memory["theirs"], 3),
        "theirs_peak_anonymous_mb": round(memory["theirs"] / 1e6),
    }


if __name__ == "__main__":
    run_command(main)
