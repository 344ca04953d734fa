"""Checkpoints that a run can be resumed from, and the final model folder.

A checkpoint holds all a run consists of: float32 weights, optimizer, schedule, random state of every process, and the
log so far. It is written aside and renamed, so a folder named `checkpoint-N` is whole. Weights and optimizer are
written by torch.distributed.checkpoint, each process its shards, and can be read by any number of processes.
"""

import contextlib
import logging
import math
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from alpaca.errors import AlpacaError, InputError, MissingInput, OutputExists
from alpaca.hf_files import (
    TensorSpec,
    WeightsFolder,
    fsync,
    list_folder,
    partial_folder,
    read_json,
    replaced_folder,
    require_free_space,
    write_json,
    write_weights,
)
from alpaca.tokenizer import Tokenizer, load_tokenizer
from alpaca.training.distributed import World, whole_tensor
from alpaca.training.model import Base

logger = logging.getLogger(__name__)

STATE_NAME = "trainer_state.json"
MAX_SHARD_BYTES = 5 * 10**9
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"\.(checkpoint-\d+|final|.+\.\d+-\d+)\.(partial|replaced|lock)")
_FINAL = ".final.partial"
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
    """Write `checkpoint-N` and remove the oldest beyond `keep`. All processes call it together."""
    world, folder = trainee.world, output_dir / f"checkpoint-{trainee.progress.step}"
    partial = partial_folder(folder)
    with contextlib.ExitStack() as stack:
        if world.is_main:
            stack.enter_context(replaced_folder(folder, overwrite=True))
        world.wait_for_all()
        _write_shards(trainee, partial)
        world.wait_for_all()
        if world.is_main:
            _write_state(trainee, partial)
    if world.is_main:
        _remove_oldest(output_dir, keep=keep, newest=folder)
    world.wait_for_all()
    return folder


def _write_shards(trainee: Trainee, folder: Path) -> None:
    model_state, optimizer_state = get_state_dict(trainee.model, trainee.optimizer)
    with _quiet_alone():
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    torch.save(_random_state(trainee.world), folder / f"random-{trainee.world.rank}.pt")


def _write_state(trainee: Trainee, folder: Path) -> None:
    """What is neither weights nor optimizer, and the sizes by which a damaged checkpoint is known."""
    progress = trainee.progress
    state = {
        "global_step": progress.step,
        "num_processes": trainee.world.num_processes,
        "identity": dict(trainee.identity),
        "scheduler": _scheduler_state(trainee.scheduler),
        "losses_since_log": progress.losses,
        "log_history": progress.log_history,
        "files": {entry.name: entry.stat().st_size for entry in folder.iterdir()},
    }
    write_json(folder / STATE_NAME, state)


def _scheduler_state(scheduler: torch.optim.lr_scheduler.LRScheduler) -> dict[str, object]:
    return {key: value for key, value in scheduler.state_dict().items() if key != "lr_lambdas"}


def _random_state(world: World) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(world.device)
    return state


def _remove_oldest(output_dir: Path, *, keep: int, newest: Path) -> None:
    others = [folder for folder in list_checkpoints(output_dir) if folder != newest]
    for folder in others[max(keep - 1, 0) :]:
        shutil.rmtree(folder, ignore_errors=True)


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
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]), reverse=True)


def find_checkpoint(output_dir: Path, asked: str | None) -> Path | None:
    """The checkpoint to resume: the folder asked for, or with "auto" the newest whole one; None to start anew.

    Raises MissingInput for a folder that is not there, InputError for a damaged one.
    """
    if asked is None:
        return None
    if asked != "auto":
        if not Path(asked).is_dir():
            raise MissingInput(f"no checkpoint at {asked}; in {output_dir}: {list_folder(output_dir)}")
        _read_state(Path(asked))
        return Path(asked)
    for folder in list_checkpoints(output_dir):
        try:
            _read_state(folder)
        except AlpacaError as error:
            logger.warning("skipped a damaged checkpoint: %s", error)
        else:
            return folder
    logger.warning("no whole checkpoint in %s to resume from: starting anew", output_dir)
    return None


def _read_state(folder: Path) -> dict:
    """A checkpoint's state, after a look at its files. Raises MissingInput, InputError."""
    state = read_json(folder / STATE_NAME)
    for name, size in state.get("files", {"files": 0}).items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            raise InputError(f"{folder / name}: expected {size} bytes, found {found or 'none'}")
    return state


def load_checkpoint(trainee: Trainee, folder: Path) -> None:
    """Put a run back where its checkpoint was saved, by as many processes or others.

    Raises InputError when the checkpoint belongs to a run of another configuration, naming what differs.
    """
    state = _read_state(folder)
    _check_identity(folder, state["identity"], trainee.identity)
    model_state, optimizer_state = get_state_dict(trainee.model, trainee.optimizer)
    saved = {"model": model_state, "optimizer": optimizer_state}
    with _quiet_alone():
        dcp.load(saved, checkpoint_id=folder)
    set_state_dict(
        trainee.model, trainee.optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"]
    )
    trainee.scheduler.load_state_dict({**trainee.scheduler.state_dict(), **state["scheduler"]})
    progress = trainee.progress
    progress.step, progress.losses, progress.log_history = (
        state[key] for key in ("global_step", "losses_since_log", "log_history")
    )
    _restore_random_state(folder, state["num_processes"], trainee.world)
    logger.info("resumed from %s, after step %d", folder, progress.step)


