"""The bytes that a training run takes, by part and at its largest moment, and those of its checkpoints.

Memory is counted, not guessed: the tensors that autograd keeps for a decoder layer follow from its operations
(transformers' LlamaDecoderLayer), and the tests hold that count against the tensors that autograd does keep, byte for
byte. What is not derived is a constant below, and named as one.

Legend: N packed tokens of a micro-batch, R target positions, D width, F width of the feed-forward layer, V vocabulary,
Q = heads * head width, K = key/value heads * head width, L layers; all bytes are of one process.
"""

import dataclasses
import os
from dataclasses import dataclass

from alpaca.architecture.description import ModelDescription
from alpaca.memory import CUDA_CONTEXT_BYTES
from alpaca.training.model import head_loss
from alpaca.training.model.optimizers.rounding import CHUNK_ELEMENTS
from alpaca.training.model.padding_free import chunk_rows
from alpaca.training.planning.trained import count_adapter, count_trained, largest_trained, moments_bytes
from alpaca.training.planning.workload import Setup, Workload

# On a CPU glibc gives freed blocks back to the system only from 32 MiB on; smaller ones stay in a heap with holes. So
# the process holds more than its live tensors: about as much again as a backward pass allocates and frees (0.8 to 1.1
# times that, measured on models of 5 and 20 M parameters), or with adapters, whose blocks are many and small, as a
# forward pass keeps. With MALLOC_MMAP_THRESHOLD_=131072 in the environment it is nothing, but steps may take longer.
_HEAP_BLOCK = 32 << 20
_PROCESS_BYTES = 6 << 20  # Python objects and late imports; measured too
_PEFT_BYTES = 50 << 20  # what importing PEFT, with bitsandbytes, adds to the process; measured too
_CHUNKS = 16  # of the stochastic AdamW's float32 and int32 temporaries, at the most
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a code, an 8-bit scale for 64, a float32 scale for 256 of those


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device by part, and their peak. host_bytes: what offloading keeps in main memory instead."""

    weights_bytes: int
    copies_bytes: int  # of weights: autocast's in bfloat16, FSDP's gathered layers, a dequantized matrix
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    working_bytes: int  # temporaries of one layer's backward pass, or of the optimizer
    overhead_bytes: int  # CUDA's context; on a CPU what heap and Python hold besides the tensors (empirical)
    peak_bytes: int
    peak_moment: str
    host_bytes: int = 0


def count_memory(shape: ModelDescription, setup: Setup, work: Workload) -> Memory:
    """The bytes of each part, and the largest sum of parts that exist at the same moment.

    The moments are: the loss (all saved activations and a chunk of logits), the backward pass (gradients grow while
    activations are freed; with several micro-batches all gradients are there from the second one on) and the step of
    AdamW. Recomputed layers are the first ones, so the other layers' activations are gone when theirs are made again.
    """
    weights, gradients = weights_bytes(shape, setup), gradient_bytes(shape, setup)
    accumulated = accumulated_bytes(shape, setup) if work.num_micro_batches > 1 else 0
    optimizer = moments_bytes(shape, setup)
    saved, layer = saved_bytes(shape, setup, work), layer_bytes(shape, setup, work)
    recomputed = recomputed_bytes(shape, setup, work) + layer if setup.num_checkpointed else 0
    logits, backward = logits_bytes(shape, setup, work), backward_bytes(shape, setup, work)
    copies = copies_bytes(shape, setup)
    overhead = overhead_bytes(
        shape, setup, work, transient_bytes=layer + backward + gradients if setup.method == "full" else saved,
        logits_bytes=logits,
    )  # fmt: skip
    host = 0
    if setup.offload and setup.on_gpu:
        host, weights, optimizer, gradients = weights + optimizer + gradients, 0, 0, 0
    if setup.optimizer.startswith("paged") and setup.on_gpu:
        host, optimizer = host + optimizer, 0
    kept, above = weights + optimizer + overhead, 1 - setup.num_checkpointed / shape.num_layers
    passes = (
        accumulated + copies + saved,  # before the last layer's backward pass
        max(accumulated, int(above * gradients)) + copies + recomputed,  # in the last of those recomputed
        max(accumulated, gradients),  # in the first layer
    )
    moments = {
        "loss": kept + accumulated + copies + saved + logits,
        "backward": kept + max(passes) + backward,
        "optimizer step": kept + gradients + step_bytes(shape, setup),
    }
    moment = max(moments, key=moments.__getitem__)
    working = step_bytes(shape, setup) if moment == "optimizer step" else backward
    return Memory(
        weights_bytes=weights, copies_bytes=copies, gradients_bytes=max(gradients, accumulated),
        optimizer_bytes=optimizer, activations_bytes=max(saved, recomputed), logits_bytes=logits,
        working_bytes=working, overhead_bytes=overhead,
        peak_bytes=moments[moment], peak_moment=moment, host_bytes=host,
    )  # fmt: skip


def weights_bytes(shape: ModelDescription, setup: Setup) -> int:
    """One process's share of the weights: float32 if trained (fast: bfloat16), else in the dtype of products."""
    if setup.method == "full":
        return setup.state_bytes * shape.num_parameters // setup.num_shards
    per_linear = {"none": setup.compute_bytes, "nf4": _NF4_BYTES, "int8": 1 + 4 / shape.width}[setup.base_quantization]
    frozen = shape.num_linear * per_linear + (shape.num_parameters - shape.num_linear) * setup.compute_bytes
    starts = count_adapter(shape, setup) if setup.starts_from_base else 0
    return int(frozen + 4 * (count_trained(shape, setup) + starts)) // setup.num_shards


