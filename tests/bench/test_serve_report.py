"""Rows, and what becomes of their samples: every figure a target names is measured, ratios are of the same round."""

import json

import pytest

from bench import rows, serve_report
from bench.rows import Row, Sample, plan_rows
from bench.serve_report import Results, StepCosts, make_targets, print_rows, row_figures
from bench.targets import Target

COSTS = StepCosts(weight_bytes=1000, engine_weight_bytes=500, kv_bytes_per_token=10)
ROW = Row(name="engine 2", way="engine", num_requests=2, clients=2, prompt_tokens=(10, 10), new_tokens=(20, 20))


@pytest.mark.parametrize(("device", "quick"), [("cpu", False), ("cpu", True), ("cuda", False)])
def test_every_target_is_measured(monkeypatch, device, quick):
    monkeypatch.setattr(rows, "DEVICE", device)
    monkeypatch.setattr(serve_report, "DEVICE", device)
    planned = plan_rows(quick=quick, compiled=device == "cuda")
    results = Results(samples={row.name: {0: Sample(seconds=1, num_tokens=8, first_token_s=[0.1])} for row in planned})
    targets = make_targets(results, quick=quick, dtype="float32", quantization="none")
    assert [target.label for target in targets if target.value is None] == []


def test_full_run_has_the_rows_that_are_quoted():
    names = [row.name for row in plan_rows(quick=False, compiled=False)]
    assert {"generate", "batching 8", "engine 8", "stream 8", "sync 8", "engine 64", "stream 32"} <= set(names)
    assert {"engine 8 mixed lengths", "engine shared prefix", "engine 8 temperature", "first token 1"} <= set(names)


def test_ratio_is_of_rounds_that_both_have():
    def samples(*tokens: int) -> dict[int, Sample]:
        return {at: Sample(seconds=1, num_tokens=number) for at, number in enumerate(tokens)}

    results = Results(samples={"a": samples(10, 40, 90), "b": samples(10, 10)})
    assert results.ratio("a", "b") == 2.5
    assert results.ratio("a", "none") is None
    assert results.rate("a") == 40


def test_percentile_is_by_nearest_rank():
    results = Results(samples={"a": {0: Sample(seconds=1, num_tokens=1, first_token_s=[0.004, 0.001, 0.003, 0.002])}})
    assert results.first_token_ms("a", 0.5) == 2
    assert results.first_token_ms("a", 0.95) == 4


def test_share_of_the_ceiling_by_hand():
    sample = Sample(seconds=2.0, num_tokens=40, bandwidth=9000.0)
    # 20 steps, each 500 bytes of weights and 2 clients' 10 + 20 / 2 tokens of 10 bytes
    assert COSTS.share(ROW, sample) == pytest.approx(20 * (500 + 2 * 20 * 10) / 9000 / 2)


def test_row_without_a_sample_says_why(capsys):
    figures = row_figures(ROW, Results(failures={"engine 2": "StuckError: no token\nmore"}), COSTS)
    assert figures["failure"] == "StuckError: no token\nmore"
    assert "tokens_per_s" not in figures
    print_rows([json.loads(json.dumps(figures))])
    assert "engine 2                              StuckError: no token\n" in capsys.readouterr().out


def test_row_with_a_sample_shows_its_cached_tokens():
    sample = Sample(seconds=2.0, num_tokens=40, bandwidth=9000.0, cached_tokens=32)
    figures = row_figures(ROW, Results(samples={"engine 2": {0: sample}}), COSTS)
    assert (figures["tokens_per_s"], figures["ms_per_step"], figures["cached_tokens"]) == (20, 100, 32)


@pytest.mark.parametrize(("value", "verdict"), [(0, "MISSED"), (3, "met"), (None, "not measured")])
def test_verdict_of_a_target(value, verdict):
    assert verdict in Target(label="cached tokens", value=value, least=1).line()
