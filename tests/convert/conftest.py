"""What the conversion's tests share: tokenizers of both kinds, and a tiny Llama 3.1."""

from pathlib import Path

import pytest
import torch

from tests.convert.meta_sources import FAMILIES, NUM_RANKS, random_model, write
from tests.test_tiktoken_files import write_tiktoken
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
