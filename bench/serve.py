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
others, which would take its memory. A row that fails is recorded and left out; the others go on. The last line is one
JSON object.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib.util
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from alpaca.errors import InputError, MissingInput, run_command
from alpaca.hf_files import TensorSpec, WeightsFolder, require_free_space, write_json, write_weights
from alpaca.prompts import RAW_TEMPLATE
from alpaca.serving.engine import Engine
from alpaca.serving.request import PredictionInputs, Request, make_request
from alpaca.serving.settings import ServerSettings
from alpaca.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer, write_llama_tokenizer
from bench.load import Load, Plan
from bench.provenance import REAL, ROOT, provenance
from script.local_server import running_server

PACKAGES = ("torch", "transformers")
VOCAB_SIZE = 32_000
CONTEXT = 2048
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_WAYS_OVER_HTTP = ("sync", "stream")
_BLOCK_TOKENS = 256  # of transformers' continuous batching: its own default
_COPIED_BYTES = 1 << 30
_SERVER_SLOTS = 64
_LOAD_TIMEOUT_S = 300
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_SETUP_LINE = re.compile(r"\b(ready:|loaded |served by |weights, )")
_QUIET_CORES = 0.1  # a sample is called disturbed when other programs took more


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a random LLaMA."""

    width: int
    num_layers: int
    num_heads: int
    ffn_width: int


SHAPES = {
    "46m": Shape(width=512, num_layers=4, num_heads=8, ffn_width=1376),
    "7b": Shape(width=4096, num_layers=32, num_heads=32, ffn_width=11008),
}


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """The command's flags."""

    shape: str
    weights: Path | None
    engine: str
    dtype: str
    quantization: str
    memory_fraction: float | None
    rounds: int
    budget_s: float
    concurrency: tuple[int, ...]
    clients: tuple[int, ...]
    stagger_ms: float
    compiled: bool
    quick: bool


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing measured: a way to generate, and the work it is given. Lengths are (least, most) tokens."""

    name: str
    way: str
    num_requests: int
    clients: int
    prompt_tokens: tuple[int, int]
    new_tokens: tuple[int, int]
    sampling: dict[str, float] = field(default_factory=dict)  # nothing: greedy
    template: str = RAW_TEMPLATE
    stagger_s: float = 0.0

    @property
    def is_uniform(self) -> bool:
        lengths_vary = self.prompt_tokens[0] < self.prompt_tokens[1] or self.new_tokens[0] < self.new_tokens[1]
        return self.template == RAW_TEMPLATE and not lengths_vary

    @property
    def num_steps(self) -> int:
        """Forward passes when all clients go in step, each prompt's prefill being one that gives a token."""
        return self.new_tokens[1] * self.num_requests // self.clients


@dataclass(kw_only=True)
class Sample:
    """What one round of one row gave."""

    seconds: float
    num_tokens: int
    first_token_s: list[float] = field(default_factory=list)
    num_retries: int = 0
    bandwidth: float = 0.0  # bytes a second, measured in this round
    others_cores: float = 0.0  # cores that programs other than this run's kept busy meanwhile

    @property
    def rate(self) -> float:
        return self.num_tokens / self.seconds


Way = Callable[[Row, list[PredictionInputs]], Sample]


