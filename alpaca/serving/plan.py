"""Plan a card's memory for serving a LLaMA, before anything is loaded.

python -m alpaca.serving.plan --weights alpaca_out --memory 80GB
"""

import argparse
import dataclasses
import json
from pathlib import Path

from alpaca.architecture.description import ModelDescription
from alpaca.errors import NotEnoughSpace, run_command
from alpaca.files.reading import parse_size
from alpaca.formats.hf.folder import FLOAT_DTYPES
from alpaca.memory import CUDA_CONTEXT_BYTES
from alpaca.serving.llama.adapters import check_for_llama, largest_ranks, stacked_bytes
from alpaca.serving.llama.planning import BLOCK_SIZE, MemoryPlan, advice, plan_memory, weights_bytes
from alpaca.serving.llama.weights import count_whole, read_llama
from alpaca.serving.served_model import obey_saved_quantization, open_served_model
from alpaca.serving.settings import DTYPES, QUANTIZATIONS, ServerSettings


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
    served = open_served_model(options.weights, settings)
    settings = obey_saved_quantization(served.base, settings)
    config, adapters = read_llama(served.base), served.adapters
    check_for_llama(adapters, config)
    dtype = FLOAT_DTYPES[options.dtype]
    memory = parse_size(options.memory)
    num_whole = count_whole(served.base, config) if settings.quantization != options.quantization else 0
    weights = weights_bytes(config, dtype, settings.quantization, num_whole=num_whole)
    adapter_bytes = stacked_bytes(adapters, config, dtype)
    free = memory - weights - adapter_bytes - CUDA_CONTEXT_BYTES
    if free <= 0:
        raise NotEnoughSpace(
            f"the weights take {(weights + adapter_bytes) / 1e9:.1f} GB as {options.dtype}, {settings.quantization}; "
            f"{options.memory} is too small for them. {advice(settings)}"
        )
    plan = plan_memory(
        config, settings, free_bytes=free, device="cuda", dtype=dtype, adapter_bytes=adapter_bytes,
        num_ranks=largest_ranks(adapters),
    )  # fmt: skip
    plan = dataclasses.replace(plan, weights_bytes=weights)
    print(describe(plan, memory_bytes=memory))
    print(describe_windows(config), end="")
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


def describe_windows(config: ModelDescription) -> str:
    """A line on sliding windows, where the model has any."""
    if not config.windows:
        return ""
    if config.longest_window:
        return (
            f"all layers see {config.longest_window} tokens at most: blocks behind are freed while a request runs, so "
            "that a longer one holds no more\n"
        )
    num_windowed = sum(map(bool, config.windows))
    return (
        f"{num_windowed} of {config.num_layers} layers see a window and the others all tokens: every layer keeps all "
        "blocks\n"
    )


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
