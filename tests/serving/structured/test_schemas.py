"""Every finished answer of a model that knows nothing validates against its schema, by another program's judgement."""

import json
import re
from collections.abc import Iterator

import jsonschema
import pytest

from alpaca.serving.detokenize import CompletionText
from alpaca.serving.engine import complete_texts
from alpaca.serving.llama.engine import LlamaEngine
from alpaca.serving.loading import load_engine
from alpaca.serving.request import PredictionInputs, make_request
from alpaca.serving.settings import ServerSettings
from tests.serving.structured.schemas import make_schema

AT_ONCE = 20
# RFC 3339, 5.6. The library's own checks know no leap seconds.
_TIME = r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?(z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_CLOCKS = {"time": _TIME, "date-time": r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])t" + _TIME}
FORMATS = jsonschema.FormatChecker(["date", "email", "uuid", "ipv4", "ipv6"])
for name, pattern in _CLOCKS.items():
    FORMATS.checks(name)(lambda text, pattern=pattern: re.fullmatch(pattern, text, re.IGNORECASE) is not None)


@pytest.fixture(scope="module")
def engine(llama_folder) -> Iterator[LlamaEngine]:
    engine = load_engine(llama_folder, ServerSettings())
    yield engine
    engine.close()


def answers(engine: LlamaEngine, schemas: list[dict]) -> list[tuple[str, str]]:
    """Each schema's answer and why it ended; all are computed in the same steps."""
    running = []
    for seed, schema in enumerate(schemas):
        inputs = PredictionInputs(
            prompt="Answer.", json_schema=schema, max_new_tokens=1500, temperature=1.0, seed=seed, top_p=0.95
        )
        request = make_request(inputs, engine.tokenizer, max_context=engine.max_context)
        running.append((engine.submit(request), CompletionText(engine.tokenizer, request.prompt_ids)))
    found = []
    for generation, text in running:
        (answer,) = complete_texts(generation, [text])
        found.append((answer, generation.finish_reasons[0]))
    return found


def check(engine: LlamaEngine, seeds: range) -> int:
    """Check the answers to the schemas of these numbers; returns how many were finished."""
    num_finished = 0
    schemas = {seed: make_schema(seed) for seed in seeds}
    for (seed, schema), (answer, reason) in zip(schemas.items(), answers(engine, list(schemas.values())), strict=True):
        jsonschema.Draft202012Validator.check_schema(schema)
        validator = jsonschema.Draft202012Validator(schema, format_checker=FORMATS)
        if reason == "stop":
            num_finished += 1
            problems = [error.message for error in validator.iter_errors(json.loads(answer))]
            assert not problems, (seed, schema, answer)
    return num_finished


@pytest.mark.slow
def test_a_few_schemas(engine):
    assert check(engine, range(12)) >= 10


@pytest.mark.slow
def test_two_hundred_schemas(engine):
    num_finished = sum(check(engine, range(at, at + AT_ONCE)) for at in range(1000, 1200, AT_ONCE))
    assert num_finished >= 190


def test_the_judge_can_say_no(engine):
    schema = make_schema(3)
    (answer,) = answers(engine, [schema])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate([json.loads(answer[0])], schema)
