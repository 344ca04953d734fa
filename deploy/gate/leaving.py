"""Ends what is done for a client that leaves before it is done."""

import asyncio
from collections.abc import Awaitable

from deploy.gate.bodies import Receive


async def unless_client_leaves(work: Awaitable[None], receive: Receive) -> None:
    """Do `work`; where the client closes its connection meanwhile, end it, which cancels what the runtime does."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_wait_for_end(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
        del task, working, leaving  # an error of theirs holds this frame, and the request with it


async def _wait_for_end(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
