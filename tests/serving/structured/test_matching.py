"""A mask allows exactly the tokens after which some answer is still possible, whatever the tokenizer is.

The oracle writes every text of a small language down and compares beginnings, byte by byte.
"""

import itertools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from alpaca.errors import InputError
from alpaca.serving.structured.compiling import Compiler
from alpaca.serving.structured.constraints import Constraint
from alpaca.serving.structured.matching import Matcher
from alpaca.serving.structured.vocabulary import Vocabulary, encoder
from alpaca.text.eos import read_eos_ids
from alpaca.text.loading import load_tokenizer
from alpaca.text.sentencepiece import write_llama_tokenizer
from alpaca.text.tiktoken import TiktokenModel
from alpaca.text.tokenizer import Tokenizer
from tests.serving.structured.letters import allowed
from tests.text.test_tiktoken_files import write_tiktoken
from tests.tiny import TEXT, train_tokenizer

LANGUAGES = {
    r"a{1,3}": ["a", "aa", "aaa"],
    r" ?(Lima|the 🦙)é?": [f"{a}{b}{c}" for a in ("", " ") for b in ("Lima", "the 🦙") for c in ("", "é")],
    r"[0-3][\t\n ][สด]": [f"{a}{b}{c}" for a in "0123" for b in "\t\n " for c in "สด"],
    r"|<s>|</s>x": ["", "<s>", "</s>x"],
}


def byte_level(folder: Path) -> None:
    """As GPT-2's and OPT's: byte-level BPE with an EOS, through transformers."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def sentencepiece(folder: Path) -> None:
    write_llama_tokenizer(train_tokenizer(folder / "source"), folder, max_length=2048)


def tiktoken(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    TiktokenModel(write_tiktoken(folder / "model", num_ranks=400), instruct=True).save(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [401, 408, 409]}))


KINDS = {"sentencepiece": sentencepiece, "byte-level": byte_level, "tiktoken": tiktoken}


@pytest.fixture(scope="module", params=KINDS)
def known(request, tmp_path_factory) -> tuple[Tokenizer, frozenset[int]]:
    """A tokenizer, and the ids that end an answer."""
    folder = tmp_path_factory.mktemp("tokenizer") / request.param
    KINDS[request.param](folder)
    tokenizer = load_tokenizer(folder)
    return tokenizer, read_eos_ids(folder, tokenizer, vocab_size=tokenizer.size)


@pytest.fixture(scope="module")
def compiler(known):
    compiler = Compiler(known[0], known[0].size, known[1])
    yield compiler
    compiler.close()


def start(compiler: Compiler, kind: str, text: str) -> Matcher:
    return compiler.start(Constraint(kind=kind, text=text), 1)[0]


def go_on(matcher: Matcher, choose: Callable[[], int], *, most: int) -> None:
    for _ in range(most):
        matcher.accept(choose())
        matcher.find_mask()


def follow(compiler: Compiler, constraint: Constraint, choose: Callable[[set[int]], int], *, most: int) -> None:
    """Begin, and go on by tokens that are allowed."""
    (matcher,) = compiler.start(constraint, 1)
    go_on(matcher, lambda: choose(allowed(matcher, compiler._size)), most=most)


@pytest.mark.parametrize("regex", LANGUAGES)
@pytest.mark.fast_rows(3)
def test_exactly_the_tokens_that_lead_to_a_text(known, compiler, regex):
    tokenizer, eos_ids = known
    pieces = {i: tokenizer.bytes_inside(i) for i in set(range(tokenizer.size)) - tokenizer.special_ids - eos_ids}
    pieces = {i: piece for i, piece in pieces.items() if piece and not tokenizer.is_unknown(i)}
    texts = [text.encode() for text in LANGUAGES[regex]]
    assert all(re.fullmatch(regex, text) for text in LANGUAGES[regex])
    chance = random.Random(regex)
    for _ in range(12):
        matcher, written = start(compiler, "regex", regex), b""
        while True:
            possible = {i for i, piece in pieces.items() if any(t.startswith(written + piece) for t in texts)}
            ends = eos_ids if written in texts else frozenset()
            found = allowed(matcher, tokenizer.size)
            forced = has_one_way(texts, written) and found <= possible and len(found) == 1
            assert forced or found == possible | ends
            if not possible:
                break
            token_id = chance.choice(sorted(found - ends) or sorted(possible))
            written += pieces[token_id]
            matcher.accept(token_id)
            if matcher.is_complete:
                break
            matcher.find_mask()
        assert written in texts


def has_one_way(texts: list[bytes], written: bytes) -> bool:
    """Whether one byte alone can follow: then a mask may name a single token, the tokenizer's own choice."""
    following = {text[len(written) : len(written) + 1] for text in texts if text.startswith(written)}
    return len(following) == 1 and b"" not in following


def test_control_tokens_are_never_allowed_but_eos_at_the_end(known, compiler):
    tokenizer, eos_ids = known
    matcher = start(compiler, "regex", r"(.|\n)*")
    found = allowed(matcher, tokenizer.size)
    assert found & tokenizer.special_ids == eos_ids & tokenizer.special_ids
    assert eos_ids <= found
    assert len(found) > 0.6 * (tokenizer.size - len(tokenizer.special_ids))  # all but pieces that begin no character


@pytest.mark.parametrize("grammar", ["start: <[{}]>", 'start: "a" <[{}]> "b"'])
def test_a_grammar_that_names_control_tokens_is_an_error(known, compiler, grammar):
    tokenizer, eos_ids = known
    for token_id in (tokenizer.bos_id, min(eos_ids)):
        constraint = Constraint(kind="grammar", text=grammar.format(token_id))
        with pytest.raises(InputError, match="the constraint allows no token"):
            follow(compiler, constraint, min, most=2)


