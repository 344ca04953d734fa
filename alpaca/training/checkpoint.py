"""Checkpoints that a run can be resumed from, and the final model folder.

A checkpoint holds all a run consists of: the weights that are trained (in the dtype they are trained in), optimizer,
schedule, random state of every process, and the log so far. It is written aside, read back from the disk and renamed,
so a folder named `checkpoint-N` is whole; whether it still is, its digests say. Weights and optimizer are written by
torch.distributed.checkpoint, each process its shards, and can be read by any number of processes.
"""

import contextlib
import errno
import functools
import io
import logging
import math
import re
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from alpaca.adapters import CONFIG_NAME, is_adapter, open_adapter
from alpaca.errors import AlpacaError, InputError, MissingInput, NotEnoughSpace, OutputExists
from alpaca.hf_files import (
    TensorSpec,
    WeightsFolder,
    fsync,
    list_folder,
    partial_folder,
    read_json,
    replaced_folder,
    require_free_space,
    write_bytes,
    write_json,
    write_weights,
)
from alpaca.tokenizer import Tokenizer, load_tokenizer
from alpaca.training.digests import FileDigest, HashedFiles, check_files, digest_bytes, digest_json
from alpaca.training.distributed import Result, World, reshard, whole_tensor
from alpaca.training.model import Base, Final, describe_final, final_tensors, find_adapter_fault

logger = logging.getLogger(__name__)

STATE_NAME = "trainer_state.json"
MAX_SHARD_BYTES = 5 * 10**9
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"\.(checkpoint-\d+|final|.+\.\d+-\d+)\.(partial|replaced|lock)")
_FINAL = ".final.partial"
_WHOLE = ("config.json", CONFIG_NAME)  # whichever is there is put last, so that its folder is known to be whole
_MODEL_FILES = (
    "model*.safetensors*", "pytorch_model*", "adapter_*", "generation_config.json", "tokenizer*", "added_tokens.json",
    "special_tokens_map.json", "merges.txt", "vocab.*", "chat_template*",
)  # fmt: skip
_PROBES = ("Below is an instruction that describes a task.", " two  spaces\n\ttab", "สวัสดี 🦙 ¿Dónde está? 0123456789")


@dataclass(kw_only=True)
class Progress:
    """How far a run has come. losses: of the steps since the last log entry."""

    step: int = 0
    log_history: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """What a checkpoint saves and restores.

    identity: what must be equal for a checkpoint to belong to this run (data, seed, batch, learning rate, steps, ...).
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    progress: Progress
    identity: Mapping[str, object]
    world: World


# Saving -------------------------------------------------------------------------------------------------------


def save_checkpoint(trainee: Trainee, output_dir: Path, *, keep: int) -> Path:
    """Write `checkpoint-N`, read it back, and remove the oldest beyond `keep`. All processes call it together.

    Raises NotEnoughSpace for a full disk and InputError for what else the disk refuses or does not give back as it was
    written; earlier checkpoints then stay as they are.
    """
    world, folder, partial = trainee.world, *_folders(trainee, output_dir)

    def together(work: Callable[[], Result]) -> Result:
        return world.together(functools.partial(_say_failure, work, folder))

    with contextlib.ExitStack() as aside:
        together(lambda: _open_aside(aside, trainee, folder) if world.is_main else None)
        files = together(lambda: _write_shards(trainee, partial))
        together(lambda: _read_back(partial, files))
        all_files = {name: digest for part in world.gather(files) for name, digest in part.items()}
        together(lambda: _write_state(trainee, partial, all_files) if world.is_main else None)
        together(aside.close)  # renames it
    if world.is_main:
        _remove_oldest(output_dir, keep=keep, newest=folder)
    world.wait_for_all()
    return folder


def _folders(trainee: Trainee, output_dir: Path) -> tuple[Path, Path]:
    """The folder of the present step's checkpoint, and where it is written."""
    folder = output_dir / f"checkpoint-{trainee.progress.step}"
    return folder, partial_folder(folder)


def checkpoint_bytes(trainee: Trainee) -> int:
    """What a checkpoint takes on the disk, about: what is trained, and AdamW's two moments of it."""
    return _state_bytes(trainee.model)


