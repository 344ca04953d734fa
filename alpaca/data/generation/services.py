"""Completions of a prompt from a service: any OpenAI-compatible one, or this project's own Cog server."""

import email.utils
import http.client
import json
import re
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timezone
from typing import Any, Protocol

from alpaca.errors import InputError, MissingPackage

_TRANSIENT = {408, 409, 425, 429}  # and every 5xx. Cog answers 409 while all its slots are taken
_NO_QUOTA = {"insufficient_quota", "billing_hard_limit_reached"}  # come as 429 but do not pass
_TOO_LONG = re.compile(r"context.?length|context window|max_tokens is too large|too many tokens", re.IGNORECASE)
_COMPLETION_MODELS = re.compile(r"(text-)?(davinci|curie|babbage|ada)(-.*)?|gpt-.*-instruct(-\d+)?")
_END_OF_TEXT = 50256  # in the vocabulary of the text-* models


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn."""

    temperature: float
    top_p: float
    stop: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A service's answer. finish_reason: "stop", "length" or another; "unknown" where the service does not say."""

    text: str
    finish_reason: str
    prompt_tokens: int
    output_tokens: int
    model: str


class RequestFailed(Exception):
    """One request brought no completion. retry_after_s: the seconds that the service asked to wait."""

    def __init__(
        self,
        reason: str,
        *,
        is_permanent: bool = False,
        is_too_long: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(reason)
        self.is_permanent, self.is_too_long, self.retry_after_s = is_permanent, is_too_long, retry_after_s


class Client(Protocol):
    """A service that completes prompts. endpoint: its address, without secrets. is_chat: it replies, not continues."""

    endpoint: str
    is_chat: bool

    def complete(self, prompt: str, *, max_tokens: int, number: int) -> Completion:
        """One request, from any thread. number: of the prompt, for services that take a seed. Raises RequestFailed."""
        ...


def count_tokens_roughly(text: str) -> int:
    """Tokens of English text without a tokenizer at hand: about 4 letters each."""
    return -(-len(text) // 4)


def hide_secrets(text: str, secrets: tuple[str, ...]) -> str:
    """Replace secrets of 8 letters or more ("EMPTY" is none), and everything that looks like a key, by stars."""
    for secret in secrets:
        if len(secret) >= 8:
            text = text.replace(secret, "***")
    return re.sub(r"\b(sk|gsk|key)-[\w*-]{6,}|(?<=Bearer )[^\s,;]+", "***", text)


def plain_address(url: str) -> str:
    """A URL without user, password, query and fragment, any of which may hold a secret."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def cut_at_stop(completion: Completion, stop: str) -> Completion:
    """The completion up to `stop`, for services that do not honour it."""
    before, found, _ = completion.text.partition(stop)
    if not found:
        return completion
    return Completion(
        text=before,
        finish_reason="stop",
        prompt_tokens=completion.prompt_tokens,
        output_tokens=completion.output_tokens,
        model=completion.model,
    )


def _status_failure(
    status: int, message: str, headers: Mapping[str, str], *, code: object = None, what: str
) -> RequestFailed:
    """The failure that an HTTP status other than 2xx stands for: whether and when another try may help."""
    hints = {401: "check the API key", 403: "the key may not use this", 404: "check the address and the model's name"}
    is_permanent = code in _NO_QUOTA or not (status in _TRANSIENT or status >= 500)
    hint = f" ({hints[status]})" if status in hints else ""
    return RequestFailed(
        f"{what} answered {status}{hint}: {message[:500]}",
        is_permanent=is_permanent,
        is_too_long=status in (400, 413, 422) and bool(_TOO_LONG.search(f"{code} {message}")),
        retry_after_s=read_retry_after(headers),
    )


def read_retry_after(headers: Mapping[str, str], *, now: Callable[[], float] = time.time) -> float | None:
    """Seconds that a reply asks to wait, else None. RFC 9110: a number or a date; OpenAI's milliseconds go first."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name) or ""
        if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
            return float(value) * unit
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after") or "")
    except ValueError:
        return None
    return max(0.0, (date if date.tzinfo else date.replace(tzinfo=timezone.utc)).timestamp() - now())


# Clients --------------------------------------------------------------------------------------------------------


class OpenAIClient:
    """An OpenAI-compatible service, through the `openai` package; OPENAI_BASE_URL and OPENAI_API_KEY say which.

    api: "chat", "completions", or "auto", by the model's name. What a model refuses to be given (newer ones take
    neither `stop` nor a temperature, and call the length otherwise) is left out from then on, and said.
    Raises MissingPackage without the package, InputError without a key.
    """

    def __init__(
        self,
        model: str,
        sampling: Sampling,
        *,
        api: str,
        environment: Mapping[str, str],
        timeout_s: float,
        say: Callable[[str], object] = lambda line: None,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise MissingPackage(
                "to ask an OpenAI-compatible service the package `openai` is needed: pip install openai; "
                "this project's own server needs none: --endpoint http://HOST:PORT/predictions"
            ) from error
        address, key = environment.get("OPENAI_BASE_URL", ""), environment.get("OPENAI_API_KEY", "")
        if not key and not address:
            raise InputError(
                "no service to ask: set OPENAI_API_KEY (and OPENAI_BASE_URL for another service than OpenAI's), or "
                "name this project's own server by --endpoint http://HOST:PORT/predictions"
            )
        self._openai, self._secrets, self._say = openai, (key,), say
        self._client = openai.OpenAI(
            api_key=key or "none", base_url=address or None, timeout=timeout_s, max_retries=0
        )  # Requester tries again, for all threads together
        self.endpoint = plain_address(str(self._client.base_url))
        self.is_chat = api == "chat" or (api == "auto" and not _COMPLETION_MODELS.fullmatch(model))
        self._parameters: dict[str, Any] = {
            "model": model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop": [sampling.stop],
        }
        if model.startswith("text-"):
            self._parameters["logit_bias"] = {str(_END_OF_TEXT): -100}  # in other vocabularies this is another word
        self._length_name = "max_tokens"

    def complete(self, prompt: str, *, max_tokens: int, number: int) -> Completion:
        while True:
            try:
                return self._read(self._send(prompt, max_tokens))
            except self._openai.APIStatusError as error:
                if not self._adapt(error):
                    raise self._failure(error) from error
            except self._openai.OpenAIError as error:  # time-outs, connections that break, bodies of another shape
                name = type(error).__name__
                raise RequestFailed(self._hide(f"{self.endpoint} gave no answer ({name}: {error})")) from error
            except (ValueError, TypeError, AttributeError, LookupError) as error:
                raise RequestFailed(
                    self._hide(f"{self.endpoint} answered something else than a completion ({error})")
                ) from error

    def _send(self, prompt: str, max_tokens: int) -> Any:
        parameters = {**self._parameters, self._length_name: max_tokens}
        if self.is_chat:
            return self._client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **parameters)
        return self._client.completions.create(prompt=prompt, **parameters)

    def _read(self, reply: Any) -> Completion:
        choice = reply.choices[0]
        text = choice.message.content if self.is_chat else choice.text
        usage = reply.usage
        return Completion(
            text=text or "",  # a refusal has none
            finish_reason=str(choice.finish_reason or "unknown"),
            prompt_tokens=int(usage.prompt_tokens) if usage else 0,
            output_tokens=int(usage.completion_tokens) if usage else 0,
            model=str(reply.model or self._parameters["model"]),
        )

    def _adapt(self, error: Any) -> bool:
        """Leave out, or call otherwise, the parameter that the model refuses; whether there was one."""
        body = error.body if isinstance(error.body, dict) else {}
        name = body.get("param")
        if error.status_code != 400 or not str(body.get("code") or "").startswith("unsupported"):
            return False
        if name == "max_tokens":
            if self._length_name == "max_tokens":
                self._say("this model calls the length max_completion_tokens")
            self._length_name = "max_completion_tokens"
            return True
        if name not in ("temperature", "top_p", "stop", "logit_bias"):
            return False
        if self._parameters.pop(name, None) is not None:  # another thread may have been first
            self._say(f"this model does not take {name}: it is left out")
        return True

    def _failure(self, error: Any) -> RequestFailed:
        message = self._hide(str(error.message))
        return _status_failure(
            error.status_code,
            message,
            error.response.headers,
            code=getattr(error, "code", None),
            what=self.endpoint,
        )

    def _hide(self, text: str) -> str:
        return hide_secrets(text, self._secrets)


class CogClient:
    """This project's own server: POST to `http://HOST:PORT/predictions`, the prompt sent as it is.

    It does not say why a completion ended, so that the last block of each is taken for cut.
    """

    is_chat = False

    def __init__(self, address: str, sampling: Sampling, *, model: str, timeout_s: float) -> None:
        parts = urllib.parse.urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.path.rstrip("/").endswith("/predictions"):
            raise InputError(f"--endpoint {plain_address(address)}: expected http://HOST:PORT/predictions")
        if "@" in parts.netloc:
            raise InputError(f"--endpoint {plain_address(address)}: it came with a user or password; Cog takes neither")
        self._address, self._sampling, self._model, self._timeout_s = address, sampling, model, timeout_s
        self.endpoint = plain_address(address)

    def complete(self, prompt: str, *, max_tokens: int, number: int) -> Completion:
        values = {
            "prompt": prompt,
            "prompt_template": "{prompt}",
            "max_new_tokens": max_tokens,
            "temperature": self._sampling.temperature,
            "top_p": self._sampling.top_p,
            "stop": [self._sampling.stop],
            "seed": (self._sampling.seed << 20) + number,
        }
        reply = self._post({"input": values})
        output = reply.get("output")
        if reply.get("status") != "succeeded" or not isinstance(output, list) or len(output) != 1:
            message = str(reply.get("error") or reply)[:500]
            is_too_long = "the model's context is" in message  # the server cuts max_new_tokens itself, not the prompt
            hint = "; lower --num_prompt_instructions, or serve with a longer context" if is_too_long else ""
            raise RequestFailed(f"{self.endpoint} failed: {message}{hint}", is_permanent=is_too_long)
        metrics = reply.get("metrics") or {}
        return Completion(
            text=str(output[0]),
            finish_reason="unknown",
            prompt_tokens=int(metrics.get("prompt_tokens") or 0),
            output_tokens=int(metrics.get("output_tokens") or 0),
            model=self._model,
        )

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(self._address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as reply:
                content = json.load(reply)
        except urllib.error.HTTPError as error:
            with error:
                message = error.read().decode(errors="replace")
            raise _status_failure(error.code, message, error.headers, what=self.endpoint) from error
        except (OSError, http.client.HTTPException) as error:
            raise RequestFailed(f"{self.endpoint} gave no answer ({type(error).__name__}: {error})") from error
        except ValueError as error:
            raise RequestFailed(f"{self.endpoint} answered something else than JSON ({error})") from error
        if not isinstance(content, dict):
            raise RequestFailed(f"{self.endpoint} answered something else than a prediction")
        return content
