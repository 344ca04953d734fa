"""`diff_manifest.json`: which bits a weight difference was made from, so that recovering them can be proved.

For each tensor the SHA-256 of its bytes in the raw and in the tuned model, in their own dtypes. A raw model stored in a
wider dtype is the same model where the recorded dtype holds its values.
"""

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from alpaca.errors import InputError, MissingInput
from alpaca.files.atomic import write_json
from alpaca.files.reading import list_folder, read_json
from alpaca.formats.diff.residual import RESIDUAL_NAME
from alpaca.formats.hf.folder import FLOAT_DTYPES, TensorSpec
from alpaca.formats.hf.pickled import Weights

MANIFEST_NAME = "diff_manifest.json"
_FORMAT, _VERSION = "weight-diff", 1
_NUM_HASHERS = 2


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor as a model's files hold it."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """One tensor of both models. residual: offset and size in bytes of its part of the residual file, and elements."""

    raw: Stored
    tuned: Stored
    residual: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A manifest's content. raw: name and sizes of the raw model.   tuned_config: the tuned model's config.json."""

    raw: dict[str, object]
    tuned_config: dict[str, object]
    residual_bytes: int
    tensors: dict[str, TensorRecord]


def sha256(tensor: torch.Tensor) -> str:
    """The SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(folder: Path, specs: list[TensorSpec]) -> dict[str, object]:
    """A model's name, as its config gives it, and its sizes, for messages."""
    config = read_json(folder / "config.json")
    sizes = ("architectures", "num_hidden_layers", "hidden_size", "vocab_size")
    named = {"name": Path(config.get("_name_or_path") or folder.absolute()).name}
    counted = {"num_parameters": sum(torch.Size(spec.shape).numel() for spec in specs)}
    return named | {key: config[key] for key in sizes if key in config} | counted


def summary(description: Mapping[str, object]) -> str:
    """ "llama-7b (32 layers, width 4096, 6,738,415,616 parameters)" """
    parts = [f"{description[key]} {word}" for key, word in _WORDS.items() if key in description]
    return f"{description.get('name', 'a model')} ({', '.join(parts)})"


_WORDS = {"num_hidden_layers": "layers", "hidden_size": "wide", "vocab_size": "tokens", "num_parameters": "parameters"}


# Writing and reading ------------------------------------------------------------------------------------------


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_json(folder / MANIFEST_NAME, {"format": _FORMAT, "version": _VERSION, **asdict(manifest)})


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a diff folder, or None where there is none.

    Raises InputError for a damaged one or a residual file of another size, MissingInput for a residual file that is
    not there.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        if (folder / RESIDUAL_NAME).exists():
            raise MissingInput(f"{folder} has a {RESIDUAL_NAME} and no {MANIFEST_NAME}; copy the whole folder again")
        return None
    content = read_json(path)
    if content.get("format") != _FORMAT or content.get("version") != _VERSION:
        found = f"{content.get('format')!r}, version {content.get('version')!r}"
        raise InputError(f"{path}: expected format {_FORMAT!r}, version {_VERSION}; found {found}")
    try:
        manifest = Manifest(
            raw=dict(content["raw"]),
            tuned_config=dict(content["tuned_config"]),
            residual_bytes=int(content["residual_bytes"]),
            tensors={str(name): _record(entry) for name, entry in content["tensors"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged, get it again: {type(error).__name__} {error}") from error
    _check_residual_file(folder / RESIDUAL_NAME, manifest.residual_bytes)
    return manifest


def _record(entry: Mapping) -> TensorRecord:
    offset, num_bytes, count = map(int, entry["residual"])
    return TensorRecord(raw=_stored(entry["raw"]), tuned=_stored(entry["tuned"]), residual=(offset, num_bytes, count))


def _stored(entry: Mapping) -> Stored:
    if entry["dtype"] not in FLOAT_DTYPES:
        raise ValueError(f"dtype {entry['dtype']!r}")
    return Stored(dtype=entry["dtype"], shape=tuple(map(int, entry["shape"])), sha256=str(entry["sha256"]))


def _check_residual_file(path: Path, num_bytes: int) -> None:
    if not path.is_file():
        raise MissingInput(f"{path} is missing, which {MANIFEST_NAME} calls for; found: {list_folder(path.parent)}")
    if path.stat().st_size != num_bytes:
        raise InputError(f"{path} has {path.stat().st_size:,} bytes instead of {num_bytes:,}: get it again")


# Checking -----------------------------------------------------------------------------------------------------


def check_raw(raw: Weights, specs: Mapping[str, TensorSpec], manifest: Manifest, progress: Callable[[int], object]):
    """Raise InputError naming what differs when `raw` is not, bit for bit, the model the diff was made against.

    specs: of its tensors by name.   progress(n): hears of each n bytes read.
    """
    description = describe(raw.path, list(specs.values()))
    shapes = {name: record.raw.shape for name, record in manifest.tensors.items()}
    if {name: spec.shape for name, spec in specs.items()} != shapes:
        raise InputError(
            f"{raw.path} is another model than the diff was made against: it is {summary(description)}, "
            f"expected {summary(manifest.raw)}; {_first_difference(specs, shapes)}"
        )
    expected = {name: record.raw for name, record in manifest.tensors.items()}
    wrong = differing(raw, expected, progress)
    if wrong:
        raise InputError(
            f"{raw.path} is not the model the diff was made against, {summary(manifest.raw)}: {len(wrong)} of "
            f"{len(expected)} tensors differ: {_some(wrong)}. {_likely_cause(wrong, specs, expected)}"
        )


def differing(weights: Weights, expected: Mapping[str, Stored], progress: Callable[[int], object]) -> list[str]:
    """The names of tensors whose SHA-256 differs from `expected`; several tensors are read at once."""

    def matches(name: str) -> bool:
        tensor, dtype = weights.tensor(name), FLOAT_DTYPES[expected[name].dtype]
        narrowed = tensor.to(dtype)
        same = narrowed.dtype == tensor.dtype or torch.equal(narrowed.to(tensor.dtype), tensor)
        same = same and sha256(narrowed) == expected[name].sha256
        progress(tensor.nbytes)
        return same

    with ThreadPoolExecutor(_NUM_HASHERS) as pool:
        return [name for name, same in zip(expected, pool.map(matches, expected), strict=True) if not same]


def _first_difference(specs: Mapping[str, TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> str:
    missing, extra = sorted(shapes.keys() - specs.keys()), sorted(specs.keys() - shapes.keys())
    if missing or extra:
        return f"it lacks {_some(missing) or 'nothing'}, and has besides: {_some(extra) or 'nothing'}"
    name = next(name for name in shapes if shapes[name] != specs[name].shape)
    return f"{name} is {specs[name].shape}, expected {shapes[name]}"


def _likely_cause(wrong: list[str], specs: Mapping[str, TensorSpec], expected: Mapping[str, Stored]) -> str:
    found = {dtype_name(specs[name].dtype) for name in wrong}
    wanted = {expected[name].dtype for name in wrong}
    if found != wanted:
        return f"They are {', '.join(sorted(found))} here and were {', '.join(sorted(wanted))}: rounded on the way?"
    if len(wrong) < len(expected) / 2:
        return "A damaged or edited copy: get it again, or convert it again from Meta's checkpoint"
    return "These are other weights of the same shape: get that model, or convert it from Meta's checkpoint"


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
