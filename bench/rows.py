"""What bench.serve measures: the rows, and the prompts each of them is given."""

import dataclasses
import random
from dataclasses import dataclass, field

from alpaca.errors import InputError
from alpaca.serving.request import PredictionInputs
from alpaca.text.prompts import RAW_TEMPLATE
from alpaca.text.tokenizer import Tokenizer
from bench.machine import DEVICE

BASELINES = ("generate", "compiled", "batching")
OVER_HTTP = ("sync", "stream")
SAMPLINGS = {
    "temperature": {"temperature": 0.75},
    "top_p and top_k": {"temperature": 0.75, "top_p": 0.9, "top_k": 40},
}
_STAGGER_S = 0.03 if DEVICE == "cuda" else 0.1  # between the starts of 32 clients
_WAYS_OF_MANY = {
    2: ("engine",),
    4: ("engine",),
    16: ("engine", *OVER_HTTP),
    24: ("engine", "stream"),
    32: ("engine", *OVER_HTTP),
    64: ("engine",),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing measured: a way to generate, and the work it is given. Lengths are (least, most) tokens."""

    name: str
    way: str
    num_requests: int
    clients: int
    prompt_tokens: tuple[int, int]
    new_tokens: tuple[int, int]
    sampling: dict[str, float] = field(default_factory=dict)  # nothing: greedy
    template: str = RAW_TEMPLATE
    stagger_s: float = 0.0

    @property
    def is_uniform(self) -> bool:
        lengths_vary = self.prompt_tokens[0] < self.prompt_tokens[1] or self.new_tokens[0] < self.new_tokens[1]
        return self.template == RAW_TEMPLATE and not lengths_vary

    @property
    def num_steps(self) -> int:
        """Forward passes when all clients go in step, each prompt's prefill being one that gives a token."""
        return self.new_tokens[1] * self.num_requests // self.clients


@dataclass(kw_only=True)
class Sample:
    """What one round of one row gave."""

    seconds: float
    num_tokens: int
    first_token_s: list[float] = field(default_factory=list)
    cached_tokens: int = 0  # of the prompts, not computed again
    num_retries: int = 0
    bandwidth: float = 0.0  # bytes a second, measured in this round
    others_cores: float = 0.0  # cores that programs other than this run's kept busy meanwhile

    @property
    def rate(self) -> float:
        return self.num_tokens / self.seconds


def num_together(quick: bool) -> int:
    """How many requests the rows of "eight" have."""
    return 4 if quick else 8


def num_streams(quick: bool) -> int:
    """How many streams are held against the engine's own rate."""
    return 4 if quick else 24 if DEVICE == "cuda" else 16


def plan_rows(*, quick: bool, compiled: bool) -> list[Row]:
    """All rows, those that are compared close to each other."""
    rows = [*_rows_of_one(quick, compiled), *_rows_of_eight(quick), *_rows_of_many(quick)]
    if DEVICE == "cuda" and not quick:
        rows += _rows_of_long_answers()
    assert len({row.name for row in rows}) == len(rows)
    return rows


def _row(quick: bool, way: str, clients: int, *, name: str = "", num_requests: int = 0) -> Row:
    """`clients` requests at once, each of the run's usual lengths."""
    prompt, new = (16, 16) if quick else (64, 128)
    if clients >= 32 and DEVICE == "cpu":
        new //= 2  # time
    return Row(
        name=name or f"{way} {clients}",
        way=way,
        num_requests=num_requests or clients,
        clients=clients,
        prompt_tokens=(prompt, prompt),
        new_tokens=(new, new),
    )


def _rows_of_one(quick: bool, compiled: bool) -> list[Row]:
    few = 2 if DEVICE == "cpu" else 4
    rows = [_row(quick, "generate", 1, name="generate", num_requests=2 if quick else 8 if DEVICE == "cpu" else 4)]
    if compiled:
        rows.append(_row(quick, "compiled", 1, name="generate compiled", num_requests=few))
    rows += [_row(quick, way, 1, num_requests=few) for way in ("engine", *OVER_HTTP)]
    short = _row(quick, "stream", 1, name="first token 1", num_requests=4 if quick else 8)
    return [*rows, dataclasses.replace(short, new_tokens=(8, 8))]


def _rows_of_eight(quick: bool) -> list[Row]:
    """Eight (in a quick run four) at once: the baseline in batches, greedy and sampled, mixed lengths, one preamble."""
    eight = num_together(quick)
    engine, twice = _row(quick, "engine", eight), _row(quick, "engine", 2 * eight)
    prompt, new = ((16, 64), (8, 24)) if quick else ((16, 400), (16, 256))
    sampled = [
        dataclasses.replace(engine, name=f"{engine.name} {name}", sampling=values) for name, values in SAMPLINGS.items()
    ]
    mixed = [
        dataclasses.replace(row, name=name, prompt_tokens=prompt, new_tokens=new)
        for name, row in ((f"{engine.name} mixed lengths", engine), ("engine mixed lengths", twice))
    ]
    shared = dataclasses.replace(twice, name="engine shared prefix", template="alpaca", prompt_tokens=(16, 16))
    over_http = [_row(quick, way, eight) for way in OVER_HTTP]
    return [_row(quick, "batching", eight), engine, *sampled, *over_http, *mixed, shared]


def _rows_of_many(quick: bool) -> list[Row]:
    rows = [_row(quick, "batching", 32)] if DEVICE == "cuda" and not quick else []
    counts = [2] if quick else [count for count in _WAYS_OF_MANY if count != 24 or DEVICE == "cuda"]
    rows += [_row(quick, way, count) for count in counts for way in _WAYS_OF_MANY[count]]
    staggered = 4 if quick else 32
    last = _row(quick, "stream", staggered, name=f"first token {staggered} staggered")
    return [*rows, dataclasses.replace(last, stagger_s=_STAGGER_S)]


def _rows_of_long_answers() -> list[Row]:
    """The published settings: 32 requests of 256 in, 1,024 out; and many of 128 in, 128 out."""
    engine = Row(
        name="engine 32 long", way="engine", num_requests=32, clients=32, prompt_tokens=(256, 256),
        new_tokens=(1024, 1024),
    )  # fmt: skip
    return [
        dataclasses.replace(engine, name="batching 32 long", way="batching"),
        engine,
        *(dataclasses.replace(engine, name=f"{engine.name} {name}", sampling=SAMPLINGS[name]) for name in SAMPLINGS),
        dataclasses.replace(engine, name="stream 32 long", way="stream"),
        Row(
            name="engine saturated 128/128", way="engine", num_requests=256, clients=256, prompt_tokens=(128, 128),
            new_tokens=(128, 128),
        ),
    ]  # fmt: skip


class Prompts:
    """Texts of an exact number of tokens, no two alike: words that are one token each."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        texts = [tokenizer.decode([token_id]) for token_id in range(tokenizer.base_size)]
        words = sorted({text for text in texts if text.isascii() and text.isalpha() and len(text) > 2})
        ids = tokenizer.encode_batch(words)  # in front of a text as behind a space: both are the piece "▁word"
        self._words = [word for word, own in zip(words, ids, strict=True) if len(own) == 1]
        if len(self._words) < 1000:
            raise InputError(f"this tokenizer has {len(self._words)} words of one token; the benchmark needs 1000")

    def inputs(self, row: Row, seed: str) -> list[PredictionInputs]:
        """The requests of one round of a row."""
        draw = random.Random(f"{row.name}:{seed}")
        return [self._inputs(row, draw, number) for number in range(row.num_requests)]

    def _inputs(self, row: Row, draw: random.Random, number: int) -> PredictionInputs:
        num_words = draw.randint(*row.prompt_tokens) - len(self._tokenizer.prefix_ids)
        num_new = draw.randint(*row.new_tokens)
        inputs = PredictionInputs(
            prompt=" ".join(draw.choices(self._words, k=num_words)),
            prompt_template=row.template,
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            seed=number,
            **{"temperature": 0.0, **row.sampling},
        )
        if row.template == RAW_TEMPLATE:
            num_tokens = len(self._tokenizer.encode(inputs.prompt))
            assert num_tokens == num_words, (inputs.prompt, num_tokens, num_words)
        return inputs
