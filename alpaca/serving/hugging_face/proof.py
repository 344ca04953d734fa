"""Finds out at start in which way a transformers model may be decoded: by trying, with a few tokens.

Types whose cache does not hold all of their past, or whose prompts may not be cut, would give wrong text without a
word: Mamba's state is in no DynamicCache, GPT-1 has no cache at all. So each way is held against the plain truth: one
forward pass over the whole text for each token of each row. The first that agrees is taken.
"""

import functools
import logging
import time
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from alpaca.errors import NumbersOverflow, UnsupportedModel
from alpaca.serving.engine import is_device_lost
from alpaca.serving.hugging_face.decoding import MOST_PATIENT, PREFILL_TOKENS, QUICKEST, WAYS, Forward, Way

logger = logging.getLogger(__name__)

_NUM_TEXTS = 3
_NUM_ROWS, _NUM_STEPS = 2, 3
_FEW_TOKENS, _MANY_TOKENS = 24, PREFILL_TOKENS + 8  # of a prompt; the latter end soon after a piece as it is served
_CHEAP = {"cuda": 5e12, "cpu": 6e9}  # parameters times tokens of a forward pass that takes a tenth of a second or so
_SHOWN = 200  # characters of an error


def find_way(model: PreTrainedModel, ids: Sequence[int], *, prefix: Sequence[int] = (), max_context: int = 2048) -> Way:
    """The quickest way of decoding that gives what the model's plain forward passes give. Says in the log which.

    ids: those that the texts are drawn from.    prefix: what stands before every text.
    A way agrees where, at every place, its logits differ from the true ones by less than half of the digits of the
    model's precision: by the root of its epsilon, as a share of the logits' spread. Rounding takes a few digits, the
    more the deeper the model, but not half of them; a lost past changes the logits by as much as the past matters to
    them. Only where a rounding lets another expert be chosen can a right way differ by more, and that is chance: so a
    way is rejected once it has differed on each of three texts.
    Raises UnsupportedModel with the reason where no way is right, NumbersOverflow where the logits are no numbers.
    """
    start = time.monotonic()
    _check_inputs(model, ids)
    texts = [_Text(model, ids, prefix, max_context, seed=seed) for seed in range(_NUM_TEXTS)]
    _choose_attention(model, texts[0])
    why_not = _find_difference(model, QUICKEST, texts)
    way = QUICKEST if why_not is None else _find_other_way(model, texts)
    if why_not:
        logger.warning(
            "this %s model is served in a slower way than others: %s. The usual way %s",
            model.config.model_type, way.cost, why_not,
        )  # fmt: skip
    logger.info(
        "decoding was held against plain forward passes over %d tokens in %.1f s", texts[0].num_tokens,
        time.monotonic() - start,
    )  # fmt: skip
    return way