def _check_identity(folder: Path, saved: Mapping[str, object], now: Mapping[str, object]) -> None:
    differences = [
        f"{name} was {saved.get(name)!r} and is {now.get(name)!r}"
        for name in sorted({*saved, *now})
        if saved.get(name) != now.get(name)
    ]
    if differences:
        raise InputError(
            f"{folder} belongs to another run: {'; '.join(differences)}. Resume with the same settings, or start anew "
            "with --overwrite_output_dir or in another --output_dir"
        )


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


def check_output(output_dir: Path, *, resume: bool, checkpoint: Path | None, overwrite: bool) -> None:
    """Raise OutputExists for a folder with something in it, unless this run resumes or overwrites.

    A run that may resume but found no checkpoint starts anew in what a killed one left, but not over a finished model.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise OutputExists(f"{output_dir} is a file; choose another --output_dir")
    resumes = checkpoint is not None or (resume and not (output_dir / "config.json").exists())
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


def save_final(model: nn.Module, base: Base, output_dir: Path, *, dtype: torch.dtype, world: World) -> None:
    """Write the model folder: weights, config, generation config, tokenizer. All processes call it together.

    Everything is written aside, read back and compared with the model in memory, and only then moved into place, the
    config last: a folder with a config.json is whole. Raises InputError when what was written is not what is in memory.
    """
    aside, specs = output_dir / _FINAL, final_specs(model, dtype)
    if world.is_main:
        require_free_space(output_dir, sum(spec.num_bytes for spec in specs))
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
    _write_final_weights(model, specs, aside, world)
    if world.is_main:
        write_json(aside / "config.json", final_config(model, base, dtype))
        write_json(aside / "generation_config.json", _token_ids(base.tokenizer))
        base.tokenizer.save(aside)
    _verify(model, specs, base.tokenizer, aside, world)
    if world.is_main:
        _move_into(output_dir, aside)
    world.wait_for_all()


def require_room(model: nn.Module, output_dir: Path, *, dtype: torch.dtype, checkpoints: bool) -> None:
    """Raise NotEnoughSpace now rather than after the training: for the final weights and, if wanted, a checkpoint."""
    specs = final_specs(model, dtype)
    num_parameters = sum(math.prod(spec.shape) for spec in specs)
    in_checkpoint = num_parameters * 4 * 3 if checkpoints else 0  # float32 weights and AdamW's two moments
    require_free_space(output_dir, sum(spec.num_bytes for spec in specs) + in_checkpoint)


def final_specs(model: nn.Module, dtype: torch.dtype) -> list[TensorSpec]:
    """The tensors of the final files; of tied ones the first."""
    return [
        TensorSpec(name=name, shape=tuple(tensor.shape), dtype=dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in _saved_tensors(model).items()
    ]


def _saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    persistent = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {**dict(model.named_parameters()), **buffers}


def _write_final_weights(model: nn.Module, specs: list[TensorSpec], folder: Path, world: World) -> None:
    tensors = _saved_tensors(model)
    if world.is_main:
        write_weights(
            folder,
            specs,
            lambda spec: [whole_tensor(tensors[spec.name], world).to(spec.dtype)],
            max_shard_size=MAX_SHARD_BYTES,
        )
    else:
        for spec in specs:  # the same collectives in the same order
            whole_tensor(tensors[spec.name], world)


def final_config(model: nn.Module, base: Base, dtype: torch.dtype) -> dict[str, object]:
    """The base model's config.json with what training changed."""
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        **read_json(base.folder / "config.json"),
        **_token_ids(base.tokenizer),
        "vocab_size": model.config.vocab_size,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,  # the name that older programs read
    }


def _token_ids(tokenizer: Tokenizer) -> dict[str, object]:
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def _verify(model: nn.Module, specs: list[TensorSpec], tokenizer: Tokenizer, folder: Path, world: World) -> None:
    """Compare the written files with the model and the tokenizer in memory, bit for bit."""
    tensors, wrong = _saved_tensors(model), []
    written = WeightsFolder(folder) if world.is_main else None
    for spec in specs:
        expected = whole_tensor(tensors[spec.name], world).to(spec.dtype)
        if written and not _same_bits(expected, written.tensor(spec.name)):
            wrong.append(spec.name)
    if world.is_main and not _same_tokenizer(tokenizer, load_tokenizer(folder)):
        wrong.append("the tokenizer")
    if world.sum([float(len(wrong))])[0]:
        raise InputError(
            f"{folder} is not what is in memory ({', '.join(wrong[:5])}): the disk may be failing. Nothing was "
            "replaced; resume from the last checkpoint on another disk"
        )


def _same_bits(left: Tensor, right: Tensor) -> bool:
    if (left.shape, left.dtype) != (right.shape, right.dtype):
        return False
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (left, right)))


def _same_tokenizer(left: Tokenizer, right: Tokenizer) -> bool:
    facts = [(t.bos_id, t.eos_id, t.pad_id, t.size, t.prefix_ids, t.encode_batch(_PROBES)) for t in (left, right)]
    return facts[0] == facts[1]


def _move_into(output_dir: Path, aside: Path) -> None:
    """Replace the model files in `output_dir`. While they are a mixture of old and new there is no config.json."""
    (output_dir / "config.json").unlink(missing_ok=True)
    for old in (path for pattern in _MODEL_FILES for path in output_dir.glob(pattern)):
        old.unlink()  # an earlier model's, of which the new one need not have all
    for new in sorted(aside.iterdir(), key=lambda path: path.name == "config.json"):
        fsync(new)
        new.rename(output_dir / new.name)
    aside.rmdir()
    fsync(output_dir)
