"""Answers to a few prompts before and after training, for the report to show."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from alpaca.data.preferences import TrainingData
from alpaca.files.atomic import write_json
from alpaca.files.reading import read_json
from alpaca.text.tokenizer import Tokenizer
from alpaca.training.distributed import is_sharded
from alpaca.training.model import padding_free
from alpaca.training.model.layers import uncompiled

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 64
_FILE = "samples.json"
_RESPONSE = "### Response:"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt, the data's own answer, and the model's greedy ones (cut to 64 tokens)."""

    prompt: str
    reference: str
    before: str = ""
    after: str = ""


def choose_samples(data: TrainingData, tokenizer: Tokenizer, num_samples: int) -> list[Sample]:
    """The first examples' prompts and answers, from their tokens."""
    samples = []
    for index in range(min(num_samples, len(data))):
        text = tokenizer.decode(data.example(index)[0].tolist())
        prompt, mark, reference = text.partition(_RESPONSE)
        samples.append(Sample(prompt=prompt + mark, reference=reference))
    return samples


def answer_before(
    samples: list[Sample], model: nn.Module, tokenizer: Tokenizer, *, folder: Path, device: torch.device, resumed: bool
) -> list[Sample]:
    """The samples with the base model's answers; a resumed run takes those it gave at first, kept in samples.json."""
    path = folder / _FILE
    if resumed:
        old = {entry["prompt"]: entry["before"] for entry in read_json(path)["samples"]} if path.is_file() else {}
        return [replace(sample, before=old.get(sample.prompt, "")) for sample in samples]
    done = [
        replace(sample, before=text)
        for sample, text in zip(samples, generate(samples, model, tokenizer, device), strict=True)
    ]
    write_samples(folder, done)
    return done


def answer_after(
    samples: list[Sample], model: nn.Module, tokenizer: Tokenizer, *, folder: Path, device: torch.device
) -> list[Sample]:
    """The samples with the trained model's answers too."""
    done = [
        replace(sample, after=text)
        for sample, text in zip(samples, generate(samples, model, tokenizer, device), strict=True)
    ]
    write_samples(folder, done)
    return done


def write_samples(folder: Path, samples: list[Sample]) -> None:
    write_json(folder / _FILE, {"samples": [asdict(sample) for sample in samples]})


def generate(samples: list[Sample], model: nn.Module, tokenizer: Tokenizer, device: torch.device) -> list[str]:
    """Greedy answers of the model in memory, one prompt at a time. Draws no random numbers.

    Empty for a sharded model, whose parameters are nowhere whole. Too little memory, and a model that cannot generate,
    end no training: it is said, and the report goes without.
    """
    if is_sharded(model):
        return [""] * len(samples)
    with _answering(model):
        try:
            return [_generate_one(sample.prompt, model, tokenizer, device) for sample in samples]
        except (torch.OutOfMemoryError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
    if device.type == "cuda":  # out here, where the error no longer holds the tensors of its frames
        torch.cuda.empty_cache()
    logger.warning("no sample answers in the report: %s", reason)
    return [""] * len(samples)


def _generate_one(prompt: str, model: nn.Module, tokenizer: Tokenizer, device: torch.device) -> str:
    ids = torch.tensor([[*tokenizer.prefix_ids, *tokenizer.encode(prompt)]], device=device)
    # Frozen weights in bfloat16 meet an adapter in float32; the casts are not cached, so that no copy of all stays.
    low = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low, cache_enabled=False):
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_NEW_TOKENS, do_sample=False,
            use_cache=True, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.fill_id,
        )  # fmt: skip
    return tokenizer.decode(output[0, ids.shape[1] :].tolist()).strip()


@contextlib.contextmanager
def _answering(model: nn.Module) -> Iterator[None]:
    """Without gradients and dropout, and with an attention that has a cache."""
    packed, was_training = padding_free.is_enabled(model), model.training
    try:
        model.eval()
        if packed:
            model.set_attn_implementation("sdpa")
        with torch.no_grad(), uncompiled(model):
            yield
    finally:
        if packed:
            model.set_attn_implementation(padding_free.ATTENTION)
        model.train(was_training)
