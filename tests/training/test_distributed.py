"""Several processes on the CPU (gloo), sharded with FSDP2: they do what one does."""

import dataclasses
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from alpaca.training.config import TrainConfig, config_json
from alpaca.training.distributed import World, clip_gradients
from alpaca.training.loop import train
from tests.conftest import ROOT
from tests.training.conftest import torchrun
from tests.training.test_loop import history, largest_difference

Configure = Callable[..., TrainConfig]


def train_in_processes(num_processes: int, configs: list[dict], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Train configurations in one launch of `num_processes`, since starting them is what takes long."""
    jobs = tmp_path / f"jobs-{num_processes}.json"
    jobs.write_text(json.dumps(configs))
    return subprocess.run(
        [*torchrun(num_processes), "-m", "tests.training.worker", str(jobs)],
        capture_output=True, text=True, cwd=ROOT, timeout=180, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="session")
def opt_without_dropout(tiny_opt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(tiny_opt, tmp_path_factory.mktemp("base") / "opt-plain")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dropout": 0.0}))
    return folder


def assert_equal_to_rounding(left: Path, right: Path) -> None:
    for key in ("loss", "eval_loss"):
        assert history(left, key) == pytest.approx(history(right, key), abs=2e-5)
    assert history(left, "grad_norm") == pytest.approx(history(right, "grad_norm"), rel=1e-4)
    assert largest_difference(left, right) < 1e-5
    assert (left / "config.json").read_text() == (right / "config.json").read_text()


def test_two_processes_train_what_one_does(configure: Configure, opt_without_dropout: Path, tmp_path: Path):
    common = {"learning_rate": 2e-4, "val_set_size": 5, "eval_strategy": "epoch", "max_steps": 3}
    opt = str(opt_without_dropout)
    runs = {
        "token": {"fsdp": "full_shard auto_wrap", "max_steps": 6},
        "micro-batch": {"loss_average": "micro_batch"},
        "small micro-batches": {"per_device_train_batch_size": 1, "fsdp": "shard_grad_op auto_wrap"},
        "uneven": {"per_device_train_batch_size": 3, "gradient_checkpointing": True},
        "tied": {"model_name_or_path": opt, "weight_decay": 0.1},
        "clipped": {"max_grad_norm": 0.01, "save_dtype": "bfloat16"},
    }
    many = {name: configure(**{**common, **run}, output_dir=str(tmp_path / "two" / name)) for name, run in runs.items()}
    finished = train_in_processes(2, [config_json(config) for config in many.values()], tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    for name, config in many.items():
        alone = train(dataclasses.replace(config, output_dir=str(tmp_path / "one" / name)))
        if name == "clipped":  # bfloat16 may round either way
            assert history(alone) == pytest.approx(history(Path(config.output_dir)), abs=2e-5)
            assert largest_difference(alone, Path(config.output_dir)) < 0.02
        else:
            assert_equal_to_rounding(Path(config.output_dir), alone)
    AutoModelForCausalLM.from_pretrained(many["tied"].output_dir)


def test_three_processes_and_another_number_resumes(configure: Configure, tmp_path: Path):
    """Also with fewer examples than processes in the last micro-step, and a set smaller than the global batch."""
    values = {"learning_rate": 2e-4, "save_steps": 4, "max_steps": 7}
    alone = train(configure(output_dir=str(tmp_path / "alone"), **values))
    resumed = configure(
        output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=str(alone / "checkpoint-4"), **values
    )
    three = configure(output_dir=str(tmp_path / "three"), per_device_train_batch_size=1, **values)
    small = configure(output_dir=str(tmp_path / "small"), global_batch_size=64, **{**values, "max_steps": 2})
    jobs = [config_json(config) for config in (three, resumed, small)]
    finished = train_in_processes(3, jobs, tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert_equal_to_rounding(Path(three.output_dir), alone)
    assert_equal_to_rounding(Path(resumed.output_dir), alone)
    assert_equal_to_rounding(Path(small.output_dir), train(dataclasses.replace(small, output_dir=str(tmp_path / "s1"))))
    back = configure(
        output_dir=str(tmp_path / "back"), resume_from_checkpoint=str(Path(three.output_dir) / "checkpoint-4"), **values
    )
    assert_equal_to_rounding(train(back), alone)


def test_a_process_that_breaks_ends_them_all(configure: Configure, tmp_path: Path):
    config = configure(num_train_epochs=500, save_steps=3, save_total_limit=1)
    start = time.monotonic()
    finished = train_in_processes(2, [{**config_json(config), "crash_after": 5}], tmp_path)
    assert finished.returncode != 0
    assert "this process broke" in finished.stderr
    assert time.monotonic() - start < 60
    names = {path.name for path in Path(config.output_dir).iterdir()}
    assert "checkpoint-3" in names
    assert "config.json" not in names


def test_gradients_are_clipped_as_torch_does():
    torch.manual_seed(0)
    models = [torch.nn.Linear(3, 4) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        (model(torch.ones(2, 3)) ** 2).sum().backward()
    norm = clip_gradients(models[0], 0.5)
    assert norm == torch.nn.utils.clip_grad_norm_(models[1].parameters(), 0.5).item()
    assert torch.equal(models[0].weight.grad, models[1].weight.grad)
    before = models[0].weight.grad.clone()
    assert clip_gradients(models[0], 0) == pytest.approx(0.5, abs=1e-5)
    assert torch.equal(models[0].weight.grad, before)


def test_one_process_sums_by_itself():
    assert World(rank=0, num_processes=1, device=torch.device("cpu")).sum([1.5, 2.0]) == [1.5, 2.0]
