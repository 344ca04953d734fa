"""The examples of a run, read, held out and encoded as its settings say."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from alpaca.data.encoding.choosing import Chosen, choose_layout
from alpaca.data.examples import split_examples
from alpaca.data.preferences import AnyUnit, TrainingData, answers_of, arrange, encode_units
from alpaca.data.records import read_any_data
from alpaca.errors import InputError
from alpaca.text.tokenizer import Tokenizer
from alpaca.training.configuration.settings import DataSettings
from alpaca.training.schedule import count_held_out

logger = logging.getLogger(__name__)
_WEIGHT = re.compile(r"(.+)=(\d+(?:\.\d+)?)")
_MOST_WEIGHT = 1000


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Examples to train on, those to evaluate on (None where there are none), and the layout of both."""

    train: TrainingData
    held_out: TrainingData | None
    chosen: Chosen


def encode_data(data: DataSettings, tokenizer: Tokenizer, *, progress: bool) -> RunData:
    """Read and encode the examples of a run.

    Raises MissingInput, MissingPackage, InputError.
    """
    sources = parse_sources(data.path)
    read = [_read(path, data) for path, _ in sources]
    examples, held_out = [example for part in read for example in part], []
    source_of = torch.repeat_interleave(torch.arange(len(read)), torch.tensor([len(part) for part in read]))
    if num_held_out := count_held_out(data, len(examples)):
        train, held_out = split_examples(range(len(examples)), num_held_out=num_held_out, seed=data.seed)
        held_out = [examples[index] for index in held_out]
    else:
        train = range(len(examples))
        held_out = _read(data.eval_path, data) if data.eval_path else []
    train = _weighted(torch.tensor(train), source_of, sources, seed=data.seed)
    answers = answers_of([*examples, *held_out])
    chosen = choose_layout(data.prompt_template, answers, tokenizer, boundary=data.prompt_boundary)
    logger.info("examples are laid out by %s", chosen.layout.description)
    parts = {"training data": [examples[index] for index in train], "held-out data": held_out}
    encoded = {
        name: encode_units(
            part,
            chosen.layout,
            objective=data.objective,
            max_length=data.max_length,
            train_on_inputs=data.train_on_inputs,
            progress=progress,
        )
        for name, part in parts.items()
        if part
    }
    for name, part in encoded.items():
        for line in part.report.lines():
            logger.info("%s: %s", name, line)
    return RunData(train=encoded["training data"], held_out=encoded.get("held-out data"), chosen=chosen)


def parse_sources(data_path: str) -> list[tuple[str, float]]:
    """The data sets of `--data_path`, each with its weight: PATH, or PATH=WEIGHT, between commas.

    A file that is there by the whole name is that file. Raises InputError.
    """
    if Path(data_path).exists():
        return [(data_path, 1.0)]
    sources = []
    for part in data_path.split(","):
        match = None if Path(part).exists() else _WEIGHT.fullmatch(part)
        path, weight = (match[1], float(match[2])) if match else (part, 1.0)
        if not path or not 0 < weight <= _MOST_WEIGHT:
            raise InputError(
                f"--data_path {data_path}: expected PATH or PATH=WEIGHT between commas, with weights above 0 and up to "
                f"{_MOST_WEIGHT}; found {part!r}"
            )
        sources.append((path, weight))
    return sources


def _read(path: str, data: DataSettings) -> list[AnyUnit]:
    examples, reader = read_any_data(
        path, data_format=data.format, response_mark=data.response_mark, most_bytes=data.most_bytes
    )
    for line in reader.lines():
        logger.info("%s: %s", path, line)
    return list(arrange(examples, reader, objective=data.objective, path=path))


def _weighted(
    indices: torch.Tensor, source_of: torch.Tensor, sources: Sequence[tuple[str, float]], *, seed: int
) -> list[int]:
    """Indices of examples, those of a source as often as its weight says; of a fraction, some, drawn by the seed."""
    if all(weight == 1 for _, weight in sources):
        return indices.tolist()
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = []
    for number, (path, weight) in enumerate(sources):
        own = indices[source_of[indices] == number]
        whole, rest = int(weight), round((weight - int(weight)) * len(own))
        order = torch.randperm(len(own), generator=generator)[:rest].sort().values
        drawn += [*own.repeat(whole).tolist(), *own[order].tolist()]
        logger.info("%s: %s examples, %s in an epoch", path, f"{len(own):,}", f"{len(own) * whole + rest:,}")
    if not drawn:
        raise InputError("--data_path: the weights leave no example to train on")
    return drawn
