"""The prompts are the data format: held here byte for byte, as stanford_alpaca published them."""

import pytest

from alpaca.errors import InputError
from alpaca.text.prompts import RAW_TEMPLATE, alpaca_prompt, format_prompt

WITHOUT_INPUT = (
    b"Below is an instruction that describes a task. Write a response that appropriately completes the request."
    b"\n\n### Instruction:\nName a bird.\n\n### Response:"
)
WITH_INPUT = (
    b"Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    b"response that appropriately completes the request."
    b"\n\n### Instruction:\nName the bird.\n\n### Input:\nIt is black.\n\n### Response:"
)


def test_prompt_without_input_is_the_published_one():
    assert alpaca_prompt("Name a bird.").encode() == WITHOUT_INPUT
    assert alpaca_prompt("Name a bird.", "").encode() == WITHOUT_INPUT


def test_prompt_with_input_is_the_published_one():
    assert alpaca_prompt("Name the bird.", "It is black.").encode() == WITH_INPUT


@pytest.mark.parametrize("input", ["<No Input>", " ", "\n", "0"])
def test_only_an_empty_input_is_none(input: str):
    assert f"\n\n### Input:\n{input}\n\n### Response:" in alpaca_prompt("Name the bird.", input)


@pytest.mark.parametrize(
    "text", ["{instruction}", "{input}", "{prompt}", "{}", "{0}", "{{x}}", r"\1 \g<0>", "%s", "ไทย 🦙"]
)
def test_texts_stand_in_the_prompt_as_they_are(text: str):
    template = WITH_INPUT.decode()
    assert alpaca_prompt(text, "It is black.") == template.replace("Name the bird.", text)
    assert alpaca_prompt("Name the bird.", text) == template.replace("It is black.", text)
    assert format_prompt(text, text, "{input}|{prompt}") == f"{text}|{text}"
    assert format_prompt(text, template=RAW_TEMPLATE) == text


def test_template_alpaca_is_the_recipe():
    assert format_prompt("Name a bird.").encode() == WITHOUT_INPUT
    assert format_prompt("Name the bird.", "It is black.", "alpaca").encode() == WITH_INPUT


def test_fields_of_a_literal_template_are_optional():
    assert format_prompt("a", "b", "{input}{prompt}{other}{other}") == "ba{other}{other}"
    assert format_prompt("a", "", "{prompt} {input}.") == "a ."


@pytest.mark.parametrize("field", ["{prompt}", "{input}"])
def test_a_field_stands_in_a_template_once(field: str):
    with pytest.raises(InputError, match=rf"prompt_template may hold \{field} once; found it 3,001 times"):
        format_prompt("a", "b", "{prompt}" + "{input}" + field * 3000)


def test_template_without_a_place_for_the_prompt_is_refused():
    with pytest.raises(
        InputError, match=r'must be "alpaca", "alpaca_newline" or a text that contains \{prompt\}; found \'Alpaca\''
    ):
        format_prompt("a", template="Alpaca")


def test_input_without_a_place_is_refused():
    with pytest.raises(InputError, match=r"an input was given, but prompt_template '\{prompt\}' has no \{input\}"):
        format_prompt("a", "b", RAW_TEMPLATE)
