"""What clients ask for in OpenAI's words, as the Predictor's inputs. Decides alone by what it is given.

Nothing is passed over in silence: a field that this server cannot honour is refused by its name, unless its value asks
for nothing. The bounds of numbers are the Predictor's own, which refuses what is outside of them.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alpaca.files.names import quote_name, quote_value
from web.openai.failures import names_of
from web.openai.refusals import Refusal

_TO_THE_CONTEXTS_END = 2**31 - 1  # the Predictor cuts it to what fits
_COMPLETION_TOKENS = 16  # OpenAI's default on /v1/completions
_MOST_PROMPTS = 512
# Field -> (the Predictor's input, what a value must be)
_PASSED = {
    "temperature": ("temperature", "a number"),
    "top_p": ("top_p", "a number"),
    "presence_penalty": ("presence_penalty", "a number"),
    "frequency_penalty": ("frequency_penalty", "a number"),
    "n": ("n", "a whole number"),
    "seed": ("seed", "a whole number"),
    "top_k": ("top_k", "a whole number"),  # these three are not OpenAI's; clients pass them as they pass others' words
    "min_p": ("min_p", "a number"),
    "repetition_penalty": ("repetition_penalty", "a number"),
}
_NO_EFFECT = {"user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "metadata", "service_tier"}
# Field -> the values that ask for nothing. All others are refused by name.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "store": (False,),
    "logit_bias": ({},),
    "suffix": ("",),
    "best_of": (1,),
}
_COMMON = {"model", "stream", "stream_options", "stop", "max_tokens", "logprobs", "response_format"}
_OF_COMPLETIONS = _COMMON | {"prompt", "echo"}
_OF_CHAT = _COMMON | {"messages", "max_completion_tokens", "top_logprobs"}


@dataclass(frozen=True, kw_only=True)
class Models:
    """base: the name of the model that the servers were started with.   adapters: what else a request may name."""

    base: str
    adapters: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.base, *self.adapters)

    def check(self, name: Any) -> str:
        """Raises Refusal for a model that there is not."""
        if name not in self.names:
            known = ", ".join(self.names)
            raise Refusal(
                404, f"no model {quote_value(name)} here; there is {known}", param="model", code="model_not_found"
            )
        return name


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request.

    inputs: of the Predictor, one mapping for each prompt.   echoes: each prompt where it is to stand before its answer.
    n: completions of each prompt.   num_logprobs: most likely tokens beside each; None: no log probabilities.
    names: the client's for the Predictor's inputs, where they differ.
    """

    is_chat: bool
    model: str
    inputs: tuple[dict[str, Any], ...]
    echoes: tuple[str, ...] = ()
    n: int = 1
    streams: bool = False
    includes_usage: bool = False
    num_logprobs: int | None = None
    names: Mapping[str, str] = field(default_factory=dict, compare=False)