def gradient_bytes(shape: ModelDescription, setup: Setup) -> int:
    """The summed gradients that the optimizer uses: whole ones, or this process's shard."""
    return setup.gradient_bytes * count_trained(shape, setup) // setup.num_shards


def accumulated_bytes(shape: ModelDescription, setup: Setup) -> int:
    """Gradients that stay on the device between micro-batches: whole ones, or shards unless they are offloaded."""
    if setup.sharded and setup.whole_gradients:
        return 4 * count_trained(shape, setup)
    return 0 if setup.offload and setup.on_gpu else gradient_bytes(shape, setup)


def bytes_for_gradients(shape: ModelDescription, setup: Setup, memory_bytes: int) -> int:
    """What model, optimizer and CUDA's context leave free, by which `keeps_gradients_whole` decides."""
    context = CUDA_CONTEXT_BYTES if setup.on_gpu else 0
    if setup.offload and setup.on_gpu:
        return memory_bytes - context
    return memory_bytes - context - weights_bytes(shape, setup) - moments_bytes(shape, setup)


def overhead_bytes(
    shape: ModelDescription, setup: Setup, work: Workload, *, transient_bytes: int, logits_bytes: int
) -> int:
    """Memory besides the tensors: CUDA's context on a GPU; on a CPU the heap's holes, where blocks are small."""
    if setup.on_gpu:
        return CUDA_CONTEXT_BYTES
    limit = int(os.environ.get("MALLOC_MMAP_THRESHOLD_", _HEAP_BLOCK))
    in_heap = _PROCESS_BYTES + (_PEFT_BYTES if setup.method != "full" else 0)
    if work.max_tokens * shape.ffn_width * setup.compute_bytes < limit:
        in_heap += transient_bytes
    if 4 * _logits_rows(shape, setup, work) * shape.vocab_size < limit:
        in_heap += logits_bytes
    return in_heap


def _logits_rows(shape: ModelDescription, setup: Setup, work: Workload) -> int:
    """The number of positions whose logits exist at the same time."""
    if not setup.padding_free:
        return work.max_targets
    if setup.sums_losses:
        return min(work.max_targets, head_loss.chunk_rows(shape.vocab_size, on_gpu=setup.on_gpu))
    return min(work.max_targets, chunk_rows(shape.vocab_size, trained=setup.has_trained_head))


