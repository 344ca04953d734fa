"""Folders that transformers cannot load, or whose config says little, are named in one sentence that helps."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alpaca.errors import AlpacaError, InputError, MissingPackage
from alpaca.serving.hugging_face.engine import load_transformers_engine
from alpaca.serving.hugging_face.fitness import choose_context, naming_the_folder
from alpaca.serving.settings import ServerSettings
from bench.model_types import write_tokenizer
from bench.tiny_models import CONTEXT, tiny_model


@pytest.fixture(scope="module")
def opt(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("opt") / "opt"
    tiny_model("opt").save_pretrained(folder)
    write_tokenizer(folder, 400)
    return folder


@pytest.fixture
def changed(opt, tmp_path) -> Callable[..., Path]:
    """A copy of the folder, whose config.json has other values."""

    def change(**values: object) -> Path:
        folder = shutil.copytree(opt, tmp_path / "w")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))
        return folder

    return change


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": None}, "expected a whole number from 1 for 'hidden_size', found None"),
        ({"num_hidden_layers": "2"}, "expected a whole number from 1 for 'num_hidden_layers', found '2'"),
        ({"num_attention_heads": 0}, "expected a whole number from 1 for 'num_attention_heads', found 0"),
        ({"max_position_embeddings": "2048"}, "expected a whole number from 1 for 'max_position_embeddings', found"),
        ({"rope_scaling": "linear"}, "expected an object for 'rope_scaling', found 'linear'"),
        ({"quantization_config": "gptq"}, "expected an object for 'quantization_config', found 'gptq'"),
        ({"model_type": None}, "expected the name of a type for 'model_type', found None"),
        ({"text_config": {"vocab_size": "400"}}, "expected a whole number from 1 for 'vocab_size', found '400'"),
    ],
)
def test_values_of_wrong_types_are_named_with_their_file(changed, values, message):
    folder = changed(**values)
    with pytest.raises(InputError, match=f"{folder / 'config.json'}: {message}"):
        load_transformers_engine(folder, ServerSettings())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"max_position_embeddings": None},
            r"(?s)w cannot be loaded .*'max_position_embeddings' expected int, got NoneType",
        ),
        ({"model_type": "newer"}, "w cannot be loaded as a causal language model: .*model type `newer`"),
        ({"dropout": "x"}, "w cannot be loaded as a causal language model: .*'dropout'"),
    ],
)
def test_what_transformers_says_of_a_config_is_told_with_the_folder(changed, values, message):
    with pytest.raises(AlpacaError, match=message):
        load_transformers_engine(changed(**values), ServerSettings())


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (
            ImportError("needs hqq from https://there"),
            MissingPackage,
            r"opt \(opt\) needs a package .*: pip install hqq$",
        ),
        (ModuleNotFoundError("No module named 'torchao'", name="torchao"), MissingPackage, "pip install torchao$"),
        (MissingPackage("w lacks hqq: No module named 'hqq'"), MissingPackage, "^w lacks hqq: .*: pip install hqq$"),
        (ImportError("try `pip install aqlm[gpu]`"), MissingPackage, r"not here: try `pip install aqlm\[gpu\]`$"),
        (AttributeError("'str' object has no attribute 'get'"), InputError, r"opt \(opt\) cannot be loaded .*'get'"),
        (AssertionError(), InputError, "AssertionError: it says no more"),
        (ValueError("set `ignore_mismatched_sizes`"), InputError, "other shapes than its config.json says"),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, "out of memory"),
        (RuntimeError("CUDA error: device-side assert"), RuntimeError, "^CUDA error"),
    ],
)
def test_whatever_a_folder_makes_transformers_raise_names_it(opt, raised, error, message):
    with pytest.raises(error, match=message), naming_the_folder(opt):
        raise raised


@pytest.mark.parametrize(
    ("kind", "own"),
    [("mamba", None), ("bloom", None), ("gpt2", CONTEXT), ("mpt", CONTEXT), ("rwkv", CONTEXT), ("xlnet", None)],
)
def test_the_context_is_the_models_wherever_it_says_it(kind, own, caplog):
    """XLNet says -1, BLOOM and Mamba nothing: such models go as far as they are asked to."""
    caplog.set_level(logging.INFO)
    model = tiny_model(kind)
    assert choose_context(model, ServerSettings()) == (own or 2048)
    assert choose_context(model, ServerSettings(max_context=100)) == 100
    assert choose_context(model, ServerSettings(max_context=5000)) == (own or 5000)
    assert ("config names no context: 2048 tokens" in caplog.text) == (own is None)
    assert ("is cut to the model's context" in caplog.text) == (own is not None)


def test_robertas_positions_start_behind_its_padding():
    model = tiny_model("roberta")
    longest = choose_context(model, ServerSettings())
    assert longest == CONTEXT - 1  # its padding is row 0 here, and 1 as a rule
    with torch.inference_mode():
        assert model(input_ids=torch.full((1, longest), 5)).logits.isfinite().all()
        with pytest.raises((IndexError, RuntimeError), match=r"out of|must match|larger"):
            model(input_ids=torch.full((1, longest + 1), 5))
