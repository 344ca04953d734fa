"""The root verb of an instruction and the head of its direct object, by a lexicon and rules of our own.

No parser with an English model of its own makers installs from PyPI (spaCy's and Stanza's models live elsewhere), and
instructions are a narrow kind of English: nearly all are imperatives, whose verb opens the clause in its base form. So:

1. In each sentence in turn, what comes before the verb is skipped: "Please", "First,", "You should", "Can you",
   "Your task is to", adverbs, a number in a list, and up to its comma an opening such as "Given a text,".
2. The verb is the first word if the lexicon (verb_lexicon.json) knows it, or if it is no function word and what follows
   opens a noun phrase ("Alphabetize these"). A sentence that opens with a question word or an auxiliary is a question:
   its word is counted, it has no root verb. Another sentence is passed over.
3. The object is the head of the noun phrase after the verb (and its particle, a second verb, "me", "in detail"): the
   last noun before a preposition, a clause, a participle or a stop. A preposition or a clause at once: no object.

What it cannot do: tell "Design patterns matter." from an order, see objects of prepositions ("Come up with a list" has
none, as in a parse), read other languages than English. `ACCURACY` says how often it is right, by hand-made labels.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Kind = Literal["order", "question", "other"]


ACCURACY = (  # tests/data/analysis/test_instruction_verbs.py measures it
    "verb and object are right in 197 of 200 hand-labelled instructions of the Alpaca data and in 58 of 60 of the "
    "Self-Instruct seed tasks, labelled by the rules' author, who did not tune them on these"
)


@dataclass(frozen=True, slots=True)
class Root:
    """What an instruction asks for. kind: "order" has a verb; "question" its question word as `verb`; "other" none."""

    kind: Kind
    verb: str = ""
    object: str = ""


def find_root(instruction: str) -> Root:
    """The root verb and its direct object, as lemmas in lower case; "" for none."""
    for sentence in _sentences(instruction):
        words = _skip_opening(sentence)
        if not words:
            continue
        if (found := _verb(words)) is not None:
            verb, rest = found
            return Root("order", verb, _object(verb, rest))
        if words[0] in _QUESTION_WORDS or (words[0] in _AUXILIARIES and words[1:2] != ["not"]):
            return Root("question", words[0])
    return Root("other")


# Words --------------------------------------------------------------------------------------------------------


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_QUESTION_WORDS = _set("what what's whats which who who's whose whom when where where's why how how's")
_AUXILIARIES = _set("is are was were am do does did can could will would shall should may might must has have had")
_PRONOUNS = _set("i you he she it we they me him her us them this that these those there something anything someone")
_PREPOSITIONS = _set(
    "of for in on about with to from by as into onto between at using per via within without under over during after "
    "before against through toward towards among across around like than regarding concerning including based given "
    "according except upon behind beyond along inside outside near off out up down until till since because so while "
    "unless if"
)
_CLAUSES = _set("that which who whom whose where when why how what whether if to because so while")
_DETERMINERS = _set(
    "a an the this that these those my your our his her its their any some all each every both either several many few "
    "another one two three four five six seven eight nine ten eleven twelve fifteen twenty no more most other "
    "at least exactly up enough"
)
_AFTER_NOUN = _set(
    "below above here there further less more longer correctly accordingly together respectively again only too also "
    "then next"
)
_PARTICLES = {
    ("look", "up"), ("write", "down"), ("point", "out"), ("pick", "out"), ("find", "out"), ("figure", "out"),
    ("make", "up"), ("fill", "in"), ("fill", "out"), ("set", "up"), ("break", "down"), ("think", "up"),
    ("list", "out"), ("list", "down"), ("carry", "out"), ("lay", "out"), ("print", "out"), ("sum", "up"),
    ("clean", "up"), ("draw", "up"), ("map", "out"), ("spell", "out"), ("work", "out"), ("sketch", "out"),
    ("turn", "off"), ("turn", "on"), ("put", "together"), ("add", "up"), ("jot", "down"), ("check", "out"),
    ("write", "out"), ("cut", "down"), ("shorten", "down"), ("narrow", "down"), ("come", "up"),
}  # fmt: skip
_THAT_CLAUSE = _set(
    "prove show suppose assume imagine state ensure verify explain confirm demonstrate pretend argue say"
)
_DITRANSITIVE = _set("give tell show send teach offer ask assign make write find buy bring")
_ASIDES = re.compile(
    r"in (?:detail|brief|short|general|simple terms|plain (?:english|language)|layman's terms|"
    r"(?:your own|a few|one|two|three|\d+) (?:words?|sentences?|lines?|paragraphs?)|[a-z]+ sentences?)\b,?"
)
_OPENINGS = _set(
    "given based using with for from in on at if when while as to after before considering assuming imagining taking "
    "according by during without suppose following once through whenever keeping within under because since looking "
    "between among about regarding having starting depending instead referring provided out comparing you we i"
)
_LEAD = re.compile(
    r"(?:please|kindly|now|then|also|next|first|firstly|second|secondly|finally|lastly|ok|okay|so|and|just|"
    r"\w+ly(?= [a-z])|(?:can|could|would|will) you(?: please| kindly)?|i (?:want|need|would like|'d like) you to|"
    r"i'd like you to|you (?:will|should|must|need to|have to|are to|are asked to|are required to|are tasked to)|"
    r"(?:your|the|this) (?:task|job|goal|assignment|mission|aim) is to|let's|let us|try to|be sure to|make sure to|"
    r"\(?\d+[.)]|[-*•])(?:,| |$)\s*"
)
_NUMBER = "#"  # stands for a figure in front of a noun
_NO_ADVERBS = _set("apply reply supply multiply imply comply rely only family assembly italy")
_SUFFIXES = ("ive", "al", "ful", "ous", "able", "ible", "ic", "less", "ish", "ary", "ical", "ern", "est", "ent", "ant")
_WORD = re.compile(
    r"\"[^\"\n]*\"|“[^”\n]*”|‘[^’\n]*’|(?<!\w)'[^'\n]*'(?!\w)|[^\W_](?:[\w'’./+#-]*[\w'’+#])?|[^\w\s]|\n"
)
_STOP = re.compile(r"(?<=[.!?:;])[\"'”’)]*\s+(?=\S)|\n+")


@dataclass(frozen=True)
class _Lexicon:
    verbs: frozenset[str]
    adjectives: frozenset[str]
    ing_nouns: frozenset[str]
    nouns_like_adjectives: frozenset[str]
    plurals: dict[str, str]


@cache
def _lexicon() -> _Lexicon:
    content = json.loads(Path(__file__).with_name("verb_lexicon.json").read_text("utf-8"))
    words = {name: " ".join(lines).split() for name, lines in content.items()}
    return _Lexicon(
        verbs=frozenset(words["verbs"]),
        adjectives=frozenset(words["adjectives"]),
        ing_nouns=frozenset(words["ing_nouns"]),
        nouns_like_adjectives=frozenset(words["nouns_like_adjectives"]),
        plurals=dict(pair.split(":") for pair in words["plurals"]),
    )


def _sentences(instruction: str) -> Iterator[str]:
    text = instruction.replace("’", "'").strip()[:2000]
    for part in _STOP.split(text):
        if part.strip():
            yield part.strip().lower()


def _skip_opening(sentence: str) -> list[str]:
    """The words from the verb on, or from the first that can be none; openings are skipped up to their comma."""
    words = _skip_lead(sentence)
    if not words or words[0] not in _OPENINGS or (words[0] == "when" and words[1:2] and words[1] in _AUXILIARIES):
        return words
    if words[1:2] and words[1] in _QUESTION_WORDS - {"how"} and words[0] in _PREPOSITIONS:
        return words[1:]  # "In which year"
    for place, word in enumerate(words):
        if word in (",", ";"):
            rest = _skip_lead(" ".join(words[place + 1 :]))
            if rest and rest[0] not in _OPENINGS and (_verb(rest) or rest[0] in _QUESTION_WORDS | _AUXILIARIES):
                return rest
    return [] if words[0] in _PRONOUNS else _first_known_verb(words)


def _skip_lead(text: str) -> list[str]:
    """Words without "Please", "Can you", "First," and the like in front."""
    text = text.lstrip("\"'“‘([ ")
    while (lead := _LEAD.match(text)) and lead[0].rstrip(" ,") not in _NO_ADVERBS:
        text = text[lead.end() :]
    return _WORD.findall(text)


def _first_known_verb(words: Sequence[str]) -> list[str]:
    """For an opening without a comma ("For each word give its synonym"): a known verb before a determiner."""
    for place in range(2, len(words) - 1):
        follows = words[place + 1] in _DETERMINERS | {"how", "whether", "if"}
        if follows and words[place] in _lexicon().verbs and words[place - 1] not in _DETERMINERS | _PREPOSITIONS:
            return list(words[place:])
    return []


# The verb -----------------------------------------------------------------------------------------------------


def _verb(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """(lemma, the words after it), or None when the first word is no imperative."""
    first, rest = words[0], list(words[1:])
    if first in ("do", "have") and rest and rest[0] in _PRONOUNS - {"this", "that", "these", "those"}:
        return None  # a question
    if (known := _known_verb(first)) and not (rest and rest[0] in _AUXILIARIES - {"do", "have", "will"}):
        return known, rest
    opens_phrase = bool(rest) and (rest[0] in _DETERMINERS or rest[0] in ("how", "why", "what", "whether", "following"))
    return (first, rest) if opens_phrase and _may_be_verb(first) else None


def _known_verb(word: str) -> str | None:
    lexicon = _lexicon().verbs
    bare = word.replace("re-", "re", 1) if word.startswith("re-") else word
    spellings = [bare, re.sub(r"is(e)$", r"iz\1", bare), re.sub(r"ys(e)$", r"yz\1", bare)]
    for spelling in spellings:
        if spelling in lexicon:
            return spelling
    return bare if bare.startswith("re") and bare[2:] in lexicon and len(bare) > 5 else None


def _may_be_verb(word: str) -> bool:
    closed = _QUESTION_WORDS | _AUXILIARIES | _PRONOUNS | _PREPOSITIONS | _DETERMINERS | _lexicon().adjectives
    return word.isalpha() and word.isascii() and word not in closed and not re.search(r"(?:ing|ed|s|ly|ion)$", word)


# The object ---------------------------------------------------------------------------------------------------


def _object(verb: str, words: list[str]) -> str:
    words = _skip_to_object(verb, words)
    if words[:1] == ["that"] and verb in _THAT_CLAUSE:
        return ""
    if not words or words[0] in _CLAUSES - {"that"} or words[0] in (_PREPOSITIONS - {"given", "like"}):
        return ""
    head, rest = _noun_head(words)
    if verb in _DITRANSITIVE and head and rest and rest[0] in _DETERMINERS - {"that"}:
        head = _noun_head(rest)[0] or head  # "Give each item a name"
    return head


def _skip_to_object(verb: str, words: list[str]) -> list[str]:
    while words:
        if (verb, words[0]) in _PARTICLES and words[1:2] != ["with"]:
            words = words[1:]
        elif words[0] in ("and", "or", "then", ",", "&") and len(words) > 1 and _known_verb(words[1]):
            verb, words = words[1], words[2:]  # "Identify and list the colours": one object for both
        elif words[0] in ("me", "us"):
            words = words[1:]
        elif words[0].endswith("ly") and words[0] not in _NO_ADVERBS and words[0] not in _lexicon().adjectives:
            words = words[1:] if len(words) > 1 and words[1] not in _PREPOSITIONS else []
        elif aside := _ASIDES.match(" ".join(words)):
            words = _WORD.findall(" ".join(words)[aside.end() :])
        else:
            break
    return words


def _noun_head(words: Sequence[str]) -> tuple[str, list[str]]:
    """(the lemma of the head of the noun phrase that opens `words`, the words after the phrase)."""
    head = ""
    for place, word in enumerate(words):
        following = words[place + 1] if place + 1 < len(words) else ""
        if word in _DETERMINERS and (not head or head in _DETERMINERS):
            head = word if word not in ("a", "an", "the", "at") else head
        elif _ends_phrase(word, following, head):
            return _finish(head), list(words[place:])
        elif word[0] in "\"“‘'" and len(word) > 2:
            quoted = word[1:-1].strip(" .,!?")
            head = head if _is_noun(head) else (quoted if quoted and " " not in quoted else "")
            return _finish(head), list(words[place + 1 :])
        elif word in _PRONOUNS and not head:
            return word, list(words[place + 1 :])
        elif word not in ("and", "or", ",", "/", "-", "*", "'", "$", "%", "#") and not word[0].isdigit():
            head = word
        elif word[0].isdigit() and not head:
            head = _NUMBER
    return _finish(head), []


def _ends_phrase(word: str, following: str, head: str) -> bool:
    """Whether the noun phrase is over before `word`."""
    if word in ("given", "following", "based") and not _is_noun(head):
        return False
    if word in ("and", "or", ",", "/", "&"):
        return _is_noun(head) or following in _DETERMINERS or not following or not following[0].isalpha()
    if word in ('"', "“", "'", "-", "–", "*", "$", "%", "#"):
        return _is_noun(head) and word not in ("'", "#", "%")
    if not word[0].isalnum() and len(word) == 1:
        return True
    if word in _CLAUSES | _PREPOSITIONS | _AUXILIARIES or word in _DETERMINERS:
        return bool(head) or word not in ("like",)
    if not _is_noun(head):
        return False
    return word in _AFTER_NOUN | _PRONOUNS or _is_modifier_after_noun(word, following)


def _is_modifier_after_noun(word: str, following: str) -> bool:
    """Participles and adverbs after a noun: "an analogy comparing two things", "words related to", "the list fast"."""
    if word.endswith("ly") and word not in _NO_ADVERBS and word not in _lexicon().adjectives:
        return True
    if word in _lexicon().adjectives or word.endswith(("able", "ible")):
        return following in _PREPOSITIONS  # "the person responsible for"
    if word.endswith("ing"):
        return word not in _lexicon().ing_nouns
    if re.search(r"[a-z]{2}ed$", word) or word in ("written", "made", "found", "shown", "seen", "known", "taken"):
        return following in _PREPOSITIONS | _AFTER_NOUN or not following or not following[0].isalnum()
    return False


def _is_noun(head: str) -> bool:
    """Whether a word can be the head: it is no determiner, and no word that most likely describes the next one."""
    if not head or head in _DETERMINERS or head in ("following", "given", _NUMBER):
        return False
    if head in _lexicon().ing_nouns:
        return True
    described = head in _lexicon().adjectives or head.endswith(("ing", "ed", "'s", "s'", "ier")) or "-" in head
    return not described and not (
        len(head) > 5 and head.endswith(_SUFFIXES) and head not in _lexicon().nouns_like_adjectives
    )


def _finish(head: str) -> str:
    """A lemma from the last word of the phrase."""
    head = head.strip("'.-/#").split("/")[0].removesuffix("'s")
    return _singular(head) if head.isascii() else head


def _singular(noun: str) -> str:
    plurals = _lexicon().plurals
    if noun in plurals:
        return plurals[noun]
    if len(noun) < 4 or not noun.endswith("s") or noun.endswith(("ss", "us", "is", "'s")):
        return noun
    if noun.endswith("ies"):
        return noun[:-3] + "y"
    return noun[:-2] if noun.endswith(("sses", "xes", "ches", "shes", "zes")) else noun[:-1]
