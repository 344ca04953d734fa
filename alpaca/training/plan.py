"""What a run will take, worked out before a weight is loaded: parameters, steps, memory by part, disk, time.

    python train.py --model_name_or_path weights --data_path data.json --plan_only --plan_memory 80GB --plan_gpus 4

needs neither the GPUs nor the weights: config.json, the tokenizer and the data are enough. `train` makes the same plan
for the device it finds and refuses a GPU that is too small.

Memory is counted, not guessed: the tensors that autograd keeps for a decoder layer follow from its operations
(transformers' LlamaDecoderLayer), and the tests hold that count against the tensors that autograd does keep, byte for
byte. What is not derived is a constant below, and named as one. Figures of GPUs are not measured yet.

Legend: N packed tokens of a micro-batch, R target positions, D width, F width of the feed-forward layer, V vocabulary,
Q = heads * head width, K = key/value heads * head width, L layers; all bytes are of one process.
"""

import dataclasses
import functools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from alpaca.data.batching import count_steps_per_epoch, split_step, split_step_by_tokens, step_examples
from alpaca.data.examples import EncodedDataset, encode_examples, read_examples
from alpaca.errors import InputError, NotEnoughSpace
from alpaca.hf_files import parse_size, read_json
from alpaca.memory import CUDA_CONTEXT_BYTES, free_memory
from alpaca.training.config import (
    ADAPTER_DEFAULTS,
    ALL_LINEAR,
    TrainConfig,
    count_held_out,
    count_steps,
    parse_fsdp,
    resolve,
    target_names,
)
from alpaca.training.model import Base, choose_save_dtype, open_base
from alpaca.training.padding_free import CHUNK_LOGITS

logger = logging.getLogger(__name__)

CARDS = {  # by what they are sold as: dense bf16 FLOP/s (of a 4090, an A100, an A100, an H200)
    "24GB": 165e12, "40GB": 312e12, "80GB": 312e12, "141GB": 989e12,
}  # fmt: skip
_CARD_BYTES = {"24GB": 23.5, "40GB": 39.4, "80GB": 79.1, "141GB": 139.5}  # GiB that such a card shows, about
GPU_COUNTS = (1, 2, 4, 8)
DEVICE_PEAKS = {  # dense bf16 FLOP/s by a word of the device's name, from NVIDIA's data sheets
    "B200": 2250e12, "H200": 989e12, "H100 PCIE": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "L4": 121e12, "A10G": 70e12, "A10": 125e12, "A6000": 155e12, "4090": 165e12, "3090": 71e12,
}  # fmt: skip
# Empirical, and assumptions.
_GPU_RESERVE = 0.03  # of a card, lost to the allocator's fragments; assumed
_ASSUMED_SHARE = 0.4  # of a device's peak that training reaches; published runs: 0.14 (Stanford) to 0.68 (fms-fsdp)
_MOST_SIMULATED = 500  # steps whose micro-batches are laid out to find the largest
# On a CPU glibc gives freed blocks back to the system only from 32 MiB on; smaller ones stay in a heap with holes. Held
# besides what lives is about once what comes and goes in a backward pass (0.8 to 1.1 times, measured on models of 5 and
# 20 M parameters). With MALLOC_MMAP_THRESHOLD_=131072 in the environment it is nothing, and steps may take longer.
_HEAP_BLOCK = 32 << 20
_PROCESS_BYTES = 6 << 20  # Python objects and late imports; measured too
_PEFT_BYTES = 50 << 20  # what importing PEFT, with bitsandbytes, adds to the process; measured too
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a code, an 8-bit scale for 64, a float32 scale for 256 of those


# The model ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a model. linears: (rows, columns) of a layer's matrices by name; the rest as counts."""

    family: str
    width: int
    ffn_width: int
    num_layers: int
    num_heads: int
    query_width: int
    kv_width: int
    vocab_size: int
    linears: Mapping[str, tuple[int, int]]
    num_layer_vectors: int  # parameters of a layer that are no matrices
    num_outside: int  # parameters outside the layers, the head's among them
    eager_attention: bool = False  # keeps the scores

    @property
    def num_linear(self) -> int:
        """Parameters in the layers' matrices: those that are quantized."""
        return self.num_layers * sum(rows * columns for rows, columns in self.linears.values())

    @property
    def num_parameters(self) -> int:
        return self.num_linear + self.num_layers * self.num_layer_vectors + self.num_outside

    @property
    def num_head(self) -> int:
        return self.vocab_size * self.width

    def num_adapter(self, *, rank: int, targets: tuple[str, ...], dora: bool) -> int:
        """Parameters of LoRA's two matrices, rank x columns and rows x rank, on each target; DoRA's magnitudes."""
        sizes = [size for name, size in self.linears.items() if name in targets]
        return self.num_layers * sum(rank * (rows + columns) + rows * dora for rows, columns in sizes)


