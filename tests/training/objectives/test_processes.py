"""Preference objectives in several processes: reference, rewards and KTO's measure are those of one process."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from alpaca.training.configuration.config import TrainConfig, config_json
from alpaca.training.loop import train
from tests.training.conftest import SAMPLE
from tests.training.test_distributed import train_in_processes

Configure = Callable[..., TrainConfig]
pytestmark = pytest.mark.slow


def logged(folder: Path) -> list[dict[str, float]]:
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{name: value for name, value in entry.items() if name != "tokens_per_second"} for entry in entries]


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_two_processes_train_what_one_does(objective: str, configure: Configure, tmp_path: Path):
    """Of a batch of five, so that micro-batches of a step are empty in one of them."""
    sample = json.loads(SAMPLE.read_text())[:20]
    path = tmp_path / "pairs.json"
    made = [{**one, "rejected": sample[place - 5]["output"]} for place, one in enumerate(sample)]
    path.write_text(json.dumps(made))
    values = {
        "objective": objective, "data_path": str(path), "global_batch_size": 5, "per_device_train_batch_size": 1,
        "max_steps": 4, "learning_rate": 2e-4, "val_set_size": 3, "eval_strategy": "steps", "eval_steps": 2,
        "save_steps": 3,
    }  # fmt: skip
    one = configure(output_dir=str(tmp_path / "one"), **values)
    two = configure(output_dir=str(tmp_path / "two"), **values)
    folder = train(one)
    finished = train_in_processes(2, [config_json(two)], tmp_path)
    assert finished.returncode == 0, finished.stderr
    for own, other in zip(logged(folder), logged(tmp_path / "two"), strict=True):
        assert own == pytest.approx(other, rel=1e-3, abs=2e-4)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).abs().max() < 2e-5, name
