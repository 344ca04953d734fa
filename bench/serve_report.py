"""What bench.serve makes of its samples: rates, ratios of the same round, shares of the ceiling, targets, the table."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import LlamaConfig

from alpaca.formats.hf.folder import WeightsFolder
from bench.machine import DEVICE
from bench.rows import BASELINES, SAMPLINGS, Row, Sample, num_streams, num_together
from bench.targets import Target, rounded


@dataclass(kw_only=True)
class Results:
    """Samples and failures by row; samples are by round, so that ratios are of the same round."""

    samples: dict[str, dict[int, Sample]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    rounds: int = 0

    def of(self, name: str) -> list[Sample]:
        return list(self.samples.get(name, {}).values())

    def rate(self, name: str) -> float | None:
        return median([sample.rate for sample in self.of(name)])

    def ratio(self, over: str, under: str) -> float | None:
        upper, lower = self.samples.get(over, {}), self.samples.get(under, {})
        return median([upper[at].rate / lower[at].rate for at in upper.keys() & lower.keys()])

    def first_token_ms(self, name: str, share: float) -> float | None:
        """A percentile over all rounds, by nearest rank."""
        values = sorted(s * 1e3 for sample in self.of(name) for s in sample.first_token_s)
        return values[max(0, math.ceil(share * len(values)) - 1)] if values else None

    def cached_tokens(self, name: str) -> float | None:
        """Of all prompts of a round, in the round with the fewest."""
        return min((sample.cached_tokens for sample in self.of(name)), default=None)


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """Bytes one step reads: the weights once (of the embedding only a few rows), each client's keys and values."""

    weight_bytes: float
    engine_weight_bytes: float  # as the engine holds them: quantized, if so asked
    kv_bytes_per_token: float

    def share(self, row: Row, sample: Sample) -> float:
        """The least time a uniform row's steps could take over the time they took."""
        mean_context = row.prompt_tokens[0] + row.new_tokens[0] / 2
        weight_bytes = self.weight_bytes if row.way in BASELINES else self.engine_weight_bytes
        step_bytes = weight_bytes + row.clients * mean_context * self.kv_bytes_per_token
        return row.num_steps * step_bytes / sample.bandwidth / sample.seconds


def step_costs(folder: Path, *, dtype: str, quantization: str) -> StepCosts:
    model = LlamaConfig.from_pretrained(folder)
    size = getattr(torch, dtype).itemsize
    layer_size = {"none": size, "int8": 1, "nf4": 0.5}[quantization]
    counts = {spec.name: math.prod(spec.shape) for spec in WeightsFolder(folder).specs()}
    in_layers = sum(count for name, count in counts.items() if ".layers." in name)
    head = counts.get("lm_head.weight", counts["model.embed_tokens.weight"])
    return StepCosts(
        weight_bytes=size * (in_layers + head),
        engine_weight_bytes=layer_size * in_layers + size * head,
        kv_bytes_per_token=2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * size,
    )


# Targets --------------------------------------------------------------------------------------------------------


def make_targets(results: Results, *, quick: bool, dtype: str, quantization: str) -> list[Target]:
    if DEVICE == "cpu":
        aims = _cpu_targets(results, quick=quick, dtype=dtype)
    else:
        aims = _gpu_targets(results, quick=quick, quantization=quantization)
    shared = "engine shared prefix"
    return [*aims, Target(label=f"{shared}: cached tokens", value=results.cached_tokens(shared), least=1)]


def _cpu_targets(results: Results, *, quick: bool, dtype: str) -> list[Target]:
    eight, streams = num_together(quick), num_streams(quick)
    return [
        _ratio(results, "stream 1", "generate", 1.5),
        _ratio(results, "engine 1", "generate"),
        _ratio(results, f"stream {eight}", "generate", 8.0 if dtype == "float32" else None),
        _ratio(results, f"sync {eight}", "generate"),
        _ratio(results, f"engine {eight}", "generate"),
        _ratio(results, f"stream {eight}", f"batching {eight}", 1.4),
        _ratio(results, f"engine {eight}", f"batching {eight}"),
        *_sampling_targets(results, f"engine {eight}", most=0.05),
        _ratio(results, f"stream {streams}", f"engine {streams}", 0.9),
        _ratio(results, f"sync {streams}", f"engine {streams}"),
    ]


def _gpu_targets(results: Results, *, quick: bool, quantization: str) -> list[Target]:
    of_one = {"none": 270.0, "int8": 435.0}.get(quantization)
    eight, streams = num_together(quick), num_streams(quick)
    rates = {"stream 1": of_one, "engine 1": of_one, "stream 32 long": 3700.0, "engine 32 long": 3700.0}
    rates["engine saturated 128/128"] = 10_000.0
    alone, staggered = "first token 1", "first token 32 staggered"
    return [
        *(Target(label=f"{name}: tokens/s", value=results.rate(name), least=least) for name, least in rates.items()),
        Target(label=f"{alone}: median ms", value=results.first_token_ms(alone, 0.5), most=20),
        Target(label=f"{staggered}: p95 ms", value=results.first_token_ms(staggered, 0.95), most=120),
        *_sampling_targets(results, "engine 32 long", most=0.03),
        _ratio(results, "stream 1", "generate"),
        _ratio(results, "engine 1", "generate"),
        _ratio(results, "engine 1", "generate compiled"),
        _ratio(results, f"engine {eight}", f"batching {eight}"),
        _ratio(results, "engine 32 long", "batching 32 long"),
        _ratio(results, f"stream {streams}", f"engine {streams}", 0.97),
    ]


def _ratio(results: Results, over: str, under: str, least: float | None = None) -> Target:
    return Target(label=f"{over} / {under}", value=results.ratio(over, under), least=least)


def _sampling_targets(results: Results, greedy: str, *, most: float) -> list[Target]:
    ratios = {name: results.ratio(f"{greedy} {name}", greedy) for name in SAMPLINGS}
    return [
        Target(label=f"{greedy}: cost of {name}", value=None if ratio is None else 1 - ratio, most=most)
        for name, ratio in ratios.items()
    ]


# The table ------------------------------------------------------------------------------------------------------


def row_figures(row: Row, results: Results, costs: StepCosts) -> dict[str, object]:
    """One row of the report; a row without a figure says why."""
    left_out = {"way"} if row.stagger_s else {"way", "stagger_s"}
    figures = {name: value for name, value in dataclasses.asdict(row).items() if name not in left_out}
    if samples := results.of(row.name):
        steps = [1e3 * sample.seconds / row.num_steps for sample in samples] if row.is_uniform else []
        shares = [costs.share(row, sample) for sample in samples] if row.is_uniform and not row.stagger_s else []
        figures |= {
            "tokens_per_s": rounded(results.rate(row.name)),
            "ms_per_step": rounded(median(steps)),
            "share_of_bandwidth": rounded(median(shares)),
            "first_token_ms_p50": rounded(results.first_token_ms(row.name, 0.5)),
            "first_token_ms_p95": rounded(results.first_token_ms(row.name, 0.95)),
            "cached_tokens": results.cached_tokens(row.name),
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


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
