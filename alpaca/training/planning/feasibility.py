"""Whether a run fits the hardware at hand, and what would where it does not."""

import dataclasses
import logging

from alpaca.data.preferences import TrainingData
from alpaca.errors import InputError, NotEnoughSpace
from alpaca.training.configuration.parsing import count_checkpointed, parse_memory_limit
from alpaca.training.configuration.settings import RunSettings
from alpaca.training.distributed import World
from alpaca.training.model.base import Base
from alpaca.training.planning.hardware import Hardware, find_hardware
from alpaca.training.planning.plan import Plan, Planner, make_planner
from alpaca.training.planning.words import describe, describe_checkpointing
from alpaca.training.planning.workload import make_setup

logger = logging.getLogger(__name__)


def find_smallest_hardware(settings: RunSettings, world: World) -> Hardware:
    """The hardware of the process with the least free memory. All processes call it together and get the same.

    So all of them choose alike which layers are recomputed and when gradients are reduced.
    """
    hardware = find_hardware(world.device)
    least = min(world.gather(hardware.memory_bytes))
    return limit_hardware(dataclasses.replace(hardware, memory_bytes=least), settings.memory_limit)


def limit_hardware(hardware: Hardware, limit: str | None) -> Hardware:
    """The same hardware with no more memory than `--memory_limit`."""
    if limit is None:
        return hardware
    memory = min(parse_memory_limit(limit), hardware.memory_bytes)
    return dataclasses.replace(hardware, memory_bytes=memory, name=f"{hardware.name} (--memory_limit {limit})")


def check_plan(
    settings: RunSettings, base: Base, data: TrainingData, hardware: Hardware, *, num_processes: int
) -> Plan | None:
    """Make the plan for this hardware and log it. Returns None for a kind of model that cannot be planned.

    Raises NotEnoughSpace for a run that does not fit a GPU or the limit that was asked for. On a CPU without a limit
    it is a warning: main memory also holds data that can be dropped or swapped, and other processes come and go.
    """
    try:
        planner = make_planner(settings, base, data)
    except InputError as error:
        logger.warning("%s; training goes on without one", error)
        return None
    setup = make_setup(
        settings, planner.shape, num_processes=num_processes, on_gpu=hardware.on_gpu, num_added=planner.num_added
    )
    plan = planner.plan(setup, hardware)
    for line in describe(plan):
        logger.info("%s", line)
    if recomputed := describe_checkpointing(plan):
        logger.info("--gradient_checkpointing %s: %s", settings.model.checkpointing, recomputed)
    if not plan.fits and (plan.hardware.on_gpu or settings.memory_limit):
        raise NotEnoughSpace(refusal(plan, planner))
    if not plan.fits:
        logger.warning("%s", refusal(plan, planner))
    return plan


def refusal(plan: Plan, planner: Planner) -> str:
    """A sentence that a plan does not fit, by how much, and what would fit."""
    would = suggest_for(plan, planner)
    moment = plan.memory.peak_moment
    if recomputed := describe_checkpointing(plan):
        moment += f"; with {recomputed}"
    advice = f"these would fit: {'; or '.join(would)}" if would else "no setting of one machine would fit"
    return (
        f"this run needs {plan.memory.peak_bytes / 1e9:.2f} GB on each device ({moment}), and "
        f"{plan.hardware.name} has {plan.hardware.usable_bytes / 1e9:.2f} GB to use; {advice}"
    )


def suggest_for(plan: Plan, planner: Planner) -> list[str]:
    """Changes that would fit, starting from the setup that the user asked for."""
    asked = count_checkpointed(planner.settings.model.checkpointing, plan.shape.num_layers)
    setup = dataclasses.replace(plan.setup, num_checkpointed=asked, whole_gradients=False)
    return planner.suggest(setup, plan.hardware)
