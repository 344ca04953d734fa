"""What answers that follow a constraint cost, and which library reads constraints best.

    python -m bench.structured                              the engine's rate, clients constrained and free
    python -m bench.structured --libraries --llama3 FILE    llguidance against xgrammar

The rate: --clients requests at once on a random LLaMA: all free, half of them constrained by a JSON schema, or all.
Each case takes its turn in each of --rounds rounds. All answers have the same number of tokens, since the schema asks
for more than fit. Ratios are medians of the rounds' ratios to "free".

The libraries: vocabularies of 32,000 rows (of ALPACA_REAL) and of 128,256 (FILE is Llama 3's tokenizer.model). Each
schema is built, and an answer that it allows goes through it token by token, with the mask found before each token. To
build takes the median of three turns, without a cache; a mask's times are over all schemas' tokens, when they are seen
first and again. Beside that, which keywords are held: an answer that a schema allows must be possible, and one that it
does not must not. xgrammar is no dependency of this project: the command runs where both are installed.

The last line is one JSON object.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alpaca import cpu_threads

cpu_threads.set_defaults()  # as predict.py

import numpy as np

from alpaca.errors import InputError, MissingInput, run_command
from alpaca.serving.loading import load_engine
from alpaca.serving.settings import ServerSettings
from alpaca.serving.structured.constraints import Constraint
from alpaca.serving.structured.grammars import build, make_tokenizer
from alpaca.serving.structured.vocabulary import Vocabulary
from alpaca.text.loading import load_tokenizer
from alpaca.text.sentencepiece import SentencePieceTokenizer
from alpaca.text.tiktoken import TiktokenModel
from bench.machine import describe_device
from bench.provenance import find_real, provenance
from bench.random_model import model_folder
from bench.rows import Prompts, Row
from bench.schemas import KEYWORDS, LONG, SCHEMAS
from bench.ways import EngineWay

CASES = {"free": 0.0, "half": 0.5, "constrained": 1.0}
_TURNS = 3


def main() -> None:
    flags = parse_flags()
    packages = ("llguidance", "xgrammar") if flags.libraries else ("torch", "llguidance")
    origin = {**provenance("structured", packages), "device": describe_device()}
    found = compare_libraries(flags.llama3) if flags.libraries else {"cases": measure_rates(flags), **vars(flags)}
    print(
        json.dumps({**origin, **{name: value for name, value in found.items() if name not in ("libraries", "llama3")}})
    )


# The engine's rate ----------------------------------------------------------------------------------------------------


def measure_rates(flags: argparse.Namespace) -> dict[str, dict[str, float]]:
    row = Row(
        name="structured", way="engine", num_requests=flags.clients, clients=flags.clients,
        prompt_tokens=(64, 64), new_tokens=(flags.new_tokens,) * 2, sampling={"temperature": 0.75},
    )  # fmt: skip
    rates: dict[str, list[float]] = {case: [] for case in CASES}
    with model_folder(None, flags.shape, "float32") as folder:
        engine, prompts = load_engine(folder, ServerSettings(engine="llama")), Prompts(load_tokenizer(folder))
        for number in range(-1, flags.rounds):  # the first warms up
            for case, share in CASES.items():
                inputs = [
                    dataclasses.replace(values, json_schema=LONG) if at < share * flags.clients else values
                    for at, values in enumerate(prompts.inputs(row, f"{case} {number}"))
                ]
                sample = EngineWay(engine).run(row, inputs)
                assert sample.num_tokens == flags.clients * flags.new_tokens
                if number >= 0:
                    rates[case].append(sample.rate)
                    print(f"round {number + 1}  {case:12}{sample.rate:9.1f} tokens/s", file=sys.stderr, flush=True)
        engine.close()
    return {
        case: {
            "tokens_per_second": round(statistics.median(own), 1),
            "of_free": round(statistics.median(a / b for a, b in zip(own, rates["free"], strict=True)), 4),
        }
        for case, own in rates.items()
    }


# The libraries --------------------------------------------------------------------------------------------------------


class Failed(Exception):
    """A library refuses a schema."""


class LlGuidance:
    def __init__(self, vocabulary: Vocabulary) -> None:
        self._tokenizer = make_tokenizer(vocabulary)

    def build(self, schema: Any) -> "LlGuidance":
        """With the first mask, as the server does it."""
        try:
            self._built = build(Constraint(kind="json_schema", text=json.dumps(schema)), self._tokenizer)
        except InputError as error:
            raise Failed(str(error)) from None
        return self

    def begin(self) -> None:
        self._matcher = self._built.deep_copy()

    def find_mask(self) -> np.ndarray:
        return np.frombuffer(self._matcher.compute_bitmask(), np.uint8)

    def accept(self, token_id: int) -> bool:
        return self._matcher.consume_token(token_id)


class XGrammar:
    def __init__(self, vocabulary: Vocabulary) -> None:
        import xgrammar

        pieces = list(vocabulary.pieces)
        self._info = xgrammar.TokenizerInfo(
            pieces, xgrammar.VocabType.RAW, vocab_size=len(pieces), stop_token_ids=list(vocabulary.eos_ids)
        )
        self._mask = xgrammar.allocate_token_bitmask(1, len(pieces)).numpy()

    def build(self, schema: Any) -> "XGrammar":
        import xgrammar

        try:
            compiler = xgrammar.GrammarCompiler(self._info, max_threads=2, cache_enabled=False)
            self._built = compiler.compile_json_schema(
                json.dumps(schema), any_whitespace=False, separators=(", ", ": "), strict_mode=False
            )
            self.begin()
            self.find_mask()
        except Exception as error:  # the library's own kinds differ from schema to schema
            raise Failed(f"{type(error).__name__}: {error}") from None
        return self

    def begin(self) -> None:
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(self._built)

    def find_mask(self) -> np.ndarray:
        self._matcher.fill_next_token_bitmask(self._mask)
        return self._mask.view(np.uint8)[0]

    def accept(self, token_id: int) -> bool:
        return self._matcher.accept_token(token_id)


def compare_libraries(llama3: Path | None) -> dict[str, Any]:
    found: dict[str, Any] = {"speed": {}, "keywords": {}}
    vocabularies = {"32000": sentencepiece_vocabulary(), "128256": tiktoken_vocabulary(llama3)}
    for name, make in (("llguidance", LlGuidance), ("xgrammar", XGrammar)):
        found["speed"][name] = {size: measure_speed(make, vocabulary) for size, vocabulary in vocabularies.items()}
        library = make(vocabularies["32000"])
        found["keywords"][name] = {key: judge(library, vocabularies["32000"], *rest) for key, *rest in KEYWORDS}
        print(name, json.dumps(found["speed"][name]), json.dumps(found["keywords"][name]), file=sys.stderr, flush=True)
    return found


def sentencepiece_vocabulary() -> Vocabulary:
    file = find_real("llama-tokenizer/tokenizer.model")
    if file is None:
        raise MissingInput("set ALPACA_REAL to a folder that has Meta's tokenizer at llama-tokenizer/tokenizer.model")
    tokenizer = SentencePieceTokenizer(file)
    return Vocabulary.of(tokenizer, tokenizer.size, [tokenizer.eos_id])


def tiktoken_vocabulary(file: Path | None) -> Vocabulary:
    if file is None:
        raise MissingInput("--llama3 names Llama 3's tokenizer.model")
    model = TiktokenModel(file, instruct=True)
    pieces = [*sorted(model.ranks, key=model.ranks.__getitem__), *[b""] * len(model.special_tokens)]
    return Vocabulary(pieces=tuple(pieces), eos_ids=tuple(sorted(model.eos_ids)))


def measure_speed(make: Callable[[Vocabulary], Any], vocabulary: Vocabulary) -> dict[str, Any]:
    begun = time.perf_counter()
    library = make(vocabulary)
    found: dict[str, Any] = {"prepared_s": round(time.perf_counter() - begun, 3), "built_ms": {}, "refused": []}
    first: list[float] = []
    later: list[float] = []
    for name, (schema, answer) in SCHEMAS.items():
        built: list[float] = []
        try:
            for turn in range(_TURNS):
                begun = time.perf_counter()
                library.build(schema)
                built.append(1e3 * (time.perf_counter() - begun))
                times = walk(library, vocabulary, answer)
                if turn == 0:
                    first += times
                later += walk(library, vocabulary, answer)
        except Failed as error:
            found["refused"].append(f"{name}: {str(error)[:200]}")
            continue
        found["built_ms"][name] = round(statistics.median(built), 2)
    for kind, times in (("first", first), ("again", later)):
        found[f"mask_us_{kind}"] = {
            "mean": round(1e6 * statistics.fmean(times), 1),
            "median": round(1e6 * statistics.median(times), 1),
            "worst": round(1e6 * max(times), 1),
        }
    return found


def walk(library: Any, vocabulary: Vocabulary, answer: Any) -> list[float]:
    """Seconds of each mask on the way through an answer."""
    library.begin()
    seconds = []
    for token_id in vocabulary.cut(json.dumps(answer, ensure_ascii=False).encode()):
        begun = time.perf_counter()
        mask = library.find_mask()
        seconds.append(time.perf_counter() - begun)
        if not (mask[token_id // 8] >> (token_id % 8) & 1 and library.accept(token_id)):
            # one that forces a text allows but its own way to cut it
            forced = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
            raise Failed(f"does not take the answer; {len(forced)} tokens were allowed")
    return seconds


def judge(library: Any, vocabulary: Vocabulary, schema: Any, good: Any, bad: Any) -> str:
    try:
        library.build(schema)
    except Failed:
        return "refused"
    takes_good, takes_bad = (takes(library, vocabulary, answer) for answer in (good, bad))
    if not takes_good:
        return "a valid answer is not possible"
    return "not held" if takes_bad else "held"


def takes(library: Any, vocabulary: Vocabulary, answer: Any) -> bool:
    """Whether the answer can be given as a whole, in single characters, which is a way that no forced text takes."""
    library.begin()
    for token_id in vocabulary.cut(json.dumps(answer, ensure_ascii=False).encode()):
        if not library.accept(token_id):
            return False
    mask = library.find_mask()
    return any(mask[end // 8] >> (end % 8) & 1 for end in vocabulary.eos_ids)


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.structured", description="What constrained answers cost.")
    parser.add_argument("--libraries", action="store_true", help="compare llguidance and xgrammar")
    parser.add_argument("--llama3", type=Path, help="Llama 3's tokenizer.model, for the vocabulary of 128,256")
    parser.add_argument("--shape", default="46m")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
