"""How long it takes to compare a new instruction with a pool of 52,000: ours, the original's way, and a plain loop.

    python -m bench.similarity

full:     InstructionPool.compare: the 10 nearest and the mean score, whatever the candidate.
judge:    what generation calls: where a score is above 0.7 that alone, found among the few texts that the bound leaves.
original: its way: a pool of 16 processes made for the candidate, rouge_score's function mapped over all texts, then the
          10 highest and the mean.
loop:     the same function over all texts in one process: what the original's processes are to be faster than.

The pool is made from real instructions by crossing two of them at a time; half of the candidates are such crosses, half
real instructions with a word changed. The ways take turns, --rounds times, each with its own number of candidates, and
the medians of the time for one are reported; that they agree is checked beforehand. The last line is one JSON object.
"""

import argparse
import functools
import json
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from alpaca.data.generation.similarity import InstructionPool
from alpaca.errors import InputError, MissingPackage, run_command
from bench.provenance import ROOT, find_real, provenance

THRESHOLD = 0.7
PROCESSES = 16  # the original's default
PACKAGES = ("numpy", "rouge_score")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """The command's flags."""

    data_path: Path
    num_pool: int
    num_candidates: int
    num_original: int
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What each way finds for a candidate. nearest: the 10 highest scores."""

    is_rejected: bool
    nearest: list[float]
    mean: float


def main() -> None:
    config = parse_flags()
    texts, candidates = make_texts(config)
    started = time.perf_counter()
    pool = InstructionPool(tqdm(texts, desc="pool", disable=None))
    build_s = time.perf_counter() - started
    tokenized = [tokenize(text) for text in texts]
    num_compared = check_equal(pool, tokenized, candidates[: config.num_original])
    seconds, num_rejected = measure(config, pool, tokenized, candidates)
    report(config, seconds, pool=pool, build_s=build_s, num_rejected=num_rejected, num_compared=num_compared)


def parse_flags() -> BenchConfig:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sample = ROOT / "alpaca" / "data" / "sample.json"
    parser.add_argument("--data_path", type=Path, default=find_real("alpaca_4000.json") or sample)
    parser.add_argument("--num_pool", type=int, default=52_000)
    parser.add_argument("--num_candidates", type=int, default=200, help="a round, for our two ways")
    parser.add_argument("--num_original", type=int, default=3, help="candidates a round, for the other two")
    parser.add_argument("--rounds", type=int, default=3)
    config = BenchConfig(**vars(parser.parse_args()))
    if min(config.num_pool, config.num_candidates, config.num_original, config.rounds) < 1:
        raise InputError("--num_pool, --num_candidates, --num_original and --rounds must be 1 or more")
    try:
        import rouge_score  # noqa: F401  the two other ways are made of it
    except ImportError as error:
        raise MissingPackage("the baseline needs the package rouge-score: pip install rouge-score==0.1.2") from error
    return config


def make_texts(config: BenchConfig) -> tuple[list[str], list[str]]:
    """The pool and the candidates: the same for the same data."""
    words = [record["instruction"].split() for record in json.loads(config.data_path.read_text("utf-8"))]
    rng = random.Random(0)

    def cross() -> str:
        first, second = rng.choice(words), rng.choice(words)
        return " ".join(first[: rng.randint(1, len(first))] + second[rng.randint(0, len(second) - 1) :])

    def change() -> str:
        changed = list(rng.choice(words))
        changed[rng.randrange(len(changed))] = rng.choice(rng.choice(words))
        return " ".join(changed)

    texts = [cross() for _ in range(config.num_pool)]
    number = max(config.num_candidates, config.num_original)
    return texts, [(cross, change)[index % 2]() for index in range(number)]


def measure(
    config: BenchConfig, pool: InstructionPool, tokenized: list[list[str]], candidates: list[str]
) -> tuple[dict[str, list[float]], int]:
    """Seconds for one candidate in every round of each way; and how many of the candidates are rejected."""
    few = candidates[: config.num_original]
    ways: dict[str, tuple[Callable[[str], Judgement], list[str]]] = {
        "full": (lambda text: compare(pool, text), candidates[: config.num_candidates]),
        "judge": (lambda text: judge(pool, text), candidates[: config.num_candidates]),
        "original": (lambda text: judge_originally(tokenized, text), few),
        "loop": (lambda text: judge_in_loop(tokenized, text), few),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in tqdm(range(config.rounds), desc="rounds", disable=None):
        for name, (way, texts) in ways.items():
            start = time.perf_counter()
            found = [way(text) for text in texts]
            seconds[name].append((time.perf_counter() - start) / len(texts))
            if name == "judge":
                num_rejected = sum(judgement.is_rejected for judgement in found)
    return seconds, num_rejected


# The ways -------------------------------------------------------------------------------------------------------


def compare(pool: InstructionPool, text: str) -> Judgement:
    similarity = pool.compare(text)
    nearest = [score for _, score in similarity.nearest]
    return Judgement(is_rejected=nearest[0] > THRESHOLD, nearest=nearest, mean=similarity.mean)


def judge(pool: InstructionPool, text: str) -> Judgement:
    found, similarity = pool.judge(text, threshold=THRESHOLD)
    if similarity is None:
        return Judgement(is_rejected=found is not None, nearest=[], mean=0.0)
    return Judgement(is_rejected=False, nearest=[score for _, score in similarity.nearest], mean=similarity.mean)


def judge_originally(tokenized: list[list[str]], text: str) -> Judgement:
    from rouge_score import rouge_scorer

    score = functools.partial(rouge_scorer._score_lcs, tokenize(text))
    with multiprocessing.get_context("fork").Pool(PROCESSES) as processes:
        return judge_scores([found.fmeasure for found in processes.map(score, tokenized)])


def judge_in_loop(tokenized: list[list[str]], text: str) -> Judgement:
    from rouge_score import rouge_scorer

    words = tokenize(text)
    return judge_scores([rouge_scorer._score_lcs(words, other).fmeasure for other in tokenized])


def judge_scores(scores: list[float]) -> Judgement:
    nearest = [scores[index] for index in np.argsort(scores)[-10:][::-1]]
    return Judgement(is_rejected=max(scores) > THRESHOLD, nearest=nearest, mean=float(np.mean(scores)))


def tokenize(text: str) -> list[str]:
    from rouge_score import tokenize as rouge_tokenize

    return rouge_tokenize.tokenize(text, None)


def check_equal(pool: InstructionPool, tokenized: list[list[str]], candidates: list[str]) -> int:
    """A figure for something else than the original's scores would be worth nothing; the number compared."""
    for text in candidates:
        expected, found = judge_in_loop(tokenized, text), judge(pool, text)
        assert compare(pool, text) == expected, text
        assert found.is_rejected == expected.is_rejected, text
        assert found.is_rejected or found == expected, text
    return len(candidates)