def read_shape(folder: Path, *, num_tokens: int = 0) -> Shape:
    """The sizes config.json names, the vocabulary grown to `num_tokens`. Raises InputError for an unknown kind."""
    config = read_json(folder / "config.json")
    read = {"llama": _llama_shape, "opt": _opt_shape, "bloom": _bloom_shape}.get(str(config.get("model_type")))
    if read is None and "intermediate_size" in config:
        read = _llama_shape
    try:
        return read(config, max(num_tokens, config["vocab_size"]))
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{folder / 'config.json'}: no plan for model_type {config.get('model_type')!r} ({error}); expected the "
            "sizes of a LLaMA, OPT or BLOOM"
        ) from error


def _llama_shape(config: dict, vocab: int) -> Shape:
    width, ffn, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_width = config.get("head_dim") or width // heads
    query, kv = heads * head_width, (config.get("num_key_value_heads") or heads) * head_width
    biases = (query + 2 * kv + width) * bool(config.get("attention_bias")) + (2 * ffn + width) * bool(
        config.get("mlp_bias")
    )
    return Shape(
        family="llama", width=width, ffn_width=ffn, num_layers=config["num_hidden_layers"], num_heads=heads,
        query_width=query, kv_width=kv, vocab_size=vocab, num_layer_vectors=2 * width + biases,
        linears={
            "q_proj": (query, width), "k_proj": (kv, width), "v_proj": (kv, width), "o_proj": (width, query),
            "gate_proj": (ffn, width), "up_proj": (ffn, width), "down_proj": (width, ffn),
        },
        num_outside=vocab * width * (1 if config.get("tie_word_embeddings") else 2) + width,
    )  # fmt: skip


def _opt_shape(config: dict, vocab: int) -> Shape:
    width, ffn = config["hidden_size"], config["ffn_dim"]
    embedded = config.get("word_embed_proj_dim", width)
    outside = vocab * embedded + (config["max_position_embeddings"] + 2) * width
    outside += 2 * width * embedded if embedded != width else 0
    outside += 2 * width if config.get("do_layer_norm_before", True) else 0
    square = dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), (width, width))
    return Shape(
        family="opt", width=width, ffn_width=ffn, num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"], query_width=width, kv_width=width, vocab_size=vocab,
        linears={**square, "fc1": (ffn, width), "fc2": (width, ffn)},
        num_layer_vectors=4 * width + ffn + width + 4 * width, num_outside=outside,
    )  # fmt: skip


def _bloom_shape(config: dict, vocab: int) -> Shape:
    width = config.get("hidden_size") or config["n_embed"]
    return Shape(
        family="bloom", width=width, ffn_width=4 * width,
        num_layers=config.get("n_layer") or config["num_hidden_layers"],
        num_heads=config.get("n_head") or config["num_attention_heads"], query_width=width, kv_width=width,
        vocab_size=vocab, eager_attention=True,
        linears={
            "query_key_value": (3 * width, width), "dense": (width, width),
            "dense_h_to_4h": (4 * width, width), "dense_4h_to_h": (width, 4 * width),
        },
        num_layer_vectors=3 * width + width + 4 * width + width + 4 * width, num_outside=vocab * width + 4 * width,
    )  # fmt: skip


# The run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What of a configuration decides memory and time."""

    method: str = "full"
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()
    lora_dropout: float = 0.0
    dora: bool = False
    base_quantization: str = "none"
    micro_batch_size: int = 4
    global_batch_size: int = 128
    max_length: int = 512
    gradient_checkpointing: bool = False
    padding_free: bool = True
    offload: bool = False
    reshard: bool = True
    bf16: bool = True
    num_processes: int = 1
    on_gpu: bool = True

    @property
    def sharded(self) -> bool:
        return self.num_processes > 1 or (self.offload and self.on_gpu)

    @property
    def compute_bytes(self) -> int:
        """Of an element in matrix products."""
        return 2 if self.bf16 else 4

    @property
    def stream_bytes(self) -> int:
        """Of an element of the residual stream: it has the embeddings' dtype, float32 under autocast alone."""
        return 2 if self.bf16 and (self.sharded or self.method != "full") else 4

    def trains(self, linear: str) -> bool:
        """Whether a gradient of this matrix, or of an adapter on it, needs the matrix's input."""
        return self.method == "full" or linear in self.lora_targets


def make_setup(config: TrainConfig, shape: Shape, *, num_processes: int, on_gpu: bool) -> Setup:
    """The setup of a resolved configuration."""
    sharding, full = parse_fsdp(config.fsdp), config.method == "full"
    return Setup(
        method=config.method,
        lora_rank=config.lora_r or 0,
        lora_targets=() if full else _targets(config.lora_target_modules, shape),
        lora_dropout=config.lora_dropout or 0.0,
        dora=config.use_dora,
        base_quantization=config.base_quantization or "none",
        micro_batch_size=config.per_device_train_batch_size,
        global_batch_size=config.global_batch_size,
        max_length=config.model_max_length,
        gradient_checkpointing=config.gradient_checkpointing,
        padding_free=config.padding_free and not shape.eager_attention,
        offload=sharding.offload,
        reshard=sharding.reshard_after_forward,
        bf16=config.bf16,
        num_processes=num_processes,
        on_gpu=on_gpu,
    )


