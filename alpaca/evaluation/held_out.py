"""The recipe's loss of examples that were not trained on: over their answers' tokens, as train.py evaluates."""

import math
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from alpaca.data.encoding.chat_layout import ChatLayout
from alpaca.data.encoding.choosing import AUTO, OF_MODEL, choose_layout
from alpaca.data.encoding.layout import Layout
from alpaca.data.example import AnyExample
from alpaca.data.examples import MASKED_LABEL, encode_examples
from alpaca.evaluation.asking import Target, score_all
from alpaca.serving.engine import Engine
from alpaca.serving.request import NO_ADAPTERS
from alpaca.text.chat.trained_prompt import CHAT


def measure_loss(engine: Engine, examples: list[AnyExample], *, adapter: str | None, max_length: int) -> dict[str, Any]:
    """Mean cross entropy of all target tokens, its perplexity, and the counts of the encoding.

    max_length: tokens an example is cut to. Raises InputError where no example has a target.
    """
    layout = _find_layout(engine, examples, adapter)
    data = encode_examples(examples, layout, max_length=min(max_length, engine.max_context))
    pairs = [data.example(index) for index in range(len(data))]
    firsts = data.prompt_lengths.clamp(min=1).tolist()  # the first token is never predicted
    targets = (Target(ids.tolist(), len(ids) - first) for (ids, _), first in zip(pairs, firsts, strict=True))
    scores = tqdm(score_all(engine, targets, adapter=adapter), total=len(data), desc="held-out examples", disable=None)
    total = 0.0
    for found, (_, labels), first in zip(scores, pairs, firsts, strict=True):
        trained = (labels[first:] != MASKED_LABEL).tolist()
        total -= sum(score.logprob for score, is_trained in zip(found, trained, strict=True) if is_trained)
    loss = total / int(data.target_counts.sum())
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), **asdict(data.report)}


def _find_layout(engine: Engine, examples: list[AnyExample], adapter: str | None) -> Layout:
    """The prompt that the model was trained with, where it says so; else what fits the examples."""
    adapters, tokenizer = engine.adapters or NO_ADAPTERS, engine.tokenizer
    trained = adapters.trained_prompts.get(adapter or "", tokenizer.trained_prompt)
    template = adapters.templates.get(adapter or "", tokenizer.chat_template)
    if trained == CHAT and template is not None:
        return ChatLayout(template, tokenizer, name=OF_MODEL)
    return choose_layout(AUTO if trained in (None, CHAT) else trained, examples, tokenizer).layout
