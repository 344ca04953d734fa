"""Adapter folders in PEFT's format: what one says of itself, read and checked without PEFT and without its base model.

A LoRA adapter changes a base's linear layer W [O, I] to W + s B A, where A [r, I] and B [O, r]. B starts at zero, so an
adapter whose B are all zero is its base (PEFT's file names: https://huggingface.co/docs/peft).
"""

import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from alpaca.errors import InputError, MissingInput
from alpaca.files.model_folders import CONFIG_NAME
from alpaca.files.reading import list_folder, read_json

WEIGHTS_STEM = "adapter_model"
# Published ones have 4 to 128; in the LLaMA engine all adapters of a server take as much room as the largest.
MOST_SERVED_RANK = 256
_WEIGHTS_NAMES = (f"{WEIGHTS_STEM}.safetensors", f"{WEIGHTS_STEM}.bin")  # the second: PEFT's until 2023
_PREFIX = "base_model.model."
_ROWS_END = ".token_adapter.trainable_tokens_delta"
_LOW_RANK_ENDS = ("A.weight", "B.weight", "magnitude_vector")
# Settings of PEFT's LoRA under which the layers compute something else than W + s B A.
_OTHER_KINDS = (
    "alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "kasa_config", "layer_replication", "lora_bias",
    "monteclora_config", "target_parameters", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
# Values of init_lora_weights: ways to start a training that take from the base what the adapter then holds.
_BASE_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga", "kasa")


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRank:
    """What an adapter adds to one linear layer's weight W [O, I]: W + scale * b @ a.

    a: [r, I].    b: [O, r].    magnitude: DoRA's [O], to which each row of the sum is then scaled in length; else None.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenRows:
    """Rows [K, D] that stand in for those of K tokens in an embedding or a head."""

    ids: tuple[int, ...]
    rows: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterFolder:
    """A LoRA adapter that was read and found whole.

    base_name: the base model, as adapter_config.json names it.    rank, alpha: of the layers without a pattern.
    alphas: by PEFT's patterns of layer names.                     config: adapter_config.json, whole.
    targets: the base's modules it changes, by their full names.   tensors: as the file names them.
    """

    path: Path
    base_name: str
    rank: int
    alpha: float
    uses_dora: bool
    uses_rslora: bool
    targets: tuple[str, ...]
    tensors: dict[str, torch.Tensor]
    alphas: dict[str, float]
    config: dict[str, Any]

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def low_rank(self, target: str) -> LowRank:
        """The change of one of `targets`."""
        name = f"{_PREFIX}{target}.lora_"
        a = self.tensors[f"{name}A.weight"]
        matching = (alpha for key, alpha in self.alphas.items() if matches(key, target))
        alpha, rank = next(matching, self.alpha), a.shape[0]
        return LowRank(
            a=a,
            b=self.tensors[f"{name}B.weight"],
            scale=alpha / (math.sqrt(rank) if self.uses_rslora else rank),
            magnitude=self.tensors.get(f"{name}magnitude_vector"),
        )

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """Tensors that take the place of the base's own, by its names: trained embeddings, heads, biases and norms."""
        return {
            name.removeprefix(_PREFIX).replace(".base_layer.", "."): tensor
            for name, tensor in self.tensors.items()
            if ".lora_" not in name and not name.endswith(_ROWS_END)
        }

    def token_rows(self) -> dict[str, TokenRows]:
        """Rows of the base's tables that the adapter has instead, by the tables' names. Raises InputError."""
        rows = {}
        for name, tensor in self.tensors.items():
            if name.endswith(_ROWS_END):
                module = name.removeprefix(_PREFIX).removesuffix(_ROWS_END)
                rows[f"{module}.weight"] = TokenRows(ids=self._token_ids(module, len(tensor)), rows=tensor)
        return rows

    def _token_ids(self, module: str, number: int) -> tuple[int, ...]:
        given = self.config.get("trainable_token_indices")
        if isinstance(given, dict):  # by modules' names, or their ends
            given = next((ids for end, ids in given.items() if module == end or module.endswith(f".{end}")), None)
        is_right = isinstance(given, list) and all(isinstance(one, int) and one >= 0 for one in given)
        if not is_right or len(given) != number:
            raise InputError(
                f"{self.path / CONFIG_NAME}: expected {number} ids of tokens for {module} in "
                f"'trainable_token_indices', found {given!r}"
            )
        return tuple(given)

    def unknown_tensors(self) -> list[str]:
        """Names of low-rank tensors that `low_rank` does not read: of adapted embeddings or convolutions, say."""
        read = {f"{_PREFIX}{target}.lora_{end}" for target in self.targets for end in _LOW_RANK_ENDS}
        return [name.removeprefix(_PREFIX) for name in self.tensors if ".lora_" in name and name not in read]

    @property
    def is_base(self) -> bool:
        """Whether it changes nothing: every B is zero."""
        return not any(bool(tensor.any()) for name, tensor in self.tensors.items() if ".lora_B." in name)

    def describe(self) -> str:
        """One line for a log."""
        kind = "".join(word for word, used in ((" DoRA", self.uses_dora), (" rsLoRA", self.uses_rslora)) if used)
        layers = ", ".join(sorted({target.rpartition(".")[2] for target in self.targets}))
        numbers = f"rank {self.rank}, alpha {self.alpha:g}, {len(self.targets)} layers ({layers})"
        return f"{kind.strip() or 'LoRA'} adapter of {self.base_name}: {numbers}"


def unsupported_kind(config: Mapping[str, Any]) -> str | None:
    """What adapter_config.json asks for beyond W + s B A (DoRA's magnitudes aside) on an unchanged W; else None."""
    used = [name for name in _OTHER_KINDS if config.get(name)]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING_STARTS):
        used.append(f"init_lora_weights {start} (it changed the base's weights, too)")
    return ", ".join(used) or None


