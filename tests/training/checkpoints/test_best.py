"""The best evaluation: its weights become the final ones, and a run without a better one for long ends."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from alpaca.errors import InputError
from alpaca.training.configuration.config import TrainConfig
from alpaca.training.configuration.resolving import resolve
from alpaca.training.loop import train

Configure = Callable[..., TrainConfig]
# A rate at which so small a model soon leaves what it has learned, and the same rate whatever the number of steps.
LEAVES = {
    "learning_rate": 0.1, "lr_scheduler_type": "constant", "val_set_size": 16, "eval_strategy": "steps",
    "eval_steps": 1, "save_steps": 1000, "max_steps": 8,
}  # fmt: skip


def held_out(folder: Path) -> dict[int, float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}


def best_step(losses: dict[int, float]) -> int:
    return min((step for step in losses if step), key=lambda step: losses[step])


def same_weights(one: Path, other: Path) -> bool:
    left, right = (load_file(folder / "model.safetensors") for folder in (one, other))
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


@pytest.mark.slow
def test_the_best_weights_are_the_final_ones(configure: Configure, tmp_path: Path):
    """They are those of a run that ends there; the history goes on to the last step."""
    folder = train(configure(**LEAVES, load_best_model_at_end=True))
    losses = held_out(folder)
    best = best_step(losses)
    assert list(losses) == list(range(9))
    assert best < 8, "else this test would see nothing"
    assert (folder / f"checkpoint-{best}").is_dir()
    shorter = train(configure(**{**LEAVES, "max_steps": best}, output_dir=str(tmp_path / "shorter")))
    assert same_weights(folder, shorter)
    last = train(configure(**LEAVES, output_dir=str(tmp_path / "last")))
    assert held_out(last) == losses
    assert not same_weights(folder, last)


def test_patience_ends_a_run(configure: Configure):
    losses = held_out(train(configure(**{**LEAVES, "max_steps": 50}, early_stopping_patience=3)))
    assert len(losses) - 1 == best_step(losses) + 3 < 50


@pytest.mark.slow
def test_a_resumed_run_remembers_the_best(configure: Configure, tmp_path: Path):
    whole = train(configure(**LEAVES, load_best_model_at_end=True))
    best, other = best_step(held_out(whole)), str(tmp_path / "other")
    values = {**LEAVES, "load_best_model_at_end": True, "output_dir": other, "save_strategy": "steps", "save_steps": 1}
    stops = iter([False] * best + [True])
    with pytest.raises(Exception, match=f"stopped after step {best + 1} of 8"):
        train(configure(**values), should_stop=lambda: next(stops))
    folder = train(configure(**values, resume_from_checkpoint="auto"))
    assert held_out(folder) == held_out(whole)
    assert same_weights(folder, whole)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"load_best_model_at_end": True}, r"go by held-out loss: add --eval_strategy"),
        ({"early_stopping_patience": 2}, r"go by held-out loss: add --eval_strategy"),
        ({**LEAVES, "load_best_model_at_end": True, "save_strategy": "no"}, r"--save_strategy no keeps none"),
    ],
)
def test_what_cannot_be_followed(configure: Configure, flags, message):
    with pytest.raises(InputError, match=message):
        resolve(configure(**flags), num_processes=1, device=None)