class _Text:
    """A prompt [1, P] and what follows it in two rows [2, S], drawn by a seed."""

    def __init__(
        self, model: PreTrainedModel, ids: Sequence[int], prefix: Sequence[int], max_context: int, *, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.num_tokens = min(_affordable_tokens(model), max_context - _NUM_STEPS)
        prefix = list(prefix)[: self.num_tokens - 1]
        at = torch.randint(len(ids), (self.num_tokens - len(prefix) + _NUM_ROWS * _NUM_STEPS,), generator=generator)
        drawn = torch.tensor(ids)[at]
        first, following = drawn[: -_NUM_ROWS * _NUM_STEPS], drawn[-_NUM_ROWS * _NUM_STEPS :]
        self.prompt = torch.cat([torch.tensor(prefix, dtype=first.dtype), first])[None].to(model.device)
        self.following = following.view(_NUM_ROWS, _NUM_STEPS).to(model.device)
        self._model = model

    @functools.cached_property
    def truth(self) -> list[torch.Tensor]:
        """Logits [R, V] after the prompt and after each step, the last step's of the second row alone."""
        forward = Forward(self._model)
        rows = [torch.cat([self.prompt, row[None]], dim=1) for row in self.following]
        found = [forward.last(self.prompt).repeat(_NUM_ROWS, 1)]
        for step in range(1, _NUM_STEPS + 1):
            going_on = rows if step < _NUM_STEPS else rows[1:]
            found.append(torch.cat([forward.last(row[:, : self.num_tokens + step]) for row in going_on]))
        return found

    def decode(self, way: Way) -> Iterator[torch.Tensor]:
        """The same logits in a way of decoding: of two rows, of which the first ends before the last step."""
        piece = PREFILL_TOKENS if self.num_tokens > PREFILL_TOKENS else max(1, self.num_tokens * 2 // 5)
        decoder = way.make(self._model, piece=piece)
        logits = decoder.begin(self.prompt, _NUM_ROWS, lambda: False)
        assert logits is not None, "nothing was cancelled"
        yield logits
        for step in range(_NUM_STEPS - 1):
            yield decoder.step(self.following[:, step])
        decoder.keep([1])
        yield decoder.step(self.following[1:, -1])


def _affordable_tokens(model: PreTrainedModel) -> int:
    """Tokens of a prompt that a large model reads in about a tenth of a second, and a small one in less."""
    budget = _CHEAP.get(model.device.type, _CHEAP["cpu"])
    return max(_FEW_TOKENS, min(_MANY_TOKENS, int(budget / max(1, model.num_parameters()))))


def _check_inputs(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Raise UnsupportedModel for types that answer at tokens which `generate` adds to the text (XLNet, XLM)."""
    text = torch.tensor([list(ids[:4])], device=model.device)
    try:
        prepared = model.prepare_inputs_for_generation(text, use_cache=False, is_first_iteration=True)
    except Exception:  # what a type's own code makes of it; the plain forward pass is what counts
        return
    if prepared.get("input_ids") is not None and prepared["input_ids"].shape != text.shape:
        raise UnsupportedModel(
            f"a model of type {model.config.model_type} cannot be served: it does not go on with a text but fills in "
            "tokens that are added to it, which this server does not do"
        )


@torch.inference_mode()
def _choose_attention(model: PreTrainedModel, text: _Text) -> None:
    """Let the model compute attention plainly where transformers' fused kind gives other logits.

    It leaves out what some types ask for: a cap of scores (VaultGemma), a mask of the type's own (Doge).
    """
    fused = getattr(model.config, "_attn_implementation", None)
    if fused in (None, "eager"):
        return
    _require_truth(text, model)
    try:
        model.set_attn_implementation("eager")
        plain = Forward(model).last(text.prompt)
    except Exception as error:
        _raise_if_fatal(error)
        model.set_attn_implementation(fused)
        return
    distance = _distance(text.truth[0][:1], plain)
    if distance < torch.finfo(model.dtype).eps ** 0.5 or not plain.isfinite().all():
        model.set_attn_implementation(fused)
        return
    del text.truth
    logger.warning(
        "this %s model computes attention plainly, slower and with more memory on long texts: transformers' %s kind "
        "gives other logits, by %.2g of them", model.config.model_type, fused, distance,
    )  # fmt: skip


@torch.inference_mode()
def _find_difference(model: PreTrainedModel, way: Way, texts: Sequence[_Text]) -> str | None:
    """Why a way is not right, in words that follow "The usual way"; None where it agrees on one of the texts."""
    reason = None
    for text in texts:
        truth = _require_truth(text, model)
        try:
            distance = max(_distance(got, want) for got, want in zip(text.decode(way), truth, strict=True))
        except Exception as error:
            _raise_if_fatal(error)
            return f"fails: {_in_short(error)}"
        if distance < torch.finfo(model.dtype).eps ** 0.5:
            return None
        reason = reason or f"gives other logits than one forward pass over the whole text, by {distance:.2g} of them"
    return reason


@torch.inference_mode()
def _find_other_way(model: PreTrainedModel, texts: Sequence[_Text]) -> Way:
    """The first way after the usual one that agrees. Raises UnsupportedModel where the model repeats nothing."""
    again = Forward(model).last(texts[0].prompt)
    if not _distance(again, texts[0].truth[0][:1]) < torch.finfo(model.dtype).eps ** 0.5:
        raise UnsupportedModel(
            f"this {model.config.model_type} model cannot be served: the same forward pass gives other logits each "
            "time (a random hash, say); its config may have a seed for it"
        )
    return next((way for way in WAYS[1:-1] if _find_difference(model, way, texts) is None), MOST_PATIENT)


def _require_truth(text: _Text, model: PreTrainedModel) -> list[torch.Tensor]:
    """The true logits. Raises UnsupportedModel, NumbersOverflow where there are none."""
    try:
        truth = text.truth
    except Exception as error:
        _raise_if_fatal(error)
        raise UnsupportedModel(
            f"a model of type {model.config.model_type} cannot be served: its forward pass fails on token ids alone, "
            f"as types do that need a picture, sound or another text besides: {_in_short(error)}"
        ) from error
    if any(logits.isnan().any() for logits in truth):
        raise NumbersOverflow(
            f"the model computes what is no number (NaN), as {model.dtype}: its weights are damaged, or the precision "
            "is too narrow; try ALPACA_DTYPE bfloat16 or float32"
        )
    return truth


def _distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest distance of two rows of logits [R, V], as a share of the spread of the second; infinite for NaN."""
    counts = want.isfinite()
    if got.shape != want.shape or not bool((got.isfinite() == counts).all()):
        return float("inf")
    got, want = got.float().masked_fill(~counts, 0), want.float().masked_fill(~counts, 0)
    spread = (want - want.mean(dim=-1, keepdim=True)).norm(dim=-1)
    return float(((got - want).norm(dim=-1) / spread.clamp(min=torch.finfo(torch.float32).tiny)).max())


def _raise_if_fatal(error: Exception) -> None:
    """Let errors through that say nothing about the way: memory that does not suffice, a lost device."""
    if isinstance(error, torch.OutOfMemoryError) or is_device_lost(error):
        raise error


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_SHOWN]
