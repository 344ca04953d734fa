"""The rows that other programs train: what their processes are told, and what becomes of their figures."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from bench import environments, train_peers
from bench.random_model import SHAPES, write_random_llama
from bench.train_peers import (
    MICRO_BATCH,
    PEERS,
    Work,
    as_sample,
    compare_losses,
    make_job,
    make_peer_targets,
    make_work,
    run_peer,
)
from tests.conftest import ROOT

SAMPLE = ROOT / "alpaca" / "data" / "sample.json"
STEPS, BATCH = 3, 8


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("model")
    write_random_llama(folder, SHAPES["tiny"], torch.float32)
    return make_work(folder, str(SAMPLE), steps=STEPS, batch=BATCH, learning_rate=1e-3, max_length=512)


def test_examples_come_in_the_order_of_our_training(work: Work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from alpaca.training import gradients, loop
    from alpaca.training.configuration.config import make_config

    taken: list[torch.Tensor] = []
    real = gradients.accumulate_gradients
    runs: list[loop.Run] = []

    def watched(run: loop.Run, indices: torch.Tensor) -> tuple[float, list[float]]:
        runs.append(run)
        taken.append(indices)
        return real(run, indices)

    monkeypatch.setattr(loop, "accumulate_gradients", watched)
    monkeypatch.setattr(loop, "finish", lambda run, **rest: None)
    flags = {
        "model_name_or_path": str(work.model), "data_path": str(SAMPLE), "output_dir": str(tmp_path / "out"),
        "max_steps": STEPS, "global_batch_size": BATCH, "save_strategy": "no", "report_to": "none", "num_samples": 0,
    }  # fmt: skip
    loop.train(make_config(flags))
    data = runs[0].data
    assert work.examples == [
        tuple(part.tolist() for part in data.example(index)) for step in taken for index in step.tolist()
    ]
    assert (work.pad_id, work.num_tokens) == (runs[0].base.tokenizer.pad_id, runs[0].base.tokenizer.size)


def test_a_step_has_all_its_examples(work: Work):
    for name, peer in PEERS.items():
        job = make_job(name, work, "out")
        arguments = job["arguments"]
        rows = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
        assert arguments["per_device_train_batch_size"] <= MICRO_BATCH
        assert job["examples"] == work.examples
        tokens = sum(len(ids) for ids, _ in work.examples)
        if peer.get("packs"):  # as many rows as hold a step's tokens
            assert rows == pytest.approx(tokens / STEPS / work.max_length, abs=1)
            assert arguments["max_length"] == work.max_length
        else:
            assert rows == BATCH
        assert arguments["warmup_steps"] == 1  # 3 % of 3 steps, rounded up


def test_full_peers_add_the_padding_token_and_adapters_do_not(work: Work):
    rows = {name: make_job(name, work, "out")["num_rows"] for name in PEERS}
    assert rows == {name: 0 if "lora" in name else 32_001 for name in PEERS}
    assert [name for name in PEERS if make_job(name, work, "out")["lora"]] == ["trainer lora"]


def test_a_sample_is_the_median_of_the_steps_after_the_first():
    result = {
        "losses": [3.0, 2.0, 1.0, 0.5], "tokens": [999, 100, 200, 300], "seconds": [1.0, 1.0, 1.0],
        "cpu_seconds": [2.0, 4.0, 2.0], "peak_bytes": 5, "process_peak_bytes": 7,
    }  # fmt: skip
    assert as_sample(result) == {
        "losses": [3.0, 2.0, 1.0, 0.5], "tokens_per_second": 200.0, "tokens_per_cpu_second": 50.0, "peak_bytes": 5,
        "process_peak_bytes": 7,
    }  # fmt: skip


def _row(losses: list[float], rate: float, peak: int) -> dict:
    return {"losses": losses, "tokens_per_second": rate, "tokens_per_cpu_second": rate / 2, "peak_bytes": peak}


def test_targets_hold_ours_against_each_peer_that_ran():
    results = {
        "packed": _row([4.0, 2.0], 250.0, 60), "lora": _row([4.0, 3.0], 300.0, 40),
        "trainer": _row([4.0, 2.00001], 100.0, 100), "trainer lora": _row([4.0, 9.0], 100.0, 100),
        "trl": {"failure": "no time was left"}, "trl packed": _row([5.0, 5.0], 200.0, 60),
    }  # fmt: skip
    found = {target.label: target for target in make_peer_targets(results)}
    assert found["packed / trainer, useful tokens/s"].is_met
    assert found["packed / trainer, useful tokens/s"].value == 2.5
    assert found["packed / trainer, peak memory"].value == 0.6
    assert found["lora / trainer lora, by CPU time"].value == 3.0
    assert not any("trl," in label for label in found)
    assert compare_losses(results) == {"trainer": pytest.approx(5e-6), "trainer lora": 0.0}
    results["trainer"]["losses"][1] = 2.1
    missed = {target.label: target.is_met for target in make_peer_targets(results)}
    assert missed["losses of trainer and packed, relative"] is False


def test_a_peers_process_is_told_its_job_and_nothing_of_this_project(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[list[str]] = []

    def ran(command: list[str], **options: object) -> subprocess.CompletedProcess:
        seen.append(command)
        told = json.loads(Path(command[3]).read_text())
        steps = told["arguments"]["max_steps"]
        made = {"losses": [1.0] * steps, "tokens": [10] * steps, "seconds": [2.0] * (steps - 1)}
        made |= {"cpu_seconds": [4.0] * (steps - 1), "peak_bytes": 1, "process_peak_bytes": 2}
        Path(command[4]).write_text(json.dumps(made))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(train_peers, "their_python", lambda: Path("their-python"))
    monkeypatch.setattr(subprocess, "run", ran)
    sample = run_peer("trl packed", work, tmp_path, seconds=60)
    assert sample["tokens_per_second"] == 5.0
    assert seen[0][:2] == ["their-python", "-I"]  # isolated: neither this folder nor PYTHONPATH is looked in
    source = Path(seen[0][2]).read_text()
    assert "alpaca" not in source
    assert "bench" not in source


def test_a_peer_that_fails_says_why(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def failed(command: list[str], **options: object) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nKeyError: 'x'\n")

    monkeypatch.setattr(train_peers, "their_python", lambda: Path("their-python"))
    monkeypatch.setattr(subprocess, "run", failed)
    assert run_peer("trainer", work, tmp_path, seconds=60)["failure"].endswith("KeyError: 'x'")


def test_an_environment_is_made_once_and_again_where_it_was_left_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ran: list[list[str]] = []
    monkeypatch.setattr(environments, "FOLDER", tmp_path)

    def run(command: list[str], *, check: bool) -> None:
        assert check
        ran.append(command)
        if command[1:3] == ["-m", "venv"]:
            assert not Path(command[3]).exists()
            Path(command[3]).mkdir()

    monkeypatch.setattr(subprocess, "run", run)
    (tmp_path / "peer").mkdir()  # without the mark that it is complete
    python = environments.environment("peer", ["one==1", "two==2"], torch="2.13.0")
    assert python == tmp_path / "peer" / "bin" / "python"
    assert [command[-1] for command in ran[1:]] == ["torch==2.13.0", "two==2"]
    assert environments.environment("peer", ["one==1", "two==2"], torch="2.13.0") == python
    assert len(ran) == 3


@pytest.mark.slow
@pytest.mark.skipif(
    not (environments.FOLDER / "trl" / "complete").exists(), reason="python -m bench.train --peers makes it"
)
@pytest.mark.parametrize("name", ["trainer", "trl padding_free"])
def test_a_peers_losses_are_ours(name: str, work: Work, tmp_path: Path):
    theirs = run_peer(name, work, tmp_path, seconds=600)
    assert "failure" not in theirs, theirs
    ours = our_losses(work, tmp_path)
    assert theirs["losses"] == pytest.approx(ours, rel=1e-5)


def our_losses(work: Work, folder: Path) -> list[float]:
    from alpaca.training.configuration.config import make_config
    from alpaca.training.loop import train

    losses: list[float] = []
    flags = {
        "model_name_or_path": str(work.model), "data_path": str(SAMPLE), "output_dir": str(folder / "ours"),
        "max_steps": work.steps, "global_batch_size": work.batch, "model_max_length": work.max_length,
        "learning_rate": work.learning_rate, "save_strategy": "no", "report_to": "none", "num_samples": 0,
    }  # fmt: skip
    train(make_config(flags), on_step=lambda entry: losses.append(entry["loss"]))
    return losses
