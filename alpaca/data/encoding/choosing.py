"""Which layout a run's examples have: the one that is asked for, or the one that fits them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alpaca.data.encoding.chat_layout import ChatLayout
from alpaca.data.encoding.layout import Layout
from alpaca.data.encoding.prompt_layout import PromptLayout
from alpaca.data.example import AnyExample, Completion, Conversation
from alpaca.errors import InputError
from alpaca.files.names import quote_name
from alpaca.text.chat.files import ChatTemplate, known_template
from alpaca.text.chat.trained_prompt import CHAT
from alpaca.text.prompts import NAMED_TEMPLATES, RAW_TEMPLATE
from alpaca.text.tokenizer import Tokenizer

AUTO, OF_MODEL, SPLIT = "auto", "model", "split"
BOUNDARIES = ("merged", SPLIT)
_NEEDED = {  # control tokens without which a template is only text
    "llama2": (),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}


@dataclass(frozen=True)
class Chosen:
    """layout: encodes examples.    served: the prompt that the trained model is asked by, as the server reads it.

    template: the chat template that is written beside the weights; None: the base's own is left as it is.
    """

    layout: Layout
    served: str
    template: ChatTemplate | None = None


def choose_layout(
    asked: str, examples: Sequence[AnyExample], tokenizer: Tokenizer, *, boundary: str = BOUNDARIES[0]
) -> Chosen:
    """The layout of `--prompt_template`: a name, a Jinja file, a text that holds {prompt}, or what fits the examples.

    boundary: "split" tokenizes prompt and answer apart. Raises InputError.
    """
    chat = _find_chat(asked, examples, tokenizer)
    if chat is not None:
        if boundary == SPLIT:
            raise InputError(
                "--prompt_boundary split is for prompt templates: with a chat template an answer begins behind a "
                "control token anyway; leave it out"
            )
        template, name = chat
        return Chosen(ChatLayout(template, tokenizer, name=name), CHAT, None if name == OF_MODEL else template)
    prompt = "alpaca" if asked == AUTO else asked
    if prompt not in NAMED_TEMPLATES and "{prompt}" not in prompt:
        known = (AUTO, *NAMED_TEMPLATES, *_NEEDED, OF_MODEL)
        raise InputError(
            f"--prompt_template: expected one of {', '.join(known)}, a Jinja file, or a text that holds {{prompt}}; "
            f"found {quote_name(asked)}"
        )
    wraps = asked != AUTO
    layout = PromptLayout(prompt, tokenizer, splits=boundary == SPLIT, wraps_completions=wraps)
    is_raw = not wraps and all(isinstance(example, Completion) for example in examples)
    return Chosen(layout, RAW_TEMPLATE if is_raw else prompt)


def _find_chat(asked: str, examples: Sequence[AnyExample], tokenizer: Tokenizer) -> tuple[ChatTemplate, str] | None:
    """The chat template to use, and its name; None for prompts."""
    if asked == OF_MODEL:
        if tokenizer.chat_template is None:
            raise InputError(
                "--prompt_template model: this model has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json); use alpaca, llama2, llama3, chatml or a Jinja file"
            )
        return tokenizer.chat_template, OF_MODEL
    if asked in _NEEDED:
        missing = [token for token in _NEEDED[asked] if token not in tokenizer.marked_encoder.control_tokens]
        if missing:
            raise InputError(
                f"--prompt_template {asked}: this model's tokenizer has no control token {', '.join(missing)}, and "
                "they would be learnt as plain text; use alpaca, llama2 or a Jinja file with tokens that it has"
            )
        return known_template(asked), asked
    if asked.endswith((".jinja", ".j2")) or ("{prompt}" not in asked and Path(asked).is_file()):
        return _read_file(Path(asked)), Path(asked).name
    if asked == AUTO and tokenizer.chat_template is not None and any(isinstance(e, Conversation) for e in examples):
        return tokenizer.chat_template, OF_MODEL
    return None


def _read_file(file: Path) -> ChatTemplate:
    try:
        return ChatTemplate(file.read_text(encoding="utf-8"), file)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompt_template {file} cannot be read as a Jinja file: {error}") from error