def _state_bytes(model: nn.Module) -> int:
    return sum(math.prod(p.shape) * p.itemsize * 3 for p in model.parameters() if p.requires_grad)


def _open_aside(aside: contextlib.ExitStack, trainee: Trainee, folder: Path) -> None:
    require_free_space(folder.parent, checkpoint_bytes(trainee))
    aside.enter_context(replaced_folder(folder, overwrite=True))


def _say_failure(work: Callable[[], Result], folder: Path) -> Result:
    """Do `work`; what the operating system refuses is said for a person."""
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
    """This process's part of a checkpoint; the digests of its files, taken from memory."""
    state = _trained_state(trainee)
    writer, files = FileSystemWriter(folder), HashedFiles()
    writer.fs = files
    try:
        with _quiet_alone():
            dcp.save(state, storage_writer=writer)
    except CheckpointException as error:  # in all processes where one fails
        refused = next(filter(None, trainee.world.gather(files.error)), error)
        raise refused from error
    name, content = f"random-{trainee.world.rank}.pt", io.BytesIO()
    torch.save(_random_state(trainee.world), content)
    write_bytes(folder / name, content.getvalue())
    return {**files.digests, name: digest_bytes(content.getvalue())}


def _trained_state(trainee: Trainee) -> dict[str, dict]:
    """What training changes, shards where there are such: the model's own tensors and copies of the optimizer's.

    Neither an adapter's frozen base is in it, nor the quantized layers' extra state that torch cannot name.
    """
    reshard(trainee.model)
    trained = {name: p.detach() for name, p in trainee.model.named_parameters() if p.requires_grad}
    return {"model": trained, "optimizer": get_optimizer_state_dict(trainee.model, trainee.optimizer)}


def _read_back(folder: Path, files: Mapping[str, FileDigest]) -> None:
    damage = check_files(folder, files, from_disk=True)
    if damage:
        raise InputError(
            f"{damage}: the disk does not give back what was written, it may be failing. Earlier checkpoints are as "
            "they were; go on with another disk: copy the newest there, and pass it to --resume_from_checkpoint"
        )


def _write_state(trainee: Trainee, folder: Path, files: Mapping[str, FileDigest]) -> None:
    """What is neither weights nor optimizer, and the digests by which a damaged checkpoint is known."""
    progress = trainee.progress
    state = {
        "global_step": progress.step,
        "num_processes": trainee.world.num_processes,
        "identity": dict(trainee.identity),
        "scheduler": _scheduler_state(trainee.scheduler),
        "losses_since_log": progress.losses,
        "log_history": progress.log_history,
        "files": dict(sorted(files.items())),
    }
    write_json(folder / STATE_NAME, {**state, "sha256": digest_json(state)})
    _read_state(folder)


def _scheduler_state(scheduler: torch.optim.lr_scheduler.LRScheduler) -> dict[str, object]:
    return {key: value for key, value in scheduler.state_dict().items() if key != "lr_lambdas"}


def _random_state(world: World) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(world.device)
    return state


def _remove_oldest(output_dir: Path, *, keep: int, newest: Path) -> None:
    """Keep `newest` and those just before it. Those of later steps were damaged, or not chosen to go on from."""
    others = [folder for folder in list_checkpoints(output_dir) if folder != newest]
    earlier = [folder for folder in others if _step(folder) < _step(newest)]
    for folder in others:
        if folder not in earlier[: max(keep - 1, 0)]:
            shutil.rmtree(folder, ignore_errors=True)


