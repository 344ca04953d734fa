"""Fine-tuning a model that somebody trained, on examples that somebody wrote."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from alpaca.formats.meta.to_hf import convert
from alpaca.training.configuration.config import TrainConfig
from alpaca.training.loop import train
from convert.convert_llama_weights_to_hf import parse_arguments


@pytest.mark.slow
def test_held_out_loss_falls(real: Path, configure: Callable[..., TrainConfig], tmp_path: Path):
    """One epoch of 1,000 examples; the loss falls as it does nowhere by chance, and most of it early."""
    examples = json.loads((real / "alpaca_4000.json").read_text())
    for name, part in (("train", examples[:1000]), ("held_out", examples[1000:1100])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    flags = ["--input_dir", str(real / "unconverted-weights"), "--model_size", "260K", "--output_dir", str(tmp_path)]
    base = convert(parse_arguments(flags))
    output_dir = train(
        configure(
            model_name_or_path=str(base),
            data_path=str(tmp_path / "train.json"),
            eval_data_path=str(tmp_path / "held_out.json"),
            eval_strategy="steps",
            eval_steps=10,
            model_max_length=512,
            global_batch_size=32,
            learning_rate=1e-3,
            num_train_epochs=1,
            num_samples=2,
        )
    )
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[-1] > 1.0
    page = (output_dir / "report.html").read_text()
    assert all(f"{losses[at]:.4f}" in page for at in (0, -1))
