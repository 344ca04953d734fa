"""A run that fails before its first step is done leaves nothing that stands in the next one's way."""

import signal
from pathlib import Path

import pytest
import torch

from alpaca.errors import NotEnoughSpace, OutputExists
from alpaca.training import loop
from alpaca.training.loop import train


def fail_at(step: int, error: BaseException):
    real = loop.accumulate_gradients

    def accumulate(run, indices):
        if run.progress.step + 1 == step:
            raise error
        return real(run, indices)

    return accumulate


@pytest.mark.parametrize(
    ("error", "raised"),
    [(torch.OutOfMemoryError("too much"), NotEnoughSpace), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_the_corrected_command_runs_in_the_same_folder(configure, monkeypatch, error, raised):
    config = configure(max_steps=2, save_strategy="no", report_to="tensorboard")
    folder = Path(config.output_dir)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "accumulate_gradients", fail_at(1, error))
        with pytest.raises(raised):
            train(config)
    assert list(folder.iterdir()) == []
    train(config)
    assert (folder / "model.safetensors").is_file()


def test_files_of_others_stay(configure, monkeypatch):
    config = configure(max_steps=2, save_strategy="no", overwrite_output_dir=True)
    note = Path(config.output_dir) / "notes.txt"
    note.parent.mkdir(exist_ok=True)
    note.write_text("mine")
    monkeypatch.setattr(loop, "accumulate_gradients", fail_at(1, RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        train(config)
    assert [path.name for path in note.parent.iterdir()] == ["notes.txt"]


def test_a_run_that_has_begun_is_kept(configure, monkeypatch):
    config = configure(max_steps=3, save_strategy="steps", save_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "accumulate_gradients", fail_at(2, RuntimeError("broken")))
        with pytest.raises(RuntimeError, match="broken"):
            train(config)
    assert {"checkpoint-1", "train_config.json"} <= {path.name for path in Path(config.output_dir).iterdir()}
    with pytest.raises(OutputExists, match="go on with a run that was interrupted"):
        train(config)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
