"""Another program that runs beside the gate, asks it, and does not outlive it."""

import asyncio
import contextlib
from collections.abc import Sequence

from deploy.gate.runtime import die_with_parent
from deploy.listening import show_address

_ENDING_S = 10.0  # after SIGTERM


class Companion:
    """command: starts it, but for the gate's address; an empty one stands for no program."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self._command, self._environment = command, environment
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, host: str, port: int) -> None:
        """host, port: where the gate listens."""
        if not self._command:
            return
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            "--target",
            show_address(host, port),
            env=self._environment,
            start_new_session=True,  # a signal from the terminal comes to the gate, which passes it on
            preexec_fn=die_with_parent,
        )

    async def ends(self) -> None:
        """Wait for its end, for ever where there is none."""
        if self._process is None:
            await asyncio.Event().wait()
        else:
            await self._process.wait()

    async def stop(self) -> None:
        """End it, its open requests first."""
        if self._process is None or self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        ended = asyncio.ensure_future(self._process.wait())
        await asyncio.wait({ended}, timeout=_ENDING_S)
        if not ended.done():
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await ended
