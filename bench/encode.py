"""How long the recipe's data takes to encode: ours, the original's way, and the ceiling, in one run.

    python -m bench.encode

ours:     alpaca.data.examples.encode_examples on --num_examples examples: prompts, ids, labels and report.
original: its preprocessing, text by text: source, and source + answer + EOS, each alone through transformers'
          AutoTokenizer (padding, truncation, a tensor, a count). Run on --num_baseline distinct examples and scaled.
ceiling:  SentencePiece alone, with all threads, on the joint texts alone: what no encoder over it can undercut.

The three take turns, --rounds times, and the medians are reported; the ids and labels of ours and of the original are
compared beforehand. The last line is one JSON object.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from alpaca.data.encoding.prompt_layout import PromptLayout
from alpaca.data.example import Example
from alpaca.data.examples import MASKED_LABEL, EncodedDataset, encode_examples
from alpaca.data.records import read_examples
from alpaca.errors import InputError, MissingInput, run_command
from alpaca.text.prompts import alpaca_prompt
from alpaca.text.sentencepiece import SentencePieceTokenizer, write_llama_tokenizer
from alpaca.text.tokenizer import PAD_TOKEN
from bench.provenance import ROOT, find_real, provenance

MAX_LENGTH = 512
PACKAGES = ("torch", "transformers", "tokenizers", "sentencepiece")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """The command's flags."""

    data_path: str
    tokenizer: Path
    num_examples: int
    num_baseline: int
    rounds: int


def main() -> None:
    config = parse_flags()
    distinct = read_examples(config.data_path)
    examples = [distinct[index % len(distinct)] for index in range(config.num_examples)]
    tokenizer = SentencePieceTokenizer(config.tokenizer)
    baseline = distinct[: config.num_baseline]
    num_tokens = encode_examples(
        examples, PromptLayout("alpaca", tokenizer), max_length=MAX_LENGTH
    ).report.num_tokens  # warms up, too
    with tempfile.TemporaryDirectory() as folder:
        original = load_original_tokenizer(config.tokenizer, Path(folder))
        check_equal(
            encode_examples(baseline, PromptLayout("alpaca", tokenizer), max_length=MAX_LENGTH),
            encode_originally(baseline, original),
        )
        seconds = measure(config, examples, baseline, tokenizer=tokenizer, original=original)
    report(config, seconds, num_tokens=num_tokens, num_baseline=len(baseline))


def parse_flags() -> BenchConfig:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sample = ROOT / "alpaca" / "data" / "sample.json"
    parser.add_argument("--data_path", default=str(find_real("alpaca_4000.json") or sample))
    tokenizer = find_real("llama-tokenizer/tokenizer.model")
    parser.add_argument("--tokenizer", type=Path, default=tokenizer, required=tokenizer is None)
    parser.add_argument("--num_examples", type=int, default=52_002, help="the data is repeated up to this number")
    parser.add_argument("--num_baseline", type=int, default=2_000, help="distinct examples for the original's way")
    parser.add_argument("--rounds", type=int, default=3)
    config = BenchConfig(**vars(parser.parse_args()))
    if not config.tokenizer.is_file():
        raise MissingInput(f"no tokenizer at {config.tokenizer}; name a SentencePiece tokenizer.model by --tokenizer")
    if min(config.num_examples, config.num_baseline, config.rounds) < 1:
        raise InputError("--num_examples, --num_baseline and --rounds must be 1 or more")
    return config


def measure(
    config: BenchConfig,
    examples: list[Example],
    baseline: list[Example],
    *,
    tokenizer: SentencePieceTokenizer,
    original: PreTrainedTokenizerFast,
) -> dict[str, list[float]]:
    """Seconds of every round of each way, the original's scaled to all examples."""
    processor = SentencePieceProcessor(model_file=str(config.tokenizer))
    joint_texts = [alpaca_prompt(example.instruction, example.input) + example.output for example in examples]
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: encode_examples(
            examples, PromptLayout("alpaca", tokenizer), max_length=MAX_LENGTH, progress=False
        ),
        "original": lambda: encode_originally(baseline, original),
        "ceiling": lambda: processor.encode(joint_texts, num_threads=-1),
    }
    scale = {"ours": 1.0, "original": len(examples) / len(baseline), "ceiling": 1.0}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in tqdm(range(config.rounds), desc="rounds", disable=None):
        for name, encode in ways.items():
            seconds[name].append(time_call(encode) * scale[name])
    return seconds


