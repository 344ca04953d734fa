"""The arithmetic of weight differences: tuned - raw and raw + diff, tensor by tensor, one block in memory at a time."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from alpaca.architecture.tensors import is_rotary_table
from alpaca.errors import InputError
from alpaca.files.progress import byte_bar
from alpaca.files.reading import read_json
from alpaca.formats.diff.manifest import (
    Manifest,
    Stored,
    TensorRecord,
    check_raw,
    describe,
    dtype_name,
    read_manifest,
    sha256,
    summary,
)
from alpaca.formats.diff.published_sum import check_published_sum
from alpaca.formats.diff.residual import (
    RESIDUAL_NAME,
    ResidualWriter,
    TensorResidual,
    blocks,
    float_bits,
    restored_bits,
)
from alpaca.formats.hf.folder import FLOAT_DTYPES, TensorSpec
from alpaca.formats.hf.pickled import Weights, open_model_weights

logger = logging.getLogger(__name__)


def open_model(folder: Path) -> Weights:
    """Open a folder's weights, and log when it holds rotary tables, as older folders do; these are left out."""
    weights = open_model_weights(folder)
    tables = [name for name in weights.names if is_rotary_table(name)]
    if tables:
        logger.info("%s: leaving out %d rotary tables (%s, …)", folder, len(tables), tables[0])
    return weights


def model_specs(weights: Weights) -> dict[str, TensorSpec]:
    """A model's tensors by name, without rotary tables. Raises InputError for a tensor that is not of floats."""
    specs = {spec.name: spec for spec in weights.specs() if not is_rotary_table(spec.name)}
    for spec in specs.values():
        if spec.dtype not in FLOAT_DTYPES.values():
            raise InputError(
                f"{weights.path}: {spec.name} is {dtype_name(spec.dtype)}; expected one of {', '.join(FLOAT_DTYPES)}"
            )
    return specs


def check_match(raw: Weights, other: Weights) -> None:
    """Raise InputError unless both hold the same tensors; `other` (tuned or diff) may have more vocabulary rows."""
    ours, theirs = model_specs(raw), model_specs(other)
    grown = [read_json(weights.path / "config.json").get("vocab_size") for weights in (raw, other)]
    missing, extra = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
    if missing or extra:
        raise InputError(
            f"{raw.path} and {other.path} are not of one model: the first lacks {missing[:5]}, the second {extra[:5]}"
        )
    for name, spec in theirs.items():
        old, new = ours[name].shape, spec.shape
        may_grow = old[:1] + new[:1] == tuple(grown) and old[0] < new[0] and old[1:] == new[1:]
        if old != new and old[1:] == new[1:] and None in grown:
            config = (raw, other)[grown.index(None)].path / "config.json"
            raise InputError(
                f"{config} lacks vocab_size, without which it cannot be told whether the {old[0]} and {new[0]} rows "
                f"of {name} are a vocabulary that grew; get that file again"
            )
        if old != new and not may_grow:
            raise InputError(
                f"{raw.path} and {other.path} are not of one model: {name} is {old} in the first and {new} in the "
                "second, expected the same or more rows of vocabulary. "
                f"They are {_summary(raw, ours)} and {_summary(other, theirs)}"
            )


def _summary(weights: Weights, specs: Mapping[str, TensorSpec]) -> str:
    return summary(describe(weights.path, list(specs.values())))


class RawValues:
    """A raw tensor's values as float32, flat, block by block; rows that it lacks follow its own.

    added: what each new row [columns] is.
    """

    def __init__(self, raw: torch.Tensor, shape: torch.Size, added: torch.Tensor | None) -> None:
        self._flat = raw.contiguous().view(-1)
        self.num_known = raw.numel()
        self._added = None if added is None else added.expand(shape[0] - len(raw), *shape[1:]).reshape(-1)

    def block(self, start: int, stop: int) -> torch.Tensor:
        values = self._flat[start:stop].float()
        if self._added is None or stop <= self.num_known:
            return values
        first = max(0, start - self.num_known)
        return torch.cat([values, self._added[first : stop - self.num_known]])


