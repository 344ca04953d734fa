"""One prediction at one of the targets: asked, asked again elsewhere while nothing of it has come, and read."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from deploy.gate.exchange import BrokenOff, NotReached, Reply, Unanswered, abandon
from web.openai.answers import Document
from web.openai.failures import of_detail, of_failure
from web.openai.refusals import RETRY_AFTER_S, Refusal
from web.openai.targets import Target, Targets, read_all

_decode = json.JSONDecoder().decode  # json.loads looks for the coding of bytes first
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.2
_PATIENCE_S = 60.0  # of pauses, after targets that say that they are up have not taken it
_MOST_TRIES = 2  # of what was sent and broke off: it may be what a server died of
_MOST_REFUSAL_BYTES = 1 << 20


class _NotTaken(Exception):
    """The target has not begun the prediction."""


class _Interrupted(Exception):
    """The target had the prediction, and ended or vanished before its end."""


async def predict(
    targets: Targets, inputs: Mapping[str, Any], names: Mapping[str, str], *, turn: asyncio.Lock | None = None
) -> AsyncIterator[list[Document]]:
    """The prediction's documents, as many at a time as came together. Raises Refusal.

    names: the client's for the Predictor's inputs, where they differ.   turn: shared by the request's predictions, of
    which one is in line at a time.
    Close it (contextlib.aclosing) when no more is wanted: that cancels the prediction.
    """
    has_begun, num_tries, before = False, 0, None
    pause, paused_s = _FIRST_PAUSE_S, 0.0  # its time in line does not count
    while True:
        async with targets.place(after=before, turn=turn) as target:
            before = target
            try:
                async with contextlib.aclosing(_predict_at(target, targets, inputs, names)) as batches:
                    async for batch in batches:
                        has_begun = True
                        yield batch
                return
            except NotReached:
                targets.drop(target)
            except _NotTaken:
                if paused_s > _PATIENCE_S:
                    raise Refusal(503, "the model servers take nothing now", retry_after_s=RETRY_AFTER_S) from None
                await asyncio.sleep(pause)
                paused_s += pause
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            except _Interrupted:
                num_tries += 1
                if has_begun or num_tries == _MOST_TRIES:
                    raise Refusal(503, "the model server was interrupted", retry_after_s=RETRY_AFTER_S) from None


async def _predict_at(
    target: Target, targets: Targets, inputs: Mapping[str, Any], names: Mapping[str, str]
) -> AsyncIterator[list[Document]]:
    """Raises NotReached, _NotTaken, _Interrupted, Refusal."""
    # Made only here: the prompts of a list share a schema, which each would have a copy of while it waits
    body = json.dumps({"input": inputs}).encode()
    try:
        reply = await _ask(target, targets, body)
    except Unanswered:
        raise _Interrupted from None
    try:
        if reply.status != 200:
            await _raise_refusal(reply, names)
        reader = _Events(inputs, names)
        async with contextlib.aclosing(reply.pieces()) as pieces:
            async for piece in pieces:
                if documents := reader.feed(piece):
                    yield documents
                if reader.has_ended:
                    return
        raise _Interrupted
    except BrokenOff:
        raise _Interrupted from None
    finally:
        reply.close()


async def _ask(target: Target, targets: Targets, body: bytes) -> Reply:
    """The answer's head. A target that goes down before is left, where there is another."""
    asking = asyncio.ensure_future(target.ask("/predictions", body))
    going_down = asyncio.ensure_future(target.went_down.wait())
    try:
        await asyncio.wait({asking, going_down}, return_when=asyncio.FIRST_COMPLETED)
        if not asking.done() and targets.is_any_up:
            abandon(asking)
            raise _NotTaken
        return await asking
    except asyncio.CancelledError:
        abandon(asking)
        raise
    finally:
        going_down.cancel()
        del asking  # its error holds this frame, and what the request sent with it


class _Events:
    """Takes a prediction's events apart. has_ended: its last was there. Raises _Interrupted, Refusal."""

    def __init__(self, inputs: Mapping[str, Any], names: Mapping[str, str]) -> None:
        self.has_ended = False
        self._inputs, self._names = inputs, names
        self._waiting = b""

    def feed(self, data: bytes) -> list[Document]:
        """The documents that are complete with these bytes."""
        *events, self._waiting = (self._waiting + data).split(b"\n\n")
        documents = []
        for event in events:
            name, _, value = event.partition(b"\ndata:")
            if name == b"event: output":
                documents.append(_document(value))
            elif name == b"event: completed":
                self._end(json.loads(value))
            elif name == b"event: error":
                raise _Interrupted
        return documents

    def _end(self, prediction: Mapping[str, Any]) -> None:
        self.has_ended = True
        if prediction["status"] == "failed":
            raise of_failure(str(prediction.get("error") or ""), self._inputs, self._names)
        if prediction["status"] != "succeeded":
            raise _Interrupted


def _document(value: bytes) -> Document:
    try:
        return _decode(_decode(value.decode())["chunk"])
    except ValueError:
        raise Refusal(
            500, "the model server gives texts where documents were asked for: it is of another version"
        ) from None


async def _raise_refusal(reply: Reply, names: Mapping[str, str]) -> None:
    """Say what the server says. Raises _NotTaken, _Interrupted, Refusal."""
    if reply.status in (409, 503):
        raise _NotTaken
    if reply.status in (401, 403):
        raise Refusal(500, "the model server wants another key from this endpoint: ALPACA_SERVER_TOKEN")
    try:
        said = json.loads(await read_all(reply, _MOST_REFUSAL_BYTES))
    except ValueError:
        said = {}
    detail = said.get("detail") if isinstance(said, dict) else None
    if reply.status == 422 and isinstance(detail, list) and detail:
        raise of_detail(detail[0], names)
    if 400 <= reply.status < 500:
        raise Refusal(400, str(detail or said or "the model server refused the request"))
    raise Refusal(500, f"the model server answered with status {reply.status}")