def _targets(asked: str | None, shape: Shape) -> tuple[str, ...]:
    """The layers' matrices that get an adapter; one that is not there is refused where the model is known."""
    if asked == ALL_LINEAR:
        return tuple(shape.linears)
    wanted = target_names(asked) if asked else ["q_proj", "v_proj", "query_key_value"]
    return tuple(name for name in shape.linears if name in wanted)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What there is to do. The largest micro-batch is that of the steps that were laid out."""

    num_examples: int
    num_tokens: int  # of the whole run
    num_targets: int
    num_steps: int
    num_micro_batches: int  # of a step and process, at the most
    max_tokens: int  # N of the largest micro-batch, padding included
    max_targets: int  # R; padded micro-batches make logits of all N
    max_length: int  # of an example


def measure_work(setup: Setup, data: EncodedDataset, *, num_steps: int, seed: int) -> Work:
    """Lay out the micro-batches of the first steps as training does, and take the largest."""
    largest, targets, most = 0, 0, 0
    for step in range(min(num_steps, _MOST_SIMULATED)):
        indices = step_examples(len(data), global_batch_size=setup.global_batch_size, seed=seed, step=step)
        micro_batches = _lay_out(setup, data, indices)
        most = max(most, len(micro_batches))
        for own in micro_batches:
            if len(own):
                lengths = data.lengths[own]
                size = int(lengths.sum()) if setup.padding_free else int(lengths.max()) * len(own)
                largest = max(largest, size)
                targets = max(targets, int(data.target_counts[own].sum()))
    steps_per_epoch = count_steps_per_epoch(len(data), global_batch_size=setup.global_batch_size)
    share = num_steps * min(setup.global_batch_size * steps_per_epoch, len(data)) / steps_per_epoch / len(data)
    return Work(
        num_examples=len(data),
        num_tokens=round(share * int(data.lengths.sum())),
        num_targets=round(share * int(data.target_counts.sum())),
        num_steps=num_steps,
        num_micro_batches=most,
        max_tokens=largest,
        max_targets=targets if setup.padding_free else largest,
        max_length=int(data.lengths.max()),
    )


def _lay_out(setup: Setup, data: EncodedDataset, indices: torch.Tensor) -> list[torch.Tensor]:
    layout = {"rank": 0, "num_processes": setup.num_processes}
    if not setup.padding_free:
        return split_step(indices, micro_batch_size=setup.micro_batch_size, **layout)
    max_tokens = setup.micro_batch_size * setup.max_length
    return split_step_by_tokens(indices, data.lengths, max_tokens=max_tokens, **layout)


# Memory -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device by part, and the most at a moment; host_bytes: in main memory instead, by offload."""

    weights_bytes: int
    copies_bytes: int  # of weights: autocast's in bfloat16, FSDP's gathered layers, a dequantized matrix
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    working_bytes: int  # what one layer's backward pass or the optimizer adds for a moment
    overhead_bytes: int  # CUDA's context, or on a CPU what the heap and Python hold besides; empirical
    peak_bytes: int
    peak_moment: str
    host_bytes: int = 0


def plan_memory(shape: Shape, setup: Setup, work: Work) -> Memory:
    """The parts, and the largest of the moments that hold several of them.

    Loss: everything saved by the forward pass, and the logits' chunk. Backward: gradients grow while activations go;
    where micro-batches are accumulated the gradients of all are there from the second on. Step: AdamW.
    """
    weights, gradients = weights_bytes(shape, setup), gradient_bytes(shape, setup)
    optimizer = 2 * 4 * count_trained(shape, setup) // setup.num_processes
    saved, layer = saved_bytes(shape, setup, work), layer_bytes(shape, setup, work)
    activations = saved + (layer if setup.gradient_checkpointing else 0)
    logits, backward = logits_bytes(shape, setup, work), backward_bytes(shape, setup, work)
    copies = copies_bytes(shape, setup)
    overhead = overhead_bytes(shape, setup, work, transient_bytes=layer + logits + backward + gradients)
    host = 0
    if setup.offload and setup.on_gpu:
        host, weights, optimizer, gradients = weights + optimizer + gradients, 0, 0, 0
    kept = weights + optimizer + overhead
    before = gradients if work.num_micro_batches > 1 else 0
    moments = {
        "loss": kept + before + copies + saved + logits,
        "backward": kept + max(before + copies + activations + backward, gradients + backward),
        "optimizer step": kept + gradients + step_bytes(shape, setup),
    }
    moment = max(moments, key=moments.__getitem__)
    working = step_bytes(shape, setup) if moment == "optimizer step" else backward
    return Memory(
        weights_bytes=weights, copies_bytes=copies, gradients_bytes=gradients, optimizer_bytes=optimizer,
        activations_bytes=activations, logits_bytes=logits, working_bytes=working, overhead_bytes=overhead,
        peak_bytes=moments[moment], peak_moment=moment, host_bytes=host,
    )  # fmt: skip


def count_trained(shape: Shape, setup: Setup) -> int:
    if setup.method == "full":
        return shape.num_parameters
    return shape.num_adapter(rank=setup.lora_rank, targets=setup.lora_targets, dora=setup.dora)


