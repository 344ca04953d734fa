"""The models of an evaluation: a fine-tune, and the base that it is held against."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from alpaca.errors import InputError
from alpaca.files.model_folders import is_adapter
from alpaca.files.places import open_weights
from alpaca.formats.hf.folder import find_fingerprint
from alpaca.serving.engine import Engine
from alpaca.serving.settings import ServerSettings
from alpaca.text.loading import load_tokenizer

TUNED, BASE = "fine-tune", "base"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model to evaluate.    is_adapter: its folder holds an adapter, which the server's settings find the base of."""

    role: str
    folder: Path
    is_adapter: bool

    def describe(self) -> dict[str, object]:
        """By name and digest: where it lies says nothing on another machine."""
        digest = None if self.is_adapter else find_fingerprint(self.folder)
        return {"name": self.folder.absolute().name, "adapter": self.is_adapter, "fingerprint": digest}


def find_candidates(weights: str, base: str | None) -> list[Candidate]:
    """The models, opened, with equal tokenizers. Raises InputError, MissingInput."""
    places = {TUNED: open_weights(weights, named="--weights")}
    if base is not None:
        places[BASE] = open_weights(base, named="--base")
    found = [Candidate(role=role, folder=place, is_adapter=is_adapter(place)) for role, place in places.items()]
    if base is not None and found[1].is_adapter:
        raise InputError(f"--base {base} is an adapter; the base must be a whole model")
    if base is not None and not found[0].is_adapter:
        require_same_tokenizer(*places.values())
    return found


def require_same_tokenizer(tuned: Path, base: Path) -> None:
    """Raise InputError where two models read texts as other tokens, whose losses could not be compared.

    A token that training added ([PAD]) makes no difference.
    """
    first, second = load_tokenizer(tuned), load_tokenizer(base)
    text = "Name three alpacas, 12 llamas and a café.\n\n### Response: ไทย"
    if first.base_size != second.base_size or first.encode(text) != second.encode(text):
        raise InputError(
            f"--weights and --base have different tokenizers ({first.base_size} and {second.base_size} tokens), so "
            f"their scores are of different tokens: {base} is not the base of {tuned}; evaluate them one by one"
        )


@contextlib.contextmanager
def opened(
    candidates: list[Candidate], settings: ServerSettings
) -> Iterator[Iterator[tuple[Candidate, Engine, str | None]]]:
    """Each model with an engine that has it and the adapter to use, one after the other.

    An adapter and its base are one engine: what is asked of it differs.
    """
    from alpaca.serving.loading import load_engine

    engine: Engine | None = None

    def each() -> Iterator[tuple[Candidate, Engine, str | None]]:
        nonlocal engine
        for candidate in candidates:
            shares = engine is not None and candidates[0].is_adapter
            if engine is not None and not shares:
                engine.close()
            if not shares:
                engine = load_engine(candidate.folder, dataclasses.replace(settings, weights=str(candidate.folder)))
            yield candidate, engine, engine.adapters.default if candidate.is_adapter else None

    try:
        yield each()
    finally:
        if engine is not None:
            engine.close()