@dataclass(kw_only=True)
class Results:
    """Samples and failures by row; samples are by round, so that ratios are of the same round."""

    samples: dict[str, dict[int, Sample]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    rounds: int = 0

    def rate(self, name: str) -> float | None:
        return median([sample.rate for sample in self.samples.get(name, {}).values()])

    def ratio(self, over: str, under: str) -> float | None:
        upper, lower = self.samples.get(over, {}), self.samples.get(under, {})
        return median([upper[at].rate / lower[at].rate for at in upper.keys() & lower.keys()])

    def first_token_ms(self, name: str, share: float) -> float | None:
        """A percentile over all rounds, by nearest rank."""
        values = sorted(s * 1e3 for sample in self.samples.get(name, {}).values() for s in sample.first_token_s)
        return values[max(0, math.ceil(share * len(values)) - 1)] if values else None


def main() -> None:
    config = parse_flags()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    origin = {**provenance("serve", PACKAGES), "device": describe_device()}  # before the hours of work, if it can fail
    start = time.monotonic()
    with model_folder(config.weights, config.shape, config.dtype) as folder:
        print(f"{folder} ready after {time.monotonic() - start:.0f} s", file=sys.stderr)
        bench = Bench(config, folder, deadline=start + config.budget_s)
        bench.run()
        report(bench, origin, seconds=time.monotonic() - start)


def parse_flags() -> BenchConfig:
    on_gpu = DEVICE == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="46m", help="of the random model")
    parser.add_argument("--weights", type=Path, help="a LLaMA folder to use instead of a random model")
    parser.add_argument("--engine", default="auto", help="the server's ALPACA_ENGINE")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--quantization", default="none", help="of the engine and the server; the baselines have none")
    parser.add_argument(
        "--memory_fraction", type=float, default=0.45 if on_gpu else None, help="of the engine in process"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget_s", type=float, default=440, help="no round starts that would end after this")
    parser.add_argument("--concurrency", type=_numbers, help="of the engine: 1,2,4,…")
    parser.add_argument("--clients", type=_numbers, help="of the server: 1,8,…")
    parser.add_argument("--stagger_ms", type=float, default=30 if on_gpu else 100, help="between 32 clients' starts")
    parser.add_argument("--compiled", action="store_true", help="also `generate` with static cache and torch.compile")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.compiled and not on_gpu:
        raise InputError("--compiled needs a GPU: generate compiles on none other")
    if options.weights and not (options.weights / "config.json").is_file():
        raise MissingInput(f"no model at {options.weights}: no config.json; leave --weights out for a random one")
    ServerSettings(engine=options.engine, quantization=options.quantization)  # raises InputError for other names
    options.concurrency = options.concurrency or ((1, 2, 4) if options.quick else (1, 2, 4, 8, 16, 32, 64))
    options.clients = options.clients or ((1, 4) if options.quick else (1, 8, 16, 32))
    options.rounds = 1 if options.quick else options.rounds
    if min(options.rounds, *options.concurrency, *options.clients) < 1:
        raise InputError("--rounds, --concurrency and --clients must be 1 or more")
    if max(options.clients) > _SERVER_SLOTS:
        raise InputError(f"--clients must be at most {_SERVER_SLOTS}, the server's slots; found {max(options.clients)}")
    return BenchConfig(**vars(options))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


# What is measured -----------------------------------------------------------------------------------------------


def plan_rows(config: BenchConfig) -> list[Row]:
    """All rows, those that are compared close to each other."""
    rows = [*_rows_of_one(config), *_rows_of_eight(config), *_rows_of_many(config)]
    if DEVICE == "cuda" and not config.quick:
        rows += _rows_of_long_answers()
    assert len({row.name for row in rows}) == len(rows)
    return rows


def _row(config: BenchConfig, way: str, clients: int, *, name: str = "", **changes: object) -> Row:
    """`clients` requests at once, each of the run's usual lengths, or `changes` of that."""
    prompt, new = (16, 16) if config.quick else (64, 128)
    if clients >= 32 and DEVICE == "cpu":
        new //= 2  # time
    values = {
        "name": name or f"{way} {clients}",
        "way": way,
        "num_requests": clients,
        "clients": clients,
        "prompt_tokens": (prompt, prompt),
        "new_tokens": (new, new),
    }
    return Row(**{**values, **changes})


def _rows_of_one(config: BenchConfig) -> list[Row]:
    few = 2 if DEVICE == "cpu" else 4
    rows = [_row(config, "generate", 1, name="generate", num_requests=2 if config.quick else 8)]
    if config.compiled:
        rows.append(_row(config, "compiled", 1, name="generate compiled", num_requests=few))
    rows += [_row(config, "engine", 1, num_requests=few)] if 1 in config.concurrency else []
    rows += [_row(config, way, 1, num_requests=few) for way in _WAYS_OVER_HTTP if 1 in config.clients]
    short = _row(config, "stream", 1, name="first token 1", num_requests=4 if config.quick else 8, new_tokens=(8, 8))
    return [*rows, short]


def _rows_of_eight(config: BenchConfig) -> list[Row]:
    """Eight (in a quick run four) at once: the baseline in batches, greedy and sampled, mixed lengths, one preamble."""
    eight = 4 if config.quick else 8
    rows = [_row(config, "batching", eight)]
    rows += [_row(config, "engine", eight)] if eight in config.concurrency else []
    rows += [
        _row(config, "engine", eight, name=f"engine {eight} {name}", sampling=sampling)
        for name, sampling in SAMPLINGS.items()
    ]
    rows += [_row(config, way, eight) for way in _WAYS_OVER_HTTP if eight in config.clients]
    mixed = {"prompt_tokens": (16, 64), "new_tokens": (8, 24)} if config.quick else MIXED
    rows.append(_row(config, "engine", 2 * eight, name="engine mixed lengths", **mixed))
    alpaca = {"template": "alpaca", "prompt_tokens": (16, 16)}
    return [*rows, _row(config, "engine", 2 * eight, name="engine shared prefix", **alpaca)]


def _rows_of_many(config: BenchConfig) -> list[Row]:
    eight = 4 if config.quick else 8
    rows = [_row(config, "batching", 32)] if DEVICE == "cuda" and not config.quick else []
    num_streams = streams(config)
    for clients in sorted({*config.concurrency, *config.clients, num_streams} - {1, eight}):
        if clients in config.concurrency or clients == num_streams:
            rows.append(_row(config, "engine", clients))
        ways = _WAYS_OVER_HTTP if clients in config.clients else ("stream",) if clients == num_streams else ()
        rows += [_row(config, way, clients) for way in ways]
    staggered = 4 if config.quick else 32
    changes = {"stagger_s": config.stagger_ms / 1e3}
    return [*rows, _row(config, "stream", staggered, name=f"first token {staggered} staggered", **changes)]


def _rows_of_long_answers() -> list[Row]:
    """The published settings: 32 requests of 256 in, 1,024 out; and many of 128 in, 128 out."""
    sampled = SAMPLINGS.items()
    long = {"prompt_tokens": (256, 256), "new_tokens": (1024, 1024), "num_requests": 32, "clients": 32}
    full = {"prompt_tokens": (128, 128), "new_tokens": (128, 128), "num_requests": 256, "clients": 256}
    return [
        Row(name="batching 32 long", way="batching", **long),
        Row(name="engine 32 long", way="engine", **long),
        *(Row(name=f"engine 32 long {name}", way="engine", sampling=values, **long) for name, values in sampled),
        Row(name="stream 32 long", way="stream", **long),
        Row(name="engine saturated 128/128", way="engine", **full),
    ]  # fmt: skip


SAMPLINGS = {
    "temperature": {"temperature": 0.75},
    "top_p and top_k": {"temperature": 0.75, "top_p": 0.9, "top_k": 40},
}
MIXED = {"prompt_tokens": (16, 400), "new_tokens": (16, 256)}


def streams(config: BenchConfig) -> int:
    """How many streams are held against the engine's own rate."""
    return 4 if config.quick else 24 if DEVICE == "cuda" else 16


class Prompts:
    """Texts of an exact number of tokens, no two alike: words that are one token each."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        texts = [tokenizer.decode([token_id]) for token_id in range(tokenizer.base_size)]
        words = sorted({text for text in texts if text.isascii() and text.isalpha() and len(text) > 2})
        ids = tokenizer.encode_batch(words)  # in front of a text as behind a space: both are the piece "▁word"
        self._words = [word for word, own in zip(words, ids, strict=True) if len(own) == 1]
        if len(self._words) < 1000:
            raise InputError(f"this tokenizer has {len(self._words)} words of one token; the benchmark needs 1000")

    def inputs(self, row: Row, seed: str) -> list[PredictionInputs]:
        """The requests of one round of a row."""
        draw = random.Random(f"{row.name}:{seed}")
        return [self._inputs(row, draw, number) for number in range(row.num_requests)]

    def _inputs(self, row: Row, draw: random.Random, number: int) -> PredictionInputs:
        num_words = draw.randint(*row.prompt_tokens) - len(self._tokenizer.prefix_ids)
        num_new = draw.randint(*row.new_tokens)
        inputs = PredictionInputs(
            prompt=" ".join(draw.choices(self._words, k=num_words)),
            prompt_template=row.template,
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            seed=number,
            **{"temperature": 0.0, **row.sampling},
        )
        if row.template == RAW_TEMPLATE:
            num_tokens = len(self._tokenizer.encode(inputs.prompt))
            assert num_tokens == num_words, (inputs.prompt, num_tokens, num_words)
        return inputs


class Bench:
    """One run: opens the ways, gives each row its turns, keeps what they gave."""

    def __init__(self, config: BenchConfig, folder: Path, *, deadline: float) -> None:
        self.config, self.folder, self.deadline = config, folder, deadline
        self.rows = plan_rows(config)
        self.results = Results()
        self.facts: dict[str, object] = {}
        self.costs = step_costs(folder, config)
        self._tokenizer = load_tokenizer(folder)
        self._prompts = Prompts(self._tokenizer)
        self._ways: dict[str, Way] = {}

    def run(self) -> None:
        if DEVICE == "cpu":
            self._measure(self.open_in_process, self.open_server)
        else:
            self._measure(self.open_in_process, share=0.75)
            self._measure(self.open_server)

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
                self._guarded(row, self._take_sample, number, bandwidth)
            longest = max(longest, time.monotonic() - start)
            self.results.rounds = max(self.results.rounds, number + 1)

    def _take_sample(self, row: Row, number: int, bandwidth: float) -> None:
        inputs = self._prompts.inputs(row, f"round {number}")
        gc.collect()
        start, before = time.monotonic(), others_cpu_seconds()
        sample = self._ways[row.way](row, inputs)
        sample.others_cores = max(0.0, (others_cpu_seconds() - before) / (time.monotonic() - start))
        expected = sum(values.max_new_tokens for values in inputs)
        if sample.num_tokens != expected:
            raise RuntimeError(f"{sample.num_tokens} tokens came where {expected} were asked for")
        sample.bandwidth = bandwidth
        self.results.samples.setdefault(row.name, {})[number] = sample
        busy = f"  (others: {sample.others_cores:.1f} cores)" if sample.others_cores > _QUIET_CORES else ""
        print(f"round {number + 1}  {row.name:36}{sample.rate:9.1f} tokens/s{busy}", file=sys.stderr, flush=True)

    def _warm_up(self, row: Row) -> None:
        few = min(row.num_requests, row.clients)
        new = row.new_tokens if row.way == "compiled" else (2, 4)  # a cache of another length is compiled anew
        short = dataclasses.replace(row, new_tokens=new, num_requests=few, stagger_s=0.0)
        if row.way != "batching":  # which is warmed up before each round's clock runs
            self._ways[row.way](short, self._prompts.inputs(short, "warm-up"))

    def _guarded(self, row: Row, measure: Callable[..., None], *arguments: object) -> None:
        """One row's failure is its own."""
        if row.name in self.results.failures:
            return
        try:
            measure(row, *arguments)
        except Exception as error:
            self.results.failures[row.name] = f"{type(error).__name__}: {error}"[-2000:]
            traceback.print_exc(file=sys.stderr)

    # Opening the ways

    def open_in_process(self, stack: contextlib.ExitStack) -> None:
        """transformers' model, then the engine, which divides what memory is left."""
        model = self._open("generate", lambda: load_model(self.folder, self.config.dtype))
        if model is not None:
            self._ways["generate"] = lambda row, inputs: run_generate(model, self._requests(inputs))
            self._ways["compiled"] = lambda row, inputs: run_generate(model, self._requests(inputs), compiled=True)
            self._ways["batching"] = lambda row, inputs: run_batching(model, row, self._requests(inputs))
        engine = self._open("engine", lambda: load_engine(self.folder, self._settings()))
        if engine is None:
            return
        stack.callback(engine.close)
        if DEVICE == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)  # an engine may bound the whole process
        self.facts["engine"] = type(engine).__name__
        self._ways["engine"] = lambda row, inputs: run_engine(engine, row, self._requests(inputs))
        if model is not None:
            self._open("check", lambda: self._compare(model, engine))

    def open_server(self, stack: contextlib.ExitStack) -> None:
        if importlib.util.find_spec("cog") is None:
            for row in self.rows:
                if row.way in _WAYS_OVER_HTTP:
                    self.results.failures[row.name] = "skipped: no cog in this environment"
            return
        server = self._open("server", lambda: stack.enter_context(running_server(self._server_flags())))
        if server is None:
            return
        lines = [_COLOUR.sub("", line).strip() for line in server.logs]
        said = [line for line in lines if _SETUP_LINE.search(line)]  # which engine it has, to begin with
        self.facts["server_said"] = said
        print("\n".join(said), file=sys.stderr)
        for way in _WAYS_OVER_HTTP:
            self._ways[way] = lambda row, inputs: run_clients(server.url, row, inputs)

    def _open(self, name: str, load: Callable[[], object]):
        """What `load` gives; its failure is that of all rows that need it."""
        start = time.monotonic()
        try:
            opened = load()
        except Exception as error:
            needed = {"generate": ("generate", "compiled", "batching"), "server": _WAYS_OVER_HTTP}.get(name, (name,))
            text = f"{name}: {type(error).__name__}: {error}"[-2000:]
            self.results.failures.update({row.name: text for row in self.rows if row.way in needed} or {name: text})
            traceback.print_exc(file=sys.stderr)
            return None
        print(f"{name} ready after {time.monotonic() - start:.1f} s", file=sys.stderr)
        return opened

    def _compare(self, model: PreTrainedModel, engine: Engine) -> None:
        """How many greedy tokens of the engine are those of `generate`: all in float32, nearly all in bfloat16."""
        row = _row(self.config, "engine", 2, name="check", new_tokens=(32, 32))
        same = total = 0
        for request in self._requests(self._prompts.inputs(row, "check")):
            expected = generate_ids(model, request)
            own = [event.token_id for event in engine.submit(request).events() if hasattr(event, "token_id")]
            agreed = next((at for at, (a, b) in enumerate(zip(own, expected, strict=True)) if a != b), len(expected))
            same, total = same + agreed, total + len(expected)
        self.facts["tokens_before_the_first_difference_from_generate"] = f"{same} of {total}"

    def _requests(self, inputs: list[PredictionInputs]) -> list[Request]:
        return [make_request(values, self._tokenizer, max_context=CONTEXT) for values in inputs]

    def _settings(self) -> ServerSettings:
        fraction = self.config.memory_fraction or ServerSettings.memory_fraction
        shared = {name: getattr(self.config, name) for name in ("engine", "dtype", "quantization")}
        return ServerSettings(weights=str(self.folder), memory_fraction=fraction, **shared)

    def _server_flags(self) -> list[str]:
        names = ("engine", "dtype", "quantization")
        flags = [text for name in names for text in (f"--{name}", str(getattr(self.config, name)))]
        return ["--weights", str(self.folder.absolute()), "--concurrency", str(_SERVER_SLOTS), *flags]


