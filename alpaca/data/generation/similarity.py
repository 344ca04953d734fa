"""How similar an instruction is to each of a pool: ROUGE-L F exactly as `rouge_score` has it, for all of them at once.

The score rests on the longest common subsequence of two texts' words. Only words of the pool that occur in the
candidate can be part of one, so those are found first, in one pass over the pool's words. Their number alone bounds the
score; the subsequences themselves are computed for all texts side by side, one bit for each word of the candidate.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"[a-z0-9]+")
_WORD_BITS = 64
_ALL_BITS = np.uint64(2**64 - 1)

Scores = NDArray[np.float64]
Ints = NDArray[np.int64]


def tokenize(text: str) -> list[str]:
    """The words that ROUGE compares: runs of ASCII letters and digits, lower-cased, without a stemmer.

    Source: google-research rouge (`rouge_score/tokenize.py`, use_stemmer=False). Texts in other scripts have none.
    """
    return _WORD.findall(text.lower())


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """A text beside a pool. nearest: (index in the pool, score), the most similar first.  mean: over the whole pool."""

    nearest: tuple[tuple[int, float], ...]
    mean: float


class InstructionPool:
    """Texts that a new one is compared with; P texts of N words together, V different ones. It only grows."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.texts: list[str] = []
        self._ids: dict[str, int] = {}  # of each word
        self._words = _Grown(np.int32)  # [N] the word ids of all texts, end to end
        self._owners = _Grown(np.int32)  # [N] the text that each word belongs to
        self._lengths = _Grown(np.int64)  # [P] words of each text
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self.texts)

    def add(self, text: str) -> None:
        """Append a text, under the index `len(pool)`."""
        ids = [self._ids.setdefault(word, len(self._ids)) for word in tokenize(text)]
        self._words.extend(ids)
        self._owners.extend([len(self.texts)] * len(ids))
        self._lengths.extend([len(ids)])
        self.texts.append(text)

    def scores(self, text: str) -> Scores:
        """ROUGE-L F with each text of the pool [P], bit for bit as rouge_score computes it."""
        return self._scores(self._match(tokenize(text)))

    def upper_bounds(self, text: str) -> Scores:
        """Upper bounds of the scores [P]: those that would result if all shared words stood in the same order."""
        return self._bounds(self._match(tokenize(text)))

    def find_similar(self, text: str, threshold: float) -> tuple[int, float] | None:
        """(index, score) of the most similar text, the last of equals, if its score is above `threshold`; else None.

        Subsequences are computed for the few texts only that the bound leaves.
        """
        return self._find_similar(self._match(tokenize(text)), threshold)

    def compare(self, text: str, *, num_nearest: int = 10) -> Similarity:
        """The nearest texts of the pool (of equal scores the later text first) and the mean score over all."""
        return self._compare(self._match(tokenize(text)), num_nearest)

    def judge(
        self, text: str, *, threshold: float, num_nearest: int = 10
    ) -> tuple[tuple[int, float] | None, Similarity | None]:
        """`find_similar`, and where it finds none `compare`, with one pass over the pool for both."""
        matches = self._match(tokenize(text))
        found = self._find_similar(matches, threshold)
        return found, None if found else self._compare(matches, num_nearest)

    # From words to scores ---------------------------------------------------------------------------------------

    def _match(self, words: Sequence[str]) -> "_Matches":
        """Which words of the pool occur in the candidate, text by text."""
        masks = _position_masks([self._ids.get(word, -1) for word in words], num_ids=len(self._ids))
        is_shared = masks.any(axis=0)
        hits = np.flatnonzero(is_shared[self._words.view])
        counts = np.bincount(self._owners.view[hits], minlength=len(self))
        return _Matches(num_words=len(words), masks=masks, hits=self._words.view[hits], counts=counts)

    def _bounds(self, matches: "_Matches") -> Scores:
        shared = np.minimum(matches.counts, matches.num_words)
        return _f_measure(shared, self._lengths.view, matches.num_words)

    def _scores(self, matches: "_Matches") -> Scores:
        lengths = _common_lengths(matches, np.arange(len(self)))
        return _f_measure(lengths, self._lengths.view, matches.num_words)

    def _find_similar(self, matches: "_Matches", threshold: float) -> tuple[int, float] | None:
        left = np.flatnonzero(self._bounds(matches) > threshold)
        scores = _f_measure(_common_lengths(matches, left), self._lengths.view[left], matches.num_words)
        if not len(left) or not scores.max() > threshold:
            return None
        best = np.flatnonzero(scores == scores.max())[-1]
        return int(left[best]), float(scores[best])

    def _compare(self, matches: "_Matches", num_nearest: int) -> Similarity:
        scores = self._scores(matches)
        nearest = [(int(index), float(scores[index])) for index in _highest(scores, num_nearest)]
        return Similarity(nearest=tuple(nearest), mean=float(scores.mean()) if len(scores) else 0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Matches:
    """The words of the pool that occur in a candidate of C words; W = ceil(C / 64), H of them in all.

    masks: uint64 [W, V], in which positions of the candidate each word of the vocabulary stands.
    hits: [H] their word ids, text after text.   counts: [P] how many each text has.
    """

    num_words: int
    masks: NDArray[np.uint64]
    hits: NDArray[np.int32]
    counts: Ints


class _Grown:
    """A flat array that grows at its end, in amortised constant time."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self._array = np.zeros(1024, dtype)
        self._size = 0

    @property
    def view(self) -> NDArray:
        return self._array[: self._size]

    def extend(self, values: Sequence[int]) -> None:
        size = self._size + len(values)
        if size > len(self._array):
            self._array = np.concatenate([self.view, np.zeros(size, self._array.dtype)])
        self._array[self._size : size] = values
        self._size = size


def _position_masks(ids: Sequence[int], *, num_ids: int) -> NDArray[np.uint64]:
    """For each word of the vocabulary, a bit for each position of `ids` where it stands: uint64 [W, V]."""
    masks = np.zeros((max(1, -(-len(ids) // _WORD_BITS)), num_ids), np.uint64)
    for position, word in enumerate(ids):
        if word >= 0:
            masks[position // _WORD_BITS, word] |= np.uint64(1 << position % _WORD_BITS)
    return masks


def _common_lengths(matches: _Matches, texts: Ints) -> Ints:
    """Length of the longest common subsequence of the candidate and each of `texts`: [len(texts)].

    Bit-parallel (Hyyrö 2004, "Bit-parallel LCS-length computation revisited"): a column of the table of lengths is kept
    as its differences, one bit a row, and a word of the text takes one addition. Texts are ordered by falling number of
    shared words, so that those which still have a k-th one are always the first.
    """
    starts = (np.cumsum(matches.counts) - matches.counts)[texts]
    counts = matches.counts[texts]
    most = int(counts.max(initial=0))
    falling = (most - counts).astype(np.int16 if most < 2**15 else np.int64)  # 16 bits sort in linear time
    order = np.argsort(falling, kind="stable")
    starts, falling = starts[order], falling[order]
    state = np.full((len(matches.masks), len(texts)), _ALL_BITS)
    for number in range(most):
        num_left = int(np.searchsorted(falling, most - number))  # those with more than `number`
        words = matches.hits[starts[:num_left] + number]
        _take_word(state[:, :num_left], matches.masks[:, words])
    lengths = np.zeros(len(texts), np.int64)
    lengths[order] = np.bitwise_count(~state).sum(axis=0)
    return lengths


def _take_word(state: NDArray[np.uint64], masks: NDArray[np.uint64]) -> None:
    """One step: state = (state + (state & mask)) | (state & ~mask), as one long number over the rows [W, texts]."""
    carry = np.uint64(0)
    for own, mask in zip(state, masks, strict=True):
        shared = own & mask
        partial = own + shared
        total = partial + carry
        carry = ((partial < own) | (total < partial)).astype(np.uint64)
        np.bitwise_or(total, own & ~mask, out=own)


def _f_measure(common: Ints, lengths: Ints, num_words: int) -> Scores:
    """rouge_score's F of a common length, in its order of operations, so that ties and the threshold agree."""
    f_measures = np.zeros(len(common))
    some = np.flatnonzero(common)
    precision, recall = common[some] / lengths[some], common[some] / max(num_words, 1)
    f_measures[some] = 2 * precision * recall / (precision + recall)
    return f_measures


def _highest(scores: Scores, number: int) -> Ints:
    """Indices of the highest scores, falling; of equals the later comes first."""
    number = min(number, len(scores))
    if number == 0:
        return np.zeros(0, np.int64)
    limit = np.partition(scores, len(scores) - number)[len(scores) - number]
    candidates = np.flatnonzero(scores >= limit)
    return candidates[np.argsort(scores[candidates], kind="stable")][::-1][:number]
