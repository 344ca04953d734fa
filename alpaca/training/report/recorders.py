"""Where a run's measurements go while it runs: TensorBoard, W&B, or nowhere."""

import importlib
from abc import ABC, abstractmethod
from pathlib import Path

from alpaca.errors import MissingPackage
from alpaca.training.config import TrainConfig, config_json

Entry = dict[str, float]  # of the log: "step", "epoch" and what was measured


# While it runs ------------------------------------------------------------------------------------------------


class Recorder(ABC):
    """Where log entries go besides log_history."""

    @abstractmethod
    def record(self, entry: Entry) -> None:
        """Take one log entry."""

    @abstractmethod
    def close(self) -> None:
        """Write out what is still in memory."""


class NoRecorder(Recorder):
    def record(self, entry: Entry) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoardRecorder(Recorder):
    """Event files in output_dir/runs/NAME; a resumed run goes on in the same folder."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        _import("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def record(self, entry: Entry) -> None:
        for name, value in _measurements(entry).items():
            self._writer.add_scalar(name, value, int(entry["step"]))

    def close(self) -> None:
        self._writer.close()


class WandbRecorder(Recorder):
    """A run of Weights & Biases, whose own environment variables say where."""

    def __init__(self, config: TrainConfig, *, name: str) -> None:
        wandb = _import("wandb", "wandb")
        self._run = wandb.init(name=name, config=config_json(config), resume="allow")

    def record(self, entry: Entry) -> None:
        self._run.log(_measurements(entry), step=int(entry["step"]))

    def close(self) -> None:
        self._run.finish()


def open_recorder(config: TrainConfig, *, first_step: int) -> Recorder:
    """The recorder `--report_to` names. Raises MissingPackage."""
    output_dir = Path(config.output_dir)
    name = config.run_name or output_dir.absolute().name
    if config.report_to == "tensorboard":
        return TensorBoardRecorder(output_dir / "runs" / name, first_step=first_step)
    if config.report_to == "wandb":
        return WandbRecorder(config, name=name)
    return NoRecorder()


def check_recorder(config: TrainConfig) -> None:
    """Raise MissingPackage now rather than after the model is loaded."""
    if config.report_to != "none":
        _import(config.report_to, config.report_to)


def _import(module: str, package: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackage(
            f"--report_to {package} needs the package {package}: pip install {package}, or use --report_to none"
        ) from error


def _measurements(entry: Entry) -> Entry:
    """Values under the names transformers gives them: train/loss, eval/loss."""
    values = {key: value for key, value in entry.items() if key != "step"}
    return {f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}": value for key, value in values.items()}
