"""Rules that find suspicious examples: each looks at one example and says what it saw, or nothing.

A finding is a reason to look, not a verdict: a wrong sum is wrong, but a link in an answer may be what was asked for.
What `cleaning` mends by itself is a small part of this. Most kinds were complained of by users of the Alpaca data
(empty answers, wrong arithmetic, links, merged tasks).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tqdm import tqdm

from alpaca.data.example import AnyExample

Check = Callable[[AnyExample], str | None]
_EVIDENCE = 160  # characters of a text that a finding quotes


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The letters of an `input` that only says that there is none ("<noinput>", "No input.", '"<No Input>"').
_NO_INPUT_LETTERS = _words(
    "noinput ninput noinputs noinputneeded noinputrequired noinputprovided noinputgiven noinputnecessary"
)
_NO_OUTPUT_LETTERS = _words("nooutput noinput noresponse noanswer todo tbd null nan undefined")
_LEAKED_TASK = re.compile(
    r"^[ \t]*(?:#{2,}[ \t]*(?:instruction|input|response)s?[ \t]*:|\d+[ \t]*[.)][ \t]*instruction[ \t]*:)", re.I | re.M
)
_SEPARATOR = re.compile(r"\s*(?:#{2,}|-{3,}|<!--\s*-->)?\s*")
_LABELLED_BLOCK = re.compile(r"^[ \t]*instruction:[ \t]*\S", re.I | re.M)
_LABEL_FIRST = re.compile(r"\s*(?:output|response|answer)\s*:", re.I)
_INPUT_INSIDE = re.compile(r"\n[ \t]*input\s*:", re.I)
_LINK = re.compile(r"(?:https?://|www\.)[^\s<>\"')\]]+", re.I)
_UNSEEN = re.compile(
    r"!\[[^\]\n]{0,300}\]\([^)\n]{0,2000}\)|<(?:img|audio|video)\b[^>\n]{0,2000}>|"
    r"[<\[(](?=[^>\])\n]{0,80}\b(?:image|picture|photo|video|audio|file|attachment|screenshot)\b)"
    r"[^>\])\n]{0,80}\b(?:attached|here|image|clip|file|inserted|below|upload(?:ed)?)\b[^>\])\n]{0,80}[>\])]",
    re.I,
)
_REFUSAL = re.compile(
    r"\bas an? (?:ai\b|artificial intelligence|(?:large )?language model)[^.]{0,40}\bI\b|"
    r"\bI(?:'m| am) (?:just |only )?an? (?:ai\b|(?:large |ai )?language model)|"
    r"\bI(?:'m| am) (?:sorry,? (?:but )?I (?:can(?:'t|not)|am (?:unable|not able))|(?:unable|not able) to "
    r"(?:see|view|access|open|process|complete|provide|generate|answer|assist|help))|"
    r"\bI (?:can(?:'t|not)|do not|don't) (?:see|view|access|open|have access to)\b[^.\n]{0,40}"
    r"\b(?:image|picture|photo|link|url|website|page|article|file|video|audio|attachment|internet|document)|"
    r"\bcannot be (?:completed|answered|done|performed) by an? (?:ai|gpt|language)\b|"
    r"\b(?:is|was) not possible to (?:see|view|open) the",
    re.I,
)
_DAMAGED = re.compile("\ufffd|â€[™œ\u009d“”¦]|Ã[©¨¤¶¼±§¡³]|Â[ ·°]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_OPEN_WORDS = _words("the a an and or of my your their its our because which if than into")


@dataclass(frozen=True)
class Rule:
    """A check with its name in the log, its title, and a sentence that says what it looks for."""

    name: str
    title: str
    meaning: str
    check: Check


@dataclass(frozen=True, slots=True)
class Finding:
    """Where a rule found something (counted from 0), and the piece of text it saw."""

    index: int
    evidence: str


def find_suspicious(
    indexed: Iterable[tuple[int, AnyExample]], *, total: int, progress: bool = True
) -> dict[str, list[Finding]]:
    """Findings of every rule in RULES by its name, in the order of the examples; `total` is for the bar."""
    found: dict[str, list[Finding]] = {rule.name: [] for rule in RULES}
    bar = tqdm(indexed, total=total, desc="check", unit=" examples", delay=1, disable=None if progress else True)
    for index, example in bar:
        for rule in RULES:
            if (evidence := rule.check(example)) is not None:
                found[rule.name].append(Finding(index, _short(evidence)))
    return found


def _short(text: str) -> str:
    return text if len(text) <= _EVIDENCE else text[: _EVIDENCE - 1] + "…"


def _around(match: re.Match[str] | None, *, before: int = 30, after: int = 60) -> str | None:
    if match is None:
        return None
    return match.string[max(0, match.start() - before) : match.end() + after].strip()


def _letters(text: str) -> str:
    return re.sub(r"[^a-z]", "", text.lower())


# What a text says, used by `cleaning` too ---------------------------------------------------------------------


def says_no_input(text: str) -> bool:
    """Whether an `input` is only a way to write that there is none; "None" and "NA" might be meant, "N/A" is not."""
    return _letters(text) in _NO_INPUT_LETTERS or text.strip().lower() in ("n/a", "<n/a>")


def says_no_output(text: str) -> bool:
    """Whether an `output` is only a placeholder where the answer should stand."""
    bare = text.strip()
    return len(bare) < 40 and _letters(bare) in _NO_OUTPUT_LETTERS and not bare[-1:].isdigit()


def before_leaked_block(output: str) -> str | None:
    """The answer before the header of a further task; None where there is no such header, or no answer before it.

    What separates the two (lines of ##, --- or <!-- -->) goes with the task. A numbered "Input:" or "Output:" alone may
    be a step of the answer, and is left.
    """
    found = _LEAKED_TASK.search(output)
    if not found:
        return None
    lines = output[: found.start()].split("\n")
    while lines and _SEPARATOR.fullmatch(lines[-1]):
        lines.pop()
    return "\n".join(lines).rstrip() or None


# The checks ---------------------------------------------------------------------------------------------------


def _empty_output(example: AnyExample) -> str | None:
    return "" if not example.output.strip() else None


def _empty_instruction(example: AnyExample) -> str | None:
    return example.output[:_EVIDENCE] if not example.instruction.strip() else None


def _placeholder_output(example: AnyExample) -> str | None:
    output = example.output.strip()
    if not output:
        return None
    starts = re.match(r"<\s*no\s*(?:in|out)put\b", output, re.I)
    return output if says_no_output(output) or starts or output.lower() in ("n/a", "...", "-", "?") else None


def _placeholder_input(example: AnyExample) -> str | None:
    said = says_no_input(example.input) or example.input.strip().lower() in ("none", "none.", "<none>", "null", "-")
    return example.input if said and example.input.strip() else None


def _blank_input(example: AnyExample) -> str | None:
    return repr(example.input) if example.input and not example.input.strip() else None


def _leaked_template(example: AnyExample) -> str | None:
    for text in (example.instruction, example.input, example.output):
        if found := re.search(r"(?<!#)#{2,}\s{0,9}(?:instruction|input|response)s?\b\s*:", text, re.I):
            return _around(found)
    return None


def _merged_task(example: AnyExample) -> str | None:
    for text in (example.output, example.instruction, example.input):
        found = re.search(r"^[ \t]*\d+\s*[.)]\s*(?:instruction|input|output)\s*:", text, re.I | re.M)
        if found or (found := _LABELLED_BLOCK.search(text, 1 if text is example.instruction else 0)):
            return _around(found)
    return None


def _label_in_text(example: AnyExample) -> str | None:
    return _around(_LABEL_FIRST.match(example.output)) or _around(_INPUT_INSIDE.search(example.instruction))


def _repeats_prompt(example: AnyExample) -> str | None:
    answer = example.output.split()
    return example.output if answer and answer in (example.input.split(), example.instruction.split()) else None


def _refusal(example: AnyExample) -> str | None:
    return _around(_REFUSAL.search(example.output, 0, 400))


def _link_in_output(example: AnyExample) -> str | None:
    return _around(_LINK.search(example.output), before=20, after=0)


def _link_in_prompt(example: AnyExample) -> str | None:
    return _around(_LINK.search(example.instruction) or _LINK.search(example.input), before=20, after=0)


def _unseen_media(example: AnyExample) -> str | None:
    for text in (example.input, example.instruction, example.output):
        if found := _UNSEEN.search(text):
            return _around(found, before=10, after=10)
    return None


def _open_fence(example: AnyExample) -> str | None:
    fences = re.findall(r"^[ \t]*```", example.output, re.M)
    return example.output[-_EVIDENCE:] if len(fences) % 2 else None


def _cut_ending(example: AnyExample) -> str | None:
    words = example.output.split()
    if len(words) < 12:
        return None
    last = words[-1].lower()
    cut = last in _OPEN_WORDS or last[-1] in ",(["
    last_line = example.output.rstrip().rsplit("\n", 1)[-1]
    return "…" + example.output.rstrip()[-60:] if cut and len(last_line.split()) >= 6 else None


def _repeated_lines(example: AnyExample) -> str | None:
    lines = [line.strip() for line in re.split(r"\n|(?<=[.!?])\s", example.output) if len(line.split()) >= 3]
    return next((line for line, count in Counter(lines).items() if count >= 4), None)


def _damaged_text(example: AnyExample) -> str | None:
    for text in (example.instruction, example.input, example.output):
        if found := _DAMAGED.search(text):
            return repr(_around(found, before=20, after=20))
    return None


# Arithmetic ---------------------------------------------------------------------------------------------------

_FIGURE = r"\d+(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?"
_OPERATOR = r"\s*[+*×÷]\s*|\s+[-–−/x]\s+"
_SUM = re.compile(
    rf"(?<![\w.,%^)=/*×÷+−-])(?<![=+*/×÷^−(–-]\s)(?P<left>(?:{_FIGURE})(?:(?:{_OPERATOR})(?:{_FIGURE}))+)"
    rf"\s*=\s*\$?(?P<sign>[-−]?)(?P<right>{_FIGURE})(?![\w%^!)])(?!,\d)(?!\.\d)(?!\s*(?:[+*×÷/^%]|[-–−x]\s))"
)


def _wrong_sum(example: AnyExample) -> str | None:
    for match in _SUM.finditer(example.output):
        if not _is_right(match):
            return _around(match, before=0, after=0)
    return None


def _is_right(match: re.Match[str]) -> bool:
    """Whether a claim holds to the places its result is written with."""
    right = match["right"].replace(",", "")
    places = len(right.partition(".")[2])
    value = float(right) * (-1 if match["sign"] else 1)
    found = _evaluate(match["left"])
    return found is None or abs(found - value) <= 0.5 * 10**-places * 1.001 + abs(found) * 1e-9


def _evaluate(left: str) -> float | None:
    """The value of figures joined by + - * /, products first; None where it has none."""
    total, product, sign = 0.0, None, 1.0
    pieces = re.findall(rf"({_FIGURE})|([-+*/×÷x–−])", left)
    operator = "+"
    for figure, symbol in pieces:
        if symbol:
            operator = symbol
            continue
        value = float(figure.replace(",", ""))
        if operator in "*×x":
            product *= value
        elif operator in "/÷":
            if not value:
                return None
            product /= value
        else:
            total += sign * (product or 0.0)
            sign, product = (1.0 if operator == "+" else -1.0), value
    return total + sign * (product or 0.0)


RULES = (
    Rule("empty_output", "Empty answers", "The output holds nothing but white space.", _empty_output),
    Rule("empty_instruction", "Empty instructions", "The instruction is only white space.", _empty_instruction),
    Rule(
        "placeholder_output", "Placeholders as answers",
        'The output is or starts with "<noinput>" or "<nooutput>", or is "N/A", "null", "TODO" or the like.',
        _placeholder_output,
    ),
    Rule(
        "placeholder_input", "Inputs that say there is none",
        'The input is "<noinput>", "No input", "N/A", "none" or the like; the recipe takes it for a real input.',
        _placeholder_input,
    ),
    Rule("blank_input", "Blank inputs", "The input is white space, and so counts as one.", _blank_input),
    Rule(
        "leaked_template", 'Leaked "### Instruction"',
        'A field holds "### Instruction:", "### Input:" or "### Response:", the words of the prompt itself.',
        _leaked_template,
    ),
    Rule(
        "merged_task", "Merged tasks",
        'A line opens a further task: "8. Instruction:", "8. Input:", "8. Output:", or "Instruction:" before text.',
        _merged_task,
    ),
    Rule(
        "label_in_text", "Labels in texts",
        'The output starts with "Output:", "Response:" or "Answer:", or the instruction holds a line "Input:".',
        _label_in_text,
    ),
    Rule(
        "repeats_prompt", "Answers that repeat the prompt",
        "The output equals the input or the instruction but for white space (right where nothing was to correct).",
        _repeats_prompt,
    ),
    Rule(
        "refusal", "Refusals",
        'In its first 400 characters the output says that an AI, or "I", cannot do, see or open what was asked.',
        _refusal,
    ),
    Rule(
        "unseen_media", "Images, sounds, files",
        "A field stands for an image, sound or file: Markdown or HTML for one, or brackets such as <image attached>.",
        _unseen_media,
    ),
    Rule("link_in_output", "Links in answers", "The output holds a web address; models invent them.", _link_in_output),
    Rule(
        "link_in_prompt", "Links in prompts",
        "The instruction or input holds a web address, whose content the model cannot see.", _link_in_prompt,
    ),
    Rule("open_fence", "Open code fences", "The output has an odd number of lines that start with ```.", _open_fence),
    Rule(
        "cut_ending", "Cut endings",
        "An output of 12 words or more whose last line, of 6 or more, ends in a comma, an open bracket or a word such "
        'as "the" or "of".',
        _cut_ending,
    ),
    Rule(
        "repeated_lines", "Loops", "A line or sentence of 3 words or more stands 4 times or more in the output.",
        _repeated_lines,
    ),
    Rule(
        "wrong_sum", "Wrong arithmetic",
        'The output claims "2 + 3 = 6": figures joined by + - × ÷, without brackets or letters; rounding is right.',
        _wrong_sum,
    ),
    Rule(
        "damaged_text", "Damaged characters",
        "A field holds control characters, the replacement character or UTF-8 read as Latin-1 (such as â€™).",
        _damaged_text,
    ),
)  # fmt: skip
