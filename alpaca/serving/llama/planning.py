"""Divides a device's memory: weights, working memory, and as many key/value blocks as fit into the rest.

Shapes and settings in, numbers out. The engine sizes itself with the memory it finds free once the weights are loaded.
"""

from dataclasses import dataclass

import torch

from alpaca.architecture.description import ModelDescription
from alpaca.errors import NotEnoughSpace
from alpaca.serving.llama.scheduler import most_blocks
from alpaca.serving.scoring import ROWS_AT_ONCE
from alpaca.serving.settings import ServerSettings

BLOCK_SIZE = 16  # tokens; small, so that the Alpaca preamble (about 35) is shared
MOST_RUNNING = 256  # sequences in one step
PREFILL_TOKENS = {"cuda": 1024, "cpu": 128}  # of a step: what a running stream waits for at most
# On a CPU the cache shares the memory with everything else: a part of what is free, and no more than serves a few
# requests of full length.
_CPU_SHARE, _CPU_BYTES, _CPU_REQUESTS = 0.25, 1 << 30, 8
_RANK_PARTS = 16  # triton_low_rank's splits, at most
_BYTES_PER_WEIGHT = {"int8": 1.0, "nf4": 0.5 + 4 / 64}  # nf4: an absolute maximum in float32 for each 64


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What the memory is used for, in bytes, and how many requests of which length that allows."""

    weights_bytes: int
    adapter_bytes: int
    working_bytes: int
    kv_bytes_per_token: int
    num_blocks: int
    max_context: int  # tokens of one request, prompt and answer
    max_running: int
    # Where all layers have windows: the blocks of one request besides those that a step writes, and these; else 0.
    window_blocks: int = 0
    step_blocks: int = 0

    @property
    def cached_tokens(self) -> int:
        """Number of tokens the cache has room for. One block is for padding."""
        return (self.num_blocks - 1) * BLOCK_SIZE

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * BLOCK_SIZE * self.kv_bytes_per_token

    def num_requests(self, length: int) -> int:
        """Number of requests of `length` tokens that run at once, without one waiting for room."""
        whole = (self.num_blocks - 1) // -(-length // BLOCK_SIZE)
        if self.window_blocks:
            whole = max(whole, (self.num_blocks - 1 - self.step_blocks) // self.window_blocks)
        return min(self.max_running, whole)


def max_running(settings: ServerSettings) -> int:
    """Most sequences of one step: all completions of every request in flight, up to MOST_RUNNING."""
    return min(MOST_RUNNING, 5 * settings.concurrency)


def weights_bytes(config: ModelDescription, dtype: torch.dtype, quantization: str, *, num_whole: int = 0) -> int:
    """Bytes of the weights on the device, without the rotary table.

    num_whole: elements of the layers' matrices that a folder which was saved quantized holds whole.
    """
    per_weight = _BYTES_PER_WEIGHT.get(quantization, dtype.itemsize)
    num_routing = config.num_layers * config.num_experts * config.width  # never quantized here
    num_quantized = config.num_linear - max(num_whole, num_routing)
    whole = (config.num_parameters - num_quantized) * dtype.itemsize
    return int(num_quantized * per_weight) + whole + _extra_norm_bytes(config, dtype)


def _extra_norm_bytes(config: ModelDescription, dtype: torch.dtype) -> int:
    """What norms take beyond their elements in the files: some stay in float32, and those of heads have a row each."""
    family, per_layer = config.family, len(config.family.norms) * config.width
    if family.head_norms == "whole":
        per_layer += config.query_width + config.kv_width
    rows = config.query_width + config.kv_width if family.head_norms == "each" else 0
    per_element = max(dtype.itemsize, 4) if family.scales_wide else dtype.itemsize
    held = config.num_layers * (per_layer + rows) + config.width
    stored = config.num_layers * (per_layer + (2 * config.head_width if rows else 0)) + config.width
    return held * per_element - stored * dtype.itemsize


def working_bytes(
    config: ModelDescription, dtype: torch.dtype, *, num_tokens: int, num_sampled: int, num_ranks: int = 0
) -> int:
    """An upper bound of what one step needs beside weights and cache: activations of a layer, logits, sampling.

    num_ranks: of all adapters' in one layer, at most; their sums are kept in float32, in several parts.
    """
    inner = 3 * config.ffn_width
    if config.num_experts:  # every token's experts may be the same: gathered inputs, gates and outputs of all at once
        inner = config.experts_per_token * (3 * config.expert_width + 4 * config.width)
    widths = 4 * config.width + inner + 2 * config.head_width * (config.num_heads + config.num_kv_heads)
    # Logits, their float32, probabilities, and for top_p scores and ids in order, and cumulative sums.
    per_score = dtype.itemsize + 4 * 4 + 8 + 8
    ranks = num_tokens * num_ranks * _RANK_PARTS * 4
    # Of tokens whose log-probabilities are asked for, a few at a time: logits, widened, and their log-softmax.
    scored = min(num_tokens, ROWS_AT_ONCE) * config.vocab_size * (dtype.itemsize + 2 * 4)
    return num_tokens * widths * dtype.itemsize + num_sampled * config.vocab_size * per_score + ranks + scored


def plan_memory(
    config: ModelDescription,
    settings: ServerSettings,
    *,
    free_bytes: int,
    device: str,
    dtype: torch.dtype,
    adapter_bytes: int = 0,
    num_ranks: int = 0,
) -> MemoryPlan:
    """Divide the bytes that are free after weights and adapters. Raises NotEnoughSpace if no request fits."""
    running = max_running(settings)
    context = min(settings.max_context or config.max_context, config.max_context)
    working = working_bytes(
        config, dtype, num_tokens=running + PREFILL_TOKENS[device], num_sampled=running, num_ranks=num_ranks
    )
    per_token = config.kv_elements_per_token() * dtype.itemsize
    # A GPU holds the working memory twice: for the graphs, in a pool of their own, and for steps with prompts.
    working *= 2 if device == "cuda" else 1
    room = settings.memory_fraction * free_bytes - working
    if device == "cpu":
        room = min(_CPU_SHARE * room, max(_CPU_BYTES, _CPU_REQUESTS * context * per_token))
    per_block = BLOCK_SIZE * per_token
    useful = 1 + running * -(-context // BLOCK_SIZE)  # every running sequence as long as can be
    window_blocks, step_blocks = _window_blocks(config, max_step_tokens=running + PREFILL_TOKENS[device])
    if window_blocks:
        useful = min(useful, 1 + running * window_blocks + step_blocks)
    num_blocks = min(useful, int(room) // per_block)
    has_any_length = window_blocks and num_blocks > window_blocks + step_blocks
    if num_blocks < 1 + min(4, -(-context // BLOCK_SIZE)):
        raise NotEnoughSpace(
            f"{free_bytes / 1e9:.2f} GB are free after the weights, of which ALPACA_MEMORY_FRACTION "
            f"({settings.memory_fraction}) may be used; a step takes {working / 1e9:.2f} GB and the key/value cache "
            f"{per_token / 1e6:.3f} MB a token: no request fits. {advice(settings)}"
        )
    return MemoryPlan(
        weights_bytes=weights_bytes(config, dtype, settings.quantization),
        adapter_bytes=adapter_bytes,
        working_bytes=working,
        kv_bytes_per_token=per_token,
        num_blocks=num_blocks,
        max_context=context if has_any_length else min(context, (num_blocks - 1) * BLOCK_SIZE),
        max_running=running,
        window_blocks=window_blocks,
        step_blocks=step_blocks,
    )


def _window_blocks(config: ModelDescription, *, max_step_tokens: int) -> tuple[int, int]:
    """Where all layers have windows, the blocks that one request holds for its window, and those of a step's tokens.

    What lies behind the window is freed. The tokens of a step are those of all requests together.
    """
    if not config.longest_window:
        return 0, 0
    whole = most_blocks(config.longest_window, max_step_tokens, BLOCK_SIZE)
    step_blocks = -(-max_step_tokens // BLOCK_SIZE)
    return whole - step_blocks + 1, step_blocks


def advice(settings: ServerSettings) -> str:
    """A sentence on how to make room, without what the settings already do."""
    smaller = {"none": "set ALPACA_QUANTIZATION to int8 or nf4", "int8": "set ALPACA_QUANTIZATION to nf4"}
    steps = [smaller.get(settings.quantization), "lower COG_MAX_CONCURRENCY and ALPACA_MAX_CONTEXT"]
    return f"To make room {', '.join(filter(None, steps))}, or use a machine with more memory"
