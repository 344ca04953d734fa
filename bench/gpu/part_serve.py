"""`serve`: how fast the engine answers, beside transformers on the same card and, where it can, the same weights."""

import dataclasses
import importlib.util
import math
import time
from collections.abc import Callable

import torch
from transformers.utils import logging as transformers_logging

from bench.gpu.child import Report
from bench.gpu.model import drawn_model, filled_folder, hollow_folder, open_engine, twin_of
from bench.gpu.samples import Sampler
from bench.gpu.scale import Scale, choose_scale
from bench.machine import DEVICE
from bench.rows import SAMPLINGS, Row
from bench.ways import BatchingWay, EngineWay, GenerateWay, ServerWay, make_requests

_ENGINE_MEMORY = 0.45  # of what the card has free: transformers' batching gets some of the rest
_LONG_S = 20.0  # the most that the row of long answers may take
_STAGGER_S = 0.03
_COMPARED_TOKENS = 32


# Rows


def row_of(name: str, count: int, prompt: int, new: int, **more: object) -> Row:
    """`count` requests at once, of exact lengths."""
    given = {"way": "engine", "num_requests": count, "clients": count, **more}
    return Row(name=name, prompt_tokens=(prompt, prompt), new_tokens=(new, new), **given)


def take_batches(sampler: Sampler, scale: Scale, *, prefix: str, counts: tuple[int, ...]) -> None:
    """The rows "batch N". Each fails by itself."""
    for count in counts:
        name = f"{prefix}batch {count}"
        real_count = min(count, scale.most)
        with sampler.report.guarded(name):
            few = {"num_requests": 2} if count == 1 else {}
            sampler.take(row_of(name, real_count, scale.prompt, scale.new, **few))


def take_first_tokens(sampler: Sampler, scale: Scale, *, prefix: str, way: str) -> None:
    """A request that is alone, and 32 that come one after the other."""
    alone = row_of(f"{prefix}first token alone", 1, scale.prompt, 8, way=way, num_requests=8)
    many = row_of(f"{prefix}first token, 32 staggered", scale.many, scale.prompt, scale.new, way=way)
    for row in (alone, dataclasses.replace(many, stagger_s=_STAGGER_S)):
        with sampler.report.guarded(row.name):
            sampler.take(row, rounds=1)


# The engine


def serve_in_process(report: Report) -> None:
    """The engine in the precision of the targets, then transformers on the very same weights."""
    quiet_transformers()
    scale = choose_scale()
    with report.guarded("engine"), hollow_folder(scale.shape, scale.dtype) as folder:
        engine, phases = open_engine(folder, dtype=scale.dtype, concurrency=16, memory_fraction=_ENGINE_MEMORY)
        report.row("engine start", phases_s=phases)
        sampler = Sampler(report, folder, EngineWay(engine), dtype=scale.dtype)
        take_batches(sampler, scale, prefix="", counts=(1,))
        take_first_tokens(sampler, scale, prefix="", way="engine")
        take_streams(sampler, scale)
        take_batches(sampler, scale, prefix="", counts=(8, 32, 64))
        take_prefill(sampler, scale)
        with report.guarded("transformers"):
            take_transformers(sampler, scale, twin_of(engine, folder, scale.dtype), engine)
        take_long_answers(sampler, scale)
        engine.close()


def take_streams(sampler: Sampler, scale: Scale) -> None:
    """32 requests together, greedy and sampled."""
    greedy = row_of("32 streams", scale.many, scale.stream_prompt, scale.stream_new)
    sampled = [
        dataclasses.replace(greedy, name=f"32 streams {name}", sampling=values) for name, values in SAMPLINGS.items()
    ]
    for row in (greedy, *sampled):
        with sampler.report.guarded(row.name):
            sampler.take(row)


def take_transformers(sampler: Sampler, scale: Scale, model: torch.nn.Module, engine: object) -> None:
    """`generate` and continuous batching over the engine's own weights, and whether all say the same."""
    generate = GenerateWay(model, engine.tokenizer)
    eager = row_of("generate eager", 1, scale.prompt, scale.new, way="generate", num_requests=1)
    with sampler.report.guarded(eager.name):
        sampler.of(generate).take(eager, rounds=1)
    sampler.report.attempt("tokens like generate's", lambda: compare_tokens(generate, EngineWay(engine), scale))
    batching = row_of(
        "continuous batching 32 streams", scale.many, scale.stream_prompt, scale.stream_new, way="batching"
    )
    with sampler.report.guarded(batching.name):
        sampler.of(BatchingWay(model, engine.tokenizer)).take(batching, rounds=1)
    if DEVICE == "cuda":  # the engine of transformers bounds the whole process
        torch.cuda.set_per_process_memory_fraction(1.0)


