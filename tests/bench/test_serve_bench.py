"""One failure in a run: whose it is."""

import contextlib
from pathlib import Path

import pytest

from bench import serve
from bench.rows import plan_rows
from bench.serve import Bench, parse_flags
from bench.serve_report import Results
from bench.ways import StuckError, Way


class BrokenWay(Way):
    def __init__(self, error: Exception) -> None:
        self.error, self.num_runs = error, 0

    def run(self, row, inputs):
        self.num_runs += 1
        raise self.error


@pytest.fixture
def bench(monkeypatch) -> Bench:
    """A run without a model."""
    monkeypatch.setattr(serve, "step_costs", lambda *_, **__: None)
    monkeypatch.setattr(serve, "load_tokenizer", lambda folder: None)
    monkeypatch.setattr(serve, "Prompts", lambda tokenizer: None)
    made = Bench(parse_flags(["--quick"]), Path("nowhere"), deadline=0.0)
    made._prompts = type("NoPrompts", (), {"inputs": lambda *_: []})()
    return made


def run_rows(bench: Bench, engine: Way, server: Way) -> None:
    def open_ways(stack: contextlib.ExitStack) -> None:
        bench._ways |= {"engine": engine, "sync": server, "stream": server}

    bench._run_rounds = lambda rows, deadline: None
    bench._measure(open_ways)


def test_a_failure_is_the_rows_own(bench):
    engine = BrokenWay(ValueError("bad"))
    run_rows(bench, engine, BrokenWay(ValueError("bad")))
    num_rows = sum(row.way == "engine" for row in bench.rows)
    assert engine.num_runs == num_rows
    assert bench.results.failures["engine 4"] == "ValueError: bad"


def test_what_hangs_is_waited_for_once(bench):
    engine, server = BrokenWay(StuckError("no token")), BrokenWay(StuckError("no answer"))
    run_rows(bench, engine, server)
    assert (engine.num_runs, server.num_runs) == (1, 1)
    ways = ("engine", "sync", "stream")
    assert bench.results.failures.keys() == {row.name for row in bench.rows if row.way in ways}
    assert bench.results.failures["engine shared prefix"] == "StuckError: no token"
    assert bench.results.failures["sync 4"] == bench.results.failures["stream 4"] == "StuckError: no answer"


def test_what_cannot_be_loaded_fails_its_rows(bench):
    def load() -> None:
        raise OSError("no memory")

    assert bench._attempt("generate", load, ways=("generate", "batching")) is None
    assert bench.results.failures == {"generate": "OSError: no memory", "batching 4": "OSError: no memory"}
    bench.results = Results()
    assert bench._attempt("check", load) is None
    assert bench.results.failures == {"check": "OSError: no memory"}


def test_rows_of_a_quick_run_are_fewer():
    assert len(plan_rows(quick=True, compiled=False)) < len(plan_rows(quick=False, compiled=False))
