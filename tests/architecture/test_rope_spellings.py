"""The rotary settings are read as transformers reads them, in every spelling: its own rotary table is the judge."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from alpaca.architecture.rope import describe_other_theta, read_rope, spell_for_all
from alpaca.errors import InputError

HEAD_WIDTH = 16
SIZES = {
    "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 8,
    "max_position_embeddings": 256,
}  # fmt: skip
LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
NEW_LLAMA_3 = {"rope_type": "llama3", **LLAMA_3}
ABSENT = object()
THETAS = [ABSENT, 500.0, 70000]
OLDER = [
    ABSENT, None, {}, {"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 2}, NEW_LLAMA_3,
    {"type": "llama3", "rope_theta": 9000.0, **LLAMA_3}, {"rope_type": "linear", "type": "dynamic", "factor": 0.5},
]  # fmt: skip
NEWER = [
    ABSENT, None, {}, {"rope_type": "default", "rope_theta": 300.0}, {"type": "default"}, {"factor": 3.0},
    {"rope_type": "linear", "factor": 8.0, "rope_theta": 300.0}, {**NEW_LLAMA_3, "rope_theta": 300.0},
]  # fmt: skip
PARTS = {
    "llama3 without its old context": {"rope_scaling": {k: NEW_LLAMA_3[k] for k in list(NEW_LLAMA_3)[:-1]}},
    "llama3, the old context beside it": {"rope_scaling": NEW_LLAMA_3, "original_max_position_embeddings": 32},
    "LLaMA's default kind turns whole heads": {"partial_rotary_factor": 0.5},
    "a whole part": {"rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 1.0},
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0 + i / 9 for i in range(8)],
    "long_factor": [3.0 + i for i in range(8)],
}  # fmt: skip
SCALED = {
    "YaRN": {"rope_scaling": _YARN},
    "YaRN of another base": {"rope_scaling": {**_YARN, "rope_theta": 300.0}},
    "YaRN, its old context beside it": {"rope_scaling": _YARN, "original_max_position_embeddings": 32},
    "YaRN without an old context": {"rope_scaling": {"type": "yarn", "factor": 2.0}},
    "YaRN, a null factor": {"rope_parameters": {**_YARN, "factor": None}},
    "YaRN, other bounds": {"rope_parameters": {**_YARN, "beta_fast": 9, "beta_slow": 2.5}},
    "YaRN, bounds not rounded": {"rope_parameters": {**_YARN, "truncate": False}},
    "YaRN, a given factor": {"rope_parameters": {**_YARN, "attention_factor": 1.7}},
    "YaRN, two scales": {"rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.2}},
    "YaRN, one scale": {"rope_parameters": {**_YARN, "mscale": 0.7}},
    "YaRN that shortens": {"rope_parameters": {**_YARN, "factor": 0.5}},
    "dynamic, within the context": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "longrope": {"rope_parameters": {**_LONGROPE, "original_max_position_embeddings": 64}},
    "longrope with a factor": {"rope_parameters": {**_LONGROPE, "original_max_position_embeddings": 64, "factor": 9.0}},
    "longrope, a given factor": {"rope_parameters": {**_LONGROPE, "attention_factor": 1.4}},
    "longrope, its old context beside it": {"rope_scaling": _LONGROPE, "original_max_position_embeddings": 100},
}
REFUSED = {
    "no base": ({"rope_theta": None}, "'rope_theta'"),
    "a base of text": ({"rope_theta": "500"}, "'rope_theta'"),
    "a base of zero": ({"rope_theta": 0}, "'rope_theta'"),
    "an endless base": ({"rope_theta": math.inf}, "'rope_theta'"),
    "a base beyond floats": ({"rope_theta": 10**400}, "'rope_theta'"),
    "true for a base": ({"rope_theta": True}, "'rope_theta'"),
    "null within": ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "'rope_theta'"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "'factor'"),
    "a factor of text": ({"rope_scaling": {"type": "linear", "factor": "2"}}, "'factor'"),
    "no low factor": ({"rope_scaling": {**NEW_LLAMA_3, "low_freq_factor": None}}, "'low_freq_factor'"),
    "a null kind": ({"rope_scaling": {"type": None, "factor": 2.0}}, "name of a kind"),
    "a null kind before a named": (
        {"rope_scaling": {"rope_type": None, "type": "linear", "factor": 2.0}}, "name of a kind",
    ),
    "a kind that is a number": ({"rope_scaling": {"type": 3, "factor": 2.0}}, "name of a kind"),
    "a kind that is a list": ({"rope_parameters": {"rope_type": ["linear"], "factor": 2.0}}, "name of a kind"),
    "a word for an object": ({"rope_scaling": "linear"}, "expected an object for 'rope_scaling'"),
    "a list for an object": ({"rope_parameters": [2.0]}, "expected an object for 'rope_parameters'"),
    "half heads": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5}, "partial_rotary_factor",
    ),
    "half heads within": (
        {"rope_parameters": {**NEW_LLAMA_3, "partial_rotary_factor": 0.5}}, "partial_rotary_factor",
    ),
}  # fmt: skip


def given(**settings: object) -> dict[str, object]:
    """A config of its own: transformers writes into the objects it is given."""
    return copy.deepcopy({**SIZES, **{name: value for name, value in settings.items() if value is not ABSENT}})


def of_transformers(config: dict[str, object]) -> torch.Tensor:
    """transformers' own angles per position, [d/2] float32."""
    return LlamaRotaryEmbedding(LlamaConfig.from_dict(config)).inv_freq


def of_ours(config: dict[str, object]) -> torch.Tensor:
    rope = read_rope(config)
    return rope.scale(1.0 / rope.theta ** (torch.arange(0, HEAD_WIDTH, 2, dtype=torch.int64).float() / HEAD_WIDTH))


