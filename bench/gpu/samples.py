"""Samples of one way of generating: each round's figures are told as soon as they are there."""

import dataclasses
import sys
from pathlib import Path

from alpaca.text.loading import load_tokenizer
from bench.gpu.child import Report
from bench.gpu.scale import choose_scale
from bench.machine import measure_bandwidth, wake
from bench.rows import Prompts, Row
from bench.serve_report import Results, row_figures, step_costs
from bench.ways import Way


class Sampler:
    """Runs rows on one way, against the bandwidth that this process has measured on the same card."""

    def __init__(self, report: Report, folder: Path, way: Way, *, dtype: str, quantization: str = "none") -> None:
        self.report = report
        self._way, self._prompts = way, Prompts(load_tokenizer(folder))
        self._costs = step_costs(folder, dtype=dtype, quantization=quantization)
        self._results = Results()
        wake()
        self._bandwidth = measure_bandwidth(num_bytes=choose_scale().copied_bytes)

    def of(self, way: Way) -> "Sampler":
        """The same for another way on the same weights."""
        other = object.__new__(Sampler)
        other.__dict__ = {**self.__dict__, "_way": way}
        return other

    def take(self, row: Row, *, rounds: int | None = None, **more: object) -> float:
        """Warm the row up, run its rounds, and tell its figures after each; its median rate in tokens a second.

        Raises whatever the way fails with, and RuntimeError for answers that are not of the length asked for.
        """
        self._warm_up(row)
        for number in range(rounds or choose_scale().rounds):
            self._take_round(row, number, more)
        return self._results.rate(row.name)

    def _take_round(self, row: Row, number: int, more: dict[str, object]) -> None:
        inputs = self._prompts.inputs(row, f"round {number} of {row.new_tokens}")
        sample = self._way.run(row, inputs)
        expected = sum(values.max_new_tokens for values in inputs)
        if sample.num_tokens != expected:
            raise RuntimeError(f"{sample.num_tokens} tokens came where {expected} were asked for")
        sample.bandwidth = self._bandwidth
        self._results.samples.setdefault(row.name, {})[number] = sample
        figures = row_figures(row, self._results, self._costs)
        told = {
            key: value for key, value in figures.items() if key not in ("name", "rounds_others_cores", "num_retries")
        }
        self.report.row(row.name, **told, bandwidth_gb_per_s=round(self._bandwidth / 1e9, 1), **more)
        print(f"{row.name}: {sample.rate:.1f} tokens/s", file=sys.stderr, flush=True)

    def _warm_up(self, row: Row) -> None:
        if row.way == "batching":  # it warms itself up before its clock runs
            return
        new = row.new_tokens if row.way == "compiled" else (2, 4)  # a cache of another length is compiled anew
        few = min(row.num_requests, row.clients)
        short = dataclasses.replace(row, new_tokens=new, num_requests=few, stagger_s=0.0)
        self._way.run(short, self._prompts.inputs(short, f"warm-up of {row.new_tokens}"))

    @staticmethod
    def with_new_tokens(row: Row, new: int) -> Row:
        """The row with answers of `new` tokens."""
        return dataclasses.replace(row, new_tokens=(new, new))
