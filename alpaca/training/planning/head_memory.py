"""The bytes that the head takes while it computes the losses: a chunk of logits, and what is as large as its weight.

Legend: R target positions, D width, V vocabulary; all bytes are of one process.
"""

from alpaca.architecture.description import ModelDescription
from alpaca.training.model import head_loss
from alpaca.training.model.padding_free import chunk_rows
from alpaca.training.planning.workload import Setup, Workload


def logits_rows(shape: ModelDescription, setup: Setup, work: Workload) -> int:
    """The number of positions whose logits exist at the same time."""
    if not setup.padding_free:
        return work.max_targets
    if setup.sums_losses:
        return min(work.max_targets, head_loss.chunk_rows(shape.vocab_size, on_gpu=setup.on_gpu))
    return min(work.max_targets, chunk_rows(shape.vocab_size, trained=setup.has_trained_head))


def logits_bytes(shape: ModelDescription, setup: Setup, work: Workload) -> int:
    """The most bytes that computing the loss takes: for a chunk of logits (padding-free), or for all of them.

    Where losses are summed: logits in float32, and the probabilities that become their gradient, which on a CPU take
    their place; of products in bfloat16 logits and gradient also so, and the gradient of the head's weight, of a chunk
    and their sum; of bfloat16 weights that are multiplied in float32, the copies of weight and input. Else
    log_softmax's saved output, the gradient going into it and the one coming out, in float32; or the last of these
    beside the gradient of the head's weight before it is added up.
    """
    rows = logits_rows(shape, setup, work)
    if setup.sums_losses:
        if setup.is_wide:
            return 4 * rows * shape.vocab_size + 4 * shape.num_head + 4 * work.max_targets * shape.width
        in_bfloat16 = setup.compute_bytes == 2
        each = (8 if setup.on_gpu else 4) + (4 if in_bfloat16 else 0)
        scores = each * rows * shape.vocab_size
        return scores + (6 * shape.num_head if in_bfloat16 and setup.has_trained_head else 0)
    scores = 3 * 4 * rows * shape.vocab_size + (2 * rows * shape.vocab_size if setup.compute_bytes == 2 else 0)
    if not setup.has_trained_head:
        return scores
    converted = (setup.bf16 and not setup.fast) or setup.adds_up_in_float32
    weight_gradient = shape.num_head * (setup.gradient_bytes + (2 if converted else 0))
    return max(scores, setup.compute_bytes * rows * shape.vocab_size + weight_gradient)


def head_pass_bytes(shape: ModelDescription, setup: Setup) -> int:
    """Bytes in blocks as large as the head's weight that summing the losses takes and frees in each micro-batch.

    They are a bfloat16 head's: the summed gradient in float32, and one chunk's with the one that is handed on, or the
    copy that is multiplied in float32. A float32 head adds to the sum in place.
    """
    if not (setup.sums_losses and setup.has_trained_head and setup.compute_bytes == 2):
        return 0
    return 8 * shape.num_head
