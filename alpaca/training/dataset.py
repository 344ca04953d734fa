"""The examples of a run, read, held out and encoded as its settings say."""

import logging

from alpaca.data.examples import EncodedDataset, encode_examples, split_examples
from alpaca.data.records import read_examples
from alpaca.text.tokenizer import Tokenizer
from alpaca.training.configuration.settings import DataSettings
from alpaca.training.schedule import count_held_out

logger = logging.getLogger(__name__)


def encode_data(
    data: DataSettings, tokenizer: Tokenizer, *, progress: bool
) -> tuple[EncodedDataset, EncodedDataset | None]:
    """Read and encode the examples to train on, and those to evaluate on (None where there are none).

    Raises MissingInput, MissingPackage, InputError.
    """
    examples, held_out = read_examples(data.path), []
    if num_held_out := count_held_out(data, len(examples)):
        examples, held_out = split_examples(examples, num_held_out=num_held_out, seed=data.seed)
    elif data.eval_path:
        held_out = read_examples(data.eval_path)
    encoded = [
        encode_examples(
            part,
            tokenizer,
            max_length=data.max_length,
            train_on_inputs=data.train_on_inputs,
            progress=progress,
        )
        if part
        else None
        for part in (examples, held_out)
    ]
    for name, part in zip(("training data", "held-out data"), encoded, strict=True):
        for line in part.report.lines() if part else ():
            logger.info("%s: %s", name, line)
    return encoded[0], encoded[1]
