"""Schemas of the kinds that programs ask for, each with an answer, and one for each keyword. For bench.structured."""

from typing import Any

_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "email": {"type": "string", "format": "email"},
    },
    "required": ["name", "age", "email"],
    "additionalProperties": False,
}
_TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "label": {"type": "string"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["label", "children"],
            "additionalProperties": False,
        }
    },
}
_ORDER = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{6}$"},
        "placed": {"type": "string", "format": "date-time"},
        "lines": {
            "type": "array",
            "minItems": 1,
            "maxItems": 20,
            "items": {
                "type": "object",
                "properties": {
                    "article": {"type": "string", "minLength": 1, "maxLength": 80},
                    "count": {"type": "integer", "minimum": 1, "maximum": 999},
                    "price": {"type": "number", "minimum": 0},
                    "colour": {"enum": ["red", "green", "blue", None]},
                },
                "required": ["article", "count", "price"],
                "additionalProperties": False,
            },
        },
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["id", "placed", "lines"],
    "additionalProperties": False,
}
_WIDE = {
    "type": "object",
    "properties": {f"field_{i}": {"type": ["string", "null"], "maxLength": 200} for i in range(100)},
    "required": [f"field_{i}" for i in range(0, 100, 2)],
    "additionalProperties": False,
}

SCHEMAS: dict[str, tuple[Any, Any]] = {
    "any object": ({"type": "object"}, {"animal": "alpaca", "legs": 4, "names": ["Ana", "Ben"], "is": {"wild": False}}),
    "person": (_PERSON, {"name": "María José Quispe", "age": 41, "email": "maria@example.org"}),
    "order": (
        _ORDER,
        {
            "id": "AB-123456",
            "placed": "2026-11-28T12:00:00Z",
            "lines": [
                {"article": "Scarf of alpaca wool", "count": 2, "price": 39.5, "colour": "red"},
                {"article": "Hat", "count": 1, "price": 20},
            ],
            "note": "Leave it at the door, please.",
        },
    ),
    "tree": (_TREE, {"label": "a", "children": [{"label": "b", "children": [{"label": "c", "children": []}]}]}),
    "choice": ({"enum": ["positive", "negative", "neutral"]}, "neutral"),
    "100 fields": (_WIDE, {f"field_{i}": f"text number {i}" for i in range(0, 100, 2)}),
}

# Asks for more than fits any answer.
LONG = {"type": "array", "items": _PERSON, "minItems": 1000}

# Keyword, schema, an answer that it allows, one that it does not.
KEYWORDS: list[tuple[str, Any, Any, Any]] = [
    ("enum", {"enum": ["a", 1]}, "a", "b"),
    ("const", {"const": {"a": 1}}, {"a": 1}, {"a": 2}),
    ("minLength", {"type": "string", "minLength": 3}, "abc", "ab"),
    ("maxLength", {"type": "string", "maxLength": 3}, "abc", "abcd"),
    ("pattern", {"type": "string", "pattern": "^a+$"}, "aa", "ab"),
    ("pattern, unanchored", {"type": "string", "pattern": "b"}, "abc", "ac"),
    ("format date", {"type": "string", "format": "date"}, "2026-11-28", "2026-13-01"),
    ("format uuid", {"type": "string", "format": "uuid"}, "123e4567-e89b-12d3-a456-426614174000", "123"),
    ("minimum", {"type": "integer", "minimum": 5}, 5, 4),
    ("exclusiveMaximum", {"type": "number", "exclusiveMaximum": 5}, 4.5, 5),
    ("multipleOf", {"type": "integer", "multipleOf": 5}, 15, 14),
    ("minItems", {"type": "array", "items": {"type": "integer"}, "minItems": 2}, [1, 2], [1]),
    ("maxItems", {"type": "array", "items": {"type": "integer"}, "maxItems": 2}, [1, 2], [1, 2, 3]),
    (
        "prefixItems",
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "null"}], "items": False},
        [1, None],
        [None, 1],
    ),
    ("uniqueItems", {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True}, [1, 2], [1, 1]),
    ("contains", {"type": "array", "items": {"type": "integer"}, "contains": {"const": 3}}, [1, 3], [1, 2]),
    ("required", {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"a": 1}, {}),
    (
        "additionalProperties",
        {"type": "object", "properties": {"a": {}}, "additionalProperties": False},
        {"a": 1},
        {"b": 1},
    ),
    (
        "patternProperties",
        {"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False},
        {"x1": 1},
        {"x1": "a"},
    ),
    ("propertyNames", {"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}}, {"abc": 1}, {"A1": 1}),
    ("minProperties", {"type": "object", "minProperties": 1}, {"a": 1}, {}),
    ("maxProperties", {"type": "object", "maxProperties": 1}, {"a": 1}, {"a": 1, "b": 2}),
    (
        "dependentRequired",
        {"type": "object", "properties": {"a": {}, "b": {}}, "dependentRequired": {"a": ["b"]}},
        {"a": 1, "b": 1},
        {"a": 1},
    ),
    ("anyOf", {"anyOf": [{"type": "integer"}, {"const": "a"}]}, "a", "b"),
    ("oneOf", {"oneOf": [{"type": "integer", "multipleOf": 2}, {"type": "integer", "multipleOf": 3}]}, 2, 6),
    ("oneOf, apart", {"oneOf": [{"type": "integer"}, {"type": "string"}]}, "a", None),
    ("allOf", {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]}, 4, 6),
    ("not", {"type": "string", "not": {"const": "a"}}, "b", "a"),
    (
        "if",
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {}},
            "if": {"properties": {"a": {"const": 1}}},
            "then": {"required": ["b"]},
        },
        {"a": 2},
        {"a": 1},
    ),
    ("no answer", {"type": "integer", "minimum": 5, "maximum": 4}, None, 5),
]