def copies_bytes(shape: ModelDescription, setup: Setup) -> int:
    """Bytes of copies that are made of the weights.

    Autocast keeps a bfloat16 copy of each float32 matrix until the forward pass ends, and the graph keeps it on. FSDP
    gathers embeddings and head for the whole pass, and two layers at a time, or all without resharding. A quantized
    matrix is dequantized for its product.
    """
    largest = max(rows * columns for rows, columns in shape.linears.values())
    dequantized = largest * setup.compute_bytes if setup.base_quantization != "none" else 0
    if setup.sharded:
        per_layer = shape.num_linear // shape.num_layers + shape.num_layer_vectors
        num_gathered = min(2, shape.num_layers) if setup.reshard else shape.num_layers
        return (shape.num_outside + num_gathered * per_layer) * setup.compute_bytes + dequantized
    if setup.bf16 and setup.method == "full" and not setup.fast:
        return (shape.num_linear + shape.num_head) * 2
    return dequantized


def layer_bytes_per_token(shape: ModelDescription, setup: Setup) -> int:
    """Bytes that autograd keeps of one decoder layer for each of N tokens, operation by operation.

    Norms: see `_norm_bytes_per_token`.
    Inputs of q, k, v and of gate and up: one tensor where it has the products' dtype; under autocast from float32 each
    matrix has a cast of its own. Attention: q, k, v, its output, a float32 log-sum per head, and o_proj's input, which
    the CPU's kernel needs as a copy; on a GPU grouped keys and values are repeated. Feed-forward: gate, its
    activation, up, and their product (down_proj's input). Inputs of frozen matrices are not kept; an adapter keeps
    its input (with the mask of dropout) and its narrow product.
    """
    c, s = setup.compute_bytes, setup.stream_bytes
    full = setup.method == "full"
    total = _norm_bytes_per_token(shape, setup)
    for names in shape.family.input_groups:
        trained = [name for name in names if setup.trains(name)]
        columns = shape.linears[names[0]][1]
        casts_each = s != c if full else (c == 2 or setup.lora_dropout > 0)
        own_casts = casts_each and (not full or names[0] in shape.family.reads_stream)
        total += c * columns * (len(trained) if own_casts else min(1, len(trained)))
        if not full:
            mask = (1 if setup.on_gpu else c) if setup.lora_dropout else 0  # a CPU keeps it as factors
            total += len(trained) * (setup.lora_rank * c + columns * mask)
    keys = shape.query_width if setup.on_gpu else shape.kv_width
    in_attention = 4 if setup.fast and not setup.on_gpu and setup.padding_free else c  # float32 on a CPU
    total += in_attention * (2 * shape.query_width + 2 * keys) + 4 * shape.num_heads
    if full and setup.on_gpu:
        total -= c * shape.query_width  # o_proj's input is attention's output itself
    inner = {"llama": 3, "opt": 0 if full else 1, "bloom": 1}[shape.family.block]  # ReLU's result is down_proj's input
    return total + inner * c * shape.ffn_width


def _norm_bytes_per_token(shape: ModelDescription, setup: Setup) -> int:
    """Of each norm of a layer its input in float32, the reciprocal root, the normalized row where its scale is trained.

    LayerNorm is one operation: its input, mean and deviation.
    """
    s, full, family = setup.stream_bytes, setup.method == "full", shape.family
    if family.block != "llama":
        return 2 * (s * shape.width + 8)
    columns, num_roots = len(family.norms) * shape.width, len(family.norms)
    if family.head_norms:
        columns += shape.query_width + shape.kv_width
        num_roots += 2 if family.head_norms == "whole" else shape.num_heads + shape.num_kv_heads
    scaled = 4 if family.scales_wide else s
    return 4 * columns + 4 * num_roots + (scaled * columns if full else 0)


def layer_bytes(shape: ModelDescription, setup: Setup, work: Workload) -> int:
    """Bytes that autograd keeps of one layer."""
    scores = 3 * setup.compute_bytes * shape.num_heads * work.max_length if shape.family.keeps_scores else 0
    return work.max_tokens * (layer_bytes_per_token(shape, setup) + scores)


