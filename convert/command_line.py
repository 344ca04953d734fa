"""What the commands' lines share: numbers that are read."""

import argparse


def positive(text: str) -> int:
    """argparse's type of a whole number above 0."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")
    return int(text)
