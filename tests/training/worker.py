"""One of several processes with ranks: trains the configurations of a JSON file one after the other.

Besides the configuration a job may have: "crash_after", a step after which rank 0 ends with an exception of which the
others hear nothing; "copy_from", a folder to copy to its output folder, and "flip", a file there of which one byte is
changed, before; "free_memory", what the device is said to have; "full_disk", the rank whose disk is full from step 4
on; "largest_gathered", a file that is told the most bytes of gathered tensors alive at a time, and of the largest.
An AlpacaError goes to "error", a file, where that is given.
"""

import errno
import gc
import io
import json
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from markupsafe import Markup
from torch.distributed.tensor import DTensor

from alpaca.errors import AlpacaError
from alpaca.training import distributed, finishing
from alpaca.training.checkpoints import digests, final
from alpaca.training.configuration.config import make_config
from alpaca.training.distributed import join_world, leave_world
from alpaca.training.loop import train
from alpaca.training.report import page


def leave_out_charts(put: Callable[[object, str, object], None]) -> None:
    """Set, by `put(module, name, value)`, functions that draw nothing."""
    put(finishing, "draw_losses", lambda path, history: None)
    put(page, "draw_lines", lambda *lines, **options: Markup())


def crash_after(step: int, entry: dict) -> None:
    if entry["step"] == step:
        raise RuntimeError("this process broke")


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class Gathered:
    """Counts the bytes of full tensors that are alive."""

    def __init__(self) -> None:
        self.alive = self.most = self.largest = 0
        self.real = DTensor.full_tensor

    def full_tensor(self, tensor: DTensor, **options: object) -> torch.Tensor:
        whole = self.real(tensor, **options)
        self.alive += whole.nbytes
        self.most, self.largest = max(self.most, self.alive), max(self.largest, whole.nbytes)
        weakref.finalize(whole, self.release, whole.nbytes)
        return whole

    def release(self, num_bytes: int) -> None:
        self.alive -= num_bytes


def save_final_counted(path: Path, rank: int, real):
    def save_final(*arguments: object, **options: object) -> None:
        gathered = Gathered()
        gc.collect()
        DTensor.full_tensor = lambda tensor, **given: gathered.full_tensor(tensor, **given)
        real(*arguments, **options)
        DTensor.full_tensor = gathered.real
        path.with_name(f"{path.name}.{rank}").write_text(json.dumps([gathered.most, gathered.largest]))

    return save_final


class FullFile:
    """An open file whose disk takes no more."""

    def __init__(self, stream: io.IOBase) -> None:
        self.stream, self.close, self.flush, self.fileno = stream, stream.close, stream.flush, stream.fileno
        self.name, self.closed = stream.name, False

    def write(self, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def fill_disk(real, *, after_bytes: int = 0):
    """`_HashedStream.write` with a disk that runs full in checkpoint 4, after so many bytes of a file."""

    def write(stream: digests._HashedStream, data: object) -> int:
        if "checkpoint-4" in str(stream._stream.name) and stream.num_bytes >= after_bytes:
            stream._stream = FullFile(stream._stream)
        return real(stream, data)

    return write


def run(job: dict) -> None:
    world = join_world()
    step, error = job.pop("crash_after", 0), job.pop("error", None)
    copy_from, flipped = job.pop("copy_from", None), job.pop("flip", None)
    if world.is_main and copy_from:
        shutil.copytree(copy_from, job["output_dir"])
    if world.is_main and flipped:
        flip(Path(job["output_dir"]) / flipped)
    world.wait_for_all()
    real = distributed.free_memory, digests._HashedStream.write
    if "free_memory" in job:
        free = job.pop("free_memory")
        distributed.free_memory = lambda device: free
    if job.pop("full_disk", None) == world.rank:
        digests._HashedStream.write = fill_disk(digests._HashedStream.write)
    if "largest_gathered" in job:
        finishing.save_final = save_final_counted(Path(job.pop("largest_gathered")), world.rank, final.save_final)
    try:
        train(make_config(job), on_step=lambda entry: crash_after(step, entry))
    except AlpacaError as caught:
        if not error:
            raise
        Path(f"{error}.{world.rank}").write_text(f"{type(caught).__name__}: {caught}")
    distributed.free_memory, digests._HashedStream.write = real


def main() -> None:
    leave_out_charts(setattr)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
    leave_world()


if __name__ == "__main__":
    main()