def weights_bytes(shape: Shape, setup: Setup) -> int:
    """A process's share of them: float32 where they are trained; a frozen base in the dtype it computes in."""
    if setup.method == "full":
        return 4 * shape.num_parameters // setup.num_processes
    per_linear = {"none": setup.compute_bytes, "nf4": _NF4_BYTES, "int8": 1 + 4 / shape.width}[setup.base_quantization]
    frozen = shape.num_linear * per_linear + (shape.num_parameters - shape.num_linear) * setup.compute_bytes
    return int(frozen + 4 * count_trained(shape, setup)) // setup.num_processes


def gradient_bytes(shape: Shape, setup: Setup) -> int:
    """float32 gradients; of sharded ones the shard: they are kept whole only where there is room for it."""
    return 4 * count_trained(shape, setup) // setup.num_processes


def overhead_bytes(shape: Shape, setup: Setup, work: Work, *, transient_bytes: int) -> int:
    """What the tensors' sizes do not explain: CUDA's context; on a CPU the heap's holes, where blocks are small."""
    if setup.on_gpu:
        return CUDA_CONTEXT_BYTES
    block = work.max_tokens * shape.ffn_width * setup.compute_bytes
    limit = int(os.environ.get("MALLOC_MMAP_THRESHOLD_", _HEAP_BLOCK))
    imports = _PROCESS_BYTES + (_PEFT_BYTES if setup.method != "full" else 0)
    return imports + (transient_bytes if block < limit else 0)


