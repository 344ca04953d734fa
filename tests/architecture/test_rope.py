"""The rotary settings of config.json: every spelling of transformers, and its formulas."""

import numpy as np
import pytest
import torch

from alpaca.architecture.rope import Rope, read_rope
from alpaca.errors import InputError

LINEAR = Rope(kind="linear", theta=7e4, numbers={"factor": 4.0})
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("config", "rope"),
    [
        ({}, Rope()),
        ({"rope_theta": 5e5, "rope_scaling": None}, Rope(theta=5e5)),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 7e4}, "rope_theta": 1.0}, LINEAR),
        ({"rope_theta": 7e4, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, LINEAR),
        ({"rope_theta": 7e4, "rope_scaling": {"type": "linear", "factor": 4.0}}, LINEAR),
        ({"rope_theta": 777.0, "rope_parameters": {"rope_type": "default"}}, Rope(theta=777.0)),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"rope_theta": 9.0}},
         Rope(kind="linear", numbers={"factor": 4.0})),  # replaced as a whole, its base too
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, Rope(kind="yarn")),
    ],
)  # fmt: skip
def test_every_spelling_is_read(config: dict[str, object], rope: Rope):
    assert read_rope(config) == rope


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": "linear"}, "expected an object for 'rope_scaling', found 'linear'"),
        ({"rope_parameters": [4.0]}, r"expected an object for 'rope_parameters', found \[4.0\]"),
        ({"rope_theta": "10000"}, "needs a number above 0 for 'rope_theta'; found '10000'"),
        ({"rope_theta": None}, "needs a number above 0 for 'rope_theta'; found None"),
        ({"rope_theta": True}, "needs a number above 0 for 'rope_theta'; found True"),
        ({"rope_theta": float("inf")}, "needs a number above 0 for 'rope_theta'; found inf"),
        ({"rope_scaling": {"type": "linear"}}, "rope type 'linear' needs a number above 0 for 'factor'; found None"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, "low_freq_factor below high"),
    ],
)
def test_what_cannot_be_meant_is_refused(config: dict[str, object], message: str):
    with pytest.raises(InputError, match=message):
        read_rope(config)


def test_the_formulas_are_transformers():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    plain = 1.0 / 5e5 ** (torch.arange(0, 16, 2, dtype=torch.int64).float() / 16)
    for kind, numbers in (("default", {}), ("linear", {"factor": 4.0}), ("llama3", LLAMA3)):
        settings = {"rope_type": kind, "rope_theta": 5e5, **numbers}
        config = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=settings)
        found = Rope(kind=kind, theta=5e5, numbers=numbers).scale(plain)
        torch.testing.assert_close(found, LlamaRotaryEmbedding(config).inv_freq, rtol=1e-6, atol=0)


def test_numpy_and_torch_are_one():
    frequencies = 1.0 / 5e5 ** (np.arange(0, 16, 2) / 16)
    rope = Rope(kind="llama3", theta=5e5, numbers=LLAMA3)
    np.testing.assert_array_equal(rope.scale(frequencies), rope.scale(torch.from_numpy(frequencies)).numpy())


def test_an_unknown_kind_has_no_formula():
    with pytest.raises(InputError, match="rope type 'yarn' is not one of default, linear, llama3"):
        Rope(kind="yarn").scale(np.ones(4))
