"""Conversion against transformers' last converter (4.46.3) and against `cp`, in one run on the same files.

    python -m bench.convert

Makes a checkpoint of --gigabytes in Meta's layout with --num_shards shards, then in turn, --rounds times: ours, theirs,
and `cp` of the checkpoint followed by fsync. Seconds are of the whole process, imports included; ours ends with its
fsyncs, theirs makes none, so its files are fsynced after it and the sum is given too. Memory is the largest
anonymous resident memory of the process and its children (page cache of memory maps not counted). Checksums are timed
apart. The files are in the page cache for all. transformers 4.46.3 gets an environment of its own in .bench/.
The last line is one JSON object.
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
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

from alpaca.errors import MissingInput, run_command
from alpaca.hf_files import require_free_space
from alpaca.tokenizer import SentencePieceTokenizer
from bench.provenance import REAL, ROOT, provenance
from convert import layout, meta_files

WORK = ROOT / ".bench"
THEIR_VERSION = "4.46.3"
THEIR_PACKAGES = [f"transformers=={THEIR_VERSION}", "accelerate", "sentencepiece", "protobuf", "numpy"]
_MULTIPLE_OF = 256


@dataclass
class Run:
    """One process's figures; all rounds of one way are a list of these."""

    seconds: float
    peak_anonymous_bytes: int = 0
    sync_seconds: float = field(default=0.0)


def main() -> None:
    options = parse_flags()
    python = their_environment()
    source = make_checkpoint(options.gigabytes, options.num_shards, options.tokenizer)
    size = sum(path.stat().st_size for path in source.glob("*.pth"))
    require_free_space(WORK, 4 * size)
    runs: dict[str, list[Run]] = {"ours": [], "theirs": [], "cp": []}
    for _ in tqdm(range(options.rounds), desc="rounds"):
        runs["cp"].append(run_copy(source))
        runs["ours"].append(run_ours(source))
        runs["theirs"].append(run_theirs(source, python, options.num_shards))
    checksums = run_ours(source, checksums=True).seconds - statistics.median(run.seconds for run in runs["ours"])
    report(options, size, runs, checksums)
    shutil.rmtree(WORK / "convert")


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.3, help="size of the checkpoint")
    parser.add_argument("--num_shards", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizer", type=Path, default=REAL / "llama-tokenizer" / "tokenizer.model")
    options = parser.parse_args()
    if not options.tokenizer.is_file():
        raise MissingInput(f"no tokenizer at {options.tokenizer}; name a SentencePiece tokenizer.model by --tokenizer")
    return options


# What is measured -----------------------------------------------------------------------------------------------


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
    subprocess.run(["cp", *map(str, sorted(source.glob("*.pth"))), str(target)], check=True)
    sync(target)
    return Run(time.perf_counter() - start)


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
    """An environment with the last transformers that has a converter; made once."""
    folder = WORK / f"transformers-{THEIR_VERSION}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"making {folder} …", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, f"torch=={torch.__version__.split('+')[0]}"], check=True)
        subprocess.run([*install, *THEIR_PACKAGES], check=True)
        (folder / "complete").touch()
    return python


def make_checkpoint(gigabytes: float, num_shards: int, tokenizer: Path) -> Path:
    """A random float16 LLaMA of LLaMA-7B's proportions, half as wide, with as many layers as the size asks for."""
    width, vocab_size = 2048, SentencePieceTokenizer(tokenizer).size
    ffn = layout.ffn_width(width, _MULTIPLE_OF, None)
    per_layer, outside = 2 * (4 * width * width + 3 * width * ffn), 2 * 2 * vocab_size * width
    num_layers = max(1, round((gigabytes * 1e9 - outside) / per_layer))
    shape = layout.ModelShape(
        width=width, num_layers=num_layers, num_heads=16, num_kv_heads=16, ffn_width=ffn, vocab_size=vocab_size,
        norm_eps=1e-6, rope_theta=1e4,
    )  # fmt: skip
    folder = fresh("source") / "bench"
    folder.mkdir()
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(num_shards)]
    for place in layout.placements(shape):
        whole = torch.randn(place.shape, generator=torch.Generator().manual_seed(0)).mul_(0.02).half()
        for shard, part in zip(shards, split(whole, place, num_shards), strict=True):
            shard[place.meta_name] = part.clone()
    params = {"dim": width, "multiple_of": _MULTIPLE_OF, "n_heads": 16, "n_layers": num_layers, "norm_eps": 1e-6}
    meta_files.write_checkpoint(folder, shards, {**params, "vocab_size": -1})
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


def report(options: argparse.Namespace, size: int, runs: dict[str, list[Run]], checksums: float) -> None:
    seconds = {way: statistics.median(run.seconds for run in rounds) for way, rounds in runs.items()}
    memory = {way: max(run.peak_anonymous_bytes for run in rounds) for way, rounds in runs.items()}
    synced = statistics.median(run.seconds + run.sync_seconds for run in runs["theirs"])
    for way in runs:
        rate = size / seconds[way] / 1e9
        print(f"{way:7}{seconds[way]:7.2f} s  {rate:5.2f} GB/s  peak anonymous memory {memory[way] / 1e6:7.0f} MB")
    figures = {
        "bench": "convert",
        "checkpoint_bytes": size,
        "num_shards": options.num_shards,
        "ours_s": round(seconds["ours"], 2),
        "theirs_s": round(seconds["theirs"], 2),
        "theirs_with_fsync_s": round(synced, 2),
        "cp_with_fsync_s": round(seconds["cp"], 2),
        "checksums_s": round(checksums, 2),
        "time_ratio": round(seconds["ours"] / seconds["theirs"], 3),
        "memory_ratio": round(memory["ours"] / memory["theirs"], 3),
        "share_of_cp_rate": round(seconds["cp"] / seconds["ours"], 3),
        "ours_peak_anonymous_mb": round(memory["ours"] / 1e6),
        "theirs_peak_anonymous_mb": round(memory["theirs"] / 1e6),
        "rounds_s": {way: [round(run.seconds, 2) for run in rounds] for way, rounds in runs.items()},
        "baseline": f"transformers {THEIR_VERSION}",
    }
    print(json.dumps({**figures, **provenance("convert", ("torch", "safetensors"))}))


if __name__ == "__main__":
    run_command(main)
