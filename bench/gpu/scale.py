"""How large the rows are: LLaMA-7B's shape for seconds each, or a tiny one to try the kit itself on a CPU."""

import os
from dataclasses import dataclass

QUICK_VARIABLE = "ALPACA_BENCH_QUICK"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of one run; lengths are in tokens."""

    shape: str  # of bench.random_model.SHAPES
    one_layer: str  # the same with one layer: it needs the same kernels
    dtype: str  # of the served weights
    decode_s: float  # how long a row of `check` decodes
    rounds: int  # samples of a short row
    prompt: int
    new: int
    many: int  # requests of the row "32 streams"
    most: int  # requests of the row "batch 64"
    stream_prompt: int  # of the 32 streams
    stream_new: int  # of the streams that a peer runs, too
    long_new: int  # of the row without a peer
    prefill: int
    context: int  # the most a request may have
    examples: int  # of one optimizer step
    steps: int  # of a row of fine-tuning, the first of which is left out
    max_length: int  # of a training example
    matrix_width: int  # of the square product that the arithmetic rate is taken from
    copied_bytes: int  # that the bandwidth is taken from


FULL = Scale(
    shape="7b", one_layer="7b-1", dtype="bfloat16", decode_s=10.0, rounds=3, prompt=64, new=128, many=32, most=64,
    stream_prompt=256, stream_new=256, long_new=1024, prefill=2000, context=2048, examples=128, steps=5,
    max_length=512, matrix_width=8192, copied_bytes=1 << 30,
)  # fmt: skip
QUICK = Scale(
    shape="tiny", one_layer="tiny", dtype="float32", decode_s=0.2, rounds=1, prompt=8, new=6, many=3, most=4,
    stream_prompt=12, stream_new=6, long_new=10, prefill=40, context=128, examples=4, steps=2, max_length=128,
    matrix_width=128, copied_bytes=1 << 22,
)  # fmt: skip


def is_quick() -> bool:
    """Whether this run only tries the kit."""
    return bool(os.environ.get(QUICK_VARIABLE))


def choose_scale() -> Scale:
    """QUICK where ALPACA_BENCH_QUICK is set, else FULL."""
    return QUICK if is_quick() else FULL
