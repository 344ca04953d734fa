"""A plan in words, for the log and the report."""

import dataclasses

from alpaca.training.planning.footprint import Memory
from alpaca.training.planning.plan import Plan, count_flops


def describe(plan: Plan) -> list[str]:
    """A few lines for the log."""
    memory, work = plan.memory, plan.work
    gradients = "kept whole until the step's last one" if plan.setup.whole_gradients else "reduced after each"
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory_parts(memory).items() if size > 5e6)
    return [
        f"plan: {plan.shape.num_parameters / 1e6:,.1f} M parameters, {plan.num_trained / 1e6:,.1f} M trained; "
        f"{work.num_steps:,} steps of up to {work.num_micro_batches} micro-batches of up to {work.max_tokens:,} tokens"
        + (f"; gradients are {gradients}" if plan.setup.sharded else ""),
        f"plan: peak memory {memory.peak_bytes / 1e9:.2f} GB ({memory.peak_moment}) of "
        f"{plan.hardware.memory_bytes / 1e9:.2f} GB free on {plan.hardware.name}: {parts} GB",
        f"plan: disk {plan.disk_bytes / 1e9:.2f} GB; about {format_seconds(plan.seconds)} at "
        f"{plan.hardware.flops / 1e12:,.2f} TFLOP/s ({plan.hardware.flops_are})",
    ]


def describe_checkpointing(plan: Plan) -> str:
    """How many layers are recomputed, and how much work that adds; "" for none."""
    number, total = plan.setup.num_checkpointed, plan.shape.num_layers
    if not number:
        return ""
    once = count_flops(plan.shape, dataclasses.replace(plan.setup, num_checkpointed=0), plan.work)
    more = count_flops(plan.shape, plan.setup, plan.work) / once - 1
    head = plan.shape.num_head * (plan.work.num_targets / plan.work.num_tokens if plan.setup.padding_free else 1)
    forward = number / total * plan.shape.num_linear / (plan.shape.num_linear + head)
    return f"{number} of {total} layers recomputed: {forward:.0%} of the forward pass, {more:.0%} more arithmetic"


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