def copies_bytes(shape: Shape, setup: Setup) -> int:
    """Copies of weights beside the weights.

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
    if setup.bf16 and setup.method == "full":
        return (shape.num_linear + shape.num_head) * 2
    return dequantized


def layer_bytes_per_token(shape: Shape, setup: Setup) -> int:
    """What autograd keeps of one decoder layer for each of N tokens, every operation in its order.

    Each of two norms: its input in float32 (D), the reciprocal root, the normalized row where its scale is trained.
    Inputs of q, k, v and of gate and up: one tensor where it has the products' dtype; under autocast from float32 each
    matrix has a cast of its own. Attention: q, k, v, its output, a float32 log-sum per head, and o_proj's input, which
    the CPU's kernel needs as a copy; on a GPU grouped keys and values are repeated. Feed-forward: gate, its
    activation, up, and their product (down_proj's input). Inputs of frozen matrices are not kept; an adapter keeps
    its input (with the mask of dropout) and its narrow product.
    """
    c, s, width = setup.compute_bytes, setup.stream_bytes, shape.width
    full = setup.method == "full"
    rms = shape.family == "llama"  # LayerNorm is one operation: its input, mean and deviation
    total = 2 * (4 * width + 4 + (s * width if full else 0)) if rms else 2 * (s * width + 8)
    for names in _INPUT_GROUPS[shape.family]:
        trained = [name for name in names if setup.trains(name)]
        columns = shape.linears[names[0]][1]
        casts_each = s != c if full else (c == 2 or setup.lora_dropout > 0)
        own_casts = casts_each and (not full or names[0] in _FROM_STREAM)
        total += c * columns * (len(trained) if own_casts else min(1, len(trained)))
        if not full:
            total += len(trained) * (setup.lora_rank * c + columns * (setup.lora_dropout > 0))
    keys = shape.query_width if setup.on_gpu else shape.kv_width
    total += c * (2 * shape.query_width + 2 * keys) + 4 * shape.num_heads
    if full and setup.on_gpu:
        total -= c * shape.query_width  # o_proj's input is attention's output itself
    inner = {"llama": 3, "opt": 0 if full else 1, "bloom": 1}[shape.family]  # ReLU's result is down_proj's input
    return total + inner * c * shape.ffn_width


_INPUT_GROUPS = {  # matrices that share an input
    "llama": (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)),
    "opt": (("q_proj", "k_proj", "v_proj"), ("out_proj",), ("fc1",), ("fc2",)),
    "bloom": (("query_key_value",), ("dense",), ("dense_h_to_4h",), ("dense_4h_to_h",)),
}
_FROM_STREAM = ("q_proj", "gate_proj", "fc1", "query_key_value", "dense_h_to_4h")  # others' inputs are products


def layer_bytes(shape: Shape, setup: Setup, work: Work) -> int:
    """What autograd keeps of one layer."""
    scores = 3 * setup.compute_bytes * shape.num_heads * work.max_length if shape.eager_attention else 0
    return work.max_tokens * (layer_bytes_per_token(shape, setup) + scores)


def saved_bytes(shape: Shape, setup: Setup, work: Work) -> int:
    """What the forward pass leaves: all layers, or with checkpointing their inputs; the last norm, the head's input."""
    s, width = setup.stream_bytes, shape.width
    full = setup.method == "full"
    rotary = 8 * (shape.query_width // shape.num_heads)
    per_token = 4 * width + 4 + (s * width if full and shape.family == "llama" else 0) + rotary + 16
    outside = work.max_tokens * per_token + work.max_targets * (s * width + 16)
    if setup.gradient_checkpointing:
        return outside + shape.num_layers * work.max_tokens * s * width
    return outside + shape.num_layers * layer_bytes(shape, setup, work)


def logits_bytes(shape: Shape, setup: Setup, work: Work) -> int:
    """The loss's largest moment: a chunk's logits (padding-free), or all of them.

    log_softmax's saved output, the gradient going into it and the one coming out, in float32; or the last of these
    beside the gradient of the head's weight before it is added up.
    """
    rows = work.max_targets
    if setup.padding_free:
        rows = min(rows, max(1, CHUNK_LOGITS // shape.vocab_size))
    scores = 3 * 4 * rows * shape.vocab_size + (setup.compute_bytes * rows * shape.vocab_size if setup.bf16 else 0)
    if setup.method != "full":
        return scores
    weight_gradient = shape.num_head * (4 + (2 if setup.bf16 else 0))
    return max(scores, setup.compute_bytes * rows * shape.vocab_size + weight_gradient)


def backward_bytes(shape: Shape, setup: Setup, work: Work) -> int:
    """Gradients alive inside one layer: two of feed-forward width, three of the stream, and one matrix's.

    FSDP holds those of a layer, and of what stands outside the layers, whole before it reduces them.
    """
    per_token = 2 * setup.compute_bytes * shape.ffn_width + 3 * setup.stream_bytes * shape.width
    whole = 0
    if setup.method == "full" and setup.sharded:
        whole = 4 * (shape.num_linear // shape.num_layers + shape.num_outside)
    elif setup.method == "full":
        whole = 4 * max(rows * columns for rows, columns in shape.linears.values())
    return work.max_tokens * per_token + whole


def step_bytes(shape: Shape, setup: Setup) -> int:
    """AdamW's temporaries: none when fused, else two of its largest parameter."""
    if (setup.on_gpu and not setup.offload) or setup.method != "full":
        return 0
    return 2 * 4 * shape.num_head // setup.num_processes


# Disk and time ------------------------------------------------------------------------------------------------


def checkpoint_bytes(shape: Shape, setup: Setup) -> int:
    """float32 weights that are trained and AdamW's two moments of them."""
    return 3 * 4 * count_trained(shape, setup)


def count_flops(shape: Shape, setup: Setup, work: Work) -> float:
    """Of the whole run: 2 a token and weight forward, 2 for the gradient of the input, 2 for that of the weight.

    The head works on targets alone; embeddings are looked up; attention's own products are left out (under 3 % at
    512 tokens of a 7B model). Checkpointing repeats the layers' forward pass.
    """
    adapter = count_trained(shape, setup) if setup.method != "full" else 0
    per_weight = (6 if setup.method == "full" else 4) + (2 if setup.gradient_checkpointing else 0)
    head_rows = work.num_targets if setup.padding_free else work.num_tokens
    return work.num_tokens * (per_weight * shape.num_linear + 6 * adapter) + 6 * head_rows * shape.num_head


def find_device_peak(name: str) -> float | None:
    """A GPU's dense bfloat16 FLOP/s by its data sheet; None for one not listed."""
    words = name.upper()
    return next((peak for part, peak in DEVICE_PEAKS.items() if all(word in words for word in part.split())), None)


def measure_cpu_flops() -> float:
    """FLOP/s of float32 matrix products on this CPU now, in some 50 ms."""
    left = right = torch.ones(512, 512)
    left @ right
    start = time.perf_counter()
    for _ in range(8):
        left @ right
    return 8 * 2 * 512**3 / (time.perf_counter() - start)


def share_of_peak(plan: "Plan", tokens_per_second: float) -> float | None:
    """The part of the devices' peak that is put to use: of what the run needs, repeated work does not count."""
    if plan.hardware.peak_flops is None:
        return None
    once = dataclasses.replace(plan.setup, gradient_checkpointing=False)
    per_token = count_flops(plan.shape, once, plan.work) / plan.work.num_tokens
    return per_token * tokens_per_second / (plan.hardware.peak_flops * plan.setup.num_processes)


# The plan -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a plan is for. memory_bytes: free on each device; peak_flops: None where unknown."""

    name: str
    memory_bytes: int
    on_gpu: bool
    peak_flops: float | None
    flops: float  # a device's rate that times are reckoned with
    flops_are: str  # how that rate is known

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_bytes * (1 - _GPU_RESERVE)) if self.on_gpu else self.memory_bytes


@dataclass(frozen=True, kw_only=True)
class Plan:
    shape: Shape
    setup: Setup
    work: Work
    memory: Memory
    hardware: Hardware
    num_trained: int
    checkpoint_bytes: int
    num_checkpoints: int  # at once on the disk: those kept, and the one being written
    final_bytes: int
    seconds: float

    @property
    def fits(self) -> bool:
        return self.memory.peak_bytes <= self.hardware.usable_bytes

    @property
    def disk_bytes(self) -> int:
        return self.checkpoint_bytes * self.num_checkpoints + self.final_bytes


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Makes plans of one run for any setup and hardware."""

    config: TrainConfig
    shape: Shape
    data: EncodedDataset
    dtype: torch.dtype  # of the final weights
    num_steps: int

    def plan(self, setup: Setup, hardware: Hardware) -> Plan:
        work = self._work(setup)
        trained, saves = count_trained(self.shape, setup), self.config.save_strategy != "no"
        return Plan(
            shape=self.shape,
            setup=setup,
            work=work,
            memory=plan_memory(self.shape, setup, work),
            hardware=hardware,
            num_trained=trained,
            checkpoint_bytes=checkpoint_bytes(self.shape, setup),
            num_checkpoints=self.config.save_total_limit + 1 if saves else 0,
            final_bytes=trained * self.dtype.itemsize,
            seconds=count_flops(self.shape, setup, work) / (hardware.flops * setup.num_processes),
        )

    def _work(self, setup: Setup) -> Work:
        layout = (setup.micro_batch_size, setup.num_processes, setup.padding_free)
        if layout not in self._works:
            self._works[layout] = measure_work(setup, self.data, num_steps=self.num_steps, seed=self.config.seed)
        return self._works[layout]

    @functools.cached_property
    def _works(self) -> dict[tuple, Work]:
        return {}

    def suggest(self, setup: Setup, hardware: Hardware) -> list[str]:
        """Changes of the command that would fit, the least ones; several together only where no single one does."""
        found: list[str] = []
        for group in _changes(setup):
            found = [text for text, changed in group if self.plan(changed, hardware).fits]
            if found:
                return found
        return found


def _changes(setup: Setup) -> Iterator[list[tuple[str, Setup]]]:
    """Groups of changes to try, each a text and the setup it makes."""
    change = functools.partial(dataclasses.replace, setup)
    small = {"gradient_checkpointing": True, "micro_batch_size": 1}
    single = [
        ("--gradient_checkpointing True", {"gradient_checkpointing": True}),
        ("--per_device_train_batch_size 1", {"micro_batch_size": 1}),
    ]
    methods = [
        ("--method lora", _adapted(setup, method="lora", quantization="none")),
        ("--method qlora", _adapted(setup, method="qlora", quantization="nf4")),
    ]
    if setup.method != "full":
        methods = methods[1:] if setup.base_quantization == "none" else []
    offload = [('--fsdp "full_shard auto_wrap offload"', {"offload": True})] if setup.on_gpu else []
    counts = [number for number in GPU_COUNTS if number > setup.num_processes] if setup.on_gpu else []
    more = [(f"{number} GPUs (torchrun --nproc_per_node={number})", {"num_processes": number}) for number in counts]
    both = "--gradient_checkpointing True --per_device_train_batch_size 1"
    yield [(text, change(**values)) for text, values in [*single, *offload, *more[:1], *methods]]
    yield [(both, change(**small))]
    yield [(f"{text}, with {both}", change(**values, **small)) for text, values in [*offload, *more, *methods]]
    yield [(f"{text}, with offload and {both}", change(**values, **small, offload=True)) for text, values in more]


def _adapted(setup: Setup, *, quantization: str, method: str) -> dict[str, object]:
    """The default adapter on a base that is frozen."""
    own = {"lora_targets": setup.lora_targets, "lora_rank": setup.lora_rank, "lora_dropout": setup.lora_dropout}
    if not setup.lora_targets:
        own = {
            "lora_targets": ("q_proj", "v_proj", "query_key_value"),
            "lora_rank": ADAPTER_DEFAULTS["lora_r"],
            "lora_dropout": ADAPTER_DEFAULTS["lora_dropout"],
        }
    return {**own, "method": method, "base_quantization": quantization}


def describe(plan: Plan) -> list[str]:
    """A few lines for the log."""
    memory, work = plan.memory, plan.work
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory_parts(memory).items() if size > 5e6)
    return [
        f"plan: {plan.shape.num_parameters / 1e6:,.1f} M parameters, {plan.num_trained / 1e6:,.1f} M trained; "
        f"{work.num_steps:,} steps of up to {work.num_micro_batches} micro-batches of up to {work.max_tokens:,} tokens",
        f"plan: peak memory {memory.peak_bytes / 1e9:.2f} GB ({memory.peak_moment}) of "
        f"{plan.hardware.memory_bytes / 1e9:.2f} GB free on {plan.hardware.name}: {parts} GB",
        f"plan: disk {plan.disk_bytes / 1e9:.2f} GB; about {format_seconds(plan.seconds)} at "
        f"{plan.hardware.flops / 1e12:,.2f} TFLOP/s ({plan.hardware.flops_are})",
    ]


def memory_parts(memory: Memory) -> dict[str, int]:
    """The parts by the names people read. Not all are there at once."""
    return {
        "weights": memory.weights_bytes,
        "copies of weights": memory.copies_bytes,
        "gradients": memory.gradients_bytes,
        "optimizer states": memory.optimizer_bytes,
        "activations": memory.activations_bytes,
        "logits": memory.logits_bytes,
        "working memory": memory.working_bytes,
        "context and heap": memory.overhead_bytes,
    }


def format_seconds(seconds: float) -> str:
    """Such as: 3 h 05 min; 12 min; 40 s."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


def plan_json(plan: Plan) -> dict[str, object]:
    """The plan as JSON has it."""
    hardware = {**dataclasses.asdict(plan.hardware), "num_devices": plan.setup.num_processes}
    return {
        "parameters": plan.shape.num_parameters,
        "trained": plan.num_trained,
        "setup": dataclasses.asdict(plan.setup),
        "work": dataclasses.asdict(plan.work),
        "memory": dataclasses.asdict(plan.memory),
        "hardware": hardware,
        "disk": {
            "checkpoint_bytes": plan.checkpoint_bytes,
            "num_checkpoints": plan.num_checkpoints,
            "final_bytes": plan.final_bytes,
            "total_bytes": plan.disk_bytes,
        },
        "seconds": round(plan.seconds, 1),
        "tokens_per_second": round(plan.work.num_tokens / plan.seconds, 1),
        "fits": plan.fits,
    }


# At the start of a run ------------------------------------------------------------------------------------------


def make_planner(config: TrainConfig, base: Base, data: EncodedDataset) -> Planner:
    """For a resolved configuration. Raises InputError for a model whose sizes are not known."""
    steps = count_steps(config, count_steps_per_epoch(len(data), global_batch_size=config.global_batch_size))
    return Planner(
        config=config,
        shape=read_shape(base.folder, num_tokens=base.tokenizer.size if config.method == "full" else 0),
        data=data,
        dtype=choose_save_dtype(config, base),
        num_steps=steps,
    )


def check_plan(
    config: TrainConfig, base: Base, data: EncodedDataset, *, num_processes: int, device: torch.device
) -> Plan | None:
    """Make the plan for this device and log it; None for a model of another kind than those known.

    A GPU's memory is what it is, so a run that cannot fit is refused: NotEnoughSpace. Main memory also holds what can
    be dropped or swapped, and other processes come and go: there it is a warning.
    """
    try:
        planner = make_planner(config, base, data)
    except InputError as error:
        logger.warning("%s; training goes on without one", error)
        return None
    setup = make_setup(config, planner.shape, num_processes=num_processes, on_gpu=device.type == "cuda")
    plan = planner.plan(setup, find_hardware(device))
    for line in describe(plan):
        logger.info("%s", line)
    if not plan.fits and plan.hardware.on_gpu:
        raise NotEnoughSpace(refusal(plan, planner))
    if not plan.fits:
        logger.warning("%s", refusal(plan, planner))
    return plan


def refusal(plan: Plan, planner: Planner) -> str:
    """That a plan does not fit, by how much, and what would."""
    would = planner.suggest(plan.setup, plan.hardware)
    advice = f"these would fit: {'; or '.join(would)}" if would else "no setting of one machine would fit"
    return (
        f"this run needs {plan.memory.peak_bytes / 1e9:.2f} GB on each device ({plan.memory.peak_moment}), and "
        f"{plan.hardware.name} has {plan.hardware.usable_bytes / 1e9:.2f} GB to use; {advice}"
    )


def find_hardware(device: torch.device) -> Hardware:
    """The device there is, with the memory that is free on it now."""
    if device.type != "cuda":
        return Hardware(
            name="this CPU", memory_bytes=free_memory(device), on_gpu=False, peak_flops=None,
            flops=measure_cpu_flops() / 2,
            flops_are="half of what float32 matrix products reach here now",
        )  # fmt: skip
    name = torch.cuda.get_device_name(device)
    # The context is taken already, so the plan's must not be asked for twice.
    return _gpu(name, free_memory(device) + CUDA_CONTEXT_BYTES, find_device_peak(name))


def _gpu(name: str, memory_bytes: int, peak: float | None) -> Hardware:
    flops = _ASSUMED_SHARE * (peak or CARDS["40GB"])
    known = f"{_ASSUMED_SHARE:.0%} of {peak / 1e12:,.0f}" if peak else f"{_ASSUMED_SHARE:.0%} of an A100's"
    return Hardware(
        name=name, memory_bytes=memory_bytes, on_gpu=True, peak_flops=peak, flops=flops, flops_are=f"assumed: {known}"
    )


# --plan_only ----------------------------------------------------------------------------------------------------


def print_plan(config: TrainConfig, *, show: Callable[[str], object] = print) -> None:
    """Show the plan as a table and, as the last line, as JSON; for the hardware named, or what is here.

    `--plan_memory` is that of each GPU and `--plan_gpus` their number. Raises NotEnoughSpace, once all is shown, when
    the run does not fit.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    on_gpu = bool(config.plan_memory) or torch.cuda.is_available()
    num_processes = config.plan_gpus or int(os.environ.get("WORLD_SIZE", "1"))
    config = _resolve_for(config, num_processes=num_processes, on_gpu=on_gpu)
    planner = _open_planner(config)
    setup = make_setup(config, planner.shape, num_processes=num_processes, on_gpu=on_gpu)
    plan = planner.plan(setup, _named_hardware(config) if config.plan_memory else find_hardware(_device(on_gpu)))
    cards = _card_peaks(planner, setup)
    would = [] if plan.fits else planner.suggest(setup, plan.hardware)
    show(format_table(plan, cards))
    show(json.dumps({**plan_json(plan), "would_fit": would, "cards": cards}))
    if not plan.fits and on_gpu:
        raise NotEnoughSpace(refusal(plan, planner))


def _device(on_gpu: bool) -> torch.device:
    return torch.device("cuda" if on_gpu else "cpu")


def _resolve_for(config: TrainConfig, *, num_processes: int, on_gpu: bool) -> TrainConfig:
    """Resolved as on that hardware, which need not be here: any GPU a plan is for has bfloat16."""
    plain = dataclasses.replace(config, bf16=False, tf32=False)
    resolved = resolve(plain, num_processes=num_processes, device=torch.device("cpu"))
    return dataclasses.replace(resolved, bf16=config.bf16 and on_gpu, tf32=config.tf32 and on_gpu)


def _open_planner(config: TrainConfig) -> Planner:
    base, examples = open_base(config), read_examples(config.data_path)
    data = encode_examples(
        examples, base.tokenizer, max_length=config.model_max_length, train_on_inputs=config.train_on_inputs
    )
    num_held_out = count_held_out(config, len(examples))
    if num_held_out:  # which ones makes no difference
        data = data.subset(range(max(1, len(data) - num_held_out)))
    return make_planner(config, base, data)


def _named_hardware(config: TrainConfig) -> Hardware:
    memory = card_bytes(config.plan_memory)
    nearest = min(CARDS, key=lambda card: abs(card_bytes(card) - memory))
    peak = config.plan_tflops * 1e12 if config.plan_tflops else CARDS[nearest]
    return _gpu(f"a GPU of {config.plan_memory}", memory, peak)


def card_bytes(text: str) -> int:
    """Bytes of "80GB": of a usual card what it really has, else the size as written."""
    card = _CARD_BYTES.get(text.replace(" ", "").upper())
    return int(card * 2**30) if card else parse_size(text)


def _card_peaks(planner: Planner, setup: Setup) -> list[dict[str, object]]:
    """For several numbers of GPUs: what each needs, and which of the usual cards have that."""
    rows = []
    for number in GPU_COUNTS:
        own = dataclasses.replace(setup, on_gpu=True, num_processes=number)
        memory = plan_memory(planner.shape, own, planner._work(own))
        usable = {card: card_bytes(card) * (1 - _GPU_RESERVE) for card in CARDS}
        fits = {card: memory.peak_bytes <= size for card, size in usable.items()}
        rows.append({"gpus": number, "peak_bytes": memory.peak_bytes, "fits": fits})
    return rows


def format_table(plan: Plan, cards: list[dict[str, object]]) -> str:
    """A table for people."""
    work, hardware = plan.work, plan.hardware
    lines = [
        f"{'parameters':<34}{plan.shape.num_parameters / 1e6:14,.1f} M",
        f"{'trained (' + plan.setup.method + ')':<34}{plan.num_trained / 1e6:14,.1f} M",
        f"{'examples':<34}{work.num_examples:14,}",
        f"{'tokens of the run':<34}{work.num_tokens:14,}",
        f"{'steps':<34}{work.num_steps:14,}",
        f"{'micro-batches of a step':<34}{work.num_micro_batches:14,}  on each of {plan.setup.num_processes} devices",
        f"{'tokens of a micro-batch, at most':<34}{work.max_tokens:14,}  {work.max_targets:,} of them targets",
        "",
        *(f"{name:<34}{size / 1e9:14,.2f} GB" for name, size in memory_parts(plan.memory).items() if size),
        f"{'peak of a device':<34}{plan.memory.peak_bytes / 1e9:14,.2f} GB  ({plan.memory.peak_moment}: not all the "
        f"parts at once); {hardware.name}: {hardware.usable_bytes / 1e9:,.2f} GB to use: "
        f"{'fits' if plan.fits else 'DOES NOT FIT'}",
    ]
    if plan.memory.host_bytes:
        lines.append(f"{'main memory, of each process':<34}{plan.memory.host_bytes / 1e9:14,.2f} GB")
    lines += [
        "",
        f"{'disk: a checkpoint':<34}{plan.checkpoint_bytes / 1e9:14,.2f} GB  x {plan.num_checkpoints} at once",
        f"{'disk: the final model':<34}{plan.final_bytes / 1e9:14,.2f} GB",
        f"{'time':<34}{format_seconds(plan.seconds):>14}  at {hardware.flops / 1e12:,.2f} TFLOP/s a device "
        f"({hardware.flops_are})",
        "",
        f"{'GPUs':<8}{'peak of each':>16}{''.join(f'{card:>10}' for card in CARDS)}   (as planned, not measured yet)",
    ]
    for row in cards:
        verdicts = "".join(f"{'fits' if fits else '-':>10}" for fits in row["fits"].values())
        lines.append(f"{row['gpus']:<8}{row['peak_bytes'] / 1e9:13,.2f} GB{verdicts}")
    return "\n".join(lines)
