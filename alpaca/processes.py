"""This process: how old it is, and its end with the one that started it."""

import functools
import os
import threading
import time
from pathlib import Path


def process_age_s() -> float:
    """Seconds since this process was started."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])  # 22nd field: since boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


@functools.cache  # one thread watches, however often it is asked for
def end_with_parent(*, every_s: float = 0.5) -> None:
    """End this process, from now on, when the one that started it has ended.

    A runtime that is killed leaves its worker (Cog 0.23): it goes on computing, a training to its end, with the GPU's
    memory.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every_s)
        os._exit(1)

    threading.Thread(target=watch, name="watching the parent", daemon=True).start()
