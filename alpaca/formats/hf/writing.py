"""Hugging Face weight files, written as a stream: one tensor at a time, never two in memory.

A safetensors header depends on names, dtypes and shapes alone, so it can be written before a tensor is read.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from alpaca.files.atomic import write_all, write_json
from alpaca.formats.hf.folder import INDEX_NAME, SAFETENSORS_NAMES, TensorSpec

_WRITE_BYTES = 64 << 20


def group_by_size(specs: Iterable[TensorSpec], max_shard_size: int) -> list[list[TensorSpec]]:
    """Cut the tensors, in their order, into files of at most `max_shard_size` bytes (a larger tensor stands alone)."""
    groups: list[list[TensorSpec]] = []
    room = -1
    for spec in specs:
        if spec.num_bytes > room:
            groups.append([])
            room = max_shard_size
        groups[-1].append(spec)
        room -= spec.num_bytes
    return groups


def write_weights(
    folder: Path,
    specs: list[TensorSpec],
    read: Callable[[TensorSpec], Iterable[torch.Tensor]],
    *,
    max_shard_size: int,
    stem: str = "model",
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> None:
    """Stream tensors into `model*.safetensors` (and an index) in `folder`, each fsynced. `stem`: instead of "model".

    `read(spec)` is asked for one tensor at a time, in order, and gives it in pieces: its consecutive rows, or itself as
    the only one. `progress(n)` hears of each n bytes written.
    """
    groups = group_by_size(specs, max_shard_size)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = f"{stem}.safetensors" if len(groups) == 1 else f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map.update({spec.name: name for spec in group})
        with open(folder / name, "wb", buffering=0) as file:
            write_all(file, _header(group))
            for spec in group:
                written = sum(_write_piece(file, piece, spec.dtype, progress) for piece in read(spec))
                assert written == spec.num_bytes, spec
            os.fsync(file.fileno())
    if len(groups) > 1:
        total = sum(spec.num_bytes for spec in specs)
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _header(specs: list[TensorSpec]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        entries[spec.name] = {
            "dtype": SAFETENSORS_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.num_bytes],
        }
        offset += spec.num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned, as safetensors' own writer has it
    return struct.pack("<Q", len(text)) + text


def _write_piece(file, piece: torch.Tensor, dtype: torch.dtype, progress: Callable[[int], object]) -> int:
    """Write consecutive values of a tensor; the number of bytes."""
    assert piece.dtype == dtype
    data = memoryview(piece.contiguous().view(-1).view(torch.uint8).numpy())
    for start in range(0, len(data), _WRITE_BYTES):
        write_all(file, data[start : start + _WRITE_BYTES])
        progress(len(data[start : start + _WRITE_BYTES]))
    return len(data)
