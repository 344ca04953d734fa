"""Many questions to an engine at once, so that its whole batch is in use: how likely texts are, and what it answers."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from alpaca.serving.detokenize import CompletionText
from alpaca.serving.engine import Engine, Generation, TokenEvent, TokenScore, advance
from alpaca.serving.request import Request

_AHEAD = 512  # requests that are handed to the engine before the first of them is read: more than run at once
_READERS = 64  # answers that are read at once, so that each ends where its stop text comes
GREEDY = dict(
    n=1, min_new_tokens=0, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0,
    presence_penalty=0.0, frequency_penalty=0.0, seed=0, num_beams=1,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """Tokens to be scored: the last `num_scored` of `ids`."""

    ids: Sequence[int]
    num_scored: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What was generated: its ids without the one that ended it, its text up to a stop text, and why it ended."""

    ids: list[int]
    text: str
    finish_reason: str


def score_all(engine: Engine, targets: Iterable[Target], *, adapter: str | None) -> Iterator[list[TokenScore]]:
    """The scores of each target's last tokens, in order, each with the most likely token in its place.

    What stands before them is computed once where targets that follow each other begin alike (`share_prefixes`).
    """
    begun: deque[tuple[Generation, int]] = deque()
    try:
        for target in targets:
            begun.append((engine.submit(_scoring(target, adapter)), target.num_scored))
            if len(begun) >= _AHEAD:
                yield _read_scores(*begun.popleft())
        while begun:
            yield _read_scores(*begun.popleft())
    finally:
        for generation, _ in begun:
            generation.cancel()


def _scoring(target: Target, adapter: str | None) -> Request:
    return Request(
        **GREEDY,
        prompt_ids=tuple(target.ids),
        max_new_tokens=0,
        echo=True,
        logprobs=1,
        scored_from=len(target.ids) - target.num_scored - 1,
        adapter=adapter,
        reads_along=False,
    )


def _read_scores(generation: Generation, num_scored: int) -> list[TokenScore]:
    for _ in generation.batches():
        pass
    assert len(generation.prompt_scores) == num_scored
    return generation.prompt_scores


def share_prefixes(contexts: Sequence[Sequence[int]], *, group: int = 64) -> list[int]:
    """The order in which to ask, as places in `contexts`, so that what begins alike is found in the prefix cache.

    The cache knows a prompt once its step is launched. So of the first `group` different contexts one each comes first,
    then all others with the same contexts, then the next ones.
    """
    places: dict[tuple[int, ...], list[int]] = {}
    for place in sorted(range(len(contexts)), key=lambda place: contexts[place]):
        places.setdefault(tuple(contexts[place]), []).append(place)
    alike, order = list(places.values()), []
    for start in range(0, len(alike), group):
        some = alike[start : start + group]
        order += [found[0] for found in some]
        order += [place for found in some for place in found[1:]]
    return order


def answer_all(engine: Engine, requests: Sequence[tuple[Request, tuple[str, ...], bool]]) -> Iterator[Answer]:
    """The answer to each (request, its stop texts, whether its text begins with its first word), in order."""
    readers = ThreadPoolExecutor(_READERS)
    try:
        yield from readers.map(lambda asked: _answer(engine, *asked), requests)
    finally:
        readers.shutdown(wait=False, cancel_futures=True)  # whoever closes the engine ends those that run


def _answer(engine: Engine, request: Request, stop: tuple[str, ...], strips: bool) -> Answer:
    text = CompletionText(engine.tokenizer, request.prompt_ids, stop=stop, strip_leading=strips)
    generation = engine.submit(request)
    ids: list[int] = []
    pieces: list[str] = []
    for event in generation.events():
        if isinstance(event, TokenEvent) and not text.stopped:
            ids.append(event.token_id)
        pieces.append(advance(generation, text, event))
    return Answer(ids=ids, text="".join(pieces), finish_reason=str(generation.finish_reasons[0]))
