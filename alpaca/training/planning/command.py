"""`--plan_only`: the plan of a run as a table and as JSON, for the GPUs named or those here.

    python train.py --model_name_or_path weights --data_path data.json --plan_only --plan_memory 80GB --plan_gpus 4

needs neither the GPUs nor the weights: config.json, the tokenizer and the data are enough.
"""

import dataclasses
import json
import os
from collections.abc import Callable

import torch

from alpaca.errors import InputError, NotEnoughSpace
from alpaca.training.configuration.config import TrainConfig
from alpaca.training.configuration.parsing import parse_memory
from alpaca.training.configuration.resolving import make_settings, resolve
from alpaca.training.configuration.settings import RunSettings
from alpaca.training.dataset import encode_data
from alpaca.training.model.base import open_base
from alpaca.training.planning.feasibility import limit_hardware, refusal
from alpaca.training.planning.hardware import GPU_COUNTS, Hardware, assume_gpu, find_hardware
from alpaca.training.planning.plan import Plan, Planner, make_planner, plan_json
from alpaca.training.planning.words import describe_checkpointing, format_seconds, memory_parts
from alpaca.training.planning.workload import GPUS_PER_MACHINE, Setup, make_setup

CARDS = {  # by what they are sold as: dense bf16 FLOP/s (of a 4090, an A100, an A100, an H200)
    "24GB": 165e12, "40GB": 312e12, "80GB": 312e12, "141GB": 989e12,
}  # fmt: skip
_CARD_BYTES = {"24GB": 23.5, "40GB": 39.4, "80GB": 79.1, "141GB": 139.5}  # GiB that such a card shows, about


