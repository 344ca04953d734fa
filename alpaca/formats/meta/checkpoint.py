"""Meta's checkpoint folders: the only file that opens `consolidated.NN.pth`.

A folder holds params.json, consolidated.00.pth … consolidated.NN.pth (one per model-parallel rank) and mostly
checklist.chk (md5 of each); tokenizer.model lies beside them or a level up. The pickles are opened memory-mapped and
with `weights_only=True`: tensors cost no memory until they are read, and nothing in the file can run.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from alpaca.errors import InputError, MissingInput
from alpaca.files.atomic import write_json, write_text
from alpaca.files.reading import list_folder, read_json
from alpaca.formats.torch_files import read_tensors

_SHARD_NAME = re.compile(r"consolidated\.(\d+)\.pth")
_READ_BYTES = 8 << 20


def find_checkpoint(input_dir: Path, model_size: str | None) -> Path:
    """Find the folder that holds a checkpoint, in any of the layouts that Meta ships.

    `input_dir/SIZE`; a folder named after it, such as `llama-2-7b` or `checkpoints/Llama3.2-1B`, for 7B or 1B;
    `input_dir` itself; each of them also as `original/` inside a Hugging Face repository. Without `model_size` the only
    checkpoint there is. Raises MissingInput saying what was found, InputError for several that fit, or saying what to
    do with a Hugging Face folder.
    """
    if model_size is not None and Path(model_size).name != model_size:
        raise InputError(f"--model_size names a folder in --input_dir, such as 7B; found {model_size!r}")
    exact = input_dir / (model_size or ".")
    is_named = exact.is_dir() and (model_size is not None or _inner_checkpoint(exact) is not None)
    candidates = [exact] if is_named else _folders_named(input_dir, model_size or "")
    if len(candidates) > 1:
        names = ", ".join(folder.name for folder in candidates)
        raise InputError(f"{input_dir} holds several checkpoints that fit: {names}; name one of them by --model_size")
    folder = candidates[0] if candidates else input_dir
    found = _inner_checkpoint(folder)
    if found is None:
        _refuse_hugging_face(folder, input_dir)
        if folder == exact != input_dir:
            return folder  # its owner meant it: what it lacks is said next
        raise MissingInput(
            f"no folder {exact}; found in {input_dir}: {list_folder(input_dir)}. "
            f"Put params.json and consolidated.*.pth of the {model_size + ' ' if model_size else ''}model there"
        )
    return found


def _inner_checkpoint(folder: Path) -> Path | None:
    """The folder, or its `original/`, whichever holds params.json or a shard; None where neither does."""
    for candidate in (folder, folder / "original"):
        if (candidate / "params.json").is_file() or any(candidate.glob("consolidated.*.pth")):
            return candidate
    return None


def _folders_named(input_dir: Path, model_size: str) -> list[Path]:
    """Checkpoints in `input_dir` or its `checkpoints/` whose name has `model_size` as a word: Llama-2-7b for 7B."""
    word = re.compile(rf"(?<![0-9A-Za-z.]){re.escape(model_size)}(?![0-9A-Za-z])" if model_size else "", re.IGNORECASE)
    parents = [parent for parent in (input_dir, input_dir / "checkpoints") if parent.is_dir()]
    folders = sorted(path for parent in parents for path in parent.iterdir() if path.is_dir())
    return [path for path in folders if word.search(path.name) and _inner_checkpoint(path) is not None]


def _refuse_hugging_face(*folders: Path) -> None:
    for candidate in folders:
        if (candidate / "config.json").is_file():
            raise InputError(
                f"{candidate} holds a Hugging Face model (config.json) already, nothing needs converting: "
                "use it as --model_name_or_path or --weights. Meta's checkpoint has params.json and consolidated.*.pth"
            )


def find_shards(folder: Path) -> list[Path]:
    """List consolidated.00.pth, 01, … in order. Raises MissingInput for none or for a gap, naming the files found."""
    numbered = {int(match[1]): path for path in folder.iterdir() if (match := _SHARD_NAME.fullmatch(path.name))}
    if not numbered:
        raise MissingInput(f"no consolidated.*.pth in {folder}; found: {list_folder(folder)}")
    missing = [number for number in range(max(numbered) + 1) if number not in numbered]
    if missing:
        names = ", ".join(f"consolidated.{number:02d}.pth" for number in missing)
        raise MissingInput(f"{folder} lacks {names}; found: {list_folder(folder)}")
    return [numbered[number] for number in sorted(numbered)]


def read_params(folder: Path) -> dict[str, object]:
    """Read params.json; in newer ones the model's part stands under "model"."""
    params = read_json(folder / "params.json")
    return params["model"] if isinstance(params.get("model"), dict) else params


