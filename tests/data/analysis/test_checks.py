"""Each rule for suspicious examples: what it must find, and what it must leave alone."""

import time

import pytest

from alpaca.data.analysis.checks import RULES, before_leaked_block, find_suspicious
from alpaca.data.analysis.languages import UNDETERMINED, detect_language
from alpaca.data.example import Example


def record(instruction: str = "Do it.", output: str = "Done.", input: str = "") -> Example:
    return Example(instruction=instruction, output=output, input=input)


LONG = "one two three four five six seven eight nine ten eleven twelve "
FOUND = {
    "empty_output": [record(output=""), record(output=" \n\t")],
    "empty_instruction": [record(" ")],
    "placeholder_output": [record(output=text) for text in ("<noinput>", "No Output", "N/A", "<nooutput> or", "null")],
    "placeholder_input": [record(input=text) for text in ("<noinput>", "No input.", '"<No Input>"', "n/a", "None")],
    "blank_input": [record(input=" ")],
    "leaked_template": [record(output="Yes.\n### Instruction:"), record("###Response: Go"), record(input="### Input:")],
    "merged_task": [record(output="Yes.\n8. Instruction: Go.\n8. Input:\nit"), record(output="Instruction: Go on")],
    "label_in_text": [record(output="Output: 4"), record("Sum up.\n\nInput: a text")],
    "repeats_prompt": [record("Fix it.", "a  text", input="a text"), record("Say hi", "Say hi")],
    "refusal": [
        record(output="As an AI language model, I cannot do that."), record(output="I'm sorry, but I can't help."),
        record(output="I cannot see the image you mean."), record(output="It cannot be done by a GPT model."),
    ],
    "unseen_media": [
        record(input="![a cat](http://x.org/c.png)"), record(input="<image attached>"),
        record(output='<img src="a.png">'), record(input="[Insert picture here]"),
    ],
    "link_in_output": [record(output="See https://example.org/a.")],
    "link_in_prompt": [record(input="www.example.org"), record("Sum up http://example.org")],
    "open_fence": [record(output="```python\nprint(1)\n")],
    "cut_ending": [record(output=LONG + "and the"), record(output=LONG + "then,")],
    "repeated_lines": [record(output="It is so good. " * 4), record(output="on and on\n" * 5)],
    "wrong_sum": [
        record(output=text)
        for text in ("2 + 3 = 6", "so 2 × 3 + 1 = 8.", "10 - 4 = 5", "1,000 * 2 = 200", "1 + 2 + 3 = 7", "8 / 4 = 3",
                     "3 - 5 = 2", "0.1 + 0.2 = 0.4", "2 * 3 = $7", "7 / 2 = 3.4")
    ],
    "damaged_text": [record(output="donâ€™t"), record(output="a\x00b"), record(input="\ufffd")],
}  # fmt: skip
CLEAN = {
    "placeholder_output": ["None of them.", "Null hypotheses are tested.", "No", "Input: none was given, so I chose."],
    "merged_task": ["1. Input the data.\n2. Output it.", "Instructions: mix and bake.", "The instruction: go."],
    "label_in_text": ["The output: 4"],
    "refusal": [
        "I am sorry for your loss.", "Division cannot be done by 0", "An AI is a program.", "I'm sorry I was late.",
        "As an AI researcher, she built it.",
    ],
    "unseen_media": ["<div>text</div>", "The image shows [1] a cat.", "List<int> files"],
    "link_in_output": ["http is a protocol", "a.b.c"],
    "open_fence": ["```\na\n```", "Use ` or ``` inline."],
    "cut_ending": [LONG + "to talk with", LONG + "end.", "of the", "Dear Sir,\n" + "yours,\n" * 9],
    "repeated_lines": ["yes\n" * 9],
    "wrong_sum": [
        "2 + 3 = 5", "10 / 3 = 3.33", "1 + 5 + 3 = 9", "2 + 3 × 4 = 14", "x + 2 + 3 = 7", "(2 + 3) * 4 = 20",
        "50% + 20% = 8", "2x + 3 = 7", "2023-01-05 = 5", "5 + 3 = 8 + 0", "a 2 + 2 = 4x", "4 - 6 = -2", "1/2 = 3",
        "2 * 3 = 6!", "1 + 1 = 10b", "3 ^ 2 + 1 = 10", "1 + 2 = 3.00", "7 / 2 = 3.5", "5 / 0 = 1", "x = 3 * 4 = 13 - 1",
    ],
    "damaged_text": ["naïve café — “quoted”", "tab\tand\nline", "Ünïcödé Â"],
}  # fmt: skip


def found_by(example: Example) -> set[str]:
    return {name for name, findings in find_suspicious([(0, example)], total=1, progress=False).items() if findings}


def test_every_rule_is_tested():
    assert {rule.name for rule in RULES} == FOUND.keys()


@pytest.mark.parametrize(("name", "example"), [(name, example) for name, many in FOUND.items() for example in many])
def test_finds(name: str, example: Example):
    assert name in found_by(example)


@pytest.mark.parametrize(("name", "output"), [(name, output) for name, many in CLEAN.items() for output in many])
def test_leaves_alone(name: str, output: str):
    assert name not in found_by(record(output=output))


def test_an_ordinary_example_is_clean():
    assert found_by(record("Name three colours.", "Red, green and blue.")) == set()


@pytest.mark.parametrize(
    "piece",
    ["(", "<", " ", "\n", "1 + ", "1", "1,", "[image ", "#", "![", "```\n", "a. ", "<!--", "8. Instruction", "\t"],
)
@pytest.mark.fast_rows(4)
def test_long_texts_take_no_time(piece: str):
    """No pattern may run away on a text made to hurt it."""
    text = piece * (50_000 // len(piece))
    start = time.process_time()
    found_by(record(output=text, input=text))
    before_leaked_block(text + "\n### Instruction: x")
    detect_language(text)
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Write a story about a dog.", "English"), ("Generate code to sort numbers.", "English"),
        ("Schreibe eine Geschichte über einen Hund und die Katze.", "German"), ("Il est un grand chanteur.", "French"),
        ("La vida es un viaje muy largo, pero es hermosa.", "Spanish"),
        ("Não sei o que você quer com isso.", "Portuguese"),
        ("Questo è un esempio di come si fa.", "Italian"), ("Dit is een voorbeeld van het werk.", "Dutch"),
        ("彼女は優秀な教師です。", "Japanese"), ("这是一个例子。", "Chinese"), ("안녕하세요 여러분", "Korean"),
        ("Это пример текста.", "Russian or Bulgarian"), ("Це приклад тексту, її книга.", "Ukrainian"),
        ("هذا مثال على النص", "Arabic or Persian"), ("यह एक उदाहरण है", "Hindi"), ("ภาษาไทย", "Thai"),
        ("42", UNDETERMINED), ("", UNDETERMINED), ("x = y / 2", UNDETERMINED), ("Lima, Quito", UNDETERMINED),
        ("https://www.la-de-el.es/la/de", UNDETERMINED),
    ],
)  # fmt: skip
def test_languages(text: str, language: str):
    assert detect_language(text) == language
