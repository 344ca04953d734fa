"""Measure this project on a GPU, one part a call; each part is complete in itself and keeps to its seconds.

Results go to OUT (default: the variable OUT, else bench/results): gpu-PART.json, written anew after every row, so that
a part that is killed leaves what it has; a log a job; and the built kernels, packed for the next run. At the end stands
a table of rows and of targets met and missed. The exit status is 1 if a row failed; a missed target is no failure.

What the machine needs: one NVIDIA GPU of 80 GB with its driver; Python 3.12 with torch (CUDA), triton, transformers,
peft, accelerate, safetensors, sentencepiece, numpy and pytest; this project's files; room for 14 GB in memory or on a
disk. No network, no git. What is missing costs the rows that need it, and no others. Wheels of what the machine lacks
go into the folder .whl/ of the project: cog, coglet and structlog for the rows over HTTP; bitsandbytes for QLoRA; trl,
datasets and what datasets needs (pyarrow, pandas, multiprocess, dill, xxhash and the like) for the row of TRL.

variables:
  ALPACA_COMMIT          the commit, where there is no git to ask
  ALPACA_REAL            the folder of real inputs: the 260K model with its published text, 4,000 examples, a tokenizer
  ALPACA_TRITON_CACHE    a folder that an earlier run has left its built kernels in (its OUT)
  ALPACA_BENCH_KEEP      leave the folder of random weights for the next part on the same machine
  ALPACA_BENCH_QUICK     tiny sizes, also on a CPU: whether the kit works; the figures mean nothing
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from alpaca.errors import InputError, run_command
from bench.gpu import kernel_cache
from bench.gpu.jobs import run_job, run_stages
from bench.gpu.plans import MACHINE, PARTS, Part
from bench.gpu.record import Record
from bench.gpu.scale import is_quick
from bench.provenance import commit

CACHE_VARIABLE = "ALPACA_TRITON_CACHE"
_PACKING_S = 6.0  # kept of the budget, to pack the kernels and say what there is


def main() -> None:
    options = parse_flags()
    part = PARTS[options.part]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    options.out.mkdir(parents=True, exist_ok=True)
    head = {
        "bench": f"gpu {part.name}", "budget_s": options.budget_s, "is_quick": is_quick(), "commit": commit(),
        "command": f"script/bench_gpu {part.name}",  # where OUT lies says nothing elsewhere
    }  # fmt: skip
    record = Record(options.out / f"gpu-{part.name}.json", head, make_targets=part.make_targets)
    run(part, record, options.out, deadline=time.monotonic() + options.budget_s)
    record.finish()
    print("\n".join(summary(record)))
    sys.exit(1 if record.failures else 0)


def parse_flags(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parts = "\n".join(f"  {part.name:8}{part.budget_s:4g} s  {part.help}" for part in PARTS.values())
    parser = argparse.ArgumentParser(
        prog="script/bench_gpu", description=f"{__doc__}\nparts, and the seconds they keep to:\n{parts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("part", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT", help="folder for the results")
    parser.add_argument("--budget_s", type=float, help="other seconds than the part's own")
    options = parser.parse_args(arguments)
    options.out = (options.out or Path(os.environ.get("OUT") or "bench/results")).absolute()
    options.budget_s = PARTS[options.part].budget_s if options.budget_s is None else options.budget_s
    if not options.budget_s > 0:
        raise InputError(f"--budget_s must be above 0; found {options.budget_s:g}")
    return options


def run(part: Part, record: Record, out: Path, *, deadline: float) -> None:
    """The machine, kernels of an earlier run, the part's jobs; after each stage the kernels are packed."""
    kernels = kernel_cache.default_folder()
    environment = {**os.environ, **kernel_cache.environment(kernels), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false"}
    last = deadline - min(_PACKING_S, 0.1 * (deadline - time.monotonic()))
    run_job(part.name, MACHINE, record, last, environment)
    key = record.fact("kernel_cache_key")
    if key and key["device"] == "cpu" and not is_quick():
        record.fail(part.name, "torch sees no GPU here; ALPACA_BENCH_QUICK=1 tries the kit on a CPU")
        return
    record.put_facts({"kernel_cache": take_kernels(kernels, key)})
    packed = _count_files(kernels)
    for stage in part.stages:
        run_stages(part.name, [stage], record, deadline=last, environment=environment)
        if key and _count_files(kernels) != packed:
            packed = _count_files(kernels)
            record.put_facts({"kernel_cache_packed": pack_kernels(kernels, out, key)})


def take_kernels(folder: Path, key: kernel_cache.Key | None) -> str:
    """Unpack what an earlier run has left; what became of it, in words. Never a reason not to measure."""
    source = os.environ.get(CACHE_VARIABLE)
    if not source:
        return f"none given: {CACHE_VARIABLE} is not set"
    if not key:
        return "ignored: the card could not be told"
    try:
        return kernel_cache.unpack(Path(source), folder, key)
    except (InputError, OSError) as error:
        return f"ignored: {error}"


def pack_kernels(folder: Path, out: Path, key: kernel_cache.Key) -> dict[str, object]:
    """Pack the kernels built so far; never a reason not to go on."""
    try:
        return kernel_cache.pack(folder, out, key)
    except OSError as error:
        return {"failure": str(error)}


def _count_files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


def summary(record: Record) -> list[str]:
    """What people read at the end: rows with their figures, what failed, targets."""
    lines = [f"kernels of an earlier run: {record.fact('kernel_cache')}", ""]
    for name, row in record.rows.items():
        if not name.startswith("kernel "):  # one for each build: the file has them
            lines.append(f"{name:34} {describe(row)}")
    lines += ["", *(target.line() for target in record.targets)]
    met = [target.is_met for target in record.targets]
    lines += [
        "",
        f"targets: {met.count(True)} met, {met.count(False)} missed; rows that failed: {len(record.failures)}",
    ]
    return [*lines, str(record.path)]


_SHOWN = (
    "tokens_per_s", "tokens_per_second", "ms_per_step", "share_of_bandwidth", "share_of_matrix_rate",
    "first_token_ms_p50", "prompt_tokens_per_s", "first_token_s", "passed", "failed", "skipped", "is_right",
    "num_kernels", "build_s", "gb_per_s", "tflop_per_s", "peak_bytes", "scaled", "phases_s",
)  # fmt: skip


def describe(row: dict[str, object]) -> str:
    """A row's main figures, or why it has none."""
    if "failure" in row:
        return f"FAILED  {str(row['failure']).strip().splitlines()[-1][:150]}"
    if "left_out" in row:
        return f"left out: {row['left_out']}"
    return "  ".join(f"{key} {row[key]}" for key in _SHOWN if row.get(key) is not None)


if __name__ == "__main__":
    run_command(main)
