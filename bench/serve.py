"""Serving: the engine in process and behind Cog's server, against transformers, in one run on the same weights.

    python -m bench.serve                   a random LLaMA of 45 M parameters; on a CPU under 8 minutes
    python -m bench.serve --shape 7b        LLaMA-7B's shape in bfloat16, on a GPU; under 10 minutes
    python -m bench.serve --quick           a smoke test of one minute: its figures mean nothing

generate:  transformers' `generate`, eager, one prompt after the other (and by --compiled: static cache, torch.compile).
batching:  transformers' continuous batching, started and warm before the clock runs.
engine:    this project's engine without Cog: requests submitted at once, their events read by one thread.
sync, stream:  the same engine behind the real server, over HTTP, with clients in a process of their own (bench.load).

Every way takes its turn in each of --rounds rounds, on prompts that no other row or round has; rates are medians of the
rounds, ratios medians of the rounds' ratios. Seconds include the prompts' prefill. Every generation has its full length
(no EOS). A row's share is of the time which reading the weights and the keys and values once a step would take at the
bandwidth measured in the same round. On a CPU all ways are loaded side by side; on a GPU the server runs after the
others, which would take its memory. A row that fails is recorded and left out; the others go on. What makes no progress
for two minutes fails, and with it the rows that would wait for it again. The last line is one JSON object.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from alpaca import cpu_threads

cpu_threads.set_defaults()  # as predict.py

import torch
from transformers.utils import logging as transformers_logging

from alpaca.errors import InputError, run_command
from alpaca.serving.engine import Engine
from alpaca.serving.loading import load_engine
from alpaca.serving.settings import ServerSettings
from alpaca.text.loading import load_tokenizer
from bench.machine import DEVICE, describe_device, measure_bandwidth, others_cpu_seconds
from bench.provenance import provenance
from bench.random_model import SHAPES, model_folder
from bench.rows import BASELINES, OVER_HTTP, Prompts, Row, plan_rows
from bench.serve_report import Results, make_targets, median, print_rows, row_figures, step_costs
from bench.targets import rounded
from bench.ways import (
    BatchingWay,
    EngineWay,
    GenerateWay,
    ServerWay,
    StuckError,
    T,
    Way,
    call_within,
    load_model,
    make_requests,
)
from deploy.local_server import running_server, stop_children_on_sigterm

PACKAGES = ("torch", "transformers")
_LOADING_LIMIT_S = 300.0
_CLOSING_LIMIT_S = 30.0
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_SETUP_LINE = re.compile(r"\b(ready:|loaded |served by |weights, )")
_QUIET_CORES = 0.1  # a sample is called disturbed when other programs took more
_GPU_MEMORY_FRACTION = 0.45  # of what the engine in process finds free: transformers' batching needs the rest


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """The command's flags."""

    shape: str
    weights: Path | None
    engine: str
    dtype: str
    quantization: str
    rounds: int
    budget_s: float
    compiled: bool
    quick: bool


def main() -> None:
    config = parse_flags()
    stop_children_on_sigterm()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    origin = {**provenance("serve", PACKAGES), "device": describe_device()}  # before the work, of the sources it ran
    start = time.monotonic()
    with model_folder(config.weights, config.shape, config.dtype) as folder:
        print(f"{folder} ready after {time.monotonic() - start:.0f} s", file=sys.stderr)
        bench = Bench(config, folder, deadline=start + config.budget_s)
        try:
            bench.run()
        finally:  # whoever is told to end tells what there is
            report(bench, origin, seconds=time.monotonic() - start)


def parse_flags(arguments: Sequence[str] | None = None) -> BenchConfig:
    on_gpu = DEVICE == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="46m", help="of the random model")
    parser.add_argument("--weights", type=Path, help="a LLaMA folder to use instead of a random model")
    parser.add_argument("--engine", default="auto", help="the server's ALPACA_ENGINE")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--quantization", default="none", help="of the engine and the server; the baselines have none")
    parser.add_argument("--rounds", type=int, default=3, help="a quick run has one")
    parser.add_argument("--budget_s", type=float, default=440, help="no round that would end later, no row after it")
    parser.add_argument("--compiled", action="store_true", help="also `generate` with static cache and torch.compile")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    if options.compiled and not on_gpu:
        raise InputError("--compiled needs a GPU: generate compiles on none other")
    if options.rounds < 1:
        raise InputError(f"--rounds must be 1 or more; found {options.rounds}")
    ServerSettings(engine=options.engine, quantization=options.quantization)  # raises InputError for other names
    options.rounds = 1 if options.quick else options.rounds
    return BenchConfig(**vars(options))


