"""How the memory is divided: weights, working memory, and as many key/value blocks as the rest has room for.

    python -m alpaca.serving.plan --weights alpaca_out --memory 80GB

The engine sizes itself by the same arithmetic, with the memory it finds free once the weights are loaded.
"""

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from alpaca.errors import NotEnoughSpace, run_command
from alpaca.hf_files import FLOAT_DTYPES, parse_size
from alpaca.memory import CUDA_CONTEXT_BYTES
from alpaca.serving.adapters import check_for_llama, largest_ranks, open_served, stacked_bytes
from alpaca.serving.llama import LlamaConfig
from alpaca.serving.settings import DTYPES, QUANTIZATIONS, ServerSettings

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
    """Bytes by use, and what they make possible."""

    weights_bytes: int
    adapter_bytes: int
    working_bytes: int
    kv_bytes_per_token: int
    num_blocks: int
    max_context: int  # tokens of one request, prompt and answer
    max_running: int

    @property
    def cached_tokens(self) -> int:
        """Tokens the cache has room for; one block is for padding."""
        return (self.num_blocks - 1) * BLOCK_SIZE

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * BLOCK_SIZE * self.kv_bytes_per_token

    def num_requests(self, length: int) -> int:
        """How many requests of `length` tokens are computed at once, without one waiting for room."""
        return min(self.max_running, (self.num_blocks - 1) // -(-length // BLOCK_SIZE))


def max_running(settings: ServerSettings) -> int:
    """Sequences in one step: every request in flight with all of its completions, up to a bound."""
    return min(MOST_RUNNING, 5 * settings.concurrency)


def weights_bytes(config: LlamaConfig, dtype: torch.dtype, quantization: str) -> int:
    """What the weights take on the device, the rotary table left out."""
    per_weight = _BYTES_PER_WEIGHT.get(quantization, dtype.itemsize)
    return int(config.num_linear_weights * per_weight) + config.num_other_weights * dtype.itemsize


def working_bytes(
    config: LlamaConfig, dtype: torch.dtype, *, num_tokens: int, num_sampled: int, num_ranks: int = 0
) -> int:
    """An upper bound of what one step needs beside weights and cache: activations of a layer, logits, sampling.

    num_ranks: of all adapters' in one layer, at most; their sums are kept in float32, in several parts.
    """
    widths = 4 * config.width + 3 * config.ffn_width + 2 * config.head_width * (config.num_heads + config.num_kv_heads)
    # Logits, their float32, probabilities, and for top_p scores and ids in order, and cumulative sums.
    per_score = dtype.itemsize + 4 * 4 + 8 + 8
    ranks = num_tokens * num_ranks * _RANK_PARTS * 4
    return num_tokens * widths * dtype.itemsize + num_sampled * config.vocab_size * per_score + ranks


def plan_memory(
    config: LlamaConfig,
    settings: ServerSettings,
    *,
    free_bytes: int,
    device: str,
    dtype: torch.dtype,
    adapter_bytes: int = 0,
    num_ranks: int = 0,
) -> MemoryPlan:
    """Divide `free_bytes`, free once weights and adapters are loaded. Raises NotEnoughSpace when no request fits."""
    running = max_running(settings)
    context = min(settings.max_context or config.max_context, config.max_context)
    working = working_bytes(
        config, dtype, num_tokens=running + PREFILL_TOKENS[device], num_sampled=running, num_ranks=num_ranks
    )
    per_token = config.kv_bytes_per_token(dtype)
    # A GPU holds the working memory twice: for the graphs, in a pool of their own, and for steps with prompts.
    working *= 2 if device == "cuda" else 1
    room = settings.memory_fraction * free_bytes - working
    if device == "cpu":
        room = min(_CPU_SHARE * room, max(_CPU_BYTES, _CPU_REQUESTS * context * per_token))
    per_block = BLOCK_SIZE * per_token
    useful = 1 + running * -(-context // BLOCK_SIZE)  # every running sequence as long as can be
    num_blocks = min(useful, int(room) // per_block)
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
        max_context=min(context, (num_blocks - 1) * BLOCK_SIZE),
        max_running=running,
    )


def advice(settings: ServerSettings) -> str:
    """What makes more fit, of what was not done yet."""
    smaller = {"none": "set ALPACA_QUANTIZATION to int8 or nf4", "int8": "set ALPACA_QUANTIZATION to nf4"}
    steps = [smaller.get(settings.quantization), "lower COG_MAX_CONCURRENCY and ALPACA_MAX_CONTEXT"]
    return f"To make room {', '.join(filter(None, steps))}, or use a machine with more memory"


# The command --------------------------------------------------------------------------------------------------------


def main() -> None:
    options = _parse_arguments()
    settings = ServerSettings(
        quantization=options.quantization,
        memory_fraction=options.memory_fraction,
        max_context=options.max_context,
        concurrency=options.concurrency,
        adapters=options.adapters,
        base_model=options.base_model,
    )
    served = open_served(options.weights, settings)
    config, adapters = LlamaConfig.read(served.base), served.adapters
    check_for_llama(adapters, config)
    dtype = FLOAT_DTYPES[options.dtype]
    memory = parse_size(options.memory)
    weights = weights_bytes(config, dtype, options.quantization)
    adapter_bytes = stacked_bytes(adapters, config, dtype)
    free = memory - weights - adapter_bytes - CUDA_CONTEXT_BYTES
    if free <= 0:
        raise NotEnoughSpace(
            f"the weights take {(weights + adapter_bytes) / 1e9:.1f} GB as {options.dtype}, {options.quantization}; "
            f"{options.memory} is too small for them. {advice(settings)}"
        )
    plan = plan_memory(
        config, settings, free_bytes=free, device="cuda", dtype=dtype, adapter_bytes=adapter_bytes,
        num_ranks=largest_ranks(adapters),
    )  # fmt: skip
    print(describe(plan, memory_bytes=memory))
    lengths = {length: plan.num_requests(length) for length in _lengths(plan)}
    print(json.dumps({**dataclasses.asdict(plan), "memory_bytes": memory, "requests_at_once": lengths}))


def describe(plan: MemoryPlan, *, memory_bytes: int) -> str:
    """A table for people."""
    reserved = memory_bytes - plan.weights_bytes - plan.adapter_bytes - plan.working_bytes - plan.kv_bytes
    lines = [
        f"{'weights':<28}{plan.weights_bytes / 1e9:8.2f} GB",
        *([f"{'adapters':<28}{plan.adapter_bytes / 1e9:8.2f} GB"] if plan.adapter_bytes else []),
        f"{'one step':<28}{plan.working_bytes / 1e9:8.2f} GB",
        f"{'key/value cache':<28}{plan.kv_bytes / 1e9:8.2f} GB  {plan.num_blocks} blocks of {BLOCK_SIZE} tokens, "
        f"{plan.kv_bytes_per_token / 1e6:.3f} MB a token",
        f"{'CUDA itself and reserve':<28}{reserved / 1e9:8.2f} GB",
        f"longest request: {plan.max_context} tokens; at most {plan.max_running} completions in one step",
    ]
    lines += [f"requests of {length:>6} tokens at once: {plan.num_requests(length)}" for length in _lengths(plan)]
    return "\n".join(lines)


def _lengths(plan: MemoryPlan) -> list[int]:
    return [length for length in (256, 512, 1024, 2048, 4096, 8192, 32768, 131072) if length <= plan.max_context]


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Plan a card's memory for serving a LLaMA.")
    parser.add_argument("--weights", type=Path, required=True, help="folder with config.json")
    parser.add_argument("--memory", required=True, help='of the card, such as "80GB"')
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="none")
    parser.add_argument("--memory_fraction", type=float, default=ServerSettings.memory_fraction)
    parser.add_argument("--max_context", type=int, help="default: the model's")
    parser.add_argument("--base_model", help="folder with config.json, where --weights is an adapter")
    parser.add_argument("--adapters", help="name=folder,name2=folder2")
    parser.add_argument("--concurrency", type=int, default=ServerSettings.concurrency)
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