# The ways -------------------------------------------------------------------------------------------------------


def load_engine(folder: Path, settings: ServerSettings) -> Engine:
    """The engine as predict.py loads it; the one of transformers alone where there is no other yet."""
    try:
        from alpaca.serving.loading import load_engine as load
    except ModuleNotFoundError as error:
        if error.name != "alpaca.serving.loading":
            raise
        from alpaca.serving.transformers_engine import load_transformers_engine as load
    return load(folder, settings)


def load_model(folder: Path, dtype: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), device_map={"": DEVICE}, local_files_only=True
    ).eval()


def run_generate(model: PreTrainedModel, requests: list[Request], *, compiled: bool = False) -> Sample:
    """Greedy, one after the other."""
    start = time.perf_counter()
    num_tokens = sum(len(generate_ids(model, request, compiled=compiled)) for request in requests)
    return Sample(seconds=time.perf_counter() - start, num_tokens=num_tokens)


@torch.inference_mode()
def generate_ids(model: PreTrainedModel, request: Request, *, compiled: bool = False) -> list[int]:
    prompt = torch.tensor([request.prompt_ids], device=model.device)
    changes = {"cache_implementation": "static", "compile_config": CompileConfig()} if compiled else {}
    settings = GenerationConfig(max_new_tokens=request.max_new_tokens, do_sample=False, pad_token_id=0, **changes)
    whole = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    return whole[0, prompt.shape[1] :].tolist()