class Bench:
    """One run: opens the ways, gives each row its turns, keeps what they gave."""

    def __init__(self, config: BenchConfig, folder: Path, *, deadline: float) -> None:
        self.config, self.folder, self.deadline = config, folder, deadline
        self.rows = plan_rows(quick=config.quick, compiled=config.compiled)
        self.results = Results()
        self.facts: dict[str, object] = {}
        self.costs = step_costs(folder, dtype=config.dtype, quantization=config.quantization)
        self._tokenizer = load_tokenizer(folder)
        self._prompts = Prompts(self._tokenizer)
        self._ways: dict[str, Way] = {}

    def run(self) -> None:
        if DEVICE == "cpu":
            self._measure(self._open_in_process, self._open_server)
        else:
            self._measure(self._open_in_process, share=0.75)
            self._measure(self._open_server)

    def _measure(self, *openers: Callable[[contextlib.ExitStack], None], share: float = 1.0) -> None:
        """Open some ways and run the rounds of their rows within that share of the time that is left."""
        with contextlib.ExitStack() as stack:
            for opener in openers:
                opener(stack)
            rows = [row for row in self.rows if row.way in self._ways]
            for row in rows:
                self._guarded(row, self._warm_up)
            now = time.monotonic()
            self._run_rounds(rows, deadline=now + share * (self.deadline - now))
        self._ways = {}
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()

    def _run_rounds(self, rows: list[Row], *, deadline: float) -> None:
        longest = 0.0
        for number in range(self.config.rounds):
            start = time.monotonic()
            if number and start + longest > deadline:
                print(f"no time for round {number + 1} of {self.config.rounds}", file=sys.stderr)
                return
            bandwidth = measure_bandwidth()
            for row in rows:
                if time.monotonic() > deadline:
                    self.results.failures.setdefault(row.name, "no time was left")
                    continue
                self._guarded(row, self._take_sample, number, bandwidth)
            longest = max(longest, time.monotonic() - start)
            self.results.rounds = max(self.results.rounds, number + 1)

    def _take_sample(self, row: Row, number: int, bandwidth: float) -> None:
        inputs = self._prompts.inputs(row, f"round {number}")
        gc.collect()
        start, before = time.monotonic(), others_cpu_seconds()
        sample = self._ways[row.way].run(row, inputs)
        sample.others_cores = max(0.0, (others_cpu_seconds() - before) / (time.monotonic() - start))
        expected = sum(values.max_new_tokens for values in inputs)
        if sample.num_tokens != expected:
            raise RuntimeError(f"{sample.num_tokens} tokens came where {expected} were asked for")
        sample.bandwidth = bandwidth
        self.results.samples.setdefault(row.name, {})[number] = sample
        busy = f"  (others: {sample.others_cores:.1f} cores)" if sample.others_cores > _QUIET_CORES else ""
        print(f"round {number + 1}  {row.name:36}{sample.rate:9.1f} tokens/s{busy}", file=sys.stderr, flush=True)

    def _warm_up(self, row: Row) -> None:
        if row.way == "batching":  # warmed up before each round's clock runs
            return
        few = min(row.num_requests, row.clients)
        new = row.new_tokens if row.way == "compiled" else (2, 4)  # a cache of another length is compiled anew
        short = dataclasses.replace(row, new_tokens=new, num_requests=few, stagger_s=0.0)
        self._ways[row.way].run(short, self._prompts.inputs(short, "warm-up"))

    def _guarded(self, row: Row, measure: Callable[..., None], *arguments: object) -> None:
        """One row's failure is its own, unless the others would wait for the same as long and in vain."""
        if row.name in self.results.failures:
            return
        try:
            measure(row, *arguments)
        except Exception as error:
            rows = [row]
            if isinstance(error, StuckError):
                rows = [other for other in self.rows if self._ways.get(other.way) is self._ways[row.way]]
            self._record(error, [other.name for other in rows])

    def _record(self, error: Exception, names: Sequence[str]) -> None:
        """Called while the error is handled: a traceback for who watches, its end for the report."""
        traceback.print_exc(file=sys.stderr)
        for name in names:
            self.results.failures.setdefault(name, f"{type(error).__name__}: {error}"[-2000:])

    # Opening the ways

    def _open_in_process(self, stack: contextlib.ExitStack) -> None:
        """transformers' model, then the engine, which divides what memory is left."""
        model = self._attempt("generate", lambda: load_model(self.folder, self.config.dtype), ways=BASELINES)
        if model is not None:
            generate = GenerateWay(model, self._tokenizer)
            self._ways |= {"generate": generate, "compiled": generate}
            self._ways["batching"] = BatchingWay(model, self._tokenizer)
        engine = self._attempt("engine", self._load_engine, ways=("engine",))
        if engine is None:
            return
        stack.callback(self._attempt, "engine closed", lambda: call_within(_CLOSING_LIMIT_S, engine.close))
        if DEVICE == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)  # the engine of transformers bounds the whole process
        self.facts["engine"] = type(engine).__name__
        self._ways["engine"] = EngineWay(engine)
        if model is not None:
            self._attempt("check", lambda: self._compare(generate, self._ways["engine"]))

    def _load_engine(self) -> Engine:
        fraction = _GPU_MEMORY_FRACTION if DEVICE == "cuda" else ServerSettings.memory_fraction
        settings = ServerSettings(
            weights=str(self.folder),
            engine=self.config.engine,
            dtype=self.config.dtype,
            quantization=self.config.quantization,
            memory_fraction=fraction,
        )
        return call_within(_LOADING_LIMIT_S, lambda: load_engine(self.folder, settings))

    def _open_server(self, stack: contextlib.ExitStack) -> None:
        flags = ["--weights", str(self.folder.absolute()), "--engine", self.config.engine]
        flags += ["--dtype", self.config.dtype, "--quantization", self.config.quantization]
        server = self._attempt("server", lambda: stack.enter_context(running_server(flags)), ways=OVER_HTTP)
        if server is None:
            return
        lines = [_COLOUR.sub("", line).strip() for line in server.logs]
        said = [line for line in lines if _SETUP_LINE.search(line)]  # which engine it has, to begin with
        self.facts["server_said"] = said
        print("\n".join(said), file=sys.stderr)
        self._ways |= dict.fromkeys(OVER_HTTP, ServerWay(server.url))

    def _attempt(self, name: str, call: Callable[[], T], *, ways: Sequence[str] = ()) -> T | None:
        """What `call` gives; its failure is that of all rows of `ways`, or with none stands by itself."""
        start = time.monotonic()
        try:
            done = call()
        except Exception as error:
            self._record(error, [row.name for row in self.rows if row.way in ways] or [name])
            return None
        print(f"{name} after {time.monotonic() - start:.1f} s", file=sys.stderr)
        return done

    def _compare(self, generate: GenerateWay, engine: EngineWay) -> None:
        """How many greedy tokens of the engine are those of `generate`: all in float32, nearly all in bfloat16."""
        row = Row(name="check", way="", num_requests=2, clients=2, prompt_tokens=(64, 64), new_tokens=(32, 32))
        same = total = 0
        for request in make_requests(self._prompts.inputs(row, "check"), self._tokenizer):
            expected, own = generate.generate_ids(request), engine.generate_ids(request)
            agreed = next((at for at, (a, b) in enumerate(zip(own, expected, strict=True)) if a != b), len(expected))
            same, total = same + agreed, total + len(expected)
        self.facts["tokens_before_the_first_difference_from_generate"] = f"{same} of {total}"