@pytest.mark.parametrize(("theta", "older", "newer"), list(itertools.product(THETAS, OLDER, NEWER)))
@pytest.mark.fast_rows(48)
def test_every_spelling_gives_the_angles_of_transformers(theta, older, newer):
    config = given(rope_theta=theta, rope_scaling=older, rope_parameters=newer)
    torch.testing.assert_close(of_ours(config), of_transformers(config), rtol=3e-7, atol=0)


def test_the_spellings_differ_from_each_other():
    """The table above could not fail if all of it came to the same angles."""
    found = {
        tuple(of_ours(given(rope_theta=theta, rope_scaling=older, rope_parameters=newer)).tolist())
        for theta, older, newer in itertools.product(THETAS, OLDER, NEWER)
    }
    assert len(found) == 19


@pytest.mark.parametrize("name", SCALED)
def test_scaled_kinds_give_the_angles_and_factors_of_transformers(name):
    config = given(**SCALED[name])
    theirs = LlamaRotaryEmbedding(LlamaConfig.from_dict(copy.deepcopy(config)))
    rope = read_rope(config)
    unscaled = 1.0 / rope.theta ** (torch.arange(0, HEAD_WIDTH, 2, dtype=torch.int64).float() / HEAD_WIDTH)
    for length in (10, rope.long_from or 200):
        theirs(torch.zeros(1), torch.arange(length)[None])
        found = rope.scale(unscaled, is_long=bool(rope.long_from) and length >= rope.long_from)
        torch.testing.assert_close(found, theirs.inv_freq, rtol=1e-6, atol=0)
    assert rope.table_factor == pytest.approx(theirs.attention_scaling)


@pytest.mark.parametrize(("theta", "older", "newer"), list(itertools.product(THETAS, OLDER, NEWER)))
@pytest.mark.fast_rows(48)
def test_what_is_written_for_all_programs_keeps_the_angles(theta, older, newer):
    """In the new spelling alone, in the old one alone, and in both: none of them may say another model."""
    config = given(rope_theta=theta, rope_scaling=older, rope_parameters=newer)
    written = spell_for_all(config)
    expected = of_transformers(config)
    for left_out in ((), ("rope_parameters",), ("rope_scaling", "rope_theta")):
        spelled = copy.deepcopy({name: value for name, value in written.items() if name not in left_out})
        torch.testing.assert_close(of_transformers(spelled), expected, rtol=3e-7, atol=0)


def test_settings_by_kinds_of_layers_and_absent_ones_stay_as_they_are():
    by_layers = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": {}}
    for config in (given(), given(rope_parameters=by_layers), given(rope_scaling=None)):
        assert spell_for_all(config) == config


def test_two_bases_that_differ_are_told_with_the_one_that_holds():
    older, newer = {"type": "linear", "factor": 2.0}, {"rope_type": "default", "rope_theta": 300.0}
    assert "the rotary base is 500, not the 300" in describe_other_theta(
        given(rope_theta=500.0, rope_scaling=older, rope_parameters=newer)
    )
    assert "the rotary base is 10000, not the 300" in describe_other_theta(
        given(rope_scaling=older, rope_parameters=newer)
    )
    assert describe_other_theta(given(rope_theta=300.0, rope_scaling=older, rope_parameters=newer)) == ""
    assert describe_other_theta(given(rope_theta=500.0, rope_parameters=newer)) == ""


@pytest.mark.parametrize("name", PARTS)
def test_numbers_from_beside_the_object(name):
    config = given(**PARTS[name])
    torch.testing.assert_close(of_ours(config), of_transformers(config), rtol=3e-7, atol=0)


@pytest.mark.parametrize("name", REFUSED)
def test_what_nobody_can_compute_is_refused(name):
    settings, message = REFUSED[name]
    with pytest.raises(InputError, match=f"^here: .*{message}"):
        read_rope(given(**settings), source="here")


@pytest.mark.parametrize("kind", ["proportional", "axial", "mine"])
def test_a_kind_without_a_formula_is_named_and_not_computed(kind):
    rope = read_rope(given(rope_scaling={"type": kind, "factor": 2.0}))
    assert rope.kind == kind
    with pytest.raises(InputError, match=f"rope type '{kind}' is not one of default, linear, llama3"):
        rope.scale(np.ones(2))


@pytest.mark.parametrize("settings", [{"type": "linear", "factor": 4.0}, NEW_LLAMA_3])
def test_numpy_in_float64_gives_the_same_as_torch_in_float64(settings):
    rope = read_rope(given(rope_theta=500.0, rope_scaling=settings))
    exponents = np.arange(0, HEAD_WIDTH, 2) / HEAD_WIDTH
    frequencies = 1.0 / rope.theta**exponents
    assert np.array_equal(rope.scale(frequencies), rope.scale(torch.from_numpy(frequencies)).numpy())


def test_divisors_are_the_frequencies_over_the_scaled_ones():
    """What llama.cpp stores for llama3: the kept share says how much each pair's frequency is divided by."""
    rope = read_rope(given(rope_theta=500.0, rope_scaling=NEW_LLAMA_3))
    frequencies = 1.0 / rope.theta ** (np.arange(0, HEAD_WIDTH, 2) / HEAD_WIDTH)
    share = rope.kept_share(frequencies)
    assert share.min() == 0
    assert share.max() == 1
    assert ((share > 0) & (share < 1)).any()
    divisors = 1 / ((1 - share) / rope.numbers["factor"] + share)
    assert np.allclose(frequencies / divisors, rope.scale(frequencies), rtol=1e-14)
