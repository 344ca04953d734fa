"""The head's summed losses and their gradients, against torch's cross entropy over all logits."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from alpaca.training.model import head_loss

WIDTH, VOCAB = 16, 50


def random_head(
    rows: int, *, bias: bool, dtype: torch.dtype = torch.float32
) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(rows)
    tensors = [torch.randn(rows, WIDTH), torch.randn(VOCAB, WIDTH), *([torch.randn(VOCAB)] if bias else [])]
    return [tensor.to(dtype) for tensor in tensors], torch.randint(VOCAB, (rows,))


def gradients(loss_of, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    own = [tensor.clone().requires_grad_() for tensor in tensors]
    loss = loss_of(*own)
    (loss / 3).backward()
    return loss.detach(), [tensor.grad for tensor in own]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 21])
def test_losses_and_gradients_are_those_of_torch(rows, bias, smoothing, monkeypatch):
    monkeypatch.setattr(head_loss, "CPU_CHUNK_LOGITS", 7 * VOCAB)
    tensors, ids = random_head(rows, bias=bias)

    def expected(hidden, weight, bias=None):
        return cross_entropy(linear(hidden, weight, bias), ids, reduction="sum", label_smoothing=smoothing)

    def found(hidden, weight, bias=None):
        return head_loss.sum_target_losses(hidden, weight, bias, ids, smoothing)

    for ours, theirs in zip(gradients(found, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_frozen_head_gets_no_gradient_and_none_is_made():
    (hidden, weight), ids = random_head(9, bias=False)
    hidden.requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss = head_loss.sum_target_losses(hidden, weight, None, ids, 0.0)
    loss.backward()
    assert [tensor.shape for tensor in kept] == [hidden.shape]
    assert weight.grad is None
    with torch.no_grad():
        assert head_loss.sum_target_losses(hidden, weight, None, ids, 0.0).item() == loss.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_in_bfloat16_are_a_linear_layers(dtype):
    """By autocast from float32, and of weights in bfloat16."""
    tensors, ids = random_head(20, bias=False, dtype=dtype)
    tensors[1] /= 4

    def autocast(of):
        def run(hidden, weight):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
                return of(hidden, weight)

        return run

    found = gradients(autocast(lambda h, w: head_loss.sum_target_losses(h, w, None, ids, 0.0)), tensors)
    expected = gradients(autocast(lambda h, w: cross_entropy(linear(h, w).float(), ids, reduction="sum")), tensors)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert ours.dtype == theirs.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_nothing_to_learn_is_no_loss():
    (hidden, weight), ids = random_head(0, bias=False)
    hidden.requires_grad_()
    loss = head_loss.sum_target_losses(hidden, weight, None, ids, 0.0)
    loss.backward()
    assert (loss.item(), hidden.grad.shape) == (0.0, (0, WIDTH))


def test_positions_without_a_target_lose_and_teach_nothing():
    """A process that has no micro-batch left computes such ones."""
    (hidden, weight), ids = random_head(7, bias=False)
    ids[[0, 3]] = -100
    expected = gradients(lambda h, w: cross_entropy(linear(h, w), ids, reduction="sum"), [hidden, weight])
    found = gradients(lambda h, w: head_loss.sum_target_losses(h, w, None, ids, 0.0), [hidden, weight])
    torch.testing.assert_close(found, expected)
    nothing, without = gradients(
        lambda h, w: head_loss.sum_target_losses(h, w, None, torch.full_like(ids, -100), 0.0), [hidden, weight]
    )
    assert nothing == 0
    assert all(not gradient.any() for gradient in without)
