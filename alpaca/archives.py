"""Weights as a folder or as an archive of one: found, packed, and opened safely, for prediction and training alike."""

import gzip
import shutil
import tarfile
import tempfile
import zlib
from pathlib import Path

from alpaca.adapters import is_adapter
from alpaca.errors import InputError, MissingInput
from alpaca.hf_files import list_folder, replaced_folder, require_free_space

TRAINED = Path("alpaca_out")
_ARCHIVE_ENDINGS = (".tar", ".tar.gz", ".tgz")
# What serving needs of a training's output: no checkpoints, logs or plots.
_MODEL_FILES = ("*.safetensors", "*.json", "tokenizer.model", "merges.txt", "vocab.txt", "loss.png")


def open_weights(weights: str | None, *, named: str = "COG_WEIGHTS") -> Path:
    """The folder of a model or an adapter to use: `weights` when given (COG_WEIGHTS), else what train.py left.

    `named` is what the caller calls it in errors. An archive is unpacked once, into the temporary folder. Raises
    MissingInput naming the step that makes the folder, InputError for what is no folder or archive, or an archive that
    is damaged or unsafe.
    """
    if weights and "://" in weights:
        raise InputError(
            f"weights must lie on this machine: download {weights} and give the path of the folder or .tar"
        )
    path = Path(weights) if weights else TRAINED
    if path.is_file():
        path = unpack(path)
    if not ((path / "config.json").is_file() or is_adapter(path)):
        raise MissingInput(f"no model in {path} (found: {list_folder(path)}). {_next_step(weights, named)}")
    return path


def pack(folder: Path, archive: Path) -> Path:
    """Write the model in `folder` as a .tar that `open_weights` takes."""
    files = sorted({file for pattern in _MODEL_FILES for file in folder.glob(pattern) if file.is_file()})
    require_free_space(archive.parent, sum(file.stat().st_size for file in files))
    partial = archive.with_name(f".{archive.name}.partial")
    with tarfile.open(partial, "w") as tar:
        for file in files:
            tar.add(file, arcname=file.name)
    partial.replace(archive)
    return archive


def unpack(archive: Path) -> Path:
    """The folder an archive's files are unpacked to; the same archive is unpacked once.

    Only plain files at the archive's top or in one folder are taken. Raises InputError for links, devices and paths
    that lead elsewhere, and for a damaged archive.
    """
    if not archive.name.endswith(_ARCHIVE_ENDINGS):
        raise InputError(f"{archive} is neither a folder nor an archive ({', '.join(_ARCHIVE_ENDINGS)})")
    state = archive.stat()
    target = Path(tempfile.gettempdir()) / "alpaca-weights" / f"{archive.stem}-{state.st_size}-{state.st_mtime_ns}"
    if (target / "config.json").is_file() or is_adapter(target):
        return target
    try:
        with tarfile.open(archive) as tar:
            members = [_checked(member, archive) for member in tar if not member.isdir()]
            require_free_space(target, sum(member.size for member in members))
            with replaced_folder(target, overwrite=True) as folder:
                for member in members:
                    _extract(tar, member, folder)
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{archive} is damaged or no tar archive: {error}") from error
    return target


def _checked(member: tarfile.TarInfo, archive: Path) -> tarfile.TarInfo:
    parts = Path(member.name).parts
    if not member.isfile() or member.name.startswith("/") or ".." in parts or len(parts) > 2:
        raise InputError(
            f"{archive} holds {member.name!r}, which is no plain file of a model folder; nothing was unpacked"
        )
    return member


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    source = tar.extractfile(member)
    assert source is not None  # a plain file
    with source, open(folder / Path(member.name).name, "wb") as target:
        shutil.copyfileobj(source, target, 16 << 20)


def _next_step(weights: str | None, named: str) -> str:
    if weights:
        return f"{named} must name a folder with config.json, safetensors and tokenizer, such as weights/llama-7b"
    return (
        "Fine-tune one first (python train.py --model_name_or_path weights/llama-7b --data_path … --output_dir "
        "alpaca_out), or set COG_WEIGHTS to a model folder such as weights/llama-7b"
    )
