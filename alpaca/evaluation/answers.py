"""Answers to a file of prompts, and what can be counted of them: length, repetition, and refusals."""

import json
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from alpaca.errors import InputError, MissingInput
from alpaca.evaluation.asking import Answer, answer_all
from alpaca.serving.engine import Engine
from alpaca.serving.request import NO_ADAPTERS, PredictionInputs, make_request

_KNOWN = {item.name for item in fields(PredictionInputs)}
_FIXED = ("n", "stream", "details", "logprobs", "echo", "num_beams", "replicate_weights")  # one plain answer each
_GRAM = 4  # words
_LOOPS = 0.5  # repetition from which an answer is counted as going round in circles
_REFUSAL_CHARACTERS = 200  # of an answer's beginning, in which a refusal is looked for
_REFUSAL = re.compile(
    r"\b(i(['’]m| am) (sorry|unable|not able)|i (can(['’]t|not| not)|won['’]t|will not|must decline)"
    r"|as an? (ai|language model|assistant)|(sorry|unfortunately),? (but )?i\b"
    r"|it is not (appropriate|possible) for me)",
    re.IGNORECASE,
)


def read_prompts(file: Path) -> list[dict[str, Any]]:
    """The inputs of a file, a JSON object a line, as script/predict takes them. Raises InputError, MissingInput."""
    if not file.is_file():
        raise MissingInput(f"--prompts {file} is no file; expected one with a JSON object of inputs a line")
    lines = file.read_text(encoding="utf-8").split("\n")
    records = [_read_line(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise InputError(f"--prompts {file} has no line with a prompt")
    return records


def _read_line(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f'{where}: expected a JSON object such as {{"prompt": "Name three animals."}}; {error}'
        ) from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object; found {line[:60]}")
    if unknown := sorted(set(record) - (_KNOWN - {*_FIXED})):
        raise InputError(
            f"{where}: {', '.join(unknown)} cannot be given here; prompt, input, temperature and so on can"
        )
    _as_inputs(record, 0).check()
    return record


def _as_inputs(record: dict[str, Any], seed: int) -> PredictionInputs:
    """Greedy and from one seed where the line does not say otherwise, so that two models differ by themselves alone."""
    return PredictionInputs.from_mapping({"temperature": 0.0, "seed": seed, **record})


def answer_prompts(
    engine: Engine, records: Sequence[dict[str, Any]], *, adapter: str | None, seed: int
) -> list[dict[str, Any]]:
    """Each prompt's answer with what is counted of it. Raises InputError, PromptTooLong."""
    asked = []
    for record in records:
        inputs = _as_inputs({**record, "replicate_weights": adapter or "none"}, seed)
        request = make_request(
            inputs, engine.tokenizer, max_context=engine.max_context, adapters=engine.adapters or NO_ADAPTERS
        )
        asked.append((request, inputs.stop, request.strips_leading))
    return [describe_answer(answer) for answer in answer_all(engine, asked)]


def describe_answer(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "tokens": len(answer.ids),
        "words": len(answer.text.split()),
        "repetition": repetition(answer.text),
        "refuses": is_refusal(answer.text),
    }


def repetition(text: str) -> float:
    """The share of the text's runs of four words that stood in it before, from 0 to 1, whatever their case."""
    words = text.lower().split()
    grams = [tuple(words[at : at + _GRAM]) for at in range(len(words) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def is_refusal(text: str) -> bool:
    """Whether the beginning has a phrase by which models decline: "I'm sorry", "I cannot", "As an AI" and the like."""
    return _REFUSAL.search(text[:_REFUSAL_CHARACTERS]) is not None


def summarize(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means and counts over one model's answers."""
    return {
        "answers": len(answers),
        "mean_tokens": statistics.fmean(answer["tokens"] for answer in answers),
        "mean_words": statistics.fmean(answer["words"] for answer in answers),
        "mean_repetition": statistics.fmean(answer["repetition"] for answer in answers),
        "going_round": sum(answer["repetition"] >= _LOOPS for answer in answers),
        "empty": sum(not answer["text"].strip() for answer in answers),
        "refusals": sum(answer["refuses"] for answer in answers),
        "finish_reasons": dict(Counter(answer["finish_reason"] for answer in answers)),
    }