def run_batching(model: PreTrainedModel, row: Row, requests: list[Request]) -> Sample:
    """transformers' continuous batching, greedy. Its sizes are given: left out, they take all memory there is."""
    blocks_each = math.ceil((row.prompt_tokens[1] + row.new_tokens[1]) / _BLOCK_TOKENS)
    sizes = ContinuousBatchingConfig(
        block_size=_BLOCK_TOKENS,
        num_blocks=max(16, math.ceil(1.1 * row.clients * blocks_each)),
        max_batch_tokens=2048 if DEVICE == "cuda" else 512,
    )
    settings = GenerationConfig(max_new_tokens=row.new_tokens[1], do_sample=False, eos_token_id=-1, pad_token_id=0)
    with model.continuous_batching_context_manager(
        generation_config=settings, continuous_batching_config=sizes
    ) as manager:
        _drain_batching(manager, requests[:1], max_new_tokens=2)
        start = time.perf_counter()
        num_tokens = _drain_batching(manager, requests, max_new_tokens=row.new_tokens[1])
        seconds = time.perf_counter() - start
    return Sample(seconds=seconds, num_tokens=num_tokens)


def _drain_batching(manager, requests: list[Request], *, max_new_tokens: int) -> int:
    """Add the requests and wait for all; the number of tokens that came."""
    manager.add_requests([list(request.prompt_ids) for request in requests], max_new_tokens=max_new_tokens)
    num_finished = num_tokens = 0
    while num_finished < len(requests):
        result = manager.get_result(timeout=1)
        if result is not None and result.error is not None:
            raise RuntimeError(f"continuous batching failed: {result.error}")
        if result is None and not manager.is_running():
            raise RuntimeError("continuous batching ended by itself")
        if result is not None and result.is_finished():
            num_finished += 1
            num_tokens += len(result.generated_tokens)
    return num_tokens