def _step(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


@contextlib.contextmanager
def _quiet_alone() -> Iterator[None]:
    """Without the warning that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


# Resuming -----------------------------------------------------------------------------------------------------


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Folders named as checkpoints, newest step first."""
    found = [path for path in output_dir.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step, reverse=True)


def find_checkpoint(output_dir: Path, asked: str | None, *, world: World) -> Path | None:
    """The checkpoint to resume: the folder asked for, or with "auto" the newest good one; None to start anew.

    All processes call it together, each reads a part. Raises MissingInput for a folder that is not there, InputError
    for a damaged one.
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
    """What is wrong with a checkpoint, the same in all processes; "" for nothing. Reads every byte of it once."""
    try:
        files = _read_state(folder)["files"]
        own = sorted(files, key=lambda name: files[name]["bytes"])[world.rank :: world.num_processes]
        damage = check_files(folder, {name: files[name] for name in own}, from_disk=False)
    except AlpacaError as error:
        damage = str(error)
    return next(filter(None, world.gather(damage)), "")


def _read_state(folder: Path) -> dict:
    """A checkpoint's state as it was written. Raises MissingInput, InputError."""
    state = read_json(folder / STATE_NAME)
    if state.pop("sha256", None) != digest_json(state):
        raise InputError(f"{folder / STATE_NAME} is damaged: its content does not have its SHA-256")
    return state


def load_checkpoint(trainee: Trainee, folder: Path) -> None:
    """Put a run back where its checkpoint was saved, by as many processes or others.

    Raises InputError when the checkpoint belongs to a run of another configuration, naming what differs.
    """
    state = read_json(folder / STATE_NAME)
    _check_identity(folder, state["identity"], trainee.identity)
    saved = _trained_state(trainee)
    with _quiet_alone():
        dcp.load(saved, checkpoint_id=folder)  # the weights into the model itself
    set_optimizer_state_dict(trainee.model, trainee.optimizer, saved["optimizer"])
    trainee.scheduler.load_state_dict({**trainee.scheduler.state_dict(), **state["scheduler"]})
    progress = trainee.progress
    progress.step, progress.losses, progress.log_history = (
        state[key] for key in ("global_step", "losses_since_log", "log_history")
    )
    _restore_random_state(folder, state["num_processes"], trainee.world)
    logger.info("resumed from %s, after step %d", folder, progress.step)


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


# The output folder --------------------------------------------------------------------------------------------


def require_shared_folder(output_dir: Path, world: World) -> None:
    """Raise InputError now rather than at the first checkpoint: for a folder that cannot be written to, or that the
    processes on other machines do not see. All processes call it together.
    """
    number = world.gather(time.time_ns())[0]
    first, own = (output_dir / f".probe.{number}-{rank}.partial" for rank in (0, world.rank))
    try:
        world.together(lambda: _write_first_probe(first) if world.is_main else None)
        world.together(lambda: _write_probe(own, first))
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
    """Raise OutputExists for a folder with something in it, unless this run resumes or overwrites.

    A run that may resume but found no checkpoint starts anew in what a killed one left, but not over a finished model.
    """
    resumes = checkpoint is not None or (resume and not any((output_dir / name).exists() for name in _WHOLE))
    if resumes or overwrite or not output_dir.exists():
        return
    if any(not _LEFTOVER.fullmatch(entry.name) for entry in output_dir.iterdir()):
        raise OutputExists(
            f"{output_dir} is not empty ({list_folder(output_dir, most=5)}); go on with a run that was interrupted by "
            "--resume_from_checkpoint auto, replace it by --overwrite_output_dir, or choose another --output_dir"
        )


def clear_output(output_dir: Path, *, old_checkpoints: bool) -> None:
    """Remove what killed runs left and, for a run that starts anew, checkpoints that are not its own."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for entry in output_dir.iterdir():
        if _LEFTOVER.fullmatch(entry.name):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for folder in list_checkpoints(output_dir) if old_checkpoints else ():
        logger.warning("removing %s of an earlier run", folder)
        shutil.rmtree(folder)


# The final model ----------------------------------------------------------------------------------------------


def save_final(
    model: nn.Module, base: Base, output_dir: Path, *, dtype: torch.dtype, learned: bool, world: World
) -> None:
    """Write the model folder, or the adapter's: weights, configs, tokenizer. All processes call it together.

    Everything is written aside, read back and compared with the model in memory, and only then moved into place, the
    config last: a folder with one is whole. learned: whether a step had a learning rate above 0, so that an adapter
    cannot be its base. Raises InputError when what was written is not what is in memory.
    """
    aside, specs, final = output_dir / _FINAL, final_specs(model, dtype), describe_final(model, base, dtype)
    if world.is_main:
        require_free_space(output_dir, sum(spec.num_bytes for spec in specs))
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
    _write_final_weights(final, specs, aside, world)
    if world.is_main:
        for name, config in final.configs.items():
            write_json(aside / name, config)
        base.tokenizer.save(aside)
    _verify(final, specs, base.tokenizer, aside, world)
    if CONFIG_NAME in final.configs:
        _verify_adapter(model, base.tokenizer, aside, learned=learned, world=world)
    if world.is_main:
        _move_into(output_dir, aside)
    world.wait_for_all()


def require_room(model: nn.Module, output_dir: Path, *, dtype: torch.dtype, checkpoints: bool) -> None:
    """Raise NotEnoughSpace now rather than after the training: for the final weights and, if wanted, a checkpoint."""
    specs = final_specs(model, dtype)
    in_checkpoint = _state_bytes(model) if checkpoints else 0
    require_free_space(output_dir, sum(spec.num_bytes for spec in specs) + in_checkpoint)


def final_specs(model: nn.Module, dtype: torch.dtype) -> list[TensorSpec]:
    """The tensors of the final files; of tied ones the first."""
    return [
        TensorSpec(name=name, shape=tuple(tensor.shape), dtype=dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in final_tensors(model).items()
    ]


def _write_final_weights(final: Final, specs: list[TensorSpec], folder: Path, world: World) -> None:
    tensors = final.tensors
    if world.is_main:
        write_weights(
            folder,
            specs,
            lambda spec: [whole_tensor(tensors[spec.name], world).to(spec.dtype)],
            max_shard_size=MAX_SHARD_BYTES,
            stem=final.stem,
        )
    else:
        for spec in specs:  # the same collectives in the same order
            whole_tensor(tensors[spec.name], world)


def _verify(final: Final, specs: list[TensorSpec], tokenizer: Tokenizer, folder: Path, world: World) -> None:
    """Compare the written files with the model and the tokenizer in memory, bit for bit."""
    wrong, written = [], None
    if world.is_main:
        written = open_adapter(folder) if is_adapter(folder) else WeightsFolder(folder)
    for spec in specs:
        expected = whole_tensor(final.tensors[spec.name], world).to(spec.dtype)
        if written and not _same_bits(expected, written.tensor(spec.name)):
            wrong.append(spec.name)
        del expected  # before the next is gathered
    if world.is_main and not _same_tokenizer(tokenizer, load_tokenizer(folder)):
        wrong.append("the tokenizer")
    if world.sum([float(len(wrong))])[0]:
        raise InputError(
            f"{folder} is not what is in memory ({', '.join(wrong[:5])}): the disk may be failing. Nothing was "
            "replaced; resume from the last checkpoint on another disk"
        )


def _verify_adapter(model: nn.Module, tokenizer: Tokenizer, folder: Path, *, learned: bool, world: World) -> None:
    """Reload the written adapter onto the base and compare it with the one in memory by what they answer."""
    ids = [*tokenizer.prefix_ids, *tokenizer.encode(_PROBES[0])]
    written = open_adapter(folder) if world.is_main else None
    fault = world.gather(find_adapter_fault(model, written, ids, learned=learned, device=world.device))[0]
    if fault:
        raise InputError(f"{folder}: {fault}. Nothing was replaced")


def _same_bits(left: Tensor, right: Tensor) -> bool:
    if (left.shape, left.dtype) != (right.shape, right.dtype):
        return False
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (left, right)))


def _same_tokenizer(left: Tokenizer, right: Tokenizer) -> bool:
    facts = [(t.bos_id, t.eos_id, t.pad_id, t.size, t.prefix_ids, t.encode_batch(_PROBES)) for t in (left, right)]
    return facts[0] == facts[1]


def _move_into(output_dir: Path, aside: Path) -> None:
    """Replace the model files in `output_dir`. While they are a mixture of old and new there is no config."""
    for name in _WHOLE:
        (output_dir / name).unlink(missing_ok=True)
    for old in (path for pattern in _MODEL_FILES for path in output_dir.glob(pattern)):
        old.unlink()  # an earlier model's, of which the new one need not have all
    for new in sorted(aside.iterdir(), key=lambda path: path.name in _WHOLE):
        fsync(new)
        new.rename(output_dir / new.name)
    aside.rmdir()
    fsync(output_dir)