def saved_bytes(shape: ModelDescription, setup: Setup, work: Workload) -> int:
    """Bytes that the forward pass saves: all layers (of recomputed ones the input), the last norm, and of the head its
    input or, where it sums losses, the gradients of that and of its weight.
    """
    num_kept = shape.num_layers - setup.num_checkpointed
    return recomputed_bytes(shape, setup, work) + num_kept * layer_bytes(shape, setup, work)


def recomputed_bytes(shape: ModelDescription, setup: Setup, work: Workload) -> int:
    """Bytes that are still saved when the first recomputed layer is made again: by then the other layers are freed."""
    s, width = setup.stream_bytes, shape.width
    full = setup.method == "full"
    rotary = 2 * s * (shape.query_width // shape.num_heads)
    per_token = 4 * width + 4 + (s * width if full and shape.family.block == "llama" else 0) + rotary + 16
    outside = work.max_tokens * per_token + work.max_targets * (s * width + 8)
    if setup.sums_losses and setup.has_trained_head:
        outside += (setup.state_bytes if full else 4) * shape.num_head
    return outside + setup.num_checkpointed * work.max_tokens * s * width


def logits_bytes(shape: ModelDescription, setup: Setup, work: Workload) -> int:
    """The most bytes that computing the loss takes: for a chunk of logits (padding-free), or for all of them.

    Where losses are summed: logits in float32, and the probabilities that become their gradient, which on a CPU take
    their place; of products in bfloat16 logits and gradient also so, and the gradient of the head's weight, of a chunk
    and their sum. Else log_softmax's saved output, the gradient going into it and the one coming out, in float32; or
    the last of these beside the gradient of the head's weight before it is added up.
    """
    rows = _logits_rows(shape, setup, work)
    if setup.sums_losses:
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


def backward_bytes(shape: ModelDescription, setup: Setup, work: Workload) -> int:
    """Gradients alive inside one layer: two of feed-forward width, three of the residual stream's, and one matrix's.

    FSDP holds the gradients of a layer, and of all outside the layers, whole before it reduces them.
    """
    per_token = 2 * setup.compute_bytes * shape.ffn_width + 3 * setup.stream_bytes * shape.width
    whole = 0
    if setup.method == "full" and setup.sharded:
        whole = 4 * (shape.num_linear // shape.num_layers + shape.num_outside)
    elif setup.trains_embedding or setup.trains_head:
        whole = 4 * shape.num_head
    elif setup.method == "full":
        each = setup.gradient_bytes + (2 if setup.adds_up_in_float32 else 0)  # as it comes, and converted
        whole = each * max(rows * columns for rows, columns in shape.linears.values())
    return work.max_tokens * per_token + whole


def step_bytes(shape: ModelDescription, setup: Setup) -> int:
    """AdamW's temporaries: none when it is fused, else two of the size of the largest parameter.

    Adafactor has three in float32; Muon the momentum's in float32 and four in bfloat16; 8-bit AdamW on a CPU the two
    moments in float32 with two more. With fast numerics AdamW works through chunks, and the largest temporary is the
    float32 copy of a gradient that a CPU makes to take its norm.
    """
    if setup.optimizer != "adamw_torch":
        each = {"adafactor": 12, "muon": 12}.get(setup.optimizer, 0 if setup.on_gpu else 16)
        return each * largest_trained(shape, setup)
    if setup.on_gpu and not setup.offload:
        return 0
    if setup.method != "full":
        return 8 * shape.num_head if setup.trains_embedding or setup.trains_head else 0
    if setup.fast:
        norm = 0 if setup.adds_up_in_float32 else 4 * shape.num_head // setup.num_shards
        return norm + _CHUNKS * 4 * CHUNK_ELEMENTS
    return 2 * 4 * shape.num_head // setup.num_shards


def checkpoint_bytes(shape: ModelDescription, setup: Setup) -> int:
    """Bytes of a checkpoint: the trained weights and the optimizer's moments."""
    alone = dataclasses.replace(setup, num_processes=1)
    starts = 4 * count_adapter(shape, setup) if setup.starts_from_base else 0
    return setup.state_bytes * count_trained(shape, setup) + moments_bytes(shape, alone) + starts