def print_plan(config: TrainConfig, *, show: Callable[[str], object] = print) -> None:
    """Show the plan as a table and, as the last line, as JSON; for the hardware named, or what is here.

    `--plan_memory` is that of each GPU and `--plan_gpus` their number. Raises NotEnoughSpace, once all is shown, when
    the run does not fit.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    on_gpu = bool(config.plan_memory) or torch.cuda.is_available()
    num_processes = config.plan_gpus or int(os.environ.get("WORLD_SIZE", "1"))
    on_machine = config.plan_gpus_per_machine or _own_machine(named=bool(config.plan_gpus))
    settings = _resolve_for(config, num_processes=num_processes, on_gpu=on_gpu)
    planner = open_planner(settings)
    layout = {"num_processes": num_processes, "on_gpu": on_gpu, "on_machine": on_machine}
    setup = make_setup(settings, planner.shape, **layout, num_added=planner.num_added)
    _require_whole_machines(setup)
    hardware = _named_hardware(config) if config.plan_memory else find_hardware(_device(on_gpu))
    plan = planner.plan(setup, limit_hardware(hardware, config.memory_limit))
    cards = _card_plans(planner, dataclasses.replace(setup, on_gpu=True, bf16=config.bf16))
    would = [] if plan.fits else planner.suggest(setup, plan.hardware)
    show(format_table(plan, cards))
    show(json.dumps({**plan_json(plan), "would_fit": would, "cards": cards}))
    if not plan.fits and (on_gpu or config.memory_limit):
        raise NotEnoughSpace(refusal(plan, planner))


def _own_machine(*, named: bool) -> int:
    """GPUs of a machine: under torchrun its number, for a number of GPUs that was named the usual one."""
    return GPUS_PER_MACHINE if named else int(os.environ.get("LOCAL_WORLD_SIZE", GPUS_PER_MACHINE))


def _require_whole_machines(setup: Setup) -> None:
    if setup.num_processes % setup.num_shards:
        raise InputError(
            f"--fsdp hybrid_shard: expected as many GPUs on every machine, found --plan_gpus {setup.num_processes} in "
            f"machines of {setup.on_machine}; say how many a machine has with --plan_gpus_per_machine"
        )


def _device(on_gpu: bool) -> torch.device:
    return torch.device("cuda" if on_gpu else "cpu")


def _resolve_for(config: TrainConfig, *, num_processes: int, on_gpu: bool) -> RunSettings:
    """The settings on that hardware, which need not be here: any GPU that a plan is made for has bfloat16."""
    plain = dataclasses.replace(config, bf16=False, tf32=False)
    resolved = resolve(plain, num_processes=num_processes, device=torch.device("cpu"))
    return make_settings(dataclasses.replace(resolved, bf16=config.bf16 and on_gpu, tf32=config.tf32 and on_gpu))


def open_planner(settings: RunSettings) -> Planner:
    """A planner from the folder and the data that the settings name."""
    base = open_base(settings.base)
    data = encode_data(settings.data, base.tokenizer, progress=True).train
    return make_planner(settings, base, data)


def _named_hardware(config: TrainConfig) -> Hardware:
    memory = card_bytes(config.plan_memory)
    nearest = min(CARDS, key=lambda card: abs(card_bytes(card) - memory))
    peak = config.plan_tflops * 1e12 if config.plan_tflops else CARDS[nearest]
    return assume_gpu(f"a GPU of {config.plan_memory}", memory, peak)


def card_bytes(text: str) -> int:
    """Bytes of "80GB": of a usual card what it really has, else the size as written."""
    card = _CARD_BYTES.get(text.replace(" ", "").upper())
    return int(card * 2**30) if card else parse_memory("plan_memory", text)


def _card_plans(planner: Planner, setup: Setup) -> list[dict[str, object]]:
    """For several numbers of GPUs: the plan on each of the usual cards, its peak and how many layers are recomputed.

    Where it does not fit the peak is the least there can be.
    """
    rows = []
    for number in GPU_COUNTS:
        changed = dataclasses.replace(setup, num_processes=number)
        plans = {card: planner.plan(changed, assume_gpu(card, card_bytes(card), peak)) for card, peak in CARDS.items()}
        rows.append(
            {
                "gpus": number,
                "peak_bytes": {card: plan.memory.peak_bytes for card, plan in plans.items()},
                "fits": {card: plan.fits for card, plan in plans.items()},
                "recomputed_layers": {card: plan.setup.num_checkpointed for card, plan in plans.items()},
            }
        )
    return rows


def format_table(plan: Plan, cards: list[dict[str, object]]) -> str:
    """A table for people."""
    work, hardware = plan.work, plan.hardware
    lines = [
        f"{'parameters':<34}{plan.shape.num_parameters / 1e6:14,.1f} M",
        f"{'trained (' + plan.setup.method + ')':<34}{plan.num_trained / 1e6:14,.1f} M",
        f"{'examples':<34}{work.num_examples:14,}",
        f"{'tokens of the run':<34}{work.num_tokens:14,}",
        *([f"{'tokens that only go forward':<34}{work.num_forward:14,}"] if work.num_forward else []),
        f"{'steps':<34}{work.num_steps:14,}",
        f"{'micro-batches of a step':<34}{work.num_micro_batches:14,}  on each of {plan.setup.num_processes} devices"
        f"{_describe_copies(plan.setup)}",
        f"{'tokens of a micro-batch, at most':<34}{work.max_tokens:14,}  {work.max_targets:,} of them targets",
        "",
        *(f"{name:<34}{size / 1e9:14,.2f} GB" for name, size in memory_parts(plan.memory).items() if size),
        f"{'peak of a device':<34}{plan.memory.peak_bytes / 1e9:14,.2f} GB  ({plan.memory.peak_moment}: not all the "
        f"parts at once); {hardware.name}: {hardware.usable_bytes / 1e9:,.2f} GB to use: "
        f"{'fits' if plan.fits else 'DOES NOT FIT'}",
    ]
    if recomputed := describe_checkpointing(plan):
        lines.append(f"{'recomputed activations':<34}{recomputed}")
    if plan.memory.host_bytes:
        lines.append(f"{'main memory, of each process':<34}{plan.memory.host_bytes / 1e9:14,.2f} GB")
    lines += [
        "",
        f"{'disk: a checkpoint':<34}{plan.checkpoint_bytes / 1e9:14,.2f} GB  x {plan.num_checkpoints} at once",
        f"{'disk: the final model':<34}{plan.final_bytes / 1e9:14,.2f} GB",
        f"{'time':<34}{format_seconds(plan.seconds):>14}  at {hardware.flops / 1e12:,.2f} TFLOP/s a device "
        f"({hardware.flops_are})",
        "",
        "peak of each GPU in GB, as planned on such a card (not measured yet)",
        f"{'GPUs':<8}{''.join(f'{card:>18}' for card in CARDS)}",
    ]
    lines += [f"{row['gpus']:<8}{''.join(f'{_verdict(row, card):>18}' for card in CARDS)}" for row in cards]
    lines += (
        ["(+N: so many layers are recomputed; needs: the least there can be, and it does not fit)"] if cards else []
    )
    return "\n".join(lines)


def _describe_copies(setup: Setup) -> str:
    """What a hybrid sharding is over; "" for another."""
    if not setup.hybrid:
        return ""
    copies = setup.num_processes // setup.num_shards
    return f": {copies} {'copy' if copies == 1 else 'copies'} of the model, over {setup.num_shards} of a machine each"


def _verdict(row: dict[str, object], card: str) -> str:
    """A cell of the table."""
    gigabytes, number = f"{row['peak_bytes'][card] / 1e9:,.2f}", row["recomputed_layers"][card]
    if not row["fits"][card]:
        return f"needs {gigabytes}"
    return f"{gigabytes} +{number}" if number else gigabytes
