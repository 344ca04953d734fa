"""The inputs that a client may send, with their bounds, and the request that an engine gets in their place."""

import dataclasses
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from alpaca.errors import InputError, PromptTooLong
from alpaca.files.names import quote_name, quote_value
from alpaca.serving.settings import BARE_BASE, DEFAULT_ADAPTER
from alpaca.serving.structured.constraints import Constraint, read_constraint
from alpaca.text.chat.files import ChatTemplate
from alpaca.text.chat.messages import Message
from alpaca.text.chat.prompt import encode_chat
from alpaca.text.chat.trained_prompt import CHAT
from alpaca.text.fitting import encode_within
from alpaca.text.prompts import RAW_TEMPLATE, format_prompt, with_context
from alpaca.text.tokenizer import Tokenizer

_LARGEST_DRAWN_SEED = 2**31 - 1
_OTHER_NAMES = {
    "max_length": "max_new_tokens, or total_tokens, which counts the prompt, too",
    "max_tokens": "max_new_tokens",
}
_DEFAULT_TEMPLATE = "auto"  # what the model was trained with, where its folder says so; else Alpaca's
_ALPACA = "alpaca"
MOST_STOPS = 64
MOST_STOP_CHARACTERS = 256  # of one stop text
_LARGEST_SEED = 2**53  # the largest whole number that survives as a JSON number everywhere


def _bounded(default: Any, *, ge: float | None = None, le: float | None = None) -> Any:
    return field(default=default, metadata={"ge": ge, "le": le})


@dataclass(frozen=True, kw_only=True)
class PredictionInputs:
    """The Predictor's inputs: names, defaults and bounds. predict.py repeats them as literals; a test compares."""

    prompt: str = ""
    input: str = ""
    prompt_template: str = _DEFAULT_TEMPLATE
    messages: tuple[Message, ...] = ()
    n: int = _bounded(1, ge=1, le=5)
    max_new_tokens: int = _bounded(256, ge=0)
    min_new_tokens: int = _bounded(0, ge=0)
    total_tokens: int | None = _bounded(None, ge=1)
    temperature: float = _bounded(0.75, ge=0, le=5)
    top_p: float = _bounded(1.0, ge=0.01, le=1)
    top_k: int = _bounded(0, ge=0)
    min_p: float = _bounded(0.0, ge=0, le=1)
    repetition_penalty: float = _bounded(1.0, ge=0.01, le=5)
    presence_penalty: float = _bounded(0.0, ge=-2, le=2)
    frequency_penalty: float = _bounded(0.0, ge=-2, le=2)
    stop: tuple[str, ...] = ()
    seed: int | None = _bounded(None, ge=0)
    num_beams: int = _bounded(1, ge=1, le=8)
    stream: bool = False
    details: bool = False
    logprobs: int | None = _bounded(None, ge=0, le=20)
    echo: bool = False
    json_schema: dict[str, Any] | None = None
    regex: str = ""
    grammar: str = ""
    replicate_weights: str | None = None
    max_length: int | None = None  # these two are other programs' names, and do nothing but be spoken of: see below
    max_tokens: int | None = None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "PredictionInputs":
        """Take inputs as they come over HTTP, where an integer may be 3.0 and `stop` is a list. Raises InputError."""
        integers = {item.name for item in dataclasses.fields(cls) if item.type in (int, int | None)}
        cleaned = {name: _whole(name, value) if name in integers else value for name, value in values.items()}
        for name in ("messages", "stop"):
            cleaned[name] = tuple(cleaned.get(name) or ())
        _check_stop(cleaned["stop"])
        return cls(**cleaned)

    def check(self) -> None:
        """Check each value against its bounds, and which values go together. Raises InputError."""
        for item in dataclasses.fields(self):
            value, ge, le = getattr(self, item.name), item.metadata.get("ge"), item.metadata.get("le")
            if value is None:
                continue
            # `not >=` rather than `<`, so that NaN fails
            if (ge is not None and not value >= ge) or (le is not None and not value <= le):
                raise InputError(f"{item.name} must be {_bounds_text(ge, le)}; found {quote_value(value)}")
        self._check_one_prompt()
        if self.seed is not None and self.seed > _LARGEST_SEED:
            raise InputError(f"seed must be at most 2**53; found {self.seed}")
        if self.num_beams > 1 and (self.presence_penalty or self.frequency_penalty):
            raise InputError("beam search knows no presence_penalty or frequency_penalty; leave them out")
        if self.stream and (self.n > 1 or self.num_beams > 1):
            raise InputError("stream sends the pieces of one completion: use it with n = 1 and num_beams = 1")
        if self.num_beams > 1 and self.n > self.num_beams:
            raise InputError(f"beam search with num_beams {self.num_beams} cannot give n = {self.n} completions")
        self._check_details()
        if self.num_beams > 1 and self.constraint is not None:
            raise InputError(f"beam search follows no {self.constraint.kind}: leave it out, or leave num_beams at 1")

    @cached_property
    def constraint(self) -> Constraint | None:
        """What the answer must follow. Raises InputError."""
        return read_constraint(self.json_schema, self.regex, self.grammar)

    def _check_details(self) -> None:
        asked = [name for name, is_asked in self._scores_asked().items() if is_asked]
        if asked and not self.details:
            raise InputError(f"{' and '.join(asked)} need details: only a JSON document has room for them")
        if asked and self.num_beams > 1:
            raise InputError(f"{' and '.join(asked)} do not go with num_beams above 1; details alone does")
        if not self.max_new_tokens and not self.echo:
            raise InputError("max_new_tokens 0 needs echo: without it there would be nothing to answer")

    def _scores_asked(self) -> dict[str, bool]:
        return {"logprobs": self.logprobs is not None, "echo": self.echo}

    def _check_one_prompt(self) -> None:
        if self.messages:
            beside = {"prompt": self.prompt, "input": self.input}
            if self.prompt_template != _DEFAULT_TEMPLATE:
                beside["prompt_template"] = self.prompt_template
            if given := [name for name, value in beside.items() if value]:
                raise InputError(f"messages are the whole conversation: leave {' and '.join(given)} out beside them")
        elif not self.prompt and self.prompt_template != RAW_TEMPLATE:
            raise InputError(
                "give prompt, a text, or messages, a list of objects with `role` and `content`; an empty prompt goes "
                f"with prompt_template {RAW_TEMPLATE} alone"
            )


