"""A schema's numbers: either refused, or every answer validates."""

import json
import random

import jsonschema
import pytest

from alpaca.errors import InputError
from alpaca.serving.structured.constraints import Constraint, read_constraint
from alpaca.serving.structured.grammars import build, explain, make_tokenizer
from alpaca.serving.structured.numbers import is_exact
from alpaca.serving.structured.vocabulary import Vocabulary

PIECES = (b"", *(bytes([byte]) for byte in range(32, 127)))
TOKENIZER = make_tokenizer(Vocabulary(pieces=PIECES, eos_ids=(0,)))
BIG = 2**53 + 1


def answer(schema: dict, chance: random.Random, at_most: int = 1) -> str:
    """An answer by chance, which ends as soon as it may, or at any such place up to the last of `at_most` letters."""
    constraint = read_constraint(schema, "", "")
    assert constraint is not None
    matcher, found = build(constraint, TOKENIZER), b""
    while not matcher.is_stopped() and not (matcher.is_accepting() and chance.random() < max(len(found), 1) / at_most):
        mask = matcher.compute_bitmask()
        chosen = chance.choice([i for i in range(1, len(PIECES)) if mask[i // 8] >> i % 8 & 1])
        found += PIECES[chosen]
        assert matcher.consume_token(chosen)
    return found.decode()


def some_number(chance: random.Random) -> int | float:
    whole = chance.choice([1, -1]) * (chance.getrandbits(chance.randint(1, 62)) | 1)
    decimal = round(chance.uniform(-1, 1) * 10.0 ** chance.randint(-6, 12), chance.randint(0, 17))
    return chance.choice([whole, decimal])


@pytest.mark.parametrize("keyword", ["const", "enum", "bounds"])
def test_a_number_is_refused_or_followed(keyword):
    chance, num_followed = random.Random(keyword), 0
    for _ in range(150):
        number = some_number(chance)
        bounds = {"type": "number", "minimum": number, "maximum": number}
        schema = {"const": {"const": number}, "enum": {"enum": [[number]]}, "bounds": bounds}[keyword]
        if is_exact(number):
            num_followed += 1
            jsonschema.validate(json.loads(answer(schema, chance)), schema)
        else:
            with pytest.raises(InputError, match="cannot be followed exactly"):
                answer(schema, chance)
    assert 40 < num_followed < 150


@pytest.mark.parametrize("kind", ["integer", "number"])
def test_answers_keep_to_bounds_of_any_size(kind):
    """Those of 64 bits are usual."""
    chance = random.Random(kind)
    for _ in range(60):
        low, high = -chance.getrandbits(chance.randint(1, 80)), chance.getrandbits(chance.randint(1, 80)) + 1
        bounds = {
            chance.choice(["minimum", "exclusiveMinimum"]): low,
            chance.choice(["maximum", "exclusiveMaximum"]): high,
        }
        schema = {"type": kind, **bounds}
        try:
            found = json.loads(answer(schema, chance, at_most=40))
        except InputError:
            assert max(-low, high) <= 1, schema  # no whole number is between them
            continue
        jsonschema.validate(found, schema)
    text = json.dumps({"type": "integer", "maximum": 2**63 - 1, "minimum": -(2**63)})
    constraint = read_constraint(json.loads(text), "", "")
    assert json.loads(constraint.text) == {"type": "integer", "maximum": 2**53, "minimum": -(2**53)}


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"properties": {"id": {"enum": [18446744073709551617]}}}, "#/properties/id/enum/0"),
        ({"const": {"a/b": [1, BIG]}}, "#/const/a~1b/1"),
        ({"$defs": {"const": {"minimum": BIG}}}, "#/$defs/const/minimum"),
        ({"anyOf": [{"maximum": -BIG}]}, "#/anyOf/0/maximum"),
        ({"items": {"exclusiveMinimum": BIG}}, "#/items/exclusiveMinimum"),
        ({"exclusiveMaximum": -BIG}, "#/exclusiveMaximum"),
        ({"multipleOf": BIG}, "#/multipleOf"),
        ({"properties": {"default": {"const": 123456789.12345679}}}, "#/properties/default/const"),
    ],
)
def test_the_place_is_named(schema, place):
    with pytest.raises(InputError) as raised:
        read_constraint(schema, "", "")
    assert str(raised.value).startswith(f"json_schema at {place}: the number ")


def test_what_bears_on_no_answer_is_not_refused():
    schema = {"default": BIG, "examples": [{"const": BIG}], "description": "x", "const": 2**53, "enum": [2**53, 0.1]}
    assert read_constraint(schema, "", "") == Constraint(
        kind="json_schema", text=json.dumps(schema, separators=(",", ":"))
    )


def test_a_panic_is_not_shown():
    message = explain("panic: index out of range\nat a line of code")
    assert message.startswith("the library that follows grammars cannot read this one: make it simpler")
    assert "index" not in message