def read_body(content: bytes) -> dict[str, Any]:
    """The fields that are not null. Raises Refusal."""
    try:
        body = json.loads(content, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise Refusal(400, "the request's body is no JSON") from None
    if not isinstance(body, dict):
        raise Refusal(400, "expected the request's body to be a JSON object")
    return {name: value for name, value in body.items() if value is not None}


def _no_number(name: str) -> None:
    raise ValueError(name)


def read_chat(body: Mapping[str, Any], models: Models) -> Asked:
    """A request for /v1/chat/completions. Raises Refusal."""
    model = _check_fields(body, _OF_CHAT, models)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, "messages must be a list of at least one message", param="messages")
    most = _take(body, "max_completion_tokens", "a whole number", _take(body, "max_tokens", "a whole number", None))
    num_logprobs = _take(body, "top_logprobs", "a whole number", 0)
    wants_logprobs = _take(body, "logprobs", "true or false", False)
    if num_logprobs and not wants_logprobs:
        raise Refusal(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    return _asked(
        body,
        model,
        models,
        [{"messages": [_read_message(message, f"messages[{i}]") for i, message in enumerate(messages)]}],
        is_chat=True,
        max_new_tokens=_TO_THE_CONTEXTS_END if most is None else most,
        num_logprobs=num_logprobs if wants_logprobs else None,
    )


def read_completion(body: Mapping[str, Any], models: Models) -> Asked:
    """A request for /v1/completions. Raises Refusal."""
    model = _check_fields(body, _OF_COMPLETIONS, models)
    prompts = _read_prompts(body.get("prompt", ""))
    echoes = _take(body, "echo", "true or false", False)
    num_logprobs = _take(body, "logprobs", "a whole number", None)
    most = _take(body, "max_tokens", "a whole number", _COMPLETION_TOKENS)
    raw = [{"prompt": prompt, "prompt_template": "{prompt}"} for prompt in prompts]
    if echoes and (num_logprobs is not None or most == 0):  # else the prompt is put before the answer here
        raw = [{**values, "echo": True} for values in raw]
    return _asked(
        body,
        model,
        models,
        raw,
        is_chat=False,
        max_new_tokens=most,
        num_logprobs=num_logprobs,
        echoes=tuple(prompts) if echoes else (),
    )


def _asked(
    body: Mapping[str, Any],
    model: str,
    models: Models,
    prompts: list[dict[str, Any]],
    *,
    is_chat: bool,
    max_new_tokens: int,
    num_logprobs: int | None,
    echoes: tuple[str, ...] = (),
) -> Asked:
    """What both kinds have in common.

    One completion is streamed as it comes. Of several each comes when it is whole: the Predictor has no other way, and
    predictions with other seeds would give other texts than the answer that is not streamed.
    """
    streams = _take(body, "stream", "true or false", False)
    options = body.get("stream_options", {})
    if options and not streams:
        raise Refusal(400, "stream_options goes with stream alone", param="stream_options")
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise Refusal(400, "stream_options has include_usage, and nothing else", param="stream_options")
    n = _take(body, "n", "a whole number", 1)
    shared: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": max_new_tokens, "details": True}
    for name, (ours, kind) in _PASSED.items():
        if name in body:
            shared[ours] = _take(body, name, kind, None)
    if "stop" in body:
        shared["stop"] = _read_stop(body["stop"])
    if (schema := _read_response_format(body.get("response_format"))) is not None:
        shared["json_schema"] = schema
    if num_logprobs is not None:
        shared["logprobs"] = num_logprobs
    if model != models.base:
        shared["replicate_weights"] = model
    if streams and n == 1:
        shared["stream"] = True
    return Asked(
        is_chat=is_chat,
        model=model,
        inputs=tuple({**prompt, **shared} for prompt in prompts),
        echoes=echoes,
        n=n,
        streams=streams,
        includes_usage=bool(options.get("include_usage")),
        num_logprobs=num_logprobs,
        names=names_of(body),
    )


def _check_fields(body: Mapping[str, Any], known: set[str], models: Models) -> str:
    """Refuse a field that is unknown or cannot be honoured. Returns the model's name."""
    for name, value in body.items():
        if name in _REFUSED:
            if not any(value == nothing and type(value) is type(nothing) for nothing in _REFUSED[name]):
                raise Refusal(400, f"this server has no {name}: leave it out", param=name, code="unsupported_parameter")
        elif name not in known and name not in _PASSED and name not in _NO_EFFECT:
            raise Refusal(
                400, f"unknown field {quote_name(name)}: leave it out", param=name[:80], code="unknown_parameter"
            )
    if "model" not in body:
        raise Refusal(400, "model is missing", param="model", code="missing_required_parameter")
    return models.check(body["model"])


def _take(body: Mapping[str, Any], name: str, kind: str, default: Any) -> Any:
    """A field's value, of the kind it must be. Raises Refusal."""
    if name not in body:
        return default
    value = body[name]
    is_whole = (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and value.is_integer()
    )
    fits = {
        "a number": is_whole or (isinstance(value, float) and math.isfinite(value)),
        "a whole number": is_whole,
        "true or false": isinstance(value, bool),
    }
    if not fits[kind]:
        raise Refusal(400, f"{name} must be {kind}; found {quote_value(value)}", param=name)
    return int(value) if kind == "a whole number" else value


def _read_prompts(prompt: Any) -> list[str]:
    """One text, or several in a list."""
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if prompts and not any(isinstance(one, str) for one in prompts) and all(isinstance(x, int | list) for x in prompts):
        raise Refusal(400, "prompt: this server takes texts, no token ids", param="prompt")
    if not prompts or not all(isinstance(one, str) for one in prompts):
        raise Refusal(400, "prompt must be a text, or a list of texts", param="prompt")
    if len(prompts) > _MOST_PROMPTS:
        raise Refusal(400, f"prompt may hold {_MOST_PROMPTS} texts; found {len(prompts):,}", param="prompt")
    return prompts


def _read_stop(stop: Any) -> list[str]:
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Refusal(400, "stop must be a text, or a list of texts", param="stop")
    return [text for text in texts if text]


def _read_response_format(given: Any) -> dict[str, Any] | None:
    """The JSON schema of the answer, None for any text. `strict` changes nothing: the schema always holds."""
    name = "response_format"
    kind = given.get("type") if isinstance(given, dict) else None
    if given is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        found = quote_value(given if kind is None else kind)
        raise Refusal(
            400, f"{name}: this server has the types text, json_object and json_schema; found {found}",
            param=f"{name}.type",
        )  # fmt: skip
    described = given.get("json_schema")
    if not isinstance(described, dict) or not isinstance(described.get("name"), str):
        raise Refusal(
            400, f"{name}.json_schema must be an object with a name and a schema", param=f"{name}.json_schema"
        )
    if not isinstance(described.get("strict", False), bool | None):
        raise Refusal(400, f"{name}.json_schema.strict must be true or false", param=f"{name}.json_schema.strict")
    schema = described.get("schema", {})
    if not isinstance(schema, dict):
        raise Refusal(400, f"{name}.json_schema.schema must be an object", param=f"{name}.json_schema.schema")
    return schema


def _read_message(message: Any, name: str) -> dict[str, Any]:
    """A message as the Predictor takes it: a role and a content. Raises Refusal."""
    if not isinstance(message, dict):
        raise Refusal(400, f"{name} must be an object", param=name)
    given = {key: value for key, value in message.items() if value is not None and value != []}
    for key in given.keys() - {"role", "content"}:
        raise Refusal(
            400, f"{name} has {quote_name(key)}: this server takes a role and a content", param=f"{name}.{key[:80]}"
        )
    if given.keys() != {"role", "content"}:
        raise Refusal(400, f"{name} must have a role and a content", param=name)
    role, content = given["role"], given["content"]
    if role in ("tool", "function"):
        raise Refusal(400, f"{name}: this server has no tools and functions", param=f"{name}.role")
    for i, part in enumerate(content if isinstance(content, list) else ()):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise Refusal(
                400, f"{name}: this server takes parts of type text; found {quote_value(kind)}",
                param=f"{name}.content[{i}].type",
            )  # fmt: skip
    return {"role": "system" if role == "developer" else role, "content": content}
