"""Training's models of every family that the engine computes: packed rows lose what each example loses alone."""

import pytest
import torch

from alpaca.architecture.description import ModelDescription
from alpaca.data.batching import pack
from alpaca.training.model import padding_free
from tests.serving.llama.families import MODELS, make


@pytest.mark.parametrize("name", [name for name in MODELS if "longrope" not in name])
@pytest.mark.fast_rows(9)
def test_packed_examples_lose_what_each_loses_alone(name, one_thread):
    model = make(name, torch.float32)
    examples = []
    for length in (40, 7, 25):
        ids = torch.randint(3, 120, (length,), generator=torch.Generator().manual_seed(length))
        examples.append((ids, torch.cat([torch.full((3,), -100), ids[3:]])))
    with torch.inference_mode():
        expected = sum(loss_of(model, *example) for example in examples)
    is_packed = padding_free.enable(model)
    described = ModelDescription.from_config(model.config.to_dict())
    assert is_packed != described.changes_scores
    if is_packed:
        found = padding_free.sum_packed_losses(model, pack(examples, pad_id=0), bf16=False)
        torch.testing.assert_close(found.item(), expected, rtol=1e-5, atol=1e-3)


def loss_of(model: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> float:
    logits = model(ids[None], use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum").item()
