"""What the conversion's tests share: tokenizers of both kinds, a tiny Llama 3.1, a trained model, differences."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from alpaca.formats.diff.making import DiffConfig, make_diff
from alpaca.text.loading import load_tokenizer
from tests.formats.diff_sources import TABLE, add_pad_rows, frequencies, load, original_difference, train
from tests.formats.meta_sources import FAMILIES, NUM_RANKS, random_model, write
from tests.text.test_tiktoken_files import write_tiktoken
from tests.tiny import train_tokenizer


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> dict[bool, tuple[Path, int]]:
    """Llama 3's kind (True) and the older one: the file and its number of ids, which divides by 8."""
    folder = tmp_path_factory.mktemp("tokenizers")
    new = write_tiktoken(folder / "new" / "tokenizer.model", num_ranks=NUM_RANKS)
    return {True: (new, NUM_RANKS + 256), False: (train_tokenizer(folder / "old", vocab_size=400), 400)}


@pytest.fixture
def llama_3_1(tmp_path, tokenizers) -> tuple[Path, dict[str, torch.Tensor], Path]:
    """A one-shard Llama 3.1 at tmp_path/in, its tensors and its tokenizer."""
    family = FAMILIES["Llama 3.1"]
    tokenizer, vocab_size = tokenizers[True]
    tensors = random_model(family, vocab_size)
    return write(tmp_path / "in", family, [tensors], tokenizer), tensors, tokenizer


@pytest.fixture(scope="session")
def trained(tmp_path_factory, llama_folder) -> Path:
    """llama_folder, fine-tuned in float32 with a [PAD] row more; not to be changed."""
    folder = tmp_path_factory.mktemp("trained") / "tuned"
    model, tokenizer = load(llama_folder), load_tokenizer(llama_folder)
    tokenizer.add_pad_token()
    add_pad_rows(model, model.config.vocab_size + 1)
    train(model, 40)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory, llama_folder, trained) -> Path:
    """A diff of the trained model; not to be changed."""
    return make_diff(
        DiffConfig(path_raw=llama_folder, path_tuned=trained, path_diff=tmp_path_factory.mktemp("made") / "diff")
    )


@pytest.fixture
def diff(tmp_path, made) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "diff"))


@pytest.fixture
def old_diff(tmp_path, llama_folder, trained) -> Path:
    """As Stanford's: two pickles with an index, rotary tables among the tensors, no manifest."""
    folder = tmp_path / "old"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = original_difference(llama_folder, trained)
    tensors |= {TABLE.format(layer): torch.zeros_like(frequencies(trained)) for layer in range(2)}
    names = list(tensors)
    files = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, part in files.items():
        torch.save({name: tensors[name].clone() for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder
