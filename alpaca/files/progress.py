"""Progress bars for bytes that are read, written or sent."""

import sys

from tqdm import tqdm


def byte_bar(total: int, label: str) -> tqdm:
    """A progress bar of `total` bytes, in powers of ten."""
    return tqdm(total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1000, mininterval=0.5)


def progress_bar(label: str, *, total: int | None = None) -> tqdm:
    """A progress bar of bytes over a network, of unknown total at first. In a log it adds a line every 10 s at most."""
    interval_s = 1.0 if sys.stderr.isatty() else 10.0
    return tqdm(desc=label, total=total, unit="B", unit_scale=True, mininterval=interval_s)
