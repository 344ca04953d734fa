"""A prompt from a template, and the answer after it: Stanford's recipe.

Prompt and answer are tokenized as one text, EOS is added by id, and as many leading tokens carry no loss as the prompt
alone has. Where the tokenizer merges the prompt's last colon with the answer's first character, that token therefore
carries none (3 % of the Alpaca data). With `splits` the two are tokenized apart, and all of the answer carries loss.
"""

from collections.abc import Sequence

from alpaca.data.encoding.layout import Layout, Row
from alpaca.data.example import AnyExample, Completion, Conversation, Example
from alpaca.errors import InputError
from alpaca.text.prompts import RAW_TEMPLATE, format_prompt
from alpaca.text.tokenizer import Tokenizer

_MOST_SHOWN = 60
_NO_NEIGHBOUR = "\U000f0000"  # of private use: a tokenizer writes it in bytes, or as unknown


class PromptLayout(Layout):
    """template: as `format_prompt` takes it. Completions go as they are where `wraps_completions` is false."""

    def __init__(
        self, template: str, tokenizer: Tokenizer, *, splits: bool = False, wraps_completions: bool = False
    ) -> None:
        self.template, self._tokenizer = template, tokenizer
        self._splits, self._wraps_completions = splits, wraps_completions
        named = "the Alpaca prompt" if template == "alpaca" else f"the prompt template {template!r}"
        plain = "" if wraps_completions else "; prompts that have a completion as they are"
        self.description = named + plain + (", prompt and answer tokenized apart" if splits else "")

    def encode(self, examples: Sequence[AnyExample]) -> list[Row]:
        prompts = [self._prompt(example) for example in examples]
        answers = [example.output for example in examples]
        return self._encode_apart(prompts, answers) if self._splits else self._encode_as_one(prompts, answers)

    def _prompt(self, example: AnyExample) -> str:
        if isinstance(example, Example):
            return format_prompt(example.instruction, example.input, self.template)
        if isinstance(example, Completion):
            return format_prompt(example.prompt, "", self.template if self._wraps_completions else RAW_TEMPLATE)
        return format_prompt(_only_turn(example), "", self.template)

    def _encode_as_one(self, prompts: list[str], answers: list[str]) -> list[Row]:
        tokenizer, texts = self._tokenizer, [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        encoded, num_prefix = tokenizer.encode_batch(prompts + texts), len(tokenizer.prefix_ids)
        rows = []
        for prompt, whole in zip(encoded[: len(prompts)], encoded[len(prompts) :], strict=True):
            ids = [*tokenizer.prefix_ids, *whole, tokenizer.eos_id]
            start = min(num_prefix + len(prompt), len(ids))
            rows.append(Row(ids, ((start, len(ids)),), is_merged=whole[: len(prompt)] != prompt))
        return rows

    def _encode_apart(self, prompts: list[str], answers: list[str]) -> list[Row]:
        """An answer's tokens are those that follow a character with which no token begins or ends."""
        tokenizer, num = self._tokenizer, len(prompts)
        before = tokenizer.encode(_NO_NEIGHBOUR)
        encoded = tokenizer.encode_batch(prompts + [_NO_NEIGHBOUR + answer for answer in answers])
        rows = []
        for prompt, answer in zip(encoded[:num], encoded[num:], strict=True):
            if answer[: len(before)] != before:
                raise InputError(
                    "--prompt_boundary split: this model's tokenizer knows no text that goes on; leave it out"
                )
            start = len(tokenizer.prefix_ids) + len(prompt)
            ids = [*tokenizer.prefix_ids, *prompt, *answer[len(before) :], tokenizer.eos_id]
            rows.append(Row(ids, ((start, len(ids)),)))
        return rows


def _only_turn(conversation: Conversation) -> str:
    roles = [turn.role for turn in conversation.turns]
    if roles == ["user", "assistant"]:
        return conversation.turns[0].content
    raise InputError(
        f"a prompt template has room for one turn of a user and its answer, and the conversation that begins "
        f"{conversation.turns[0].content[:_MOST_SHOWN]!r} has {', '.join(roles[:6])}: use --prompt_template llama2, "
        "llama3, chatml or a Jinja file, or a model that has a chat template"
    )