def mean_row(raw: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor's rows [1, ...] in float32, which the original recipe gives to each new row."""
    return raw.float().mean(dim=0, keepdim=True)


def total_bytes(specs: Mapping[str, TensorSpec]) -> int:
    return sum(spec.num_bytes for spec in specs.values())


def with_dtype(config: Mapping[str, object], dtype: torch.dtype) -> dict[str, object]:
    """config.json for weights of another type, set under the key that it has: the new one, the old one or both."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    return {**config, **dict.fromkeys(keys, dtype_name(dtype))}


# tuned - raw -----------------------------------------------------------------------------------------------------


class Differences:
    """Reads tuned - raw tensor by tensor, writing residuals and keeping records on the way."""

    def __init__(self, raw: Weights, tuned: Weights, residual: ResidualWriter) -> None:
        self._raw, self._tuned, self.residual = raw, tuned, residual
        self._records: dict[str, TensorRecord] = {}

    def read(self, spec: TensorSpec) -> Iterator[torch.Tensor]:
        """A tensor's difference, float32, in flat blocks."""
        raw, tuned = self._raw.tensor(spec.name), self._tuned.tensor(spec.name)
        offset, listed = self.residual.num_bytes, self.residual.num_elements
        with ThreadPoolExecutor(2) as pool:  # hashing and subtracting wait for different things
            digests = [pool.submit(sha256, tensor) for tensor in (raw, tuned)]
            yield from self._blocks(raw, tuned)
            stored = [_stored(t, digest.result()) for t, digest in zip((raw, tuned), digests, strict=True)]
        segment = (offset, self.residual.num_bytes - offset, self.residual.num_elements - listed)
        self._records[spec.name] = TensorRecord(raw=stored[0], tuned=stored[1], residual=segment)

    def manifest(self, tuned_config: dict[str, object]) -> Manifest:
        return Manifest(
            raw=describe(self._raw.path, list(model_specs(self._raw).values())),
            tuned_config=tuned_config,
            residual_bytes=self.residual.num_bytes,
            tensors=self._records,
        )

    def _blocks(self, raw: torch.Tensor, tuned: torch.Tensor) -> Iterator[torch.Tensor]:
        base = RawValues(raw, tuned.shape, mean_row(raw) if raw.shape != tuned.shape else None)
        flat = tuned.contiguous().view(-1)
        for number, start, stop in blocks(tuned.numel()):
            known, wanted = base.block(start, stop), flat[start:stop]
            diff = wanted.float() - known
            restored = restored_bits(known, diff, wanted.dtype, base.num_known - start)
            self.residual.add(number, restored, float_bits(wanted))
            yield diff


def _stored(tensor: torch.Tensor, digest: str) -> Stored:
    return Stored(dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape), sha256=digest)


# raw + diff ------------------------------------------------------------------------------------------------------


