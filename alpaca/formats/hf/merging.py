"""A base model with an adapter merged into its weights, read one tensor at a time like a folder.

Legend: O output rows, I input width, r rank. Nothing here needs PEFT, and no more than one tensor is held.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from alpaca.architecture.tensors import hf_name
from alpaca.errors import InputError
from alpaca.files.reading import read_json
from alpaca.formats.hf.adapters import AdapterFolder, LowRank, TokenRows, open_adapter, unsupported_kind
from alpaca.formats.hf.folder import FLOAT_DTYPES, TensorSpec, find_fingerprint
from alpaca.formats.hf.pickled import Weights, find_tied, is_table, open_model_weights
from alpaca.formats.hf.quantization import Int8Weight, Nf4Weight, quantize_int8, quantize_nf4
from alpaca.formats.precisions import QUANTIZATIONS

logger = logging.getLogger(__name__)

RECORD_NAME = "train_config.json"  # what train.py resolved its flags to, beside the adapter
_HEAD = hf_name("head")
_CHUNK_ELEMENTS = 2**22  # float32 copies of a weight exist for this many elements at a time
_LEAST_CHANGE = 1e-6  # of a weight's length: below it DoRA's rescaling by magnitudes is rounding
_PREFIXES = ("model.", "transformer.")  # of a model with a head; files of one without a head lack it
_LINEAR_NAME = re.compile(r"(.*\.)?((layers|h)\.\d+\..+|project_(in|out))\.weight")


class MergedWeights:
    """The tensors of `base` as PEFT's merge would leave them, in the base's names and dtypes; computed in float32.

    A tied base whose head or embedding the adapter changed gets a head of its own, as PEFT leaves it (`unties`).
    An adapter trained on a quantized base corrects that base: with `quantization` "int8" or "nf4" every linear layer of
    the decoder, adapted or not, is quantized and read back as bitsandbytes does it, from values first rounded to
    `rounded_to` (the dtype the base was loaded in; None: its own), on `device` (a GPU rounds some scales otherwise). A
    base that was saved as int8 or nf4 is that already.
    `dtype`: what all is rounded to, once, at the end; None: each tensor's own.
    `tensor` notes in `changes` how far it moved each weight: the change's length over the weight's own.
    Raises InputError, naming what cannot be merged, before any tensor is read.
    """

    def __init__(
        self,
        base: Weights,
        adapter: AdapterFolder,
        *,
        quantization: str = "none",
        rounded_to: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if quantization not in QUANTIZATIONS:
            raise InputError(f"quantization must be one of {', '.join(QUANTIZATIONS)}; found {quantization!r}")
        self.base, self.adapter, self.quantization = base, adapter, quantization
        self.changes: dict[str, float] = {}
        self.rounded_to, self._dtype, self._device = rounded_to, dtype, torch.device(device)
        self._keeps_any = any(base.keeps(name) for name in base.names)
        specs = {spec.name: spec for spec in base.specs()}
        self._tied = find_tied(base)
        if self._tied:
            specs.setdefault(_HEAD, dataclasses.replace(specs[self._tied], name=_HEAD))
        _check_kind(adapter)
        self._target_of = _find_targets(adapter, specs, base.path)
        self._trained = _find_trained(adapter, specs, base.path)
        self._rows = _find_rows(adapter, specs, base.path)
        _check_grown(adapter, self._trained, specs)
        for name in self._target_of:
            _check_shapes(name, adapter.low_rank(self._target_of[name]), specs[name], adapter)
        self.unties = self._tied is not None and self._ends_differ(self._tied)
        if not self.unties and _HEAD not in base.names:
            specs.pop(_HEAD, None)
            self._trained.pop(_HEAD, None)
        self._specs = specs

    @property
    def path(self) -> Path:
        return self.base.path

    @property
    def names(self) -> list[str]:
        return list(self._specs)

    @property
    def quantized_to(self) -> str:
        """What whole weights of the base are quantized to before they are merged; "none" where they were saved so."""
        return "none" if self._keeps_any else self.quantization

    @property
    def is_tied(self) -> bool:
        """Whether the merged model's head is its embedding: the base's was, and the adapter changed neither alone."""
        return self._tied is not None and not self.unties

    @property
    def num_added_rows(self) -> int:
        """Rows the adapter's own embedding has more than the base's: config.json's vocab_size is behind by them."""
        shapes = {name: spec.shape for name, spec in self._specs.items()}
        return max([len(tensor) - shapes[name][0] for name, tensor in self._trained.items()], default=0)

    def specs(self) -> list[TensorSpec]:
        """Every tensor's name, shape and dtype: the base's, but for embeddings that grew and a dtype that was asked."""
        return [
            TensorSpec(
                name=spec.name,
                shape=tuple(self._trained[spec.name].shape) if spec.name in self._trained else spec.shape,
                dtype=self._written_dtype(spec.dtype),
            )
            for spec in self._specs.values()
        ]

    def stored(self, name: str) -> torch.Tensor:
        """The same as `tensor`: what is merged is whole."""
        return self.tensor(name)

    def keeps(self, name: str) -> bool:
        return False

    def tensor(self, name: str) -> torch.Tensor:
        """One merged tensor, computed now."""
        weight = self._start(name)
        dtype = self._written_dtype(weight.dtype)
        if name not in self._target_of and not self._is_quantized(name, weight):
            return weight.to(dtype)
        merged, change, length = torch.empty(weight.shape, dtype=dtype), 0.0, 0.0
        for start, rows in self._dequantized(name, weight):
            stop = start + len(rows)
            merged[start:stop] = self._changed(name, rows, start)
            rows = rows.to(dtype).float()
            change += float((merged[start:stop].float() - rows).norm()) ** 2
            length += float(rows.norm()) ** 2
        if name in self._target_of:
            self._note(name, (change / length) ** 0.5 if length else float(change > 0))
        return merged

    def require_change(self) -> None:
        """Raise InputError when no merged tensor so far differs from the base's in its dtype."""
        least = _LEAST_CHANGE if self.adapter.uses_dora else 0.0
        if self.changes and max(self.changes.values()) <= least:
            dtype = next(spec.dtype for spec in self.specs() if spec.name in self.changes)
            raise InputError(
                f"{self.adapter.path} changes none of the {len(self.changes)} weights it is for: what it adds is "
                f"smaller than {dtype} can tell, so the merged model would be {self.base.path} again. Was it trained?"
            )

    def describe(self) -> str:
        """One line for a log, after the tensors were read."""
        changes = sorted(self.changes.values())
        if not changes:
            return "no weight was read yet"
        middle = changes[len(changes) // 2]
        told = f"{len(changes)} weights changed by {changes[0]:.2g} to {changes[-1]:.2g} of their length"
        return f"{told} (median {middle:.2g})"

    def _ends_differ(self, embedding: str) -> bool:
        """Whether the adapter leaves the head and the embedding of a tied base with other values than each other."""
        if {embedding, _HEAD} & self._target_of.keys() or _HEAD in self._rows:
            return True
        ends = [self._trained.get(name) for name in (embedding, _HEAD)]
        if ends[0] is not None and ends[1] is not None:
            return not torch.equal(*ends)
        whole = next((tensor for tensor in ends if tensor is not None), None)
        return whole is not None and not torch.equal(whole, self.base.tensor(embedding).to(whole.dtype))

    def _base_name(self, name: str) -> str:
        """The base's own name of a tensor: of a tied head the embedding's, which it is."""
        return self._tied if name == _HEAD and self._tied and _HEAD not in self.base.names else name

    def _start(self, name: str) -> torch.Tensor:
        """The base's tensor, or the whole one that the adapter has instead, in the base's dtype."""
        weight = self.base.tensor(self._base_name(name))
        if name in self._rows:
            return self._with_rows(name, weight)
        if name not in self._trained:
            return weight
        trained = self._trained[name]
        self._note(name, _length_ratio(trained.to(weight.dtype), weight))
        return trained if self._dtype else trained.to(weight.dtype)

    def _with_rows(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A table with the adapter's own rows for some tokens."""
        own = self._rows[name]
        table = weight.to(self._written_dtype(weight.dtype)).clone()
        table[list(own.ids)] = own.rows.to(table.dtype)
        self._note(name, _length_ratio(table, weight))
        return table

    def _written_dtype(self, own: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype and own.is_floating_point else own

    def _note(self, name: str, change: float) -> None:
        if not math.isfinite(change):
            raise InputError(
                f"{self.adapter.path} makes {name} infinite or no number: it is damaged, or its training had diverged"
            )
        self.changes[name] = change

    def _is_quantized(self, name: str, weight: torch.Tensor) -> bool:
        if self._keeps_any:
            return self.base.keeps(name)
        return self.quantization != "none" and weight.ndim == 2 and _LINEAR_NAME.fullmatch(name) is not None

    def _dequantized(self, name: str, weight: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """The base's weight [O, I] as it was trained on: float32 blocks of rows with the first one's number."""
        step = max(1, _CHUNK_ELEMENTS // weight.shape[1])
        if not self._is_quantized(name, weight):
            for start in range(0, len(weight), step):
                yield start, weight[start : start + step].float()
            return
        stored = self.base.stored(name) if self._keeps_any else self._quantize(weight)
        assert isinstance(stored, Int8Weight | Nf4Weight)
        step = -(-step // stored.row_step) * stored.row_step
        for start in range(0, len(weight), step):
            rows = stored.rows(start, min(start + step, len(weight)))
            yield start, rows.dequantize(torch.float32).cpu()

    def _quantize(self, weight: torch.Tensor) -> Int8Weight | Nf4Weight:
        quantize = quantize_int8 if self.quantization == "int8" else quantize_nf4
        return quantize(weight.to(device=self._device, dtype=self.rounded_to or weight.dtype))

    def _changed(self, name: str, rows: torch.Tensor, start: int) -> torch.Tensor:
        """Rows of a weight from number `start` on, in float32, with the adapter's change added."""
        if name not in self._target_of:
            return rows
        change = self.adapter.low_rank(self._target_of[name])
        part = slice(start, start + len(rows))
        merged = torch.addmm(rows, change.b[part].float(), change.a.float(), alpha=change.scale)
        if change.magnitude is not None:
            merged *= (change.magnitude[part].float() / merged.norm(dim=1))[:, None]
        return merged


def open_merged(
    base: str | Path | Weights,
    adapter: str | Path,
    *,
    quantization: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    base_is_named: bool = False,
) -> MergedWeights:
    """Open both folders, or take a `base` that is open.

    quantization: that the adapter was trained on; None: what train.py wrote down, else none.
    base_is_named: by the user, who may want another base than the adapter's own; see `check_base`.
    Raises MissingInput, InputError.
    """
    check_base(base if isinstance(base, str | Path) else base.path, adapter, is_named=base_is_named)
    recorded, rounded_to = read_base_record(Path(adapter))
    found = quantization or recorded or "none"
    rounded_to = rounded_to if found != "none" else None
    return MergedWeights(
        open_model_weights(base) if isinstance(base, str | Path) else base,
        open_adapter(adapter),
        quantization=found,
        rounded_to=rounded_to,
        dtype=dtype,
        device=device,
    )


def read_base_record(adapter: Path) -> tuple[str | None, torch.dtype | None]:
    """How train.py had its base in memory: "none", "int8" or "nf4", and the dtype; None where there is no record."""
    file = _find_record(adapter)
    if file is None:
        return None, None
    record = read_json(file)
    quantization = record.get("base_quantization") or "none"
    if quantization not in QUANTIZATIONS:
        expected = ", ".join(QUANTIZATIONS)
        raise InputError(f"{file}: expected a base_quantization of {expected}, found {quantization!r}")
    return str(quantization), FLOAT_DTYPES["bfloat16" if record.get("bf16") else "float32"]


def read_base_fingerprint(adapter: Path) -> str | None:
    """The fingerprint of the base that an adapter was trained on, from train.py's record; None where there is none."""
    file = _find_record(adapter)
    found = read_json(file).get("base_fingerprint") if file else None
    return str(found) if found else None


def check_base(base: str | Path, adapter: str | Path, *, is_named: bool) -> None:
    """Hold a base against the fingerprint of the one that train.py wrote down beside the adapter.

    Another model of the same shapes would merge into nonsense without an error. The same one in another dtype has
    another fingerprint, too, hence a user who names the base (`is_named`) is only warned. Raises InputError.
    """
    recorded = read_base_fingerprint(Path(adapter))
    if recorded is None or find_fingerprint(base) in (None, recorded):
        return
    own = open_adapter(adapter).base_name or "unnamed"
    found = (
        f"{base} is not the model that {adapter} was trained on ({own}): its weights are others than {RECORD_NAME} has"
    )
    if not is_named:
        raise InputError(
            f"{found}. Find that one; or, if this is meant (the same model in another dtype, say), name it explicitly, "
            "by --base_model, or by --input_dir beside --adapter"
        )
    logger.warning("%s. Going on, since it was named", found)


def _find_record(adapter: Path) -> Path | None:
    return next((path for path in (adapter / RECORD_NAME, adapter.parent / RECORD_NAME) if path.is_file()), None)


# What can be merged ---------------------------------------------------------------------------------------------


def _check_kind(adapter: AdapterFolder) -> None:
    """Only W + s B A, with or without DoRA's magnitudes, on the base's own W; and not W itself."""
    if used := unsupported_kind(adapter.config):
        raise InputError(f"{adapter.path} cannot be merged: adapter_config.json asks for {used}")
    unknown = adapter.unknown_tensors()
    if unknown:
        raise InputError(
            f"{adapter.path} cannot be merged: it holds {unknown[0]!r} ({len(unknown)} such); expected lora_A.weight, "
            "lora_B.weight and lora_magnitude_vector of linear layers"
        )
    if adapter.is_base and not (adapter.uses_dora or adapter.trained_tensors() or adapter.token_rows()):
        raise InputError(
            f"{adapter.path} changes nothing: every lora_B is zero, so the merged model would be its base again. "
            "Was it saved before it was trained?"
        )


def _find_targets(adapter: AdapterFolder, specs: Mapping[str, TensorSpec], base: Path) -> dict[str, str]:
    """The adapted modules by the names of their weights in the base."""
    found = {target: _name_in_base(f"{target}.weight", specs) for target in adapter.targets}
    missing = [target for target, name in found.items() if name is None]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise InputError(
            f"{adapter.path} changes {shown}, which {base} does not have: it is an adapter of another model "
            f"({adapter.base_name or 'unnamed'}), or of tied weights"
        )
    return {name: target for target, name in found.items() if name}


def _find_trained(adapter: AdapterFolder, specs: Mapping[str, TensorSpec], base: Path) -> dict[str, torch.Tensor]:
    """The adapter's whole tensors by the base's names."""
    found: dict[str, torch.Tensor] = {}
    for trained, tensor in adapter.trained_tensors().items():
        name = _name_in_base(trained, specs)
        if name is None:
            raise InputError(f"{adapter.path} holds {trained!r} whole, which {base} does not have")
        expected = specs[name].shape
        grows = is_table(name) and tensor.ndim == 2 and tensor.shape[1:] == expected[1:] and len(tensor) > expected[0]
        if tuple(tensor.shape) != expected and not grows:
            raise InputError(
                f"{adapter.path} holds {trained!r} as {list(tensor.shape)}, {base} as {list(expected)}: "
                "they are not of one model"
            )
        found[name] = tensor
    return found


def _find_rows(adapter: AdapterFolder, specs: Mapping[str, TensorSpec], base: Path) -> dict[str, TokenRows]:
    """The adapter's rows for some tokens, by the base's names of the tables."""
    found: dict[str, TokenRows] = {}
    for trained, own in adapter.token_rows().items():
        name = _name_in_base(trained, specs)
        shape = specs[name].shape if name else None
        if shape is None or own.rows.shape[1:] != shape[1:] or max(own.ids) >= shape[0]:
            raise InputError(
                f"{adapter.path} holds rows {list(own.rows.shape)} of {trained!r} up to number {max(own.ids)}, {base} "
                f"has {list(shape) if shape else 'no such table'}: they are not of one model"
            )
        found[name] = own
    return found


def _check_grown(adapter: AdapterFolder, trained: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec]) -> None:
    """Tables that grow must grow together."""
    ends = {name: tensor for name, tensor in trained.items() if is_table(name)}
    if any(len(tensor) != specs[name].shape[0] for name, tensor in ends.items()) and len(ends) != 2:
        found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in ends.items())
        raise InputError(f"{adapter.path} adds rows at one end of the model only ({found}); expected both to grow")


def _check_shapes(name: str, change: LowRank, spec: TensorSpec, adapter: AdapterFolder) -> None:
    shape = (change.b.shape[0], change.a.shape[1])
    if spec.shape != shape or not spec.dtype.is_floating_point:
        raise InputError(
            f"{adapter.path} is for {name} as a float matrix {list(shape)}; the base has it as {spec.dtype} "
            f"{list(spec.shape)}: expected the unquantized model {adapter.base_name}"
        )
    if adapter.uses_dora != (change.magnitude is not None) or (adapter.uses_dora and len(change.magnitude) != shape[0]):
        found = "none" if change.magnitude is None else list(change.magnitude.shape)
        expected = f"[{shape[0]}]" if adapter.uses_dora else "none"
        raise InputError(f"{adapter.path}: expected the magnitudes {expected} (DoRA) for {name}, found {found}")


def _name_in_base(name: str, specs: Mapping[str, TensorSpec]) -> str | None:
    """What the base calls a tensor of the model with its head: files of the model without one have no prefix."""
    shorter = [name.removeprefix(prefix) for prefix in _PREFIXES]
    longer = [prefix + name for prefix in _PREFIXES]
    return next((candidate for candidate in (name, *shorter, *longer) if candidate in specs), None)


def _length_ratio(new: torch.Tensor, old: torch.Tensor) -> float:
    """How far `new` is from `old`, over the length of `old`; 1 where it has other rows."""
    if new.shape != old.shape:
        return 1.0
    length = float(old.float().norm())
    return float((new.float() - old.float()).norm()) / length if length else float(not torch.equal(new, old))
