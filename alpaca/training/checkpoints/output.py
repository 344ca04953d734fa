"""Checks of a run's output folder: nothing is overwritten unasked, all processes see it, the disk has room."""

import contextlib
import logging
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from alpaca.errors import InputError, OutputExists
from alpaca.files.outputs import require_free_space
from alpaca.files.reading import list_folder
from alpaca.training.checkpoints.final import final_specs
from alpaca.training.checkpoints.state import WHOLE, Trainee, list_checkpoints, state_bytes
from alpaca.training.distributed import World

logger = logging.getLogger(__name__)
_LEFTOVER = re.compile(r"\.(checkpoint-\d+|final|.+\.\d+-\d+)\.(partial|replaced|lock)")


def require_shared_folder(output_dir: Path, world: World) -> None:
    """Check that the folder can be written to and that the processes on other machines see it.

    All processes call it together, before the first step. Raises InputError.
    """
    number = world.gather(time.time_ns())[0]
    first, own = (output_dir / f".probe.{number}-{rank}.partial" for rank in (0, world.rank))
    try:
        world.run_in_all(lambda: _write_first_probe(first) if world.is_main else None)
        world.run_in_all(lambda: _write_probe(own, first))
    finally:
        with contextlib.suppress(OSError):
            own.unlink(missing_ok=True)


def _write_first_probe(probe: Path) -> None:
    if probe.parent.is_file():
        raise OutputExists(f"{probe.parent} is a file; choose another --output_dir")
    with _refusals_said(probe.parent):
        probe.parent.mkdir(parents=True, exist_ok=True)
    _write_probe(probe, probe.parent)


def _write_probe(probe: Path, expected: Path) -> None:
    if not expected.exists():
        raise InputError(
            f"{socket.gethostname()} does not see what the first process wrote to {probe.parent}: several machines "
            "need an --output_dir on a disk that all of them share"
        )
    with _refusals_said(probe.parent):
        probe.write_bytes(b"")


@contextlib.contextmanager
def _refusals_said(output_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"--output_dir {output_dir} cannot be written to: {error}; choose another folder") from error


def check_output(output_dir: Path, *, resume: bool, checkpoint: Path | None, overwrite: bool) -> None:
    """Raise OutputExists for a folder that is not empty, unless this run resumes or overwrites.

    A run that may resume but found no checkpoint starts anew beside what a killed run left, never over a finished
    model.
    """
    resumes = checkpoint is not None or (resume and not any((output_dir / name).exists() for name in WHOLE))
    if resumes or overwrite or not output_dir.exists():
        return
    if any(not _LEFTOVER.fullmatch(entry.name) for entry in output_dir.iterdir()):
        raise OutputExists(
            f"{output_dir} is not empty ({list_folder(output_dir, most=5)}); go on with a run that was interrupted by "
            "--resume_from_checkpoint auto, replace it by --overwrite_output_dir, or choose another --output_dir"
        )


@contextlib.contextmanager
def kept_once_begun(output_dir: Path, has_begun: Callable[[], bool]) -> Iterator[None]:
    """Remove what the block has written into the folder if it fails before the run has begun.

    A run that fails in its first step has taught nothing, and its files would have the corrected command refused.
    """
    before = {entry.name for entry in output_dir.iterdir()} if output_dir.is_dir() else set()
    try:
        yield
    except BaseException:
        if not has_begun():
            for entry in output_dir.iterdir():
                if entry.name not in before:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        raise


def clear_output(output_dir: Path, *, old_checkpoints: bool) -> None:
    """Remove what killed runs left; for a run that starts anew, also the checkpoints of earlier runs."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for entry in output_dir.iterdir():
        if _LEFTOVER.fullmatch(entry.name):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for folder in list_checkpoints(output_dir) if old_checkpoints else ():
        logger.warning("removing %s of an earlier run", folder)
        shutil.rmtree(folder)


def require_room(trainee: Trainee, output_dir: Path, *, dtype: torch.dtype, checkpoints: bool) -> None:
    """Raise NotEnoughSpace if the disk has no room for the final weights and, if wanted, a checkpoint."""
    specs = final_specs(trainee.model, dtype)
    in_checkpoint = state_bytes(trainee) if checkpoints else 0
    require_free_space(output_dir, sum(spec.num_bytes for spec in specs) + in_checkpoint)
