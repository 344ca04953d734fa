"""What a checkpoint holds: the state of a run that is saved and restored, and which folders are checkpoints."""

import contextlib
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from alpaca.errors import InputError
from alpaca.files.model_folders import CONFIG_NAME
from alpaca.files.reading import read_json
from alpaca.training.checkpoints.digests import digest_json
from alpaca.training.distributed import World, reshard
from alpaca.training.model.adapters.starts import list_starts
from alpaca.training.model.optimizers.choosing import list_trained, moment_bytes

STATE_NAME = "trainer_state.json"
REFERENCE_NAME = "reference.safetensors"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
WHOLE = ("config.json", CONFIG_NAME)  # a final folder's config is moved into place last, so a folder with one is whole


@dataclass(kw_only=True)
class Progress:
    """How far a run has come. losses, measures: those of the steps since the last log entry.

    reference: what `objectives.reference` measured before the first step.
    """

    step: int = 0
    log_history: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    measures: list[dict[str, float]] = field(default_factory=list)
    reference: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """What a checkpoint saves and restores.

    identity: what must be equal for a checkpoint to belong to this run (data, seed, batch, learning rate, steps, ...).
    optimizer_name: as OptimizerSettings has it.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    progress: Progress
    identity: Mapping[str, object]
    world: World
    optimizer_name: str = "adamw_torch"


def state_bytes(trainee: Trainee) -> int:
    """About how many bytes a checkpoint takes on the disk: what `trained_state` has."""
    total = 0
    for trained in list_trained(trainee.model):
        itemsize = trained.parameter.itemsize
        moments = moment_bytes([trained], trainee.optimizer_name, itemsize=itemsize)
        total += math.prod(trained.shape) * itemsize + moments
    return total + sum(start.nbytes for start in list_starts(trainee.model).values())


def trained_state(trainee: Trainee) -> dict[str, dict]:
    """The tensors that training changes: the model's own, and copies of the optimizer's; shards if it is sharded.

    An adapter's frozen base is left out, and so is extra state of quantized layers, which torch cannot name. Starts
    that were taken from the base are there: computed again they might have other last digits.
    """
    reshard(trainee.model)
    trained = {name: p.detach() for name, p in trainee.model.named_parameters() if p.requires_grad}
    return {
        "model": trained | list_starts(trainee.model),
        "optimizer": get_optimizer_state_dict(trainee.model, trainee.optimizer),
    }


def step_of(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


@contextlib.contextmanager
def quiet_alone() -> Iterator[None]:
    """Suppress torch.distributed.checkpoint's warning that there is only one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The folders named checkpoint-N, the one of the newest step first."""
    found = [path for path in output_dir.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def read_state(folder: Path) -> dict:
    """Read a checkpoint's trainer_state.json. Raises MissingInput, InputError."""
    state = read_json(folder / STATE_NAME)
    if state.pop("sha256", None) != digest_json(state):
        raise InputError(f"{folder / STATE_NAME} is damaged: its content does not have its SHA-256")
    return state
