"""A progress bar for bytes that are read or written."""

from tqdm import tqdm


def byte_bar(total: int, label: str) -> tqdm:
    """A progress bar of `total` bytes, in powers of ten."""
    return tqdm(total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1000, mininterval=0.5)
