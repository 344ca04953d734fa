"""The built kernels of one run, packed into files for the next: on a fresh machine their minutes are not paid twice.

A cache is of one card and one version of torch and Triton; any other is ignored, and said to be. It is a tar, cut
into parts small enough to be carried anywhere, with a manifest written last that names each part's SHA-256. Kernels are
code that will run: only take a cache that this project's own run has packed.
"""

import hashlib
import io
import json
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from alpaca.errors import InputError
from bench.gpu.record import write_aside

PART_BYTES = 16 << 20
MANIFEST = "kernel-cache.json"
_MOST_PACKED, _MOST_UNPACKED, _MOST_MEMBERS = 1 << 30, 4 << 30, 200_000
_PART_NAME = re.compile(r"kernel-cache-[0-9a-f]{12}\.tar\.gz\.[0-9]{3}")
_KEY_NAMES = ("device", "torch", "triton")

Key = Mapping[str, object]  # which card, torch and Triton a cache is of


def default_folder() -> Path:
    """Where kernels are kept on this machine: below the user's own folder, for what lies there is executed."""
    try:
        return Path.home() / ".cache" / "alpaca-bench" / "kernels"
    except RuntimeError:  # no home
        return Path(tempfile.mkdtemp(prefix="alpaca-kernels-"))


def environment(folder: Path) -> dict[str, str]:
    """The variables by which Triton and torch's compiler keep their kernels in `folder`."""
    return {"TRITON_CACHE_DIR": str(folder / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}


def pack(folder: Path, out: Path, key: Key) -> dict[str, object]:
    """Pack `folder` into `out`; what was done, for the record. An empty folder leaves nothing."""
    files = sorted(_files(folder))
    if not files:
        return {"packed_files": 0}
    content = _tar(folder, files)
    digest = hashlib.sha256(content).hexdigest()
    stem = f"kernel-cache-{digest[:12]}.tar.gz"
    parts = []
    for number, start in enumerate(range(0, len(content), PART_BYTES)):
        piece = content[start : start + PART_BYTES]
        write_aside(out / f"{stem}.{number:03d}", piece)
        name = f"{stem}.{number:03d}"
        parts.append({"name": name, "num_bytes": len(piece), "sha256": hashlib.sha256(piece).hexdigest()})
    manifest = {**{name: key.get(name) for name in _KEY_NAMES}, "folder": str(folder), "parts": parts}
    write_aside(out / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    for old in out.glob("kernel-cache-*.tar.gz.*"):
        if not old.name.startswith(stem):
            old.unlink()
    return {"packed_files": len(files), "packed_bytes": len(content), "parts": len(parts)}


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        is_settled = not any(part.startswith("tmp.pid_") for part in path.parts)  # Triton writes aside, too
        if is_settled and path.is_file() and not path.is_symlink() and path.name != "lock":
            yield path


def _tar(folder: Path, files: list[Path]) -> bytes:
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w:gz", compresslevel=1) as archive:
        for path in files:
            archive.add(path, arcname=str(path.relative_to(folder)), recursive=False)
    return memory.getvalue()


def unpack(source: Path, folder: Path, key: Key) -> str:
    """Put the cache of `source` in place of `folder`; what was done, in words.

    A cache of something else is ignored. Raises InputError for a damaged one and for members that would leave the
    folder.
    """
    manifest = _read_manifest(source)
    others = [name for name in _KEY_NAMES if manifest.get(name) != key.get(name)]
    if others:
        found = ", ".join(f"{name} {manifest.get(name)!r} and here {key.get(name)!r}" for name in others)
        return f"ignored: it is of {found}"
    content = b"".join(_read_parts(source, manifest["parts"]))
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".kernels-"))
    try:
        num_files = _extract(content, aside)
        _move_paths(aside / "triton", before=Path(manifest["folder"]) / "triton", now=folder / "triton")
        shutil.rmtree(folder, ignore_errors=True)
        aside.replace(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return f"unpacked: {num_files} files, {len(content) / 1e6:.1f} MB"


def _read_manifest(source: Path) -> dict:
    path = source / MANIFEST
    if not path.is_file():
        raise InputError(f"{source} holds no {MANIFEST}; give the folder that a run with built kernels has left")
    if path.stat().st_size > 1 << 20:
        raise InputError(f"{path}: expected at most 1 MiB, found {path.stat().st_size} bytes; pack the cache again")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        parts = [(str(part["name"]), int(part["num_bytes"]), str(part["sha256"])) for part in manifest["parts"]]
        Path(manifest["folder"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no manifest of a kernel cache ({error}); pack the cache again") from error
    for name, num_bytes, _ in parts:
        if not _PART_NAME.fullmatch(name) or not 0 <= num_bytes <= PART_BYTES:
            raise InputError(f"{path}: expected parts of at most {PART_BYTES} bytes, found {name!r}, {num_bytes}")
    if sum(num_bytes for _, num_bytes, _ in parts) > _MOST_PACKED:
        raise InputError(f"{path}: the parts are more than {_MOST_PACKED} bytes together; no kernel cache is")
    return manifest


def _read_parts(source: Path, parts: list[dict]) -> Iterator[bytes]:
    for part in parts:
        path = source / part["name"]
        if not path.is_file() or path.stat().st_size != part["num_bytes"]:
            raise InputError(f"{path}: expected a file of {part['num_bytes']} bytes; copy the whole folder again")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != part["sha256"]:
            raise InputError(f"{path} does not have the SHA-256 its manifest says; copy the whole folder again")
        yield content


def _extract(content: bytes, folder: Path) -> int:
    """Unpack regular files alone, each below `folder`; how many. Raises InputError."""
    num_files = num_bytes = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            for member in archive:
                num_files, num_bytes = num_files + 1, num_bytes + member.size
                if num_files > _MOST_MEMBERS or num_bytes > _MOST_UNPACKED:
                    raise InputError("the kernel cache unpacks to more than any has; pack it again")
                _extract_file(archive, member, folder)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"the kernel cache is no whole tar ({error}); copy the whole folder again") from error
    return num_files


def _extract_file(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    target = folder / member.name
    is_inside = not Path(member.name).is_absolute() and ".." not in Path(member.name).parts
    if not member.isreg() or not is_inside:
        raise InputError(f"the kernel cache has a member {member.name!r} that is no file below its folder; refused")
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.extractfile(member) as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file)
    target.chmod(0o755 if member.mode & 0o100 else 0o644)  # what torch's compiler builds may be run


def _move_paths(folder: Path, *, before: Path, now: Path) -> None:
    """Triton's groups name their files with the whole path; without this a cache that has moved is never hit."""
    if before == now:
        return
    for path in folder.glob("*/__grp__*.json"):
        group = json.loads(path.read_text(encoding="utf-8"))
        places = group.get("child_paths", {})
        moved = {
            name: str(now / Path(place).relative_to(before)) if Path(place).is_relative_to(before) else place
            for name, place in places.items()
        }
        path.write_text(json.dumps({**group, "child_paths": moved}), encoding="utf-8")