def run_engine(engine: Engine, row: Row, requests: list[Request]) -> Sample:
    """All at once, or with one client one after the other. One thread reads: any more would only take its turns."""
    groups = [requests] if row.clients > 1 else [[request] for request in requests]
    num_tokens, first_token_s = 0, []
    start = time.perf_counter()
    for group in groups:
        generations = [engine.submit(request) for request in group]
        for generation in generations:
            for _ in generation.events():
                pass
            metrics = generation.metrics()
            num_tokens += int(metrics["output_tokens"])
            first_token_s.append(metrics["time_to_first_token_s"])
    return Sample(seconds=time.perf_counter() - start, num_tokens=num_tokens, first_token_s=first_token_s)


def run_clients(url: str, row: Row, inputs: list[PredictionInputs]) -> Sample:
    """The same over HTTP. A client sees its first token when it comes; without a stream the server's word is taken."""
    asked = [
        {name: value for name, value in dataclasses.asdict(values).items() if value is not None and name != "stop"}
        for values in inputs
    ]
    plan = Plan(inputs=asked, clients=row.clients, stream=row.way == "stream", stagger_s=row.stagger_s)
    command = [sys.executable, "-m", "bench.load", url]
    done = subprocess.run(
        command, cwd=ROOT, input=json.dumps(dataclasses.asdict(plan)), capture_output=True, text=True,
        timeout=_LOAD_TIMEOUT_S, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the clients failed: {done.stderr[-2000:]}")
    load = Load.from_json(done.stdout)
    return Sample(
        seconds=load.seconds,
        num_tokens=load.num_tokens,
        first_token_s=[reply.first_output_s or reply.metrics["time_to_first_token_s"] for reply in load.replies],
        num_retries=sum(reply.num_retries for reply in load.replies),
    )


# The ceiling ----------------------------------------------------------------------------------------------------


def measure_bandwidth() -> float:
    """Bytes a second: of a GPU copying within its memory (read and written), of a CPU reading, or copying if faster."""
    source = torch.ones(_COPIED_BYTES // 4, device=DEVICE)
    target = torch.empty_like(source)
    copying = 2 * _COPIED_BYTES / _fastest(lambda: target.copy_(source))
    return copying if DEVICE == "cuda" else max(copying, _COPIED_BYTES / _fastest(source.sum))


def _fastest(call: Callable[[], object], *, repeats: int = 6) -> float:
    seconds = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def others_cpu_seconds() -> float:
    """CPU time since boot that went to anything but this process, its children and theirs. Idle time is nobody's.

    Interleaving cancels slow drift, not another program that comes and goes: on two cores it costs a factor of ten.
    """
    ticks = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    busy = sum(ticks) - ticks[3] - ticks[4]  # idle, waiting for a disk
    own, family = 0, {os.getpid()}
    for pid, parent, used, used_by_ended in sorted(_processes()):
        if pid in family or parent in family:
            family.add(pid)
            own += used + used_by_ended
    return (busy - own) / os.sysconf("SC_CLK_TCK")


def _processes() -> Iterator[tuple[int, int, int, int]]:
    """Of each process: its id, its parent's, its ticks of CPU time, and those of the children it has waited for."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(") ")[2].split()
            user, system, ended_user, ended_system = map(int, fields[11:15])
            yield int(path.parent.name), int(fields[1]), user + system, ended_user + ended_system


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """Bytes one step reads: the weights once (of the embedding only a few rows), each client's keys and values."""

    weight_bytes: float
    engine_weight_bytes: float  # as the engine holds them: quantized, if so asked
    kv_bytes_per_token: float

    def share(self, row: Row, sample: Sample) -> float | None:
        """The least time the steps could take over the time they took; None where steps cannot be told."""
        if not row.is_uniform:
            return None
        own = row.way in ("generate", "compiled", "batching")
        mean_context = row.prompt_tokens[0] + row.new_tokens[0] / 2
        step_bytes = (self.weight_bytes if own else self.engine_weight_bytes) + (
            row.clients * mean_context * self.kv_bytes_per_token
        )
        return row.num_steps * step_bytes / sample.bandwidth / sample.seconds


def step_costs(folder: Path, config: BenchConfig) -> StepCosts:
    model = LlamaConfig.from_pretrained(folder)
    size = getattr(torch, config.dtype).itemsize
    layer_size = {"none": size, "int8": 1, "nf4": 0.5}[config.quantization]
    counts = {spec.name: math.prod(spec.shape) for spec in WeightsFolder(folder).specs()}
    in_layers = sum(count for name, count in counts.items() if ".layers." in name)
    head = counts.get("lm_head.weight", counts["model.embed_tokens.weight"])
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    return StepCosts(
        weight_bytes=size * (in_layers + head),
        engine_weight_bytes=layer_size * in_layers + size * head,
        kv_bytes_per_token=2 * model.num_hidden_layers * model.num_key_value_heads * head_dim * size,
    )


# A random model -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def model_folder(weights: Path | None, shape: str, dtype: str) -> Iterator[Path]:
    """The given folder, or a random model that is removed in the end."""
    if weights is not None:
        yield weights
        return
    with tempfile.TemporaryDirectory(prefix="alpaca-bench-") as folder:
        write_random_llama(Path(folder), SHAPES[shape], getattr(torch, dtype))
        yield Path(folder)


def write_random_llama(folder: Path, shape: Shape, dtype: torch.dtype) -> None:
    """A LLaMA whose logits vary by about 2, far from flat and far from overflow, with a vocabulary of 32,000."""
    real_model = REAL / "llama-tokenizer" / "tokenizer.model"
    model_file = real_model if real_model.is_file() else write_synthetic_tokenizer(folder / "tokenizer.model")
    write_llama_tokenizer(model_file, folder, max_length=CONTEXT)
    tokenizer = SentencePieceTokenizer(folder / "tokenizer.model")
    assert tokenizer.size == VOCAB_SIZE, tokenizer.size
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=shape.width, intermediate_size=shape.ffn_width,
        num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads, num_key_value_heads=shape.num_heads,
        max_position_embeddings=CONTEXT, rms_norm_eps=1e-6, tie_word_embeddings=False, dtype=dtype,
        architectures=["LlamaForCausalLM"], **ids,
    )  # fmt: skip
    config.save_pretrained(folder)
    write_json(folder / "generation_config.json", ids)
    specs = random_llama_specs(shape, dtype)
    require_free_space(folder, sum(spec.num_bytes for spec in specs))
    generator = torch.Generator(DEVICE).manual_seed(0)
    write_weights(folder, specs, lambda spec: [random_tensor(spec, shape, generator)], max_shard_size=5 * 10**9)


def random_llama_specs(shape: Shape, dtype: torch.dtype) -> list[TensorSpec]:
    square, wide = (shape.width, shape.width), (shape.ffn_width, shape.width)
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB_SIZE, shape.width)}
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        sizes |= {f"{prefix}self_attn.{name}_proj.weight": square for name in "qkvo"}
        sizes |= {f"{prefix}mlp.{name}_proj.weight": wide for name in ("gate", "up")}
        sizes |= {f"{prefix}mlp.down_proj.weight": wide[::-1]}
        sizes |= {f"{prefix}{name}_layernorm.weight": (shape.width,) for name in ("input", "post_attention")}
    sizes |= {"model.norm.weight": (shape.width,), "lm_head.weight": (VOCAB_SIZE, shape.width)}
    return [TensorSpec(name=name, shape=size, dtype=dtype) for name, size in sizes.items()]