def report(bench: Bench, origin: dict[str, object], *, seconds: float) -> None:
    """Print the table, the targets and the line of JSON."""
    config, results = bench.config, bench.results
    figures = [row_figures(row, results, bench.costs) for row in bench.rows]
    print_rows(figures)
    aims = make_targets(results, quick=config.quick, dtype=config.dtype, quantization=config.quantization)
    print("\n" + "\n".join(target.line() for target in aims))
    samples = [sample for row in bench.rows for sample in results.of(row.name)]
    num_disturbed = sum(sample.others_cores > _QUIET_CORES for sample in samples)
    if num_disturbed:
        print(f"\n{num_disturbed} of {len(samples)} samples were taken while other programs used the cores")
    names = {row.name for row in bench.rows}
    everything = {
        "bench": "serve",
        **bench.facts,
        "config": {**vars(config), "weights": config.weights and str(config.weights)},
        "rounds": results.rounds,
        "seconds": round(seconds),
        "bandwidth_gb_per_s": rounded((median([sample.bandwidth for sample in samples]) or 0) / 1e9),
        "num_samples": len(samples),
        "num_disturbed": num_disturbed,
        "bytes_per_step": dataclasses.asdict(bench.costs),
        "rows": figures,
        "targets": [target.as_json() for target in aims],
        "other_failures": {name: text for name, text in results.failures.items() if name not in names},
    }
    print(json.dumps({**everything, **origin}), flush=True)  # a stuck engine's thread may end this process roughly


if __name__ == "__main__":
    run_command(main)