# The report -----------------------------------------------------------------------------------------------------


def report(
    config: BenchConfig,
    seconds: dict[str, list[float]],
    *,
    pool: InstructionPool,
    build_s: float,
    num_rejected: int,
    num_compared: int,
) -> None:
    median = {name: statistics.median(rounds) for name, rounds in seconds.items()}
    print(f"a candidate against {len(pool):,} instructions; median of {config.rounds} rounds")
    for name, value in median.items():
        print(f"{name:9}{1000 * value:10.2f} ms{value / median['full']:10.1f} times full")
    figures = {
        "bench": "similarity",
        "num_pool": len(pool),
        "data": f"{config.data_path.name}, crossed",
        "num_candidates": {"full": config.num_candidates, "judge": config.num_candidates}
        | dict.fromkeys(("original", "loop"), config.num_original),
        "num_rejected": num_rejected,
        "full_ms": round(1000 * median["full"], 3),
        "judge_ms": round(1000 * median["judge"], 3),
        "original_ms": round(1000 * median["original"], 1),
        "loop_ms": round(1000 * median["loop"], 1),
        "speedup": round(median["original"] / median["full"]),
        "speedup_over_loop": round(median["loop"] / median["full"]),
        "pool_build_s": round(build_s, 3),
        "identical_to_original": num_compared,  # candidates whose rejection, nearest scores and mean were compared
        "rounds_ms": {name: [round(1000 * value, 3) for value in rounds] for name, rounds in seconds.items()},
    }
    print(json.dumps({**figures, **provenance("similarity", PACKAGES)}))


if __name__ == "__main__":
    run_command(main)