def time_call(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result  # freeing it is not encoding
    return seconds


# The baseline ---------------------------------------------------------------------------------------------------


def load_original_tokenizer(model_file: Path, folder: Path) -> PreTrainedTokenizerFast:
    """transformers' tokenizer of a folder as this project writes it, with the padding token the original adds."""
    pad_id = SentencePieceProcessor(model_file=str(model_file)).get_piece_size()
    write_llama_tokenizer(model_file, folder, added={PAD_TOKEN: pad_id}, pad_token=PAD_TOKEN, max_length=MAX_LENGTH)
    return AutoTokenizer.from_pretrained(folder)


def encode_originally(examples: list[Example], tokenizer: PreTrainedTokenizerFast) -> list[tuple[Tensor, Tensor]]:
    """Ids and labels of each example in the original's steps: every text alone, the joint ones first."""
    sources = [alpaca_prompt(example.instruction, example.input) for example in examples]
    joint = [source + example.output + tokenizer.eos_token for source, example in zip(sources, examples, strict=True)]
    rows = [tokenize_alone(text, tokenizer) for text in joint]
    source_lengths = [int(tokenize_alone(text, tokenizer).ne(tokenizer.pad_token_id).sum()) for text in sources]
    labels = [row.clone() for row in rows]
    for row, source_length in zip(labels, source_lengths, strict=True):
        row[:source_length] = MASKED_LABEL
    return list(zip(rows, labels, strict=True))


def tokenize_alone(text: str, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    tokens = tokenizer(text, return_tensors="pt", padding="longest", max_length=MAX_LENGTH, truncation=True)
    return tokens.input_ids[0]


def check_equal(dataset: EncodedDataset, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """A figure for something else than the original's ids and labels would be worth nothing."""
    trainable = [pair for pair in pairs if bool((pair[1] != MASKED_LABEL).any())]
    assert len(dataset) == len(trainable), (len(dataset), len(trainable))
    for index, (ids, labels) in enumerate(trainable):
        own_ids, own_labels = dataset.example(index)
        assert torch.equal(own_ids, ids), f"ids of example {index} differ"
        assert torch.equal(own_labels, labels), f"labels of example {index} differ"


# The report -----------------------------------------------------------------------------------------------------


def report(config: BenchConfig, seconds: dict[str, list[float]], *, num_tokens: int, num_baseline: int) -> None:
    median = {name: statistics.median(rounds) for name, rounds in seconds.items()}
    print(f"{config.num_examples:,} examples, {num_tokens:,} tokens; median of {config.rounds} rounds")
    for name, value in median.items():
        scaled = f" (scaled from {num_baseline:,} examples)" if name == "original" else ""
        print(f"{name:9}{value:8.2f} s  {num_tokens / value / 1e6:6.2f} M tokens/s{scaled}")
    figures = {
        "bench": "encode",
        "num_examples": config.num_examples,
        "num_tokens": num_tokens,
        "data": f"{Path(config.data_path).name}, repeated to {config.num_examples}",
        "ours_s": round(median["ours"], 3),
        "original_s": round(median["original"], 3),
        "ceiling_s": round(median["ceiling"], 3),
        "original_scaled_from": num_baseline,
        "speedup": round(median["original"] / median["ours"], 2),
        "share_of_ceiling": round(median["ceiling"] / median["ours"], 3),
        "identical_to_original": num_baseline,  # examples whose ids and labels were compared
        "rounds_s": {name: [round(value, 3) for value in rounds] for name, rounds in seconds.items()},
    }
    print(json.dumps({**figures, **provenance("encode", PACKAGES)}))


if __name__ == "__main__":
    run_command(main)
