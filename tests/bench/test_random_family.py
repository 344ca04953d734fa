"""The random families are of the size that is said, and the engine computes every one of them."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from alpaca.architecture.description import ModelDescription
from alpaca.serving.llama.weights import TAKEN, supports
from bench.random_family import SIZES, make_config


def test_every_family_of_the_engine_is_there():
    assert {*SIZES, "llama"} == {*TAKEN}


@pytest.mark.parametrize("family", SIZES)
def test_they_are_small_models_with_many_tokens(family):
    config = make_config(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    described = ModelDescription.from_config({**config.to_dict(), "model_type": family})
    assert supports(described) is None
    assert described.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert 40e6 <= described.num_parameters <= 62e6