def open_shard(path: Path) -> dict[str, torch.Tensor]:
    """Open a shard's tensors, memory-mapped. Raises InputError for a file that is damaged or holds anything else."""
    return read_tensors(path, expected="Meta checkpoint")


def write_checkpoint(folder: Path, shards: list[dict[str, torch.Tensor]], params: Mapping[str, object]) -> None:
    """Write a checkpoint as Meta ships one, checklist included, into an existing folder."""
    write_json(folder / "params.json", params)
    for number, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{number:02d}.pth")
    write_checklist(
        folder / "checklist.chk", sorted(path for path in folder.iterdir() if path.suffix in (".pth", ".json"))
    )


def write_checklist(
    path: Path, files: Iterable[Path], progress: Callable[[int], object] = lambda num_bytes: None
) -> None:
    """The checklist of files and their md5, as Meta ships it. progress(n) is called after each n bytes read."""
    write_text(path, "".join(f"{_md5(file, progress)}  {file.name}\n" for file in files))


def find_tokenizer(input_dir: Path, folder: Path) -> Path:
    """tokenizer.model in the checkpoint's folder, a level up (LLaMA 1, 2), or in input_dir. Raises MissingInput."""
    places = list(dict.fromkeys([folder, folder.parent, input_dir]))
    for candidate in places:
        if (candidate / "tokenizer.model").is_file():
            return candidate / "tokenizer.model"
    raise MissingInput(
        f"no tokenizer.model in {' or '.join(map(str, places))}; found in {folder}: {list_folder(folder)}. "
        f"Put Meta's tokenizer.model at {folder / 'tokenizer.model'}"
    )


def read_checklist(path: Path) -> dict[Path, str]:
    """The files that a checklist in the same folder names, and their md5; empty without a checklist."""
    if not path.is_file():
        return {}
    sums: dict[Path, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        match = re.fullmatch(r"([0-9a-fA-F]{32})\s+\*?([^/\s]+)\s*", line)
        if match:
            sums[path.parent / match[2]] = match[1].lower()
        elif line.strip():
            raise InputError(f"{path}, line {number}: expected an md5 and a file name, found {line!r}")
    return sums


def verify_checksums(sums: Mapping[Path, str], progress: Callable[[int], object]) -> None:
    """Compare files with their md5, several at once. Raises InputError for damaged files, MissingInput for missing."""
    for path in sums:
        if not path.is_file():
            raise MissingInput(f"the checklist names {path}, which is missing; found: {list_folder(path.parent)}")
    with ThreadPoolExecutor(max_workers=min(len(sums) or 1, os.cpu_count() or 1)) as pool:
        found = dict(zip(sums, pool.map(lambda path: _md5(path, progress), sums), strict=True))
    damaged = [path for path, md5 in sums.items() if found[path] != md5]
    if damaged:
        lines = [f"{path}: md5 {found[path]}, the checklist says {sums[path]}" for path in damaged]
        raise InputError("damaged or truncated, get it again (or pass --skip_checksums):\n  " + "\n  ".join(lines))


def _md5(path: Path, progress: Callable[[int], object]) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()
