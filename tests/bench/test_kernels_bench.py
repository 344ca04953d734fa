"""bench.kernels measures what is right, and says so of what is not."""

import json
import sys

import pytest
import torch

from alpaca.serving.kernels import ops
from alpaca.serving.kernels.linear_base import PlainLinear
from bench import kernels, machine
from bench.kernel_cases import make_plan, small_cases
from bench.sampling_cases import sampling_cases


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """The command with some arguments; its result and its table."""

    def run(*arguments: str) -> tuple[dict, list[str]]:
        monkeypatch.setattr(sys, "argv", ["kernels", "--device", "cpu", "--quick", *arguments])
        monkeypatch.setattr(machine, "measure_bandwidth", lambda device: 1e10)
        kernels.main()
        lines = capsys.readouterr().out.splitlines()
        return json.loads(lines[-1]), lines[:-1]

    return run


def rows_of(result: dict, **wanted: object) -> list[dict]:
    return [row for row in result["rows"] if wanted.items() <= row.items()]


@pytest.mark.slow
def test_table_and_json(run, tmp_path):
    result, table = run("--out", str(tmp_path / "new" / "kernels.json"))
    assert json.loads((tmp_path / "new" / "kernels.json").read_text()) == result
    assert result["num_failed"] == result["num_left_out"] == 0
    assert {"commit", "command", "hardware", "versions"} <= result.keys()
    assert {row["operation"] for row in result["rows"]} == {
        "linear", "decode", "prefill", "rms_norm", "add_rms_norm", "rotate_and_store", "silu_mul", "sample",
        "norm_heads", "gelu_mul",
    }  # fmt: skip
    for row in result["rows"]:
        assert row["us"] > 0
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3, rel=2e-3)
        assert row["share_of_bandwidth"] == pytest.approx(row["gb_per_s"] / 10, rel=2e-3)
    assert sum(line.startswith("linear ") and " us " in line for line in table) == len(
        rows_of(result, operation="linear")
    )
    choices = {(choice["format"], choice["dtype"], choice["rows"]) for choice in result["linear"]}
    kinds = ("none", "int8", "nf4")
    assert choices == {(kind, dtype, n) for kind in kinds for dtype in ("float32", "bfloat16") for n in (1, 3)}
    for choice in result["linear"]:
        assert choice["winner"] == min(choice["ms_per_step"], key=choice["ms_per_step"].get)
        assert choice["chosen"] in choice["ms_per_step"]
        assert choice["chosen_over_winner"] >= 1


@pytest.mark.slow
def test_wrong_kernel_is_a_failed_row(run, monkeypatch):
    right = ops.silu_mul
    monkeypatch.setattr(ops, "silu_mul", lambda gate_up: right(gate_up) * 1.1)
    monkeypatch.setattr(ops, "rms_norm", lambda x, weight, eps: torch.full_like(x, float("nan")))
    monkeypatch.setattr(PlainLinear, "__call__", lambda self, x: x)
    result, table = run("--only", "small", "linear")
    for wanted, reason in (
        ({"operation": "silu_mul"}, "WrongResultError: off by 0.1"),
        ({"operation": "rms_norm"}, "WrongResultError: off by nan"),
        ({"operation": "linear", "way": "plain", "layer": "qkv"}, "ValueError: expected a result of shape"),
    ):
        rows = rows_of(result, **wanted)
        assert rows
        for row in rows:
            assert row["failure"].startswith(reason)
            assert "us" not in row
    assert result["num_failed"] == sum("failure" in row for row in result["rows"]) < result["num_rows"]
    assert any(line.startswith("silu_mul") and "WrongResultError" in line for line in table)
    assert all("plain" not in choice["ms_per_step"] for choice in result["linear"] if choice["format"] == "none")


def test_rows_after_the_budget_are_left_out(run):
    result, _ = run("--only", "sampling", "--budget_s", "0")
    assert {row["left_out"] for row in result["rows"]} == {"no time"}


@pytest.mark.slow
def test_families_after_a_lost_device_go_on_in_a_fresh_process(run, monkeypatch):
    def lose(gate_up):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(ops, "silu_mul", lose)
    monkeypatch.setattr(kernels, "is_lost", lambda row, device: "CUDA error" in row.get("failure", ""))
    result, _ = run("--only", "small", "sampling")
    assert len(rows_of(result, operation="silu_mul")) == 1
    assert len(rows_of(result, operation="sample")) == 6
    assert result["num_failed"] == 1


def test_one_token_too_far_is_wrong():
    for case in sampling_cases(make_plan("cpu", "46m", quick=True)):
        ids = case.make()[0]()
        assert case.error_of(ids) <= case.tolerance
        if case.way == "ours":
            assert case.error_of((ids + 7) % 500) > case.tolerance


def test_caches_are_looked_at():
    """A rotation that stores nothing."""
    plan = make_plan("cpu", "46m", quick=True)
    case = next(case for case in small_cases(plan) if case.operation == "rotate_and_store")
    right = case.make()[0]()
    assert case.error_of(right) <= case.tolerance
    fresh = next(case for case in small_cases(plan) if case.operation == "rotate_and_store")
    assert not fresh.error_of(right) <= fresh.tolerance
