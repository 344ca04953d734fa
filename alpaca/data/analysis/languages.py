"""The language of a text, by a small rule: its script, and for shared scripts its commonest words and letters.

It tells the languages that instruction sets come in, not all there are. A text that is too short, or made of names,
numbers or code, is "undetermined" rather than guessed.
"""

import json
import re
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path

UNDETERMINED = "undetermined"
_ENOUGH = 2  # common words (of two letters or more) that a text must hold; of English one, in up to _SHORT words
_SHORT = 9
_NO_PROSE = re.compile(r"(?:https?://|www\.)\S+|\S*[\\@={}<>/_]\S*")  # links, addresses, code
_MOST = 2000  # characters looked at
_SCRIPTS = {
    "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean", "CJK": "Chinese", "ARABIC": "Arabic or Persian",
    "HEBREW": "Hebrew", "GREEK": "Greek", "DEVANAGARI": "Hindi", "BENGALI": "Bengali", "TAMIL": "Tamil",
    "TELUGU": "Telugu", "THAI": "Thai", "GEORGIAN": "Georgian", "ARMENIAN": "Armenian", "CYRILLIC": "Cyrillic",
    "GUJARATI": "Gujarati", "GURMUKHI": "Punjabi", "KANNADA": "Kannada", "MALAYALAM": "Malayalam", "LAO": "Lao",
    "KHMER": "Khmer", "MYANMAR": "Burmese", "SINHALA": "Sinhala", "ETHIOPIC": "Amharic", "TIBETAN": "Tibetan",
}  # fmt: skip
_OWN_LETTERS = {
    "German": "ß", "Spanish": "ñ¿¡", "Portuguese": "ãõ", "Polish": "łąęśźżć", "Czech": "řěůď", "Turkish": "ığş",
    "Romanian": "șță", "Vietnamese": "ơưđạảấầẩậắằặẹẻẽếềểệỉịọỏốồổộớờợụủứừửựỳỹ",
}  # fmt: skip


def detect_language(text: str) -> str:
    """The language's English name, or UNDETERMINED."""
    text = text[:_MOST]
    if not text.isascii():
        scripts = Counter(_script(letter) for letter in text if letter.isalpha())
        if scripts and (found := _by_script(scripts, text)):
            return found
    return _by_words(text)


@cache
def _script(letter: str) -> str:
    return unicodedata.name(letter, "").split(" ")[0].split("-")[0]


def _by_script(scripts: Counter[str], text: str) -> str | None:
    """The language of the script that holds half of the letters; None for Latin."""
    named = {script: count for script, count in scripts.items() if script in _SCRIPTS}
    if sum(named.values()) * 2 < sum(scripts.values()):
        return None
    if {"HIRAGANA", "KATAKANA"} & named.keys():  # written together with Chinese characters
        return "Japanese"
    language = _SCRIPTS[max(named, key=named.__getitem__)]
    if language == "Cyrillic":
        return "Ukrainian" if re.search("[іїєґ]", text.lower()) else "Russian or Bulgarian"
    return language


@cache
def _languages_of() -> dict[str, list[str]]:
    """For each common word the languages it is common in."""
    table: dict[str, list[str]] = {}
    common = json.loads(Path(__file__).with_name("common_words.json").read_text("utf-8"))
    for language, lines in common.items():
        for word in set(" ".join(lines).split()):
            table.setdefault(word, []).append(language)
    return table


def _by_words(text: str) -> str:
    words = re.findall(r"[^\W\d_]{2,}", _NO_PROSE.sub(" ", text.lower()))
    hits: Counter[str] = Counter()
    for word in words:
        for language in _languages_of().get(word, ()):
            hits[language] += 1
    if not text.isascii():
        for language, letters in _OWN_LETTERS.items():
            hits[language] += sum(letter in letters for letter in text.lower())
    ranked = hits.most_common(2)
    enough = 1 if len(words) <= _SHORT and ranked and ranked[0][0] == "English" else _ENOUGH
    if not ranked or ranked[0][1] < enough:
        return UNDETERMINED
    tie = len(ranked) > 1 and ranked[1][1] == ranked[0][1]
    sparse = ranked[0][1] < len(words) / 20
    return UNDETERMINED if tie or sparse else ranked[0][0]