def open_adapter(folder: str | Path) -> AdapterFolder:
    """Read and check an adapter folder. Raises MissingInput, InputError for what is no LoRA adapter or is damaged."""
    folder = Path(folder)
    config = read_json(folder / CONFIG_NAME)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{folder / CONFIG_NAME}: expected the peft_type LORA, found {config.get('peft_type')!r}")
    if config.get("target_parameters"):  # its low-rank matrices are not shaped as those of layers
        raise InputError(
            f"{folder / CONFIG_NAME} has target_parameters {config['target_parameters']!r}: it changes parameters of a "
            "module (experts in one tensor, say), not linear layers, which is not read here; train it without them, or "
            "merge it into its base by PEFT's merge_and_unload()"
        )
    _check_numbers(config, folder / CONFIG_NAME)
    tensors = _read_tensors(folder)
    adapter = AdapterFolder(
        path=folder,
        base_name=str(config.get("base_model_name_or_path") or ""),
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        uses_dora=bool(config.get("use_dora")),
        uses_rslora=bool(config.get("use_rslora")),
        targets=tuple(_module_of(name) for name in tensors if ".lora_A." in name),
        tensors=tensors,
        alphas={key: float(alpha) for key, alpha in (config.get("alpha_pattern") or {}).items()},
        config=config,
    )
    _check_tensors(adapter, patterns=bool(config.get("rank_pattern")))
    return adapter


def _check_numbers(config: Mapping[str, Any], file: Path) -> None:
    """Ranks and alphas, the patterns' too: not one of them may merge wrong or fail later. Raises InputError."""
    for name, pattern, is_right, expected in (
        ("r", "rank_pattern", _is_rank, "a whole number above 0"),
        ("lora_alpha", "alpha_pattern", _is_finite, "a finite number"),
    ):
        if not is_right(config.get(name)):
            raise InputError(f"{file}: expected {expected} for {name!r}, found {config.get(name)!r}")
        by_name = config.get(pattern) or {}
        if not isinstance(by_name, dict):
            raise InputError(f"{file}: expected an object of layer names and numbers for {pattern!r}, found {by_name}")
        for key, value in by_name.items():
            if not is_right(value):
                raise InputError(f"{file}: expected {expected} for {key!r} in {pattern!r}, found {value!r}")
            try:
                re.compile(_ending(key))
            except re.error as error:
                raise InputError(f"{file}: {key!r} in {pattern!r} is no regular expression: {error}") from error


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # of a whole number beyond float's
        return False


def matches(key: str, module: str) -> bool:
    """Whether a pattern is a module's."""
    return re.match(_ending(key), module) is not None


def _ending(key: str) -> str:
    """PEFT's rule: a pattern is a regular expression for the end of a name, from a dot on."""
    return rf"(.*\.)?({key})$"


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    file = next((folder / name for name in _WEIGHTS_NAMES if (folder / name).is_file()), None)
    if file is None:
        raise MissingInput(f"no {' or '.join(_WEIGHTS_NAMES)} in {folder}; found: {list_folder(folder)}")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(f"{file} is damaged: {error}; copy or train it again") from error


def _module_of(name: str) -> str:
    return name.removeprefix(_PREFIX).rpartition(".lora_A.")[0]


def _check_tensors(adapter: AdapterFolder, *, patterns: bool) -> None:
    """Every A has its B, and their shapes are the config's rank."""
    if not adapter.targets:
        found = f"{len(adapter.tensors)} tensors, none of them lora_A"
        raise InputError(
            f"{adapter.path} holds an empty adapter ({found}): it was saved without its weights. Train it again"
        )
    for name, a in adapter.tensors.items():
        if ".lora_A." not in name:
            continue
        b = adapter.tensors.get(name.replace(".lora_A.", ".lora_B."))
        if b is None or b.shape[1] != a.shape[0] or (a.shape[0] != adapter.rank and not patterns):
            found = f"A {list(a.shape)}, B {'missing' if b is None else list(b.shape)}"
            raise InputError(f"{adapter.path}: expected rank {adapter.rank} for {_module_of(name)}, found {found}")
