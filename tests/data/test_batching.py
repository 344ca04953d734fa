"""Batches: the same examples in the same order on any layout of processes, each exactly once."""

import pytest
import torch

from alpaca.data.batching import collate, count_steps_per_epoch, epoch_permutation, split_step, step_examples
from alpaca.data.examples import MASKED_LABEL


def test_the_recipes_steps():
    assert count_steps_per_epoch(52_002, global_batch_size=128) == 406
    assert count_steps_per_epoch(100, global_batch_size=128) == 1
    assert count_steps_per_epoch(128, global_batch_size=128) == 1


def test_a_permutation_depends_on_seed_and_epoch_only():
    first = epoch_permutation(1000, seed=42, epoch=0)
    torch.manual_seed(7)
    epoch_permutation.cache_clear()
    assert torch.equal(first, epoch_permutation(1000, seed=42, epoch=0))
    assert sorted(first.tolist()) == list(range(1000))
    others = [epoch_permutation(1000, seed=seed, epoch=epoch) for seed, epoch in ((42, 1), (43, 0), (43, 1), (44, 0))]
    assert not any(torch.equal(left, right) for left in [first, *others] for right in others if left is not right)


def test_an_epochs_steps_are_its_permutation_cut_into_whole_batches():
    steps = [step_examples(50, global_batch_size=16, seed=1, step=step) for step in range(6)]
    assert torch.equal(torch.cat(steps[:3]), epoch_permutation(50, seed=1, epoch=0)[:48])
    assert torch.equal(torch.cat(steps[3:]), epoch_permutation(50, seed=1, epoch=1)[:48])


def test_a_set_smaller_than_the_batch_is_one_step_an_epoch():
    assert torch.equal(step_examples(10, global_batch_size=128, seed=1, step=2), epoch_permutation(10, seed=1, epoch=2))


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("size", [1, 3, 4, 5, 128, 200])
@pytest.mark.parametrize("num_examples", [128, 10, 1])
def test_every_example_of_a_step_goes_to_one_process(num_examples: int, num_processes: int, size: int):
    indices = torch.randperm(num_examples)
    split = [
        split_step(indices, rank=rank, num_processes=num_processes, micro_batch_size=size)
        for rank in range(num_processes)
    ]
    num_micro_steps = -(-num_examples // (num_processes * size))
    assert {len(micro_batches) for micro_batches in split} == {num_micro_steps}
    for step in range(num_micro_steps):
        for rank in range(num_processes):
            start = (step * num_processes + rank) * size
            assert torch.equal(split[rank][step], indices[start : start + size])


def test_collate_pads_on_the_right():
    long, short = torch.tensor([1, 5, 6, 2]), torch.tensor([1, 2])
    batch = collate([(long, long.clone()), (short, torch.tensor([MASKED_LABEL, 2]))], pad_id=2)
    assert batch.input_ids.tolist() == [[1, 5, 6, 2], [1, 2, 2, 2]]
    assert batch.labels.tolist() == [[1, 5, 6, 2], [-100, 2, -100, -100]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]  # an EOS that is also the pad id is seen


def test_no_examples_give_a_dummy_without_loss():
    batch = collate([], pad_id=3)
    logits = torch.randn(*batch.input_ids.shape, 7, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum"
    )
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0
    assert batch.attention_mask.all()
