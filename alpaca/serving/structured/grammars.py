"""The way to llguidance, which says of each token whether an answer may go on with it. Only this module imports it.

llguidance never raises for what a client sent: a matcher that met an error stays in it, and is asked.
"""

import json
import re
from collections.abc import Callable

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from alpaca.errors import InputError
from alpaca.serving.structured.constraints import Constraint
from alpaca.serving.structured.vocabulary import Encode, Vocabulary

# The bounds of the library's own work, in its units. A token's mask may take some 50 ms at 128,000 rows, and is found
# beside the engine's thread.
_LIMITS = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 30_000,
    "step_max_items": 10_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 10_000,  # about 3 kB each
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
# As json.dumps writes: free white space would let a model go on for ever without a word. The rest may not be changed by
# the schema's own x-guidance, since an answer is to validate.
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False}
_MOST_FORCED_BYTES = 8192  # a schema that requires itself would have a text without end
_SHOWN_CHARACTERS = 400


class _Pieces:
    """A vocabulary in the form that llguidance reads."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, encode: Encode) -> None:
        self.tokens = list(vocabulary.pieces)
        self.eos_token_id = vocabulary.eos_ids[0]
        self.special_token_ids = [token_id for token_id, piece in enumerate(vocabulary.pieces) if not piece]
        self._encode = encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode(errors="replace"))


def make_tokenizer(vocabulary: Vocabulary, encode: Encode | None = None) -> LLTokenizer:
    """What matchers share.

    encode: how a text that must come is cut into tokens; if not given, into the longest pieces. Raises InputError.
    """
    if not vocabulary.eos_ids:
        raise InputError("this model's configs name no EOS, and an answer that follows a constraint ends by one")
    pieces = _Pieces(vocabulary, encode or (lambda text: vocabulary.cut(text.encode())))
    try:
        return LLTokenizer(pieces, n_vocab=len(vocabulary.pieces), eos_token=list(vocabulary.eos_ids))
    except ValueError as error:
        raise InputError(f"constraints cannot be followed with this model's vocabulary: {error}") from None


def build(constraint: Constraint, tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher at the beginning of an answer, its first mask found. Raises InputError."""
    matcher = _start(constraint, tokenizer)
    if matcher.is_error():
        raise InputError(_describe(constraint, matcher, tokenizer))
    matcher.compute_bitmask()
    if matcher.is_error():
        raise InputError(_describe(constraint, matcher, tokenizer))
    if len(matcher.compute_ff_bytes()) > _MOST_FORCED_BYTES:
        raise InputError(
            f"{constraint.kind} allows nothing but texts that begin with the same {_MOST_FORCED_BYTES:,} bytes: "
            "does a part of it require itself?"
        )
    return matcher


def _start(constraint: Constraint, tokenizer: LLTokenizer) -> LLMatcher:
    try:
        if constraint.kind == "json_schema":
            grammar = LLMatcher.grammar_from_json_schema(constraint.text, overrides=_JSON)
        elif constraint.kind == "regex":
            grammar = LLMatcher.grammar_from_regex(constraint.text)
        else:
            grammar = LLMatcher.grammar_from_lark(constraint.text)
    except ValueError as error:
        raise InputError(f"{constraint.kind}: {_shorten(str(error))}") from None
    return LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**_LIMITS))


# Errors that name the place -------------------------------------------------------------------------------------------


def _describe(constraint: Constraint, matcher: LLMatcher, tokenizer: LLTokenizer) -> str:
    problem = explain(matcher.get_error())
    if constraint.kind == "json_schema":
        return f"json_schema{_find_pointer(constraint, problem, tokenizer)}: {_shorten(problem)}"
    if constraint.kind == "regex":
        return f"regex{_find_character(problem)}: {_shorten(_last_error(problem))}"
    place = re.match(r"(?:at )?(\d+)\((\d+)\): ", problem)
    where = f", line {place[1]}, column {place[2]}" if place else ""
    return f"grammar{where}: {_shorten(problem[place.end() :] if place else problem)}"


def explain(error: str) -> str:
    """An error of llguidance in a user's words."""
    error = error.replace("<non-verbose/>", "").strip()
    if error.startswith("NoExtension"):
        return "no text can follow it"
    if error.startswith("panic"):
        return (
            "the library that follows grammars cannot read this one: make it simpler, without empty texts in lists "
            "and without control tokens (<name>), which cannot be named"
        )
    return error


def _last_error(problem: str) -> str:
    found = re.findall(r"^error: (.*)$", problem, re.MULTILINE)
    return found[-1] if found else problem


def _find_character(problem: str) -> str:
    """The place that the parser of expressions marks by ^ below its first line."""
    marked = re.search(r"regex parse error:\n {4}.*\n {4}( *)\^", problem)
    return f", character {len(marked[1]) + 1}" if marked else ""


_MOST_TRIALS = 500
_NAMED = ("$defs", "definitions", "properties", "patternProperties")  # the first ones are what the others refer to
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "additionalItems")


def _find_pointer(constraint: Constraint, problem: str, tokenizer: LLTokenizer) -> str:
    """ " at POINTER", of the innermost part that by itself has the same problem; nothing for the whole schema."""
    root = json.loads(constraint.text)
    shared = {name: root[name] for name in ("$defs", "definitions") if isinstance(root.get(name), dict)}
    room = _MOST_TRIALS

    def has_problem(part: object) -> bool:
        nonlocal room
        room -= 1
        if room < 0 or not isinstance(part, dict):
            return False
        text = json.dumps({**shared, **part}, ensure_ascii=False)
        try:
            matcher = _start(Constraint(kind="json_schema", text=text), tokenizer)
        except InputError:
            return False
        return matcher.is_error() and explain(matcher.get_error()) == problem

    pointer, part = "", root
    while found := _first_with(part, has_problem):
        step, part = found
        pointer += step
    return f" at #{pointer}" if pointer else ""


def _first_with(schema: dict, has_problem: Callable[[object], bool]) -> tuple[str, dict] | None:
    for key in (*_NAMED, *_LISTED, *_SINGLE):
        inner = schema.get(key)
        if key in _NAMED and isinstance(inner, dict):
            parts = {f"/{key}/{_escape(name)}": part for name, part in inner.items()}
        elif key in _LISTED and isinstance(inner, list):
            parts = {f"/{key}/{index}": part for index, part in enumerate(inner)}
        else:
            parts = {f"/{key}": inner} if key in _SINGLE else {}
        for step, part in parts.items():
            if has_problem(part):
                return step, part
    return None


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
