"""What a run leaves to look at."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from alpaca.errors import MissingPackage
from alpaca.training.config import TrainConfig
from alpaca.training.loop import train

Configure = Callable[..., TrainConfig]


def test_trainer_state_and_curve(configure: Configure):
    folder = train(configure(num_train_epochs=2, val_set_size=4, eval_strategy="epoch"))
    state = json.loads((folder / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"], state["epoch"], state["num_train_epochs"]) == (8, 8, 2.0, 2)
    losses = [entry for entry in state["log_history"] if "loss" in entry]
    assert losses[0].keys() == {"loss", "grad_norm", "learning_rate", "epoch", "step", "tokens_per_second"}
    assert state["summary"]["first_loss"] == losses[0]["loss"]
    assert state["summary"]["last_eval_loss"] == state["log_history"][-1]["eval_loss"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((folder / "train_config.json").read_text())
    assert (config["global_batch_size"], config["gradient_accumulation_steps"]) == (8, 2)


def test_tensorboard_gets_every_entry(configure: Configure):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(
        configure(report_to="tensorboard", run_name="first", max_steps=4, val_set_size=4, eval_strategy="epoch")
    )
    events = EventAccumulator(str(folder / "runs" / "first")).Reload()
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "eval/loss"} <= set(events.Tags()["scalars"])
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    expected = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    assert {event.step: event.value for event in events.Scalars("train/loss")} == pytest.approx(expected)


def test_wandb_gets_every_entry(configure: Configure, monkeypatch: pytest.MonkeyPatch):
    logged: list[tuple[int, dict]] = []
    ended: list[bool] = []
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: ended.append(True))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **settings: run))
    train(configure(report_to="wandb", max_steps=2))
    assert [step for step, _ in logged] == [1, 2]
    assert logged[0][1].keys() == {
        "train/loss", "train/grad_norm", "train/learning_rate", "train/epoch", "train/tokens_per_second"
    }  # fmt: skip
    assert ended == [True]


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_missing_package_is_named_before_anything_is_loaded(package: str, configure: Configure, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    config = configure(report_to=package, model_name_or_path="nowhere")
    with pytest.raises(MissingPackage, match=f"pip install {package}, or use --report_to none"):
        train(config)
    assert not Path(config.output_dir).exists()
