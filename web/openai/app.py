"""The endpoint as a web application: OpenAI's routes, in front of the targets."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from deploy.gate.bodies import Memory, Receive, read_body
from deploy.gate.leaving import unless_client_leaves
from deploy.gate.rules import MOST_PREDICTION_BYTES, Refused, Route, Rules, check_sender
from web.openai import inputs
from web.openai.answers import Answer, Document
from web.openai.inputs import Asked, Models
from web.openai.metrics import Metrics
from web.openai.predictions import predict
from web.openai.refusals import Refusal, of_gate
from web.openai.reply import Reply, Send
from web.openai.targets import Targets

_READERS: Mapping[str, Callable[[Mapping[str, Any], Models], Asked]] = {
    "/v1/completions": inputs.read_completion,
    "/v1/chat/completions": inputs.read_chat,
}
_LOOKS = ("/health", "/metrics", "/v1/models")
_MOST_BYTES = 256 << 20  # of all bodies together
_CLIENT_LEFT = 499  # in the figures


class Endpoint:
    """An ASGI application. rules: under which names it is reached, and the keys of which one must come."""

    def __init__(self, targets: Targets, models: Models, rules: Rules, metrics: Metrics) -> None:
        self._targets, self._models, self._rules, self._metrics = targets, models, rules, metrics
        self._memory, self._started = Memory(_MOST_BYTES), int(time.time())

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        reply, path = Reply(send), scope["path"]
        try:
            await self._answer(scope["method"], path, _read_headers(scope), receive, reply)
        except Refused as refused:
            await reply.refuse(of_gate(refused))
        except Refusal as refusal:
            await reply.refuse(refusal)
        except Exception:
            logging.getLogger(__name__).exception("%s", path)
            await reply.refuse(Refusal(500, "this endpoint failed; its log says more"))
        finally:
            is_known = path in (*_READERS, *_LOOKS)
            status = reply.status or _CLIENT_LEFT
            self._metrics.count(path if is_known else "other", status, time.monotonic() - reply.begun)

    async def _answer(self, method: str, path: str, headers: Mapping[str, str], receive: Receive, reply: Reply) -> None:
        self._check_sender(path, headers)
        with self._memory.held() as held:
            content = await read_body(headers, receive, MOST_PREDICTION_BYTES, held)
            if path in _READERS:
                _check_method(method, "POST", path)
                asked = _READERS[path](inputs.read_body(content), self._models)
                del content
                self._targets.check_room()
                await unless_client_leaves(self._complete(asked, reply), receive)
            else:
                await self._look(method, path, reply)

    def _check_sender(self, path: str, headers: Mapping[str, str]) -> None:
        """Health and figures are open to whoever reaches the endpoint; all else asks for a key, if there are any."""
        keys = self._rules.keys if path.startswith("/v1/") else ()
        check_sender(headers, Route(kind="look", path=path), Rules(hosts=self._rules.hosts, keys=keys))

    async def _look(self, method: str, path: str, reply: Reply) -> None:
        name = path.removeprefix("/v1/models/")
        if path not in _LOOKS and name == path:
            raise Refusal(404, "no such route; there are " + ", ".join((*_READERS, *_LOOKS)), code="unknown_url")
        _check_method(method, "GET", path)
        if path == "/health":
            await reply.send_json({}, 200 if self._targets.is_any_up else 503)
        elif path == "/metrics":
            await reply.send_all(200, self._metrics.content_type, self._metrics.text())
        elif path == "/v1/models":
            await reply.send_json({"object": "list", "data": [self._model(name) for name in self._models.names]})
        else:
            await reply.send_json(self._model(self._models.check(name)))

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._started, "owned_by": "cog-alpaca"}

    async def _complete(self, asked: Asked, reply: Reply) -> None:
        answer = Answer(asked)
        try:
            async with contextlib.aclosing(_side_by_side(asked, self._targets)) as batches:
                if asked.streams:
                    await self._stream(answer, batches, reply)
                    return
                async for prompt, documents in batches:
                    for document in documents:
                        answer.add(prompt, document)
            _check_complete(answer)
            await reply.send_json(await asyncio.to_thread(answer.whole))
        finally:
            self._metrics.prompt_tokens.inc(answer.prompt_tokens)
            self._metrics.output_tokens.inc(answer.output_tokens)

    async def _stream(self, answer: Answer, batches: AsyncIterator[tuple[int, list[Document]]], reply: Reply) -> None:
        """The status waits for the first document: until then a refusal still has its own."""
        async for prompt, documents in batches:
            events = b"".join([answer.events_of(prompt, document) for document in documents])
            if not reply.status:
                self._metrics.first_token_seconds.observe(time.monotonic() - reply.begun)
                await reply.begin_events()
                events = answer.beginning() + events
            await reply.send_events(events)
        _check_complete(answer)
        await reply.send_events(answer.ending())
        await reply.end_events()


async def _side_by_side(asked: Asked, targets: Targets) -> AsyncIterator[tuple[int, list[Document]]]:
    """(number of the prompt, documents) as they come, from a prediction for each prompt. The first refusal ends all.

    One of them is in line at a time; the others wait here, and take no place from other requests.
    """
    if len(asked.inputs) == 1:
        async with contextlib.aclosing(predict(targets, asked.inputs[0], asked.names)) as batches:
            async for documents in batches:
                yield 0, documents
        return
    arrived: asyncio.Queue[tuple[int, list[Document]] | None] = asyncio.Queue()
    turn = asyncio.Lock()

    async def follow(prompt: int) -> None:
        try:
            async with contextlib.aclosing(predict(targets, asked.inputs[prompt], asked.names, turn=turn)) as batches:
                async for documents in batches:
                    arrived.put_nowait((prompt, documents))
        finally:
            arrived.put_nowait(None)

    following = [asyncio.ensure_future(follow(prompt)) for prompt in range(len(asked.inputs))]
    try:
        num_ended = 0
        while num_ended < len(following):
            if (batch := await arrived.get()) is not None:
                yield batch
                continue
            num_ended += 1
            for task in following:
                if task.done():
                    task.result()
    finally:
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)
        del task, following  # an error of theirs holds this frame, and the request with it


def _check_complete(answer: Answer) -> None:
    if not answer.is_complete:
        raise Refusal(500, "the model server's answer has no end")


def _check_method(method: str, expected: str, path: str) -> None:
    if method != expected and not (expected == "GET" and method == "HEAD"):
        raise Refusal(405, f"{path} takes {expected}", code="method_not_allowed", allowed=expected)


def _read_headers(scope: Mapping[str, Any]) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
