"""What a request may ask its answer to follow, and what is refused before any work on it."""

import time

import pytest

from alpaca.errors import InputError
from alpaca.serving.request import PredictionInputs
from alpaca.serving.structured.constraints import (
    MOST_GRAMMAR_CHARACTERS,
    MOST_REGEX_CHARACTERS,
    MOST_SCHEMA_CHARACTERS,
    Constraint,
    read_constraint,
)


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


def test_one_of_three_or_none():
    assert read_constraint(None, "", "") is None
    assert read_constraint(None, "a+", "") == Constraint(kind="regex", text="a+")
    assert read_constraint(None, "", "start: A") == Constraint(kind="grammar", text="start: A")
    schema = {"required": ["é"], "type": "object"}  # the order of keys is that of the answer's
    assert read_constraint(schema, "", "").text == '{"required":["é"],"type":"object"}'
    assert read_constraint({}, "", "") == Constraint(kind="json_schema", text="{}")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (({}, "a", ""), "json_schema and regex do not go together"),
        ((None, "a", "b"), "regex and grammar do not go together"),
        (({}, "a", "b"), "json_schema and regex and grammar do not go together"),
        (("{}", "", ""), "json_schema must be an object; found '{}'"),
        (([1], "", ""), "json_schema must be an object"),
        (({"const": float("nan")}, "", ""), "json_schema cannot be written as JSON"),
        ((nested(65), "", ""), "json_schema may be nested 64 deep; found more"),
        ((nested(5000), "", ""), "json_schema may be nested 64 deep; found more"),
        (({"enum": ["x" * 10_000_000]}, "", ""), "json_schema may have 65,536 characters; found more"),
        (({"x" * 10_000_000: {}}, "", ""), "json_schema may have 65,536 characters; found more"),
        (({"enum": [[]] * 10_000_000}, "", ""), "json_schema may have 65,536 characters; found more"),
        (
            ({"enum": ['"' * (MOST_SCHEMA_CHARACTERS - 100)]}, "", ""),
            "json_schema may have 65,536 characters; found 13",
        ),
        ((None, "a" * (MOST_REGEX_CHARACTERS + 1), ""), "regex may have 8,192 characters; found 8,193"),
        ((None, "", "a" * (MOST_GRAMMAR_CHARACTERS + 1)), "grammar may have 32,768 characters; found 32,769"),
        ((None, "a\0", ""), "regex holds a NUL character"),
    ],
)
def test_what_is_refused_before_any_work(given, message):
    begun = time.perf_counter()
    with pytest.raises(InputError, match=message):
        read_constraint(*given)
    assert time.perf_counter() - begun < 0.05


def test_the_deepest_schema_is_taken():
    assert read_constraint(nested(64), "", "").text.count("items") == 63


@pytest.mark.parametrize("given", [{"json_schema": {}}, {"regex": "a"}, {"grammar": "start: A"}])
def test_beam_search_follows_nothing(given):
    (name,) = given
    with pytest.raises(InputError, match=f"beam search follows no {name}: leave it out"):
        PredictionInputs(prompt="a", num_beams=2, **given).check()