def random_tensor(spec: TensorSpec, shape: Shape, generator: torch.Generator) -> torch.Tensor:
    """Normal, scaled so that variances stay near 1 through the layers; what is added to the stream, a little less."""
    if "norm" in spec.name:
        return torch.ones(spec.shape, dtype=spec.dtype)
    scale = {"embed_tokens": 1.0, "lm_head": 2 * shape.width**-0.5}.get(spec.name.split(".")[-2], spec.shape[1] ** -0.5)
    if "o_proj" in spec.name or "down_proj" in spec.name:
        scale /= (2 * shape.num_layers) ** 0.5
    values = torch.randn(spec.shape, generator=generator, device=generator.device)
    return values.mul_(scale).to(spec.dtype).cpu()


def write_synthetic_tokenizer(path: Path) -> Path:
    """A SentencePiece BPE model of 32,000 pieces for places without Meta's: bytes, letters, and words of a to z.

    A piece of more than one letter starts a word, so each is reached by adding its letters in order.
    """
    from sentencepiece import sentencepiece_model_pb2

    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [f"▁{letter}" for letter in letters]
    for word in words:  # grows behind itself: ▁a … ▁z, ▁aa … ▁zz, ▁aaa …
        if len(words) >= VOCAB_SIZE:
            break
        words += [word + letter for letter in letters]
    pieces = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    pieces += [(f"<0x{value:02X}>", kinds.BYTE) for value in range(256)]
    plain = [(text, kinds.NORMAL) for text in ("▁", *letters)]
    pieces += [(word, kinds.NORMAL) for word in words[: VOCAB_SIZE - len(pieces) - len(plain)]] + plain
    proto = sentencepiece_model_pb2.ModelProto()
    for rank, (text, kind) in enumerate(pieces):
        proto.pieces.add(piece=text, score=-float(rank) if kind == kinds.NORMAL else 0.0, type=kind)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = trainer.BPE, True, VOCAB_SIZE
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer.name, normalizer.add_dummy_prefix = "identity", True
    normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, True
    path.write_bytes(proto.SerializeToString())
    return path


