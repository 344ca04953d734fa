"""The rotary settings of config.json: every spelling of transformers, and what is none is named."""

import pytest

from alpaca.errors import InputError
from alpaca.formats.rope import read_rope

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 7e4}


@pytest.mark.parametrize(
    ("config", "rope"),
    [
        ({}, {"rope_type": "default", "rope_theta": 10000.0}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_parameters": LINEAR, "rope_scaling": None, "rope_theta": 1.0}, LINEAR),
        ({"rope_theta": 7e4, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, LINEAR),
        ({"rope_theta": 7e4, "rope_scaling": {"type": "linear", "factor": 4.0}}, {**LINEAR, "type": "linear"}),
    ],
)
def test_every_spelling_is_read(config: dict[str, object], rope: dict[str, object]):
    assert read_rope(config) == rope


@pytest.mark.parametrize("values", [{"rope_scaling": "linear"}, {"rope_parameters": [4.0]}])
def test_what_is_no_object_is_refused(values: dict[str, object]):
    with pytest.raises(InputError, match="expected objects for rope_scaling and rope_parameters, found"):
        read_rope(values)
