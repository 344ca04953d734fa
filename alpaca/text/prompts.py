"""The prompts of the Alpaca recipe. Their wording is the data format: it stands here and nowhere else.

Source: tatsu-lab/stanford_alpaca (`PROMPT_DICT` in its train.py). Nothing follows the last colon.
"""

import re

from alpaca.errors import InputError
from alpaca.files.names import quote_name

PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
RAW_TEMPLATE = "{prompt}"
# What follows the last colon: nothing in Stanford's; a line feed with litgpt, LLaMA-Factory and axolotl.
NAMED_TEMPLATES = {"alpaca": "", "alpaca_newline": "\n"}


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The recipe's prompt for an instruction. Only an empty `input` counts as none, as in the original."""
    if input == "":
        return _fill(PROMPT_WITHOUT_INPUT, instruction=instruction)
    return _fill(PROMPT_WITH_INPUT, instruction=instruction, input=input)


def format_prompt(prompt: str, input: str = "", template: str = "alpaca") -> str:
    """Fill `template`: a name of NAMED_TEMPLATES, or a literal text with `{prompt}` and optionally `{input}`.

    Only these two fields are replaced, in one pass, so braces in the texts themselves are safe. Raises InputError for a
    template without `{prompt}`, for a field that stands there twice, and for an `input` the template has no place for.
    """
    if template in NAMED_TEMPLATES:
        return alpaca_prompt(prompt, input) + NAMED_TEMPLATES[template]
    if "{prompt}" not in template:
        found = quote_name(template)
        raise InputError(
            f'prompt_template must be "alpaca", "alpaca_newline" or a text that contains {{prompt}}; found {found}'
        )
    if input and "{input}" not in template:
        raise InputError(
            f"an input was given, but prompt_template {quote_name(template)} has no {{input}}: add it, or leave input "
            "empty"
        )
    for field in ("{prompt}", "{input}"):
        if (times := template.count(field)) > 1:  # each time the text would be tokenized, and paid for, again
            raise InputError(f"prompt_template may hold {field} once; found it {times:,} times")
    return _fill(template, prompt=prompt, input=input)


def with_context(prompt: str, input: str = "") -> str:
    """An instruction and the context it refers to as one message of a user."""
    return f"{prompt}\n\n{input}" if input else prompt


def _fill(template: str, **fields: str) -> str:
    """Replace each `{name}` by its text, in one pass: a text that looks like a field stays as it is."""
    return re.sub(r"\{(\w+)\}", lambda match: fields.get(match[1], match[0]), template)
