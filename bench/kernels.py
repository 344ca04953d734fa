"""Each operation of the engine by itself, at the shapes it has in the model, against the other ways to do it.

    python -m bench.kernels                    on a GPU LLaMA-7B's shapes in bfloat16, under 100 s; on a CPU under 60 s
    python -m bench.kernels --only attention   one family (linear, attention, small, sampling)
    python -m bench.kernels --quick            a smoke test of seconds: its figures mean nothing

Every way is checked against a plain float32 computation before it is timed; one that is wrong is a failed row. On a GPU
a row's time is of one call in a CUDA graph of many, over several copies of the weights or of keys and values, so that
they come from memory; the inputs of small operations stay in the cache, as in the model. Bytes are the least a row must
move, its share is of what copying a large tensor moves in the same run.

linear says for each format and number of rows which way makes a whole step's products fastest, and whether that is the
one alpaca/serving/kernels/linear.py takes; `winners` says the same of every other operation, sdpa and varlen on
contiguous keys (the ceilings) left out. When a kernel loses the GPU, the families after it run in a fresh process. The
last line is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from alpaca import cpu_threads

cpu_threads.set_defaults()  # as predict.py

import torch

from alpaca.errors import InputError, run_command
from bench import machine
from bench.kernel_cases import HEAD_WIDTHS, Case, Plan, attention_cases, linear_cases, make_plan, small_cases
from bench.provenance import ROOT, provenance
from bench.sampling_cases import sampling_cases
from bench.stopwatch import seconds_per_call
from bench.targets import rounded

Row = dict[str, object]

FAMILIES: dict[str, Callable[[Plan], Iterator[Case]]] = {
    "small": small_cases, "sampling": sampling_cases, "linear": linear_cases, "attention": attention_cases,
}  # fmt: skip
_BUDGETS_S = {"cuda": 90.0, "cpu": 48.0}


class WrongResultError(RuntimeError):
    """A way gave something else than the plain computation."""


def main() -> None:
    options = parse_flags()
    start = time.monotonic()
    torch.manual_seed(0)
    origin = {**provenance("kernels", ("torch",)), "device": machine.describe_device()}
    plan = make_plan(options.device, options.shape, quick=options.quick)
    machine.wake(options.device)
    bandwidth = options.bandwidth or machine.measure_bandwidth(options.device)
    rows, rest = run_families(plan, options.only, bandwidth=bandwidth, deadline=start + options.budget_s)
    if rest:
        others = run_in_a_fresh_process(
            options, rest, bandwidth, budget_s=options.budget_s - (time.monotonic() - start)
        )
        print("\n".join(map(row_line, others)))
        rows += others
    result = {
        "bench": "kernels",
        "config": {name: value for name, value in vars(options).items() if name != "out"},
        "bandwidth_gb_per_s": rounded(bandwidth / 1e9),
        "seconds": round(time.monotonic() - start),
        "num_rows": len(rows),
        "num_failed": sum("failure" in row for row in rows),
        "num_left_out": sum("left_out" in row for row in rows),
        "linear": choose_linear(rows, plan),
        "winners": find_winners(rows),
        "rows": rows,
        **origin,
    }
    print_choices(result)
    text = json.dumps(result)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)


def parse_flags(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=machine.DEVICE)
    parser.add_argument("--shape", choices=HEAD_WIDTHS, help="default: 7b on a GPU, 46m on a CPU")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="families to measure")
    parser.add_argument("--budget_s", type=float, help="rows that would start after it are left out")
    parser.add_argument("--bandwidth", type=float, help="bytes a second, where it was measured before")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--out", type=Path, help="a file for the JSON, which is also the last line of the output")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here")
    options.shape = options.shape or ("7b" if options.device == "cuda" else "46m")
    options.budget_s = _BUDGETS_S[options.device] if options.budget_s is None else options.budget_s
    return options


# Measuring --------------------------------------------------------------------------------------------------------


def run_families(plan: Plan, names: Iterable[str], *, bandwidth: float, deadline: float) -> tuple[list[Row], list[str]]:
    """The rows of the families, and those that could not begin, because the device was lost."""
    rows: list[Row] = []
    waiting = list(names)
    while waiting:
        name = waiting.pop(0)
        began, before = time.monotonic(), len(rows)
        with torch.inference_mode():
            for case in FAMILIES[name](plan):
                rows.append(measure(case, plan.device, bandwidth=bandwidth, deadline=deadline))
                print(row_line(rows[-1]), flush=True)  # a kernel that hangs leaves those before it
                if is_lost(rows[-1], plan.device):
                    return rows, waiting
        print(f"{name}: {len(rows) - before} rows after {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    return rows, []


def measure(case: Case, device: str, *, bandwidth: float, deadline: float) -> Row:
    """One row: checked, then timed; or why not."""
    row: Row = {"operation": case.operation, "way": case.way, **case.setting}
    row |= {name: True for name in ("is_chosen", "is_ceiling") if getattr(case, name)}
    if time.monotonic() > deadline:
        return {**row, "left_out": "no time"}
    try:
        calls = case.make()
        poison(case, device)
        error = case.error_of(calls[0]())
        row["error"] = float(f"{error:.2g}")
        if not error <= case.tolerance:  # NaN is no result either
            raise WrongResultError(f"off by {error:.2g} of the largest value; {case.tolerance:g} is allowed")
        seconds, row["timed"] = seconds_per_call(calls, device=device)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return {**row, "failure": f"{type(error).__name__}: {error}"[-1000:]}
    rate = case.num_bytes / seconds
    row |= {"us": rounded(seconds * 1e6), "bytes": case.num_bytes, "gb_per_s": rounded(rate / 1e9)}
    row["share_of_bandwidth"] = rounded(rate / bandwidth)
    if case.num_operations:
        row["tflop_per_s"] = rounded(case.num_operations / seconds / 1e12)
    return row


def poison(case: Case, device: str) -> None:
    """Leave NaN in freed memory, where a kernel that does not write all of its output would find an earlier result."""
    if device == "cuda":
        blocks = [torch.full((size,), float("nan"), device=device) for size in (1 << 12, 1 << 16, 1 << 20, 1 << 23)]
        del blocks
        torch.cuda.synchronize()


def is_lost(row: Row, device: str) -> bool:
    """Whether no later call can succeed in this process."""
    if device == "cpu" or "failure" not in row:
        return False
    try:
        return torch.ones(1, device=device).item() != 1
    except RuntimeError:
        return True


def run_in_a_fresh_process(
    options: argparse.Namespace, names: list[str], bandwidth: float, *, budget_s: float
) -> list[Row]:
    """The rows of the families that are left; a row that says so, where that fails, too."""
    command = [sys.executable, "-m", "bench.kernels", "--device", options.device, "--shape", options.shape]
    command += [
        "--bandwidth",
        str(bandwidth),
        "--budget_s",
        str(budget_s),
        "--only",
        *names,
        *(["--quick"] if options.quick else []),
    ]
    print(f"the device was lost; {', '.join(names)} in a fresh process", file=sys.stderr, flush=True)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    try:
        return json.loads(done.stdout.splitlines()[-1])["rows"]
    except (IndexError, ValueError, KeyError):
        failure = f"ended with status {done.returncode} and no JSON: {done.stdout[-500:]}"
        return [{"operation": ", ".join(names), "way": "fresh process", "failure": failure}]


# Choosing ---------------------------------------------------------------------------------------------------------


def choose_linear(rows: list[Row], plan: Plan) -> list[Row]:
    """Of each format, dtype and number of rows: milliseconds of a step's products each way, and the fastest way.

    The head is never quantised: it counts in the format none alone. A way that one layer lacks is none.
    """
    counts = dict.fromkeys(plan.layers(), plan.shape.num_layers) | {"head": 1}
    times: dict[tuple, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    chosen: dict[tuple, str] = {}
    for row in rows:
        if row["operation"] == "linear" and (row["format"] == "none" or row["layer"] != "head"):
            key = (row["format"], row["dtype"], row["rows"])
            if row.get("is_chosen"):
                chosen[key] = row["way"]
            if "us" in row:
                times[key][row["way"]][row["layer"]] = row["us"]
    choices = []
    for key, ways in times.items():
        names = [layer for layer in counts if layer != "head" or key[0] == "none"]
        totals = {
            way: rounded(sum(counts[layer] * us[layer] for layer in names) / 1e3)
            for way, us in ways.items()
            if set(names) <= us.keys()
        }
        by_layer = {}
        for layer in names:
            own = {way: us[layer] for way, us in ways.items() if layer in us}
            by_layer |= {layer: min(own, key=own.get)} if own else {}
        choice = {"format": key[0], "dtype": key[1], "rows": key[2], "ms_per_step": totals, "by_layer": by_layer}
        choices.append({**choice, **_winner(totals, chosen.get(key))})
    return choices


def find_winners(rows: list[Row]) -> list[Row]:
    """Of each operation and setting the fastest way the engine could take, and the ceiling beside it."""
    groups: dict[str, list[Row]] = defaultdict(list)
    settings: dict[str, Row] = {}
    for row in rows:
        setting = setting_of(row)
        settings[json.dumps(setting)] = setting
        groups[json.dumps(setting)].append(row)
    winners = []
    for key, members in groups.items():
        times = {row["way"]: row["us"] for row in members if "us" in row and not row.get("is_ceiling")}
        chosen = next((row["way"] for row in members if row.get("is_chosen")), None)
        ceilings = [row["us"] for row in members if "us" in row and row.get("is_ceiling")]
        if len(times) + len(ceilings) > 1:
            winners.append({**settings[key], **_winner(times, chosen), "ceiling_us": min(ceilings, default=None)})
    return winners


def _winner(times: dict[str, float], chosen: str | None) -> Row:
    winner = min(times, key=times.get) if times else None
    slower = times[chosen] / times[winner] if chosen in times else None
    return {"winner": winner, "chosen": chosen, "chosen_over_winner": rounded(slower)}


def setting_of(row: Row) -> Row:
    names = ("operation", "layer", "format", "kind", "heads", "dtype", "rows", "sequences", "length", "new", "cached")
    return {name: row[name] for name in names if name in row}


# Printing ---------------------------------------------------------------------------------------------------------


def row_line(row: Row) -> str:
    label = " ".join(f"{value}" for value in setting_of(row).values())
    start = f"{label:44} {row['way']:16}"
    if "us" not in row:
        return f"{start} {str(row.get('failure', row.get('left_out'))).splitlines()[0][:90]}"
    marks = ("  chosen" if row.get("is_chosen") else "") + ("  ceiling" if row.get("is_ceiling") else "")
    tflops = f"{row['tflop_per_s']:9.4g} TFLOP/s" if "tflop_per_s" in row else " " * 17
    figures = f"{row['us']:11.5g} us {row['gb_per_s']:8.4g} GB/s {row['share_of_bandwidth']:7.1%}{tflops}"
    return f"{start}{figures}  off {row['error']:.0e}{marks}"


def print_choices(result: Row) -> None:
    print(f"\nlinear layers of a step, ms (copying: {result['bandwidth_gb_per_s']:g} GB/s)")
    for choice in result["linear"]:
        ways = "  ".join(f"{way} {ms:g}" for way, ms in choice["ms_per_step"].items())
        print(f"  {choice['format']:5} {choice['dtype']:9} {choice['rows']:4}  {ways}  ->  {_verdict(choice)}")
    print("\nother operations where the engine's way is not the fastest")
    for winner in result["winners"]:
        if winner["operation"] != "linear" and winner["winner"] != winner["chosen"]:
            print(f"  {' '.join(map(str, setting_of(winner).values())):44} {_verdict(winner)}")
    failed, left_out = result["num_failed"], result["num_left_out"]
    print(f"\n{result['num_rows']} rows, {failed} failed, {left_out} left out, {result['seconds']} s")


def _verdict(choice: Row) -> str:
    if choice["winner"] == choice["chosen"]:
        return f"{choice['winner']}, as chosen"
    slower = choice["chosen_over_winner"]
    return f"{choice['winner']}; chosen {choice['chosen']}" + (f" takes {slower:.2f} x" if slower else " has no time")


if __name__ == "__main__":
    run_command(main)