def compare_tokens(generate: GenerateWay, engine: EngineWay, scale: Scale) -> dict[str, object]:
    """How many greedy tokens come before the first difference: all in float32, in bfloat16 until a tie."""
    from bench.rows import Prompts

    tokenizer = engine._engine.tokenizer
    new = min(_COMPARED_TOKENS, scale.new)
    row = row_of("compared", 2, scale.prompt, new)
    same = total = 0
    for request in make_requests(Prompts(tokenizer).inputs(row, "compared"), tokenizer):
        expected, own = generate.generate_ids(request), engine.generate_ids(request)
        pairs = enumerate(zip(own, expected, strict=True))
        same += next((at for at, (a, b) in pairs if a != b), len(expected))
        total += len(expected)
    return {"tokens_alike": same, "tokens": total}


def take_prefill(sampler: Sampler, scale: Scale) -> None:
    """How fast a long prompt is read, by the time to its only token."""
    row = row_of("prefill", 1, scale.prefill, 1, num_requests=4)
    with sampler.report.guarded(row.name):
        rate = sampler.take(row)
        sampler.report.row(
            row.name, prompt_tokens=scale.prefill, prompt_tokens_per_s=round(rate * scale.prefill, 1),
            ms=round(1e3 / rate, 1),
        )  # fmt: skip


def take_long_answers(sampler: Sampler, scale: Scale) -> None:
    """32 x 256 in, 1,024 out; shorter where the time does not suffice, and then it says so."""
    name = "32 long answers"
    with sampler.report.guarded(name):
        short = row_of(name, scale.many, scale.stream_prompt, min(64, scale.stream_new))
        seconds_per_step = scale.many / sampler.take(short, rounds=1)
        room_s = min(_LONG_S, sampler.report.left_s() - 5)
        new = min(scale.long_new, math.floor(room_s / (1.3 * seconds_per_step)))
        if new < short.new_tokens[1]:
            raise RuntimeError(f"{room_s:.0f} s suffice for {new} tokens of each answer")
        scaled = {} if new == scale.long_new else {"scaled": f"answers of {new} tokens, not {scale.long_new}: time"}
        sampler.take(sampler.with_new_tokens(short, new), rounds=1, **scaled)


# Quantised


def serve_quantized(report: Report, quantization: str) -> None:
    """One request and eight, with int8 or nf4 weights."""
    scale = choose_scale()
    with report.guarded(quantization), hollow_folder(scale.shape, scale.dtype) as folder:
        engine, phases = open_engine(
            folder, dtype=scale.dtype, quantization=quantization, concurrency=2, memory_fraction=_ENGINE_MEMORY
        )
        report.row(f"{quantization} engine start", phases_s=phases)
        sampler = Sampler(report, folder, EngineWay(engine), dtype=scale.dtype, quantization=quantization)
        take_batches(sampler, scale, prefix=f"{quantization} ", counts=(1, 8))
        engine.close()


# Peers and the server


def serve_compiled(report: Report) -> None:
    """transformers' `generate` with a static cache and torch.compile, which takes a minute to compile."""
    quiet_transformers()
    scale, name = choose_scale(), "generate compiled"
    if DEVICE != "cuda":
        report.row(name, left_out="not run: transformers compiles generate on a GPU alone")
        return
    with report.guarded(name), hollow_folder(scale.shape, scale.dtype) as folder:
        model = drawn_model(folder, scale.dtype)
        from alpaca.text.loading import load_tokenizer

        sampler = Sampler(report, folder, GenerateWay(model, load_tokenizer(folder)), dtype=scale.dtype)
        row = row_of(name, 1, scale.prompt, scale.new, way="compiled", num_requests=1)
        start = time.perf_counter()
        sampler.take(row, rounds=2)
        report.facts({"compiled_seconds": round(time.perf_counter() - start, 1)})


def serve_over_http(report: Report) -> None:
    """The same engine behind Cog's own server, with clients in a process of their own."""
    name, missing = "server", [package for package in ("cog", "coglet") if importlib.util.find_spec(package) is None]
    if missing:
        report.row(name, left_out=f"not run: {' and '.join(missing)} not installed")
        return
    from deploy.local_server import running_server

    scale = choose_scale()
    with report.guarded(name), filled_folder(scale.shape, scale.dtype) as folder:
        flags = ["--weights", str(folder.absolute()), "--engine", "llama", "--dtype", scale.dtype]
        start = time.perf_counter()
        with running_server(flags) as server:
            report.row(name, ready_s=round(time.perf_counter() - start, 1))
            sampler = Sampler(report, folder, ServerWay(server.url), dtype=scale.dtype)
            _take_server_rows(sampler, scale)


def _take_server_rows(sampler: Sampler, scale: Scale) -> None:
    alone = row_of("server batch 1", 1, scale.prompt, scale.new, way="stream", num_requests=2)
    streams = row_of("server 32 streams", scale.many, scale.stream_prompt, scale.stream_new, way="stream")
    for row in (alone, streams):
        with sampler.report.guarded(row.name):
            sampler.take(row, rounds=1)
    take_first_tokens(sampler, scale, prefix="server ", way="stream")


def quiet_transformers() -> None:
    """Neither warnings nor bars: the log is for what failed."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


JOBS: dict[str, Callable[[Report], None]] = {
    "engine": serve_in_process,
    "int8": lambda report: serve_quantized(report, "int8"),
    "nf4": lambda report: serve_quantized(report, "nf4"),
    "compiled": serve_compiled,
    "server": serve_over_http,
}
