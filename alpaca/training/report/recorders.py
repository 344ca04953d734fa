"""Where a run's measurements go while it runs: TensorBoard, W&B, or nowhere."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from alpaca.errors import MissingPackage
from alpaca.training.configuration.settings import ReportSettings, RunSettings

Entry = dict[str, float]  # of the log: "step", "epoch" and what was measured


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

    def __init__(self, flags: Mapping[str, object], *, name: str) -> None:
        wandb = _import("wandb", "wandb")
        self._run = wandb.init(name=name, config=dict(flags), resume="allow")

    def record(self, entry: Entry) -> None:
        self._run.log(_measurements(entry), step=int(entry["step"]))

    def close(self) -> None:
        self._run.finish()


def open_recorder(settings: RunSettings, *, first_step: int) -> Recorder:
    """The recorder `--report_to` names. Raises MissingPackage."""
    report = settings.report
    if report.report_to == "tensorboard":
        return TensorBoardRecorder(report.output_dir / "runs" / report.run_name, first_step=first_step)
    if report.report_to == "wandb":
        return WandbRecorder(settings.flags, name=report.run_name)
    return NoRecorder()


def check_recorder(report: ReportSettings) -> None:
    """Raise MissingPackage now rather than after the model is loaded."""
    if report.report_to != "none":
        _import(report.report_to, report.report_to)


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
