"""The random LLaMA is a model like any other, with Meta's tokenizer or without."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from alpaca.errors import MissingInput
from alpaca.text.loading import load_tokenizer
from bench.random_model import VOCAB_SIZE, Shape, model_folder, write_random_llama
from bench.rows import Prompts, Row

SHAPE = Shape(width=32, num_layers=2, num_heads=2, ffn_width=48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Made with a made-up tokenizer."""
    path = tmp_path_factory.mktemp("random")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ALPACA_REAL", raising=False)
        write_random_llama(path, SHAPE, torch.float32)
    return path


def test_logits_are_neither_flat_nor_overflowing(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    logits = model(torch.arange(300, 340)[None]).logits
    assert logits.shape == (1, 40, VOCAB_SIZE)
    assert 1 < logits.std() < 4


def test_prompts_have_their_length_and_no_two_are_alike(folder):
    tokenizer = load_tokenizer(folder)
    row = Row(name="r", way="engine", num_requests=4, clients=4, prompt_tokens=(16, 16), new_tokens=(2, 9))
    inputs = [values for seed in ("round 0", "round 1") for values in Prompts(tokenizer).inputs(row, seed)]
    assert {len(tokenizer.prefix_ids) + len(tokenizer.encode(values.prompt)) for values in inputs} == {16}
    assert len({values.prompt for values in inputs}) == 8
    assert all(2 <= values.max_new_tokens == values.min_new_tokens <= 9 for values in inputs)


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(MissingInput, match=r"no config\.json"), model_folder(tmp_path, "46m", "float32"):
        raise AssertionError("unreachable")