def describe_unused(inputs: PredictionInputs) -> Iterator[str]:
    """A sentence for each input that was given under another program's name for it and has no effect.

    Cog's runtime takes every input that the schema does not list out of a request before this program sees it. So the
    names most often mistaken are listed there, for nothing but this.
    """
    for name, meant in _OTHER_NAMES.items():
        if (value := getattr(inputs, name)) is not None:
            yield f"{name} is no input of this model, and {quote_value(value)} was not used: did you mean {meant}?"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What an engine computes: `n` completions of `prompt_ids`, each of at most `max_new_tokens` tokens.

    max_new_tokens: 0 where only the prompt's scores are wanted.   limit: why an answer of that many tokens ends there.
    logprobs: each token is scored, and so many of the most likely ones with it; None: no token is.
    echo: the prompt's tokens are scored, too, those behind its token number `scored_from`. What stands before that may
    come from the cache.
    constraint: what each completion must follow.
    """

    prompt_ids: tuple[int, ...]
    n: int
    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    num_beams: int
    logprobs: int | None = None
    echo: bool = False
    scored_from: int = 0
    limit: Literal["length", "context"] = "length"
    adapter: str | None = None  # its name in the server's settings; None: the base model alone
    constraint: Constraint | None = None
    reads_along: bool = True  # the reader wants tokens as they come, not all at the end
    strips_leading: bool = True  # white space: an answer starts with its first word, while a raw prompt's text goes on

    @property
    def only_scores(self) -> bool:
        """Whether the scores of its prompt are all there is to compute, for which its last token is not needed."""
        return not self.max_new_tokens and len(self.prompt_ids) > 1


@dataclass(frozen=True, kw_only=True)
class AdapterNames:
    """The adapters a request may ask for, by the names that the operator gave them. A request never names a path.

    default: the adapter of requests that name none; None: the base model alone.
    templates, trained_prompts: of those that bring one; for all others the base model's hold.
    """

    named: tuple[str, ...] = ()
    default: str | None = None
    templates: Mapping[str, ChatTemplate] = field(default_factory=dict)
    trained_prompts: Mapping[str, str] = field(default_factory=dict)

    def resolve(self, asked: str | None) -> str | None:
        """The adapter that `replicate_weights` means; None for the base model. Raises InputError for another name."""
        if not asked or asked == DEFAULT_ADAPTER:
            return self.default
        if asked == BARE_BASE:
            return None
        if asked not in self.named:
            known = ", ".join([DEFAULT_ADAPTER, BARE_BASE, *(name for name in self.named if name != DEFAULT_ADAPTER)])
            raise InputError(
                f"replicate_weights names an adapter that this server was started with, never a path or an address: "
                f"one of {known}; found {quote_name(asked)}"
            )
        return asked


NO_ADAPTERS = AdapterNames()


def make_request(
    inputs: PredictionInputs,
    tokenizer: Tokenizer,
    *,
    max_context: int,
    adapters: AdapterNames = NO_ADAPTERS,
) -> Request:
    """Fill the template, tokenize, and cut `max_new_tokens` to what fits. Raises InputError, PromptTooLong.

    What a request may cost is bounded by its size: each field of a template stands there once, a chat template has
    bounds of its own, and of a text that cannot fit no more is tokenized than shows it.
    """
    inputs.check()
    adapter = adapters.resolve(inputs.replicate_weights)
    template = adapters.templates.get(adapter or "", tokenizer.chat_template)
    trained_prompt = adapters.trained_prompts.get(adapter or "", tokenizer.trained_prompt)
    inputs = _with_prompt(inputs, trained_prompt or _ALPACA)
    prompt_ids = tuple(_encode(inputs, tokenizer, template, max_context))
    if not prompt_ids:
        raise InputError("the prompt is empty and this model's tokenizer has no BOS token: give at least one character")
    max_new_tokens, limit = _room(inputs, len(prompt_ids), max_context)
    return Request(
        prompt_ids=prompt_ids,
        adapter=adapter,
        max_new_tokens=max_new_tokens,
        limit=limit,
        constraint=inputs.constraint,
        seed=random.SystemRandom().randint(0, _LARGEST_DRAWN_SEED) if inputs.seed is None else inputs.seed,
        reads_along=inputs.stream or inputs.n > 1 or bool(inputs.stop),
        strips_leading=_strips_leading_space(inputs),
        **{name: getattr(inputs, name) for name in _SAME_IN_BOTH},
    )


def _with_prompt(inputs: PredictionInputs, trained_prompt: str) -> PredictionInputs:
    """The inputs with the prompt that the model was trained with, unless a client asks for another."""
    if inputs.messages or inputs.prompt_template != _DEFAULT_TEMPLATE:
        return inputs
    if trained_prompt != CHAT:
        return dataclasses.replace(inputs, prompt_template=trained_prompt)
    said = with_context(inputs.prompt, inputs.input)
    return dataclasses.replace(inputs, prompt="", input="", messages=({"role": "user", "content": said},))


def _encode(
    inputs: PredictionInputs, tokenizer: Tokenizer, template: ChatTemplate | None, max_context: int
) -> list[int]:
    if inputs.messages:
        return encode_chat(inputs.messages, tokenizer, template, max_context)
    text = format_prompt(inputs.prompt, inputs.input, inputs.prompt_template)
    return [*tokenizer.prefix_ids, *encode_within(tokenizer, text, max_context)]


def _strips_leading_space(inputs: PredictionInputs) -> bool:
    """An answer to a template starts with its first word. A raw prompt's keeps its white space, and so does one that
    follows a constraint, of which white space may be part.
    """
    return inputs.prompt_template != RAW_TEMPLATE and inputs.constraint is None


def _room(inputs: PredictionInputs, prompt_length: int, max_context: int) -> tuple[int, Literal["length", "context"]]:
    """Number of tokens that may be generated, and what limits it: those asked for, as far as they fit.

    Raises PromptTooLong where none do, though some are asked for.
    """
    longest_prompt = max_context - min(inputs.max_new_tokens, 1)
    if prompt_length > longest_prompt:
        raise PromptTooLong(
            f"the prompt is {prompt_length} tokens long and the model's context is {max_context}: "
            "shorten the prompt so that room for an answer is left"
        )
    if inputs.total_tokens is not None and prompt_length > inputs.total_tokens - min(inputs.max_new_tokens, 1):
        raise PromptTooLong(
            f"the prompt is {prompt_length} tokens long and total_tokens, which includes it, is "
            f"{inputs.total_tokens}: raise total_tokens or leave it out"
        )
    asked, room = inputs.max_new_tokens, max_context - prompt_length
    if inputs.total_tokens is not None:
        asked = min(asked, inputs.total_tokens - prompt_length)
    return min(asked, room), "length" if asked <= room else "context"


def _whole(name: str, value: Any) -> Any:
    if isinstance(value, float):
        if not value.is_integer():
            raise InputError(f"{name} must be a whole number; found {quote_value(value)}")
        return int(value)
    return value


def _check_stop(stop: tuple[Any, ...]) -> None:
    """Raise InputError for stop texts that are no texts, or more or longer than are looked for."""
    if len(stop) > MOST_STOPS:
        raise InputError(f"stop may hold {MOST_STOPS} texts; found {len(stop):,}")
    for text in stop:
        if not isinstance(text, str) or not text:
            raise InputError(f"stop must be a list of texts that are not empty; found {quote_value(text)} in it")
        if len(text) > MOST_STOP_CHARACTERS:
            raise InputError(f"a stop text may have {MOST_STOP_CHARACTERS} characters; found {quote_value(text)}")


def _bounds_text(ge: float | None, le: float | None) -> str:
    return f"at least {ge}" if le is None else f"from {ge} to {le}"


_SAME_IN_BOTH = (
    {item.name for item in dataclasses.fields(PredictionInputs)} & {item.name for item in dataclasses.fields(Request)}
) - {"max_new_tokens", "seed"}