# The report -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Target:
    """A figure and what it should be: at least `least`, or at most `most`; neither: only told."""

    label: str
    value: float | None
    least: float | None = None
    most: float | None = None

    @property
    def is_met(self) -> bool | None:
        if self.value is None or (self.least is None and self.most is None):
            return None
        return self.value >= self.least if self.least is not None else self.value <= self.most

    def line(self) -> str:
        wanted = "" if self.least is None else f"at least {self.least:g}"
        wanted = wanted if self.most is None else f"at most {self.most:g}"
        value = "not measured" if self.value is None else f"{self.value:.4g}"
        verdict = {True: "met", False: "MISSED", None: ""}[self.is_met]
        return f"{self.label:44}{value:>14}  {wanted:16}{verdict}".rstrip()


def targets(config: BenchConfig, results: Results) -> list[Target]:
    return _cpu_targets(config, results) if DEVICE == "cpu" else _gpu_targets(config, results)


def _cpu_targets(config: BenchConfig, results: Results) -> list[Target]:
    eight, num_streams = 4 if config.quick else 8, streams(config)

    def ratio(over: str, under: str, least: float | None = None) -> Target:
        return Target(label=f"{over} / {under}", value=results.ratio(over, under), least=least)

    return [
        ratio("stream 1", "generate", 1.5),
        ratio("engine 1", "generate"),
        ratio(f"stream {eight}", "generate", 8.0 if config.dtype == "float32" else None),
        ratio(f"sync {eight}", "generate"),
        ratio(f"engine {eight}", "generate"),
        ratio(f"stream {eight}", f"batching {eight}", 1.4),
        ratio(f"engine {eight}", f"batching {eight}"),
        *_sampling_targets(results, f"engine {eight}", most=0.05),
        ratio(f"stream {num_streams}", f"engine {num_streams}", 0.9),
        ratio(f"sync {num_streams}", f"engine {num_streams}"),
    ]


