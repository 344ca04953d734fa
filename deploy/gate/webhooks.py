"""Tells a client's webhook the end of what the runtime never saw. All other webhooks are the runtime's."""

import asyncio
import sys
from collections.abc import Mapping

import httpx
import tenacity

_TRIES, _FIRST_PAUSE_S, _ANSWER_S = 8, 0.2, 10.0
_AGAIN = (429, 500, 502, 503, 504)  # as the runtime does


class Webhooks:
    """Posts in the background. token: goes along as `Authorization: Bearer`, as the runtime's own does."""

    def __init__(self, token: str | None) -> None:
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        self._tasks: set[asyncio.Task[None]] = set()

    def post(self, address: str, content: Mapping[str, object]) -> None:
        """Post `content` as JSON, again while the address does not take it. address: one that the rules allow."""
        task = asyncio.ensure_future(self._post(address, content))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _post(self, address: str, content: Mapping[str, object]) -> None:
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(httpx.TransportError)
            | tenacity.retry_if_result(lambda reply: reply.status_code in _AGAIN),
            wait=tenacity.wait_exponential(multiplier=_FIRST_PAUSE_S),
            stop=tenacity.stop_after_attempt(_TRIES),
        )
        try:
            async with httpx.AsyncClient(headers=self._headers, timeout=_ANSWER_S) as client:
                reply = await retrying(client.post, address, json=content)
                reply.raise_for_status()
        except (tenacity.RetryError, httpx.HTTPError) as error:
            print(f"a webhook was not taken: {error}", file=sys.stderr, flush=True)