@pytest.mark.parametrize("text", ['{"name": "', "the capital", " the", "  a", "สวัสดี 🦙", "\n\n", "<s>", "�"])
def test_a_text_that_must_come_is_cut_as_the_tokenizer_cuts_it(known, text):
    tokenizer, eos_ids = known
    vocabulary = Vocabulary.of(tokenizer, tokenizer.size, eos_ids)
    ids = encoder(tokenizer, vocabulary)(text)
    assert vocabulary.spell(ids) == text.encode()
    assert not set(ids) & tokenizer.special_ids
    whole = tokenizer.encode("a\n" + text)
    assert ids in (whole[-len(ids) :], tokenizer.encode(text))


def test_pieces_of_bytes_are_cut_greedily():
    vocabulary = Vocabulary(pieces=(b"", b"a", b"ab", b"abc", b"d", b"b"), eos_ids=(0,))
    assert vocabulary.cut(b"abcdabab") == [3, 4, 2, 2]
    assert vocabulary.cut(b"abx") == [2]
    assert Vocabulary.from_message(json.loads(json.dumps(vocabulary.to_message()))) == vocabulary


# Errors name the place ------------------------------------------------------------------------------------------------


def with_property(schema: dict) -> str:
    inner = {"type": "object", "properties": {"a/b": {"anyOf": [{"type": "null"}, schema]}}}
    return json.dumps({"$defs": {"x": inner}, "type": "object", "properties": {"q": {"$ref": "#/$defs/x"}}})


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("regex", "ab(c", "regex, character 3: unclosed group"),
        ("regex", "(?=a)b", "regex, character 1: look-around"),
        ("regex", r"(a)\1", "regex, character 4: backreferences are not supported"),
        ("regex", r"[^\s\S]", "regex: no text can follow it"),
        ("grammar", 'start: "a" b', 'grammar, line 1, column 8: unknown name: "b"'),
        ("grammar", 'start: "a"\n  "', "grammar, line 2, column 4: lexer error"),
        ("json_schema", with_property({"not": {}}), r"at #/\$defs/x/properties/a~1b/anyOf/1: .*not"),
        ("json_schema", with_property({"type": "objekt"}), "at .*/anyOf/1: .*objekt"),
        ("json_schema", '{"type":"integer","minimum":5,"maximum":4}', r"Unsatisfiable schema: minimum \(5\)"),
        ("json_schema", '{"allOf":[{"type":"string"},{"type":"null"}]}', "Unsatisfiable schema: incompatible types"),
        ("json_schema", "false", "schema"),
        ("json_schema", '{"$ref":"#"}', "no text can follow it"),
        (
            "json_schema",
            '{"type":"object","properties":{"a":{"$ref":"#"}},"required":["a"]}',
            "does a part of it require itself",
        ),
        ("json_schema", '{"$ref":"http://example.org/x.json"}', "not present"),
        ("json_schema", '{"type":"object","x-guidance":{"lenient":true},"not":{}}', "Unimplemented keys"),
    ],
)
def test_errors_name_the_place(compiler, kind, text, message):
    with pytest.raises(InputError, match=message) as error:
        start(compiler, kind, text)
    assert str(error.value).startswith(kind)
    assert len(str(error.value)) < 700


# What is kept ---------------------------------------------------------------------------------------------------------


def test_a_constraint_is_read_once_and_so_many_are_kept(known, monkeypatch):
    from alpaca.serving.structured import compiling

    monkeypatch.setattr(compiling, "MOST_KEPT", 2)
    compiler = Compiler(known[0], known[0].size, known[1])
    tried: list[str] = []
    monkeypatch.setattr(compiling.Trials, "require", lambda self, constraint: tried.append(constraint.text))
    for text in ("a", "b", "a", "c", "a", "b"):
        start(compiler, "regex", text)
    assert tried == ["a", "b", "c", "b"]
    assert [constraint.text for constraint in compiler._kept] == ["a", "b"]
    compiler.close()


def test_a_completion_goes_on_when_what_is_shared_is_worn_out(known, monkeypatch):
    """Equal constraints share the states of their expressions, of which there is a largest number."""
    from alpaca.serving.structured import grammars

    monkeypatch.setitem(grammars._LIMITS, "max_lexer_states", 400)
    tokenizer, eos_ids = known
    compiler = Compiler(tokenizer, tokenizer.size, eos_ids)
    monkeypatch.setattr("alpaca.serving.structured.trials.Trials.require", lambda self, constraint: None)
    regex = r"([ab]*a[ab]{9}c)+"
    first = compiler.start(Constraint(kind="regex", text=regex), 1)[0]
    number = itertools.count()
    monkeypatch.setattr(first, "_rebuild", lambda rebuild=first._rebuild: (next(number), rebuild())[1])
    chance = random.Random(0)
    letters = {b"a": tokenizer.encode("\na")[-1], b"b": tokenizer.encode("\nb")[-1]}
    assert all(tokenizer.bytes_inside(i) == letter for letter, i in letters.items())
    with pytest.raises(InputError, match=r"takes too much to follow after \d+ tokens"):  # in the end one alone does
        go_on(first, lambda: chance.choice(list(letters.values())), most=3000)
    assert next(number) > 0
    other = start(compiler, "regex", regex)  # another completion begins as if nothing had been
    assert letters[b"a"] in allowed(other, tokenizer.size)
    compiler.close()