def _gpu_targets(config: BenchConfig, results: Results) -> list[Target]:
    of_one = {"none": 270.0, "int8": 435.0}.get(config.quantization)
    num_streams = streams(config)
    rates = {"stream 1": of_one, "engine 1": of_one, "stream 32 long": 3700.0, "engine 32 long": 3700.0}
    rates["engine saturated 128/128"] = 10_000.0
    ratios = [("stream 1", "generate", None), ("engine 1", "generate", None), ("engine 1", "generate compiled", None)]
    ratios += [("engine 8", "batching 8", None), ("engine 32 long", "batching 32 long", None)]
    ratios.append((f"stream {num_streams}", f"engine {num_streams}", 0.97))
    return [
        *(Target(label=f"{name}: tokens/s", value=results.rate(name), least=least) for name, least in rates.items()),
        Target(label="first token 1: median ms", value=results.first_token_ms("first token 1", 0.5), most=20),
        Target(
            label="first token 32 staggered: p95 ms",
            value=results.first_token_ms("first token 32 staggered", 0.95),
            most=120,
        ),
        *_sampling_targets(results, "engine 32 long", most=0.03),
        *(Target(label=f"{a} / {b}", value=results.ratio(a, b), least=least) for a, b, least in ratios),
    ]


def _sampling_targets(results: Results, greedy: str, *, most: float) -> list[Target]:
    ratios = {name: results.ratio(f"{greedy} {name}", greedy) for name in SAMPLINGS}
    return [
        Target(label=f"{greedy}: cost of {name}", value=None if ratio is None else 1 - ratio, most=most)
        for name, ratio in ratios.items()
    ]


def report(bench: Bench, origin: dict[str, object], *, seconds: float) -> None:
    figures = [row_figures(bench, row) for row in bench.rows]
    print_rows(figures)
    aims = targets(bench.config, bench.results)
    print("\n" + "\n".join(target.line() for target in aims))
    samples = [sample for by_round in bench.results.samples.values() for sample in by_round.values()]
    num_disturbed = sum(sample.others_cores > _QUIET_CORES for sample in samples)
    if num_disturbed:
        print(f"\n{num_disturbed} of {len(samples)} samples were taken while other programs used the cores")
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(bench.config).items()}
    everything = {
        "bench": "serve",
        **bench.facts,
        "config": config,
        "rounds": bench.results.rounds,
        "seconds": round(seconds),
        "bandwidth_gb_per_s": rounded((median([sample.bandwidth for sample in samples]) or 0) / 1e9),
        "num_samples": len(samples),
        "num_disturbed": num_disturbed,
        "bytes_per_step": dataclasses.asdict(bench.costs),
        "rows": figures,
        "targets": [{**dataclasses.asdict(aim), "value": rounded(aim.value), "is_met": aim.is_met} for aim in aims],
        "other_failures": {
            name: text for name, text in bench.results.failures.items() if name not in {row.name for row in bench.rows}
        },
    }
    print(json.dumps({**everything, **origin}))


def row_figures(bench: Bench, row: Row) -> dict[str, object]:
    """One row of the report; a row without a figure says why."""
    results = bench.results
    samples = list(results.samples.get(row.name, {}).values())
    work = {
        name: value
        for name, value in dataclasses.asdict(row).items()
        if name not in ("name", "way", "stagger_s") or (name == "stagger_s" and value)
    }
    figures: dict[str, object] = {"name": row.name, **work}
    if samples:
        shares = [share for sample in samples if (share := bench.costs.share(row, sample)) is not None]
        steps = [1e3 * sample.seconds / row.num_steps for sample in samples] if row.is_uniform else []
        figures |= {
            "tokens_per_s": rounded(results.rate(row.name)),
            "ms_per_step": rounded(median(steps)),
            "share_of_bandwidth": rounded(median(shares)) if not row.stagger_s else None,
            "first_token_ms_p50": rounded(results.first_token_ms(row.name, 0.5)),
            "first_token_ms_p95": rounded(results.first_token_ms(row.name, 0.95)),
            "num_retries": sum(sample.num_retries for sample in samples),
            "rounds_tokens_per_s": [rounded(sample.rate) for sample in samples],
            "rounds_others_cores": [round(sample.others_cores, 2) for sample in samples],
        }
    if row.name in results.failures:
        figures["failure"] = results.failures[row.name]
    return figures


def print_rows(figures: Sequence[dict[str, object]]) -> None:
    heads = ("tokens/s", "ms/step", "of ceiling", "first token: p50", "p95 ms")
    names = ("tokens_per_s", "ms_per_step", "share_of_bandwidth", "first_token_ms_p50", "first_token_ms_p95")
    print(f"{'':36}" + "".join(f"{head:>18}" for head in heads))
    for row in figures:
        if "tokens_per_s" in row:
            cells = ["" if row[name] is None else f"{row[name]:,.4g}" for name in names]
            print(f"{row['name']:36}" + "".join(f"{cell:>18}" for cell in cells))
        if "failure" in row:
            print(f"{row['name']:36}  {str(row['failure']).splitlines()[0][:100]}")


def describe_device() -> dict[str, object]:
    """The GPU or the CPU's threads, and how busy this machine was before."""
    busy = round(os.getloadavg()[0], 2)
    if DEVICE == "cuda":
        return {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "load_average_before": busy}
    return {"threads": torch.get_num_threads(), "load_average_before": busy}


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def rounded(value: float | None) -> float | None:
    """Four significant digits."""
    return None if value is None else float(f"{value:.4g}")


if __name__ == "__main__":
    run_command(main)
