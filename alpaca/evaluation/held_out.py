"""The recipe's loss of examples that were not trained on: over their answers' tokens, as train.py evaluates."""

import math
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from alpaca.data.examples import encode_examples
from alpaca.data.records import Example
from alpaca.evaluation.asking import Target, score_all
from alpaca.serving.engine import Engine


def measure_loss(engine: Engine, examples: list[Example], *, adapter: str | None, max_length: int) -> dict[str, Any]:
    """Mean cross entropy of all target tokens, its perplexity, and the counts of the encoding.

    max_length: tokens an example is cut to. Raises InputError where no example has a target.
    """
    data = encode_examples(examples, engine.tokenizer, max_length=min(max_length, engine.max_context))
    targets = (Target(data.example(i)[0].tolist(), int(data.target_counts[i])) for i in range(len(data)))
    scores = score_all(engine, targets, adapter=adapter)
    total = 0.0
    for found in tqdm(scores, total=len(data), desc="held-out examples", disable=None):
        total -= sum(score.logprob for score in found)
    loss = total / int(data.target_counts.sum())
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), **asdict(data.report)}
