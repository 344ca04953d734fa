"""The GPU kit on a CPU: its parts as they are, at tiny sizes."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from alpaca.formats.hf.folder import WeightsFolder
from bench.gpu import __main__ as kit
from bench.gpu.model import drawn_model, hollow_folder, open_engine, twin_of
from bench.gpu.part_check import add_up, greedy_text, read_counts
from bench.gpu.plans import PARTS, check_targets, serve_targets, start_targets, train_targets
from bench.random_model import SHAPES, write_random_llama
from tests.conftest import ROOT


def test_help_states_each_parts_seconds(capsys):
    with pytest.raises(SystemExit, match="0"):
        kit.parse_flags(["--help"])
    text = capsys.readouterr().out
    seconds = {name: float(re.search(rf"^  {name} +(\d+) s  ", text, re.MULTILINE)[1]) for name in PARTS}
    assert seconds == {"check": 200, "serve": 300, "train": 300, "start": 120}


def test_out_is_the_variable_or_the_results_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    assert kit.parse_flags(["serve"]).out == tmp_path
    monkeypatch.delenv("OUT")
    assert kit.parse_flags(["serve"]).out == Path("bench/results").absolute()
    assert kit.parse_flags(["serve", "there", "--budget_s", "7"]).budget_s == 7


@pytest.mark.slow
def test_a_hollow_folder_is_a_model_folder_without_bytes(tmp_path):
    write_random_llama(tmp_path, SHAPES["tiny"], torch.float32)
    with hollow_folder("tiny", "float32") as folder:
        assert WeightsFolder(folder).specs() == WeightsFolder(tmp_path).specs()
        file = (folder / "model.safetensors").stat()
        assert file.st_size > sum(spec.num_bytes for spec in WeightsFolder(folder).specs())
        assert file.st_blocks * 512 < 1 << 16
        same = ("config.json", "generation_config.json", "tokenizer_config.json")
        assert all((folder / name).read_text() == (tmp_path / name).read_text() for name in same)


@pytest.mark.slow
def test_the_engine_draws_what_a_written_model_holds(tmp_path):
    """Drawn in the order of reading, which is not the file's: the same distribution, other numbers."""
    with hollow_folder("tiny", "float32") as folder:
        engine, phases = open_engine(folder, dtype="float32", concurrency=2, memory_fraction=0.5)
        layer = engine._runner.model.layers[0]
        assert torch.equal(layer.input_norm, torch.ones(64))
        assert 0.9 < engine._runner.model.embedding.std() < 1.1
        text = greedy_text(engine, num_tokens=8)
        engine.close()
        assert "weights" in phases
        again, _ = open_engine(folder, dtype="float32", concurrency=2, memory_fraction=0.5)
        assert greedy_text(again, num_tokens=8) == text
        assert twin_of(again, folder, "float32").generation_config.eos_token_id is None
        again.close()
        assert drawn_model(folder, "float32").lm_head.weight.shape == (32_000, 64)


def test_pytests_counts():
    assert read_counts("F.s\n1 failed, 3 passed, 2 skipped in 0.10s\n") == {"passed": 3, "failed": 1, "skipped": 2}
    assert read_counts("1 passed, 1 error in 0.10s") == {"passed": 1, "failed": 1, "skipped": 0}
    assert read_counts("no tests ran in 0.01s") == {"passed": 0, "failed": 0, "skipped": 0}
    shard = {"passed": 1, "failed": 0, "skipped": 0, "failed_tests": []}
    assert add_up({"a": shard, "b": shard}) == {"passed": 2, "failed": 0, "skipped": 0}
    failing = {**shard, "failed": 1, "failed_tests": ["t.py::test_x"]}
    assert add_up({"a": shard, "b": failing})["failure"] == "1 failed: t.py::test_x"


def test_targets_of_serving_by_hand():
    rows = {
        "batch 1": {"tokens_per_s": 200.0, "share_of_bandwidth": 0.8},
        "generate eager": {"tokens_per_s": 50.0},
        "int8 batch 1": {"tokens_per_s": 300.0},
        "32 streams": {"tokens_per_s": 1000.0},
        "32 streams temperature": {"tokens_per_s": 960.0},
        "first token alone": {"first_token_ms_p50": 20.0},
    }
    found = {target.label: (target.value, target.is_met) for target in serve_targets(rows)}
    assert found["batch 1: share of bandwidth"] == (0.8, True)
    assert found["batch 1 / generate eager"] == (4.0, True)
    assert found["batch 1 / generate compiled"] == (None, None)
    assert found["int8 batch 1 / batch 1"] == (1.5, False)
    assert found["32 streams: cost of temperature"] == (pytest.approx(0.04), False)
    assert found["first token alone: median ms"] == (20.0, True)