class Recovery:
    """raw + diff, tensor by tensor, exactly as tuned where there is a manifest, in float32 where there is none."""

    def __init__(self, path_raw: Path, path_diff: Path, *, dtype: torch.dtype | None, check_sum: bool) -> None:
        """dtype: the result's; None for the tuned model's.   check_sum: whether to check the sum without a manifest."""
        self.raw, self.diff = open_model(path_raw), open_model(path_diff)
        self.manifest = read_manifest(path_diff)
        self.checks_sum = check_sum and self.manifest is None
        self._sums: dict[str, torch.Tensor] = {}
        diff_specs, diff_config = model_specs(self.diff), read_json(self.diff.path / "config.json")
        if self.manifest:
            self._check_diff(diff_specs)
        else:
            self._check_old_diff(diff_config)
        self.specs = {name: replace(spec, dtype=dtype or self.own_dtype(name)) for name, spec in diff_specs.items()}
        tuned_config = self.manifest.tuned_config if self.manifest else diff_config
        exact = self.manifest and dtype is None
        self.config = tuned_config if exact else with_dtype(tuned_config, dtype or torch.float32)

    def check_base(self) -> None:
        """Raise InputError when the raw model is known not to be the one that the diff was made against."""
        if self.manifest:
            specs = model_specs(self.raw)
            with byte_bar(total_bytes(specs), "checking the raw model") as bar:
                check_raw(self.raw, specs, self.manifest, bar.update)

    def check_result(self) -> None:
        """Check the published sum of a diff without a manifest. Call this when all tensors have been read."""
        if self.checks_sum:
            total = check_published_sum(self._sums, self.raw, self.diff, self.config)
            logger.info("the tensors add up to %.4f, as published", total)

    def read(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor's values in their own type, in flat consecutive blocks. Raises InputError where the proof fails."""
        if self.manifest is None:
            yield self._sum(name)
            return
        digest = hashlib.sha256()
        with ThreadPoolExecutor(1) as pool:  # hashes one block while the next is worked out
            hashing = pool.submit(digest.update, b"")
            for block in self._exact_blocks(name, self.manifest.tensors[name]):
                hashing.result()
                hashing = pool.submit(digest.update, block.view(torch.uint8).numpy())
                yield block
        if digest.hexdigest() != self.manifest.tensors[name].tuned.sha256:
            raise InputError(
                f"{name} does not come out as it was: the raw model was checked and is right, so its difference in "
                f"{self.diff.path} or {RESIDUAL_NAME} there is damaged; get that folder again"
            )

    def _exact_blocks(self, name: str, record: TensorRecord) -> Iterator[torch.Tensor]:
        raw, diff = self.raw.tensor(name), self.diff.tensor(name)
        added = torch.zeros(1, *raw.shape[1:]) if raw.shape != diff.shape else None  # the residual has all their bits
        base, flat = RawValues(raw, diff.shape, added), diff.contiguous().view(-1)
        dtype, (offset, num_bytes, _) = FLOAT_DTYPES[record.tuned.dtype], record.residual
        residual = TensorResidual(self.diff.path / RESIDUAL_NAME, offset, num_bytes)
        for number, start, stop in blocks(diff.numel()):
            restored = restored_bits(base.block(start, stop), flat[start:stop], dtype, base.num_known - start)
            residual.apply(number, restored)
            yield (restored if dtype.itemsize == 4 else restored.to(torch.int16)).view(dtype)

    def _sum(self, name: str) -> torch.Tensor:
        """raw + diff in float32 [n], as the original adds them."""
        raw, diff = self.raw.tensor(name), self.diff.tensor(name)
        total = torch.empty(diff.shape)
        known = total[: len(raw)] if raw.dim() else total
        known.copy_(raw)
        if raw.shape != diff.shape:
            total[len(raw) :] = known.mean(dim=0, keepdim=True)
        total += diff
        if self.checks_sum:
            self._sums[name] = total.sum()
        return total.view(-1)

    def own_dtype(self, name: str) -> torch.dtype:
        """What `read` gives."""
        return FLOAT_DTYPES[self.manifest.tensors[name].tuned.dtype] if self.manifest else torch.float32

    def _check_diff(self, specs: Mapping[str, TensorSpec]) -> None:
        assert self.manifest
        expected = {name: (record.tuned.shape, torch.float32) for name, record in self.manifest.tensors.items()}
        found = {name: (spec.shape, spec.dtype) for name, spec in specs.items()}
        wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        if wrong:
            raise InputError(f"{self.diff.path}: manifest and weights disagree on {wrong[:5]}; get the folder again")

    def _check_old_diff(self, diff_config: Mapping[str, object]) -> None:
        check_match(self.raw, self.diff)
        if diff_config.get("tie_word_embeddings"):
            raise InputError(
                f"{self.diff.path} has tied embeddings and no manifest: the original tool subtracted them twice, "
                "which cannot be told from once. Recover it with that tool, or make the diff anew with this one"
            )
