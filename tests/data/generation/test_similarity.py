"""The pool's scores against rouge_score, text by text."""

import functools
import random

import numpy as np
import pytest

from alpaca.data.generation.similarity import InstructionPool, tokenize

rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="the oracle: pip install rouge-score==0.1.2")

PIECES = [
    "the", "a", "The", "list", "Write", "don't", "state-of-the-art", "é", "naïve", "ſ", "K", "İstanbul", "ß", "ภาษา",
    "日本", "🦙", "x1", "42", "3.5", "_", "__init__", "\n", "\t", "\u2028", "\x00", "...", "¿qué?", "b", "c", "d",
]  # fmt: skip


def random_text(rng: random.Random, longest: int = 12) -> str:
    separators = [" ", "  ", "\n", "", "-"]
    return "".join(rng.choice(PIECES) + rng.choice(separators) for _ in range(rng.randint(0, longest)))


SCORER = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)


def rouge_scores(texts: list[str], text: str) -> list[float]:
    """The original's way: the candidate as the target, each text of the pool as the prediction."""
    return [rouge_score(other, text) for other in texts]


@functools.cache  # the tests ask for the same pairs
def rouge_score(other: str, text: str) -> float:
    return rouge_scorer._score_lcs(words_of(text), words_of(other)).fmeasure


@functools.cache
def words_of(text: str) -> list[str]:
    return SCORER._tokenizer.tokenize(text)


def make_pools() -> list[tuple[list[str], list[str]]]:
    """(pool, candidates): short texts, texts over 64 and 128 words, few words often, nothing."""
    rng = random.Random(1)
    short = [random_text(rng) for _ in range(150)]
    long = [random_text(rng, longest) for longest in (60, 63, 64, 65, 130, 200) for _ in range(4)]
    binary = [" ".join(rng.choices("ab", k=rng.choice([1, 5, 63, 64, 65, 128, 129, 192]))) for _ in range(24)]
    return [(short, short[:40] + long), (long, long), (binary, binary[:16]), (["", "!?", "a"], ["", "a", "é"])]


POOLS = make_pools()


@pytest.mark.parametrize("number", range(len(POOLS)))
@pytest.mark.fast_rows(1)
def test_scores_are_those_of_rouge_score(number: int):
    texts, candidates = POOLS[number]
    pool = InstructionPool(texts)
    for text in candidates:
        assert pool.scores(text).tolist() == rouge_scores(texts, text)


def test_a_carry_passes_through_a_word_of_64_without_a_match():
    text = "a " * 64 + "b " * 64 + "a c a"
    texts = ["a", "a a", "c", "a c", "b " * 70, "a " * 70 + "c"]
    assert InstructionPool(texts).scores(text).tolist() == rouge_scores(texts, text)


@pytest.mark.parametrize("number", range(len(POOLS)))
def test_no_score_exceeds_its_upper_bound(number: int):
    texts, candidates = POOLS[number]
    pool = InstructionPool(texts)
    for text in candidates:
        bounds, scores = pool.upper_bounds(text), np.array(rouge_scores(texts, text))
        assert (bounds >= scores).all()
        assert ((bounds == 0) == (scores == 0)).all()


@pytest.mark.parametrize("number", range(len(POOLS)))
def test_nearest_and_mean_are_the_originals(number: int):
    texts, candidates = POOLS[number]
    pool = InstructionPool(texts)
    for text in candidates:
        expected = np.array(rouge_scores(texts, text))
        order = np.argsort(expected, kind="stable")[-10:][::-1]  # the original sorts so, without "stable"
        similarity = pool.compare(text)
        assert similarity.nearest == tuple((int(index), float(expected[index])) for index in order)
        assert similarity.mean == float(np.mean(expected))


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.7, 0.99])
@pytest.mark.fast_rows(1)
def test_rejection_is_the_originals(threshold: float):
    texts, candidates = POOLS[0]
    pool = InstructionPool(texts)
    outcomes = set()
    for text in [*candidates, *(text + " a list" for text in candidates)]:
        expected = rouge_scores(texts, text)
        found, similarity = pool.judge(text, threshold=threshold)
        assert found == pool.find_similar(text, threshold)
        assert (found is not None) == (max(expected) > threshold)
        if found:
            assert found == max((score, index) for index, score in enumerate(expected))[::-1]
            assert similarity is None
        else:
            assert similarity == pool.compare(text)
        outcomes.add(found is None)
    assert outcomes == {True, False} or threshold == 0.0


def test_a_score_of_just_the_threshold_is_decided_as_the_original_does():
    """7 of 10 words: 2pr / (p + r) is what floating point makes of 0.7, and must be the same on both sides."""
    words = [f"w{number}" for number in range(20)]
    for common in range(1, 15):
        for length in range(common, 20):
            pool = InstructionPool([" ".join(words[:length])])
            text = " ".join(words[:common] + ["other"] * (length - common))
            expected = rouge_scores(pool.texts, text)[0]
            assert (pool.find_similar(text, 0.7) is not None) == (expected > 0.7), (common, length)


def test_a_pool_that_grew_is_a_pool_made_at_once():
    texts, candidates = POOLS[0]
    grown = InstructionPool(texts[:1])
    for text in texts[1:]:
        grown.scores(text)
        grown.add(text)
    whole = InstructionPool(texts)
    assert len(grown) == len(whole) == len(texts)
    assert all((grown.scores(text) == whole.scores(text)).all() for text in candidates)


def test_growth_over_many_blocks():
    rng = random.Random(2)
    texts = [" ".join(rng.choices(PIECES, k=9)) for _ in range(2000)]
    pool = InstructionPool()
    for text in texts:
        pool.add(text)
    assert pool.scores(texts[7]).tolist() == rouge_scores(texts, texts[7])


def test_an_empty_pool_has_nothing_similar():
    pool = InstructionPool()
    assert pool.judge("Name a colour.", threshold=0.7)[0] is None
    assert pool.compare("Name a colour.").nearest == ()
    assert pool.compare("Name a colour.").mean == 0.0


def test_words_are_those_of_rouge_score():
    from rouge_score.tokenize import tokenize as reference

    rng = random.Random(3)
    letters = [chr(code) for code in [*range(1, 0x250), 0x130, 0x212A, 0x17F, 0xFB01, 0x1F999, 0x2028, 0xFF21]]
    for _ in range(300):
        text = "".join(rng.choices(letters, k=30))
        assert tokenize(text) == reference(text, None)


def test_real_instructions_score_as_in_rouge_score(real):
    from alpaca.data.records import read_examples

    texts = [example.instruction for example in read_examples(real / "alpaca_4000.json")]
    pool = InstructionPool(texts[:600])
    for text in texts[595:600] + texts[-5:]:
        assert pool.scores(text).tolist() == rouge_scores(pool.texts, text)