def test_targets_of_training_by_hand():
    rows = {
        "lora": {"tokens_per_second": 150.0, "peak_over_planned": 0.85},
        "trainer peft lora": {"tokens_per_second": 100.0},
        "full fast": {"share_of_matrix_rate": 0.5, "peak_over_planned": 1.05},
        "qlora": {"peak_bytes": 7 * 2**30},
    }
    found = {target.label: (target.value, target.is_met) for target in train_targets(rows)}
    assert found["full fast: share of the matrix rate"] == (0.5, True)
    assert found["lora / Trainer with PEFT"] == (1.5, True)
    assert found["qlora: peak GiB"] == (7.0, True)
    assert found["largest error of a planned peak"] == (pytest.approx(0.15), False)


def test_targets_of_checking_by_hand():
    rows = {
        "tests": {"failed": 0, "shards_done": 3, "shards": 4},
        "real 260K float32": {"is_right": False},
        "kernels none": {"spilling": []},
        "kernels nf4": {"spilling": ["kernel a"]},
    }
    found = {target.label: (target.value, target.is_met) for target in check_targets(rows)}
    assert found["GPU tests that failed"] == (None, None)  # a shard was ended: nothing is known
    assert found["the real model's text, float32"] == (0.0, False)
    assert found["kernels that spill"] == (1, False)
    assert [target.value for target in start_targets({})] == [None, None]


# The whole kit


def start_kit(part: str, out: Path, *flags: str, **variables: str) -> subprocess.Popen:
    environment = {**os.environ, "ALPACA_BENCH_QUICK": "1", "HOME": str(out / "home"), **variables}
    (out / "home").mkdir(exist_ok=True)
    return subprocess.Popen(
        [ROOT / "script/bench_gpu", part, out, *flags], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


NOT_ON_A_CPU = {"kernels that spill", "batch 1 / generate compiled", "lora / TRL"}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_part_measures_what_its_targets_name(tmp_path, real, part):
    process = start_kit(part, tmp_path, ALPACA_REAL=str(real))
    said, _ = process.communicate(timeout=PARTS[part].budget_s + 60)
    assert process.returncode == 0, said
    result = json.loads((tmp_path / f"gpu-{part}.json").read_text())
    assert (result["is_finished"], result["is_quick"], result["kernel_cache_key"]["device"]) == (True, True, "cpu")
    assert [row for row in result["rows"] if "failure" in row] == []
    unmeasured = {target["label"] for target in result["targets"] if target["value"] is None}
    assert unmeasured <= NOT_ON_A_CPU
    assert result["seconds"] < PARTS[part].budget_s
    assert {"commit", "command", "hardware", "versions"} <= result.keys()
    assert "targets: " in said


@pytest.mark.slow
def test_a_part_killed_midway_leaves_a_readable_file(tmp_path):
    process = start_kit("serve", tmp_path)
    path, end = tmp_path / "gpu-serve.json", time.monotonic() + 90
    names: list[str] = []
    while "batch 1" not in names:
        assert time.monotonic() < end
        assert process.poll() is None
        names = [row["name"] for row in json.loads(path.read_text())["rows"]] if path.is_file() else []
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = json.loads(path.read_text())
    assert {"bandwidth", "matrix rate", "engine start", "batch 1"} <= {row["name"] for row in found["rows"]}
    assert found["is_finished"] is False


@pytest.mark.slow
def test_a_part_whose_budget_runs_out_ends_by_itself(tmp_path):
    start = time.monotonic()
    process = start_kit("train", tmp_path, "--budget_s", "25")
    process.communicate(timeout=60)
    assert time.monotonic() - start < 40
    found = json.loads((tmp_path / "gpu-train.json").read_text())
    assert found["is_finished"] is True
    names = {row["name"] for row in found["rows"]}
    assert {"bandwidth", "lora"} <= names
    assert any("left_out" in row for row in found["rows"])
