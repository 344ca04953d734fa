"""What the commands' lines share: numbers that are read, and a bar for bytes that are written."""

import argparse

from tqdm import tqdm


def positive(text: str) -> int:
    """argparse's type of a whole number above 0."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")
    return int(text)


def byte_bar(total: int, label: str) -> tqdm:
    """A progress bar of `total` bytes, in powers of ten."""
    return tqdm(total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1000, mininterval=0.5)
