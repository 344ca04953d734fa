"""JSON schemas of the shapes that programs ask for, made by chance: forms, records, unions, trees, tables, settings."""

import random
from typing import Any

Schema = dict[str, Any]
_WORDS = (
    "name",
    "age",
    "email",
    "tags",
    "price",
    "kind",
    "items",
    "due date",
    "größe",
    "is_open",
    "note",
    "a/b",
    "$id2",
)
_CHOICES = ("red", "green", "blue", "naïve", 'say "hi"', "", 1, 2.5, None, True)
_FORMATS = ("date", "date-time", "time", "email", "uuid", "ipv4", "ipv6", "hostname", "uri")
_PATTERNS = ("^[A-Z]{2}-[0-9]{3}$", "^(ab|cd)+$", "[0-9]", "^.{2,6}$", r"^\d{1,3}(\.\d)?$", "^[^,]{1,5}$")


def make_schema(seed: int) -> Schema:
    """The schema with this number."""
    return _Maker(random.Random(seed)).whole()


class _Maker:
    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._defs: dict[str, Schema] = {}

    def whole(self) -> Schema:
        schema = self._chance.choice([self.record, self.record, self.union, self.table, self.tree])(0)
        return {**schema, **({"$defs": self._defs} if self._defs else {})}

    def any(self, depth: int) -> Schema:
        plain = [self.text, self.number, self.choice, self.flag]
        nested = [self.record, self.table, self.union, self.reference] if depth < 3 else []
        return self._chance.choice([*plain, *nested])(depth + 1)

    def text(self, depth: int) -> Schema:
        kind = self._chance.randrange(4)
        if kind == 0:
            least = self._chance.randint(0, 3)
            return {"type": "string", "minLength": least, "maxLength": least + self._chance.randint(0, 9)}
        if kind == 1:
            return {"type": "string", "format": self._chance.choice(_FORMATS)}
        if kind == 2:
            return {"type": "string", "pattern": self._chance.choice(_PATTERNS), "maxLength": 12}
        return {"type": "string", "description": "a text", "maxLength": 20}

    def number(self, depth: int) -> Schema:
        least = self._chance.randint(-20, 20)
        schema: Schema = {"type": self._chance.choice(["integer", "number"])}
        schema[self._chance.choice(["minimum", "exclusiveMinimum"])] = least
        schema[self._chance.choice(["maximum", "exclusiveMaximum"])] = least + self._chance.randint(3, 2000)
        if schema["type"] == "integer" and self._chance.random() < 0.2:
            schema = {"type": "integer", "multipleOf": self._chance.choice([2, 5, 10]), "minimum": 0, "maximum": 500}
        return schema

    def choice(self, depth: int) -> Schema:
        if self._chance.random() < 0.3:
            return {"const": self._chance.choice(_CHOICES)}
        return {"enum": self._chance.sample(_CHOICES, self._chance.randint(1, 4))}

    def flag(self, depth: int) -> Schema:
        return {"type": self._chance.choice(["boolean", "null", ["boolean", "null"]])}

    def record(self, depth: int) -> Schema:
        names = self._chance.sample(_WORDS, self._chance.randint(1, 5))
        return {
            "type": "object",
            "title": "A record",
            "properties": {name: self.any(depth) for name in names},
            "required": [name for name in names if self._chance.random() < 0.7],
            "additionalProperties": self._chance.choice(
                [False, False, False, {"type": "integer", "maximum": 9, "minimum": 0}]
            ),
        }

    def table(self, depth: int) -> Schema:
        least = self._chance.randint(0, 2)
        if self._chance.random() < 0.2:
            return {"type": "array", "prefixItems": [self.any(depth), self.any(depth)], "items": False, "minItems": 2}
        return {
            "type": "array",
            "items": self.any(depth),
            "minItems": least,
            "maxItems": least + self._chance.randint(0, 2),
        }

    def union(self, depth: int) -> Schema:
        if self._chance.random() < 0.3:
            return {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": self._chance.randint(3, 30)}]}
        return {"anyOf": [self.any(depth), self.any(depth)]}

    def reference(self, depth: int) -> Schema:
        name = f"part{len(self._defs)}"
        self._defs[name] = {"type": "string", "maxLength": 3}  # its place, in case that it refers to itself
        self._defs[name] = self.any(depth)
        return {"$ref": f"#/$defs/{name}"}

    def tree(self, depth: int) -> Schema:
        node = {
            "type": "object",
            "properties": {
                "label": self.text(depth),
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["label", "children"],
            "additionalProperties": False,
        }
        self._defs["node"] = node
        return {"$ref": "#/$defs/node"}
