"""The final model folder of a run: written, read back, compared, and only then moved into place."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from alpaca.errors import InputError
from alpaca.files.atomic import fsync, write_json
from alpaca.files.model_folders import CONFIG_NAME, is_adapter
from alpaca.files.outputs import require_free_space
from alpaca.formats.hf.adapters import open_adapter
from alpaca.formats.hf.folder import TensorSpec, WeightsFolder
from alpaca.formats.hf.writing import write_weights
from alpaca.text.loading import load_tokenizer
from alpaca.text.tokenizer import Tokenizer
from alpaca.training.checkpoints.state import WHOLE
from alpaca.training.distributed import World, whole_tensor
from alpaca.training.model.base import Base
from alpaca.training.model.final import Final, describe_final, final_tensors, find_adapter_fault

MAX_SHARD_BYTES = 5 * 10**9
_FINAL = ".final.partial"
_MODEL_FILES = (
    "model*.safetensors*", "pytorch_model*", "adapter_*", "generation_config.json", "tokenizer*", "added_tokens.json",
    "special_tokens_map.json", "merges.txt", "vocab.*", "chat_template*", "prompt_template.json",
)  # fmt: skip
_PROBES = ("Below is an instruction that describes a task.", " two  spaces\n\ttab", "สวัสดี 🦙 ¿Dónde está? 0123456789")


def save_final(
    model: nn.Module,
    base: Base,
    output_dir: Path,
    *,
    dtype: torch.dtype,
    learned: bool,
    world: World,
    write_beside: Callable[[Path], None],
) -> None:
    """Write the model folder, or the adapter's: weights, configs, tokenizer. All processes call it together.

    Everything is written aside, read back and compared with the model in memory, and only then moved into place, the
    config last, so that a folder with a config is whole. learned: whether a step had a learning rate above 0; then an
    adapter must differ from its first, empty state. write_beside: writes what else belongs to the folder. Raises
    InputError when what was written is not what is in memory.
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
        write_beside(aside)
    _verify(final, specs, base.tokenizer, aside, world)
    if CONFIG_NAME in final.configs:
        _verify_adapter(model, base.tokenizer, aside, learned=learned, world=world)
    if world.is_main:
        _move_into(output_dir, aside)
    world.wait_for_all()


def final_specs(model: nn.Module, dtype: torch.dtype) -> list[TensorSpec]:
    """Name, shape and dtype of each tensor in the final files. Of tied tensors only the first is written."""
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
        for spec in specs:  # all processes take part, in the same order
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
        del expected  # frees it before the next one is gathered
    if world.is_main and not _same_tokenizer(tokenizer, load_tokenizer(folder)):
        wrong.append("the tokenizer")
    if world.sum([float(len(wrong))])[0]:
        raise InputError(
            f"{folder} is not what is in memory ({', '.join(wrong[:5])}): the disk may be failing. Nothing was "
            "replaced; resume from the last checkpoint on another disk"
        )


def _verify_adapter(model: nn.Module, tokenizer: Tokenizer, folder: Path, *, learned: bool, world: World) -> None:
    """Load the written adapter onto the base, and compare its logits with those of the adapter in memory."""
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
    """Replace the model files in `output_dir`. While old and new files are mixed there is no config."""
    for name in WHOLE:
        (output_dir / name).unlink(missing_ok=True)
    for old in (path for pattern in _MODEL_FILES for path in output_dir.glob(pattern)):
        old.unlink()  # the new model may have fewer files than an earlier one
    for new in sorted(aside.iterdir(), key=lambda path: path.name in WHOLE):
        fsync(new)
        new.rename(output_dir / new.name)
    aside.rmdir()
    fsync(output_dir)
