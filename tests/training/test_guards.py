"""What a run notices while it goes on, and says."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alpaca.errors import InputError
from alpaca.training import gradients, loop
from alpaca.training.configuration.config import TrainConfig
from alpaca.training.configuration.resolving import make_settings
from alpaca.training.guards import LossWatch, SaveClock, describe_not_finite
from alpaca.training.loop import train
from alpaca.training.run import Run
from tests.training.test_loop import history

Configure = Callable[..., TrainConfig]


# A loss that is no number ----------------------------------------------------------------------------------------


class Stage:
    """A run whose model is looked at from outside: its weights after each step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = loop.prepare
        monkeypatch.setattr(loop, "prepare", lambda *given: self.keep(real(*given)))

    def keep(self, run: Run) -> Run:
        self.run = run
        return run

    def remember(self, entry: dict) -> None:
        self.weights = {name: tensor.clone() for name, tensor in self.run.trainee.model.state_dict().items()}

    def assert_weights_untouched(self) -> None:
        weights = self.run.trainee.model.state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in self.weights.items())


@pytest.mark.parametrize("padding_free", [True, False])
def test_the_examples_without_a_finite_loss_are_named(
    padding_free: bool, configure: Configure, records: Path, monkeypatch: pytest.MonkeyPatch
):
    stage, real = Stage(monkeypatch), gradients.sum_losses
    later = loop.step_examples(40, global_batch_size=8, seed=42, step=2).tolist()
    bad = sorted(later[2:4])

    def broken(run, data, indices, **given):
        return real(run, data, indices, **given) * (math.inf if set(indices.tolist()) & set(bad) else 1)

    monkeypatch.setattr(gradients, "sum_losses", broken)
    config = configure(padding_free=padding_free, save_strategy="no")
    with pytest.raises(InputError, match=r"step 3: the loss is inf .* before the weights are touched") as caught:
        train(config, on_step=stage.remember)
    stage.assert_weights_untouched()
    assert "Of its 8 examples 2 have such a loss" in str(caught.value)
    for index in bad:
        words = json.loads(records.read_text())[index]["instruction"].split()
        assert f'number {index} ("{" ".join(words[:8])}{" …" * (len(words) > 8)}")' in str(caught.value)


def test_weights_that_are_broken_are_not_blamed_on_the_data(configure: Configure, monkeypatch: pytest.MonkeyPatch):
    stage = Stage(monkeypatch)

    def spoil(entry: dict) -> None:
        stage.run.trainee.model.get_output_embeddings().weight.data.fill_(math.nan)

    with pytest.raises(InputError, match=r"step 2: .*each of its 8 examples .*and 3 more\): the weights are at fault"):
        train(configure(save_strategy="no"), on_step=spoil)


def test_a_gradient_that_overflows_names_the_batch(configure: Configure, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop, "clip_gradients", lambda model, norm: math.inf)
    with pytest.raises(InputError, match=r"gradient norm inf; .*Each of its 8 examples alone has a finite loss \(num"):
        train(configure(save_strategy="no"))


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"bf16": True}, "lower --learning_rate, or train with --bf16 False"),
        ({"bf16": True, "numerics": "fast"}, "lower --learning_rate, or train with --numerics stanford --bf16 False"),
        ({"bf16": False}, "lower --learning_rate"),
    ],
)
def test_only_what_would_help_is_advised(settings: dict, advice: str, configure: Configure):
    """--bf16 False does nothing in fast numerics, nor where it is so already."""
    for broken in ([], [7], [7, 8]):
        text = describe_not_finite(
            math.nan, 1.0, step=1, indices=[7, 8], broken=broken, name=str,
            remedy=gradients._float32_flags(make_settings(configure(**settings)).model),
        )  # fmt: skip
        assert (advice in text) == (broken != [7, 8])
        assert ("--bf16 False" in text) == ("bf16" in advice)


# Nothing to learn from -------------------------------------------------------------------------------------------


def test_examples_without_a_target_are_said_and_do_no_harm(
    configure: Configure, records: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Prompts that fill the whole length were NaN or a silent 0 elsewhere: here they are left out and counted."""
    caplog.set_level(logging.INFO)
    long = [{"instruction": "word " * 300, "input": "", "output": "nothing"}] * 38
    path = tmp_path / "long.json"
    path.write_text(json.dumps([*long, *json.loads(records.read_text())[:2]]))
    for average in ("token", "micro_batch"):
        config = configure(
            data_path=str(path), max_steps=2, per_device_train_batch_size=1, loss_average=average,
            output_dir=str(tmp_path / average), save_strategy="no",
        )  # fmt: skip
        assert all(0 < loss < 20 for loss in history(train(config)))
    assert "38 dropped: their prompt fills all 256 tokens, nothing is left to learn" in caplog.text
    path.write_text(json.dumps(long))
    with pytest.raises(InputError, match="none of the 38 examples has a token to learn from"):
        train(configure(data_path=str(path)))


# A loss that falls apart -----------------------------------------------------------------------------------------


def test_a_loss_far_above_its_start_is_said_once():
    watch = LossWatch()
    said = [watch.add(loss) for loss in [2.0] * 10 + [1.5] * 50 + [9.0] * 19 + [1.5] + [9.0] * 60]
    assert [step for step, text in enumerate(said) if text] == [10 + 50 + 19 + 1 + 19]
    assert "above 1.5 times its start (2.00) for 20 steps and is 9.00 now" in next(filter(None, said))
    assert not any(map(LossWatch().add, [2.0 + 0.9 * (step % 2) for step in range(100)]))  # noise
    assert not any(map(LossWatch([2.0] * 5).add, [2.0] * 5 + [3.1] * 19))
    assert any(map(LossWatch([2.0] * 30).add, [3.1] * 20))  # resumed


@pytest.mark.slow
def test_too_high_a_learning_rate_is_said_and_does_not_stop(configure: Configure, caplog: pytest.LogCaptureFixture):
    folder = train(configure(
        learning_rate=1.0, max_steps=40, lr_scheduler_type="constant", save_strategy="no", global_batch_size=4
    ))  # fmt: skip
    assert len(history(folder)) == 40
    assert history(folder)[-1] > 1.5 * history(folder)[0]
    assert caplog.text.count("the model is falling apart, most likely from too high a --learning_rate") == 1


# The first checkpoint --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step_s", "num_bytes", "after_steps"),
    [
        (1, 0, 599),  # 599 s, and another step
        (240, 0, 2),  # a third step would end at 12 minutes
        (290, 0, 2),
        (310, 0, 1),
        (900, 0, 1),  # no step can end earlier
        (60, 72_000_000_000, 5),  # saving takes 4 minutes
    ],
)
def test_the_first_checkpoint_is_written_within_the_limit(step_s: float, num_bytes: int, after_steps: int):
    time_s = 0.0
    clock = SaveClock(limit_s=600, num_bytes=num_bytes, now=lambda: time_s)
    for step in range(1, after_steps + 1):
        time_s += step_s
        assert clock.is_due() == (step == after_steps)
    assert time_s + num_bytes / 300e6 <= max(600, step_s)


def test_later_checkpoints_know_how_long_saving_takes():
    time_s = 0.0
    clock = SaveClock(limit_s=600, num_bytes=0, now=lambda: time_s)
    time_s = 10.0
    assert not clock.is_due()
    with clock.saving():
        time_s = 110.0
    time_s = 599.0  # 489 s later, with a step as long
    assert clock.is_due()
    assert not SaveClock(limit_s=0, num_bytes=10**12).is_due()
