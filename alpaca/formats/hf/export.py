"""A base model with an adapter merged into it, written as a Hugging Face folder of its own."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from alpaca.architecture.rope import spell_for_all
from alpaca.architecture.tensors import hf_name
from alpaca.errors import InputError, MissingInput
from alpaca.files.atomic import replaced_folder, write_json
from alpaca.files.outputs import check_overwrite, require_apart, require_free_space
from alpaca.files.progress import byte_bar
from alpaca.files.reading import list_folder, read_json
from alpaca.formats.hf.adapters import open_adapter
from alpaca.formats.hf.base_model import find_base
from alpaca.formats.hf.folder import FLOAT_DTYPES, TensorSpec, WeightsFolder
from alpaca.formats.hf.merge_check import compare_logits
from alpaca.formats.hf.merging import MergedWeights, open_merged
from alpaca.formats.hf.pickled import open_model_weights
from alpaca.formats.hf.writing import write_weights
from alpaca.text.loading import load_tokenizer
from alpaca.text.tokenizer import Tokenizer

_TOKENIZER_NAMES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "vocab.json")
_ALSO_COPIED = ("generation_config.json", "chat_template.jinja", "prompt_template.json")
_HEAD = hf_name("head")
_SPARE_BYTES = 16 << 20  # configs, tokenizer, file system


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The command's flags. base_model None: environment_base_model, else what the adapter names.

    environment_base_model: BASE_MODEL.    base_quantization None: as the adapter's folder says.
    """

    base_model: str | None
    environment_base_model: str | None
    adapter: Path
    output_dir: Path
    dtype: str
    max_shard_size: int
    base_quantization: str | None
    check_logits: str
    overwrite: bool


def export(config: ExportConfig) -> Path:
    """Write the merged folder and return it. Raises the errors of `alpaca.errors`; writes nothing then."""
    check_overwrite(config.output_dir, config.overwrite)
    adapter = open_adapter(config.adapter)
    found = find_base(adapter, flag="--base_model", named=config.base_model, environment=config.environment_base_model)
    base = found.folder
    require_apart(config.output_dir, {"--base_model": base, "--adapter": config.adapter})
    merged = open_merged(
        open_model_weights(base),
        config.adapter,
        quantization=config.base_quantization,
        dtype=FLOAT_DTYPES.get(config.dtype),
        device="cuda" if torch.cuda.is_available() else "cpu",
        base_is_named=found.is_named,
    )
    tokenizer = find_tokenizer(config.adapter, base, merged)
    print(f"{adapter.describe()}; base: {found.note}{_quantized_note(merged)}")
    specs = merged.specs()
    require_free_space(config.output_dir, sum(spec.num_bytes for spec in specs) + _SPARE_BYTES)
    with replaced_folder(config.output_dir, overwrite=config.overwrite) as partial:
        _write_model(partial, merged, specs, tokenizer, config)
        print(merged.describe())
        print(compare_logits(partial, merged, tokenizer, when=config.check_logits))
    return config.output_dir


def find_tokenizer(adapter: Path, base: Path, merged: MergedWeights) -> Tokenizer:
    """The adapter's own tokenizer, else the base's. Raises MissingInput, InputError where it is another model's."""
    for folder in (adapter, base):
        if any((folder / name).is_file() for name in _TOKENIZER_NAMES):
            tokenizer = load_tokenizer(folder)
            num_rows = embedding_rows(merged)
            tokenizer.require_rows(num_rows, base)
            if tokenizer.size > num_rows:
                raise InputError(
                    f"the tokenizer in {folder} has {tokenizer.size} tokens, the merged embedding {num_rows} rows: "
                    "it is not the one the adapter was trained with"
                )
            return tokenizer
    raise MissingInput(f"no tokenizer in {adapter} or {base}; found: {list_folder(adapter)} and {list_folder(base)}")


def embedding_rows(weights: MergedWeights | WeightsFolder) -> int:
    """Rows of the input embedding."""
    ends = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight")
    rows = [spec.shape[0] for spec in weights.specs() if spec.name.endswith(ends)]
    if not rows:
        raise InputError(f"{weights.path} has no embedding that is known here ({', '.join(ends)})")
    return rows[0]


def _quantized_note(merged: MergedWeights) -> str:
    return "" if merged.quantization == "none" else f", taken as {merged.quantization} has it, as in training"


def _write_model(
    folder: Path, merged: MergedWeights, specs: list[TensorSpec], tokenizer: Tokenizer, config: ExportConfig
) -> None:
    with byte_bar(sum(spec.num_bytes for spec in specs), "merging") as bar:

        def read(spec: TensorSpec) -> Iterator[torch.Tensor]:
            yield merged.tensor(spec.name)

        write_weights(folder, specs, read, max_shard_size=config.max_shard_size, progress=bar.update)
    merged.require_change()
    write_json(folder / "config.json", merged_config(merged, specs))
    for name in _ALSO_COPIED:
        found = next((path for path in (config.adapter / name, merged.path / name) if path.is_file()), None)
        if found is not None:
            shutil.copyfile(found, folder / name)
    tokenizer.save(folder)
    _verify(folder, merged, specs)


def merged_config(merged: MergedWeights, specs: list[TensorSpec]) -> dict[str, object]:
    """The base's config.json with what the merged tensors are: their dtype, added rows, and whether the head is tied.

    Its rotary settings stand in the old spelling and in the new one.
    """
    config = read_json(merged.path / "config.json")
    dtype = str(max(specs, key=lambda spec: spec.num_bytes).dtype).removeprefix("torch.")
    config = spell_for_all(config) | {"dtype": dtype, "torch_dtype": dtype}
    config.pop("quantization_config", None)
    if not merged.is_tied and _HEAD in merged.names:
        config["tie_word_embeddings"] = False
    if merged.num_added_rows:
        config["vocab_size"] = embedding_rows(merged)
    return config


def _verify(folder: Path, merged: MergedWeights, specs: list[TensorSpec]) -> None:
    """Read the headers back, and of each file the first and the last tensor. Raises InputError where one differs."""
    written = WeightsFolder(folder)
    found = {spec.name: spec for spec in written.specs()}
    assert found == {spec.name: spec for spec in specs}
    last = {file: name for name, file in written.file_of.items()}
    first = {file: name for name, file in reversed(written.file_of.items())}
    for name in {*first.values(), *last.values()}:
        if not torch.equal(written.tensor(name), merged.tensor(name)):
            raise InputError(f"{folder}: {name} reads back as other values than were written; is the disk damaged?")
