"""Writing a run's checkpoints: the shards of all processes, their digests, and the state that is not sharded."""

import contextlib
import errno
import functools
import io
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter

from alpaca.errors import AlpacaError, InputError, NotEnoughSpace
from alpaca.files.atomic import partial_folder, replaced_folder, write_bytes, write_json
from alpaca.files.outputs import require_free_space
from alpaca.training.checkpoints.digests import FileDigest, HashedFiles, check_files, digest_bytes, digest_json
from alpaca.training.checkpoints.state import (
    REFERENCE_NAME,
    STATE_NAME,
    Trainee,
    list_checkpoints,
    quiet_alone,
    read_state,
    state_bytes,
    step_of,
    trained_state,
)
from alpaca.training.distributed import Result, World

logger = logging.getLogger(__name__)


def save_checkpoint(trainee: Trainee, output_dir: Path, *, keep: int, protected: Path | None = None) -> Path:
    """Write `checkpoint-N`, read it back, and remove the oldest beyond `keep`. All processes call it together.

    protected: a checkpoint that is kept besides.

    Raises NotEnoughSpace for a full disk, and InputError where the disk refuses something else or gives other bytes
    back than were written. Earlier checkpoints then stay as they are.
    """
    world, folder, partial = trainee.world, *_folders(trainee, output_dir)

    def in_all(work: Callable[[], Result]) -> Result:
        return world.run_in_all(functools.partial(_say_failure, work, folder))

    with contextlib.ExitStack() as aside:
        in_all(lambda: _open_aside(aside, trainee, folder) if world.is_main else None)
        files = in_all(lambda: _write_shards(trainee, partial))
        in_all(lambda: _read_back(partial, files))
        all_files = {name: digest for part in world.gather(files) for name, digest in part.items()}
        in_all(lambda: _write_state(trainee, partial, all_files) if world.is_main else None)
        in_all(aside.close)  # renames the folder to its final name
    if world.is_main:
        _remove_oldest(output_dir, keep=keep, newest=folder, protected=protected)
    world.wait_for_all()
    return folder


def _folders(trainee: Trainee, output_dir: Path) -> tuple[Path, Path]:
    """The folder of the present step's checkpoint, and the temporary folder in which it is written."""
    folder = output_dir / f"checkpoint-{trainee.progress.step}"
    return folder, partial_folder(folder)


def _open_aside(aside: contextlib.ExitStack, trainee: Trainee, folder: Path) -> None:
    require_free_space(folder.parent, state_bytes(trainee))
    aside.enter_context(replaced_folder(folder, overwrite=True))


def _say_failure(work: Callable[[], Result], folder: Path) -> Result:
    """Do `work`, and turn errors of the operating system into AlpacaErrors that name the folder."""
    try:
        return work()
    except AlpacaError:
        raise
    except OSError as error:
        kept = [path.name for path in list_checkpoints(folder.parent) if path != folder]
        advice = f"{kept[0]} is untouched: --resume_from_checkpoint auto goes on there" if kept else "It was the first"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = f"the disk ran full while {folder} was written; free some space. {advice}"
            raise NotEnoughSpace(text) from error
        raise InputError(f"{folder} could not be written: {error}; mend that. {advice}") from error


def _write_shards(trainee: Trainee, folder: Path) -> dict[str, FileDigest]:
    """Write this process's part of a checkpoint. Returns the digests of its files, computed from memory."""
    state = trained_state(trainee)
    writer, files = FileSystemWriter(folder), HashedFiles()
    writer.fs = files
    try:
        with quiet_alone():
            dcp.save(state, storage_writer=writer)
    except CheckpointException as error:  # torch raises it in all processes if one fails
        refused = next(filter(None, trainee.world.gather(files.error)), error)
        raise refused from error
    name, content = f"random-{trainee.world.rank}.pt", io.BytesIO()
    torch.save(_random_state(trainee.world), content)
    write_bytes(folder / name, content.getvalue())
    written = {**files.digests, name: digest_bytes(content.getvalue())}
    if trainee.world.is_main and trainee.progress.reference:
        values = save_tensors(dict(trainee.progress.reference))
        write_bytes(folder / REFERENCE_NAME, values)
        written[REFERENCE_NAME] = digest_bytes(values)
    return written


def _read_back(folder: Path, files: Mapping[str, FileDigest]) -> None:
    damage = check_files(folder, files, from_disk=True)
    if damage:
        raise InputError(
            f"{damage}: the disk does not give back what was written, it may be failing. Earlier checkpoints are as "
            "they were; go on with another disk: copy the newest there, and pass it to --resume_from_checkpoint"
        )


def _write_state(trainee: Trainee, folder: Path, files: Mapping[str, FileDigest]) -> None:
    """Write trainer_state.json: all that is neither weights nor optimizer state, and the digests of all files."""
    progress = trainee.progress
    state = {
        "global_step": progress.step,
        "num_processes": trainee.world.num_processes,
        "identity": dict(trainee.identity),
        "scheduler": _scheduler_state(trainee.scheduler),
        "losses_since_log": progress.losses,
        **({"measures_since_log": progress.measures} if progress.measures else {}),
        "log_history": progress.log_history,
        "files": dict(sorted(files.items())),
    }
    write_json(folder / STATE_NAME, {**state, "sha256": digest_json(state)})
    read_state(folder)


def _scheduler_state(scheduler: torch.optim.lr_scheduler.LRScheduler) -> dict[str, object]:
    return {key: value for key, value in scheduler.state_dict().items() if key != "lr_lambdas"}


def _random_state(world: World) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(world.device)
    return state


def _remove_oldest(output_dir: Path, *, keep: int, newest: Path, protected: Path | None) -> None:
    """Keep `newest` and the checkpoints just before it.

    Checkpoints of later steps go, too: they were damaged, or the run was resumed from an earlier one.
    """
    others = [folder for folder in list_checkpoints(output_dir) if folder != newest]
    earlier = [folder for folder in others if step_of(folder) < step_of(newest)]
    for folder in others:
        if folder not in earlier[: max(keep - 1, 0)] and folder != protected:
            shutil.rmtree(folder, ignore_errors=True)
