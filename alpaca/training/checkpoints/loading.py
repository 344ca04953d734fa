"""Finding and loading a run's checkpoints: the newest undamaged one is taken, and damaged ones are named."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load as load_tensors
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

from alpaca.errors import AlpacaError, InputError, MissingInput
from alpaca.files.reading import list_folder, read_json
from alpaca.training.checkpoints.digests import check_files
from alpaca.training.checkpoints.state import (
    REFERENCE_NAME,
    STATE_NAME,
    Trainee,
    list_checkpoints,
    quiet_alone,
    read_state,
    trained_state,
)
from alpaca.training.checkpoints.untrusted import DataOnlyPlanner, DataOnlyReader
from alpaca.training.distributed import World

logger = logging.getLogger(__name__)


def find_checkpoint(output_dir: Path, asked: str | None, *, world: World) -> Path | None:
    """The checkpoint to resume: the folder asked for, or with "auto" the newest undamaged one; None to start anew.

    All processes call it together, and each verifies a part. Raises MissingInput for a folder that does not exist and
    InputError for a damaged one.
    """
    if asked is None:
        return None
    if asked != "auto":
        if not Path(asked).is_dir():
            raise MissingInput(f"no checkpoint at {asked}; in {output_dir}: {list_folder(output_dir)}")
        damage = _find_damage(Path(asked), world)
        if damage:
            raise InputError(damage)
        return Path(asked)
    for folder in world.gather(list_checkpoints(output_dir))[0]:
        damage = _find_damage(folder, world)
        if not damage:
            return folder
        logger.warning("skipped a damaged checkpoint: %s", damage)
    logger.warning("no whole checkpoint in %s to resume from: starting anew", output_dir)
    return None


def _find_damage(folder: Path, world: World) -> str:
    """Say what is wrong with a checkpoint, or "". All processes get the same answer. Every byte is read once."""
    try:
        files = read_state(folder)["files"]
        own = sorted(files, key=lambda name: files[name]["bytes"])[world.rank :: world.num_processes]
        damage = check_files(folder, {name: files[name] for name in own}, from_disk=False)
    except AlpacaError as error:
        damage = str(error)
    return next(filter(None, world.gather(damage)), "")


def load_checkpoint(trainee: Trainee, folder: Path) -> None:
    """Put a run back to where its checkpoint was saved, whatever the number of processes was then.

    Raises InputError when the checkpoint belongs to a run of another configuration, naming what differs.
    """
    state = read_json(folder / STATE_NAME)
    _check_identity(folder, state["identity"], trainee.identity)
    saved = trained_state(trainee)
    _load_in_place(saved, DataOnlyReader(folder, state["files"]))
    set_optimizer_state_dict(trainee.model, trainee.optimizer, saved["optimizer"])
    trainee.scheduler.load_state_dict({**trainee.scheduler.state_dict(), **state["scheduler"]})
    progress = trainee.progress
    progress.step, progress.losses, progress.log_history = (
        state[key] for key in ("global_step", "losses_since_log", "log_history")
    )
    progress.measures = state.get("measures_since_log", [])
    if REFERENCE_NAME in state["files"]:
        progress.reference = load_tensors((folder / REFERENCE_NAME).read_bytes())
    _restore_random_state(folder, state["num_processes"], trainee.world)


def _load_in_place(state: dict[str, dict], reader: DataOnlyReader) -> None:
    """Fill the tensors of `state`, those of the model among them. Raises InputError for a folder that holds others."""
    try:
        with quiet_alone():
            dcp.load(state, storage_reader=reader, planner=DataOnlyPlanner())
    except CheckpointException as error:  # torch's, around what some process raised
        cause = next((failure[0] for failure in error.failures.values()), error)
        raise InputError(f"{reader.checkpoint_id} cannot be resumed from: {cause}") from error


def _check_identity(folder: Path, saved: Mapping[str, object], now: Mapping[str, object]) -> None:
    unknown, unused = "not written down, by an older version,", "of no account"
    differences = [
        f"{name} was {_said(saved, name, unknown)} and is {_said(now, name, unused)}"
        for name in sorted({*saved, *now})
        if saved.get(name) != now.get(name)
    ]
    if differences:
        raise InputError(
            f"{folder} belongs to another run: {'; '.join(differences)}. Resume with the same settings, or start anew "
            "with --overwrite_output_dir or in another --output_dir"
        )


def _said(identity: Mapping[str, object], name: str, otherwise: str) -> str:
    return repr(identity[name]) if name in identity else otherwise


def _restore_random_state(folder: Path, num_processes: int, world: World) -> None:
    if num_processes != world.num_processes:
        logger.warning(
            "resumed by %d processes what %d saved: the data goes on where it was, dropout draws anew",
            world.num_processes, num_processes,
        )  # fmt: skip
        return
    state = torch.load(folder / f"random-{world.rank}.pt", weights_only=True)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and world.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], world.device)
