"""A run, prepared for its first step: data, plan, model, optimizer and schedule, and its identity for checkpoints."""

import dataclasses
import functools
import hashlib
import logging
from dataclasses import dataclass

import torch
from torch import nn

from alpaca.data.batching import count_steps_per_epoch, epoch_permutation
from alpaca.data.encoding.choosing import Chosen
from alpaca.data.preferences import KTO, PreferenceDataset, TrainingData, mismatch
from alpaca.errors import InputError, NotEnoughSpace
from alpaca.memory import CUDA_CONTEXT_BYTES
from alpaca.training.checkpoints.state import Progress, Trainee
from alpaca.training.configuration.parsing import AUTO, parse_memory_limit
from alpaca.training.configuration.settings import RunSettings
from alpaca.training.dataset import encode_data
from alpaca.training.distributed import World, decide_gradient_sync, is_sharded
from alpaca.training.guards import end_if_stopped
from alpaca.training.model.base import Base, open_base
from alpaca.training.model.building import count_parameters, import_libraries, load_model
from alpaca.training.model.noise import EmbeddingNoise
from alpaca.training.model.optimizers.choosing import import_optimizer, make_optimizer
from alpaca.training.model.passes import Passes
from alpaca.training.planning.feasibility import check_plan, find_smallest_hardware
from alpaca.training.planning.plan import Plan
from alpaca.training.report.summary import MemoryMeter
from alpaca.training.schedule import count_steps, count_warmup_steps, learning_rate_factor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything the loop works with, made by `prepare`.

    held_out: None where nothing is evaluated.    chosen: the layout of both.
    keeps_gradients: see `distributed.decide_gradient_sync`.
    plan: None for a model of a kind that cannot be planned.    noise: None where there is none.
    """

    settings: RunSettings
    base: Base
    data: TrainingData
    held_out: TrainingData | None
    chosen: Chosen
    trainee: Trainee
    passes: Passes
    num_steps: int
    steps_per_epoch: int
    keeps_gradients: bool
    plan: Plan | None = None
    memory: MemoryMeter
    noise: EmbeddingNoise | None = None

    @property
    def world(self) -> World:
        return self.trainee.world

    @property
    def progress(self) -> Progress:
        return self.trainee.progress


def prepare(settings: RunSettings, world: World) -> Run:
    """Read the data, load the model, make optimizer and schedule."""
    base = open_base(settings.base)
    read = encode_data(settings.data, base.tokenizer, progress=world.is_main)
    end_if_stopped()
    data, held_out = read.train, read.held_out
    if settings.objective.name == KTO:
        data, held_out = _mismatch(settings, data, held_out)
    steps_per_epoch = count_steps_per_epoch(len(data), global_batch_size=settings.batch.global_batch_size)
    num_steps = count_steps(settings.batch, steps_per_epoch)
    _say_what_is_left_out(len(data), steps_per_epoch, settings.batch.global_batch_size)
    import_libraries()
    import_optimizer(settings.optimizer.name)
    memory = MemoryMeter(world.device)
    hardware = find_smallest_hardware(settings, world)
    plan = world.run_in_all(lambda: check_plan(settings, base, data, hardware, num_processes=world.num_processes))
    end_if_stopped()
    settings = _choose_checkpointing(settings, plan)
    _limit_memory(settings, world.device)
    if settings.tf32:
        torch.set_float32_matmul_precision("high")
    trainee = _make_trainee(
        load_model(base, settings.model, world), settings, base, data, num_steps=num_steps, world=world
    )
    noise, alpha = None, settings.batch.noise
    if alpha:
        noise = EmbeddingNoise(trainee.model, alpha, settings.batch.seed)
        logger.info("noise on embeddings in training: %g over the root of an example's length times the width", alpha)
    torch.manual_seed(settings.data.seed + world.rank)  # for dropout, which each process draws by itself
    return Run(
        settings=settings,
        base=base,
        data=data,
        held_out=held_out,
        chosen=read.chosen,
        trainee=trainee,
        passes=_make_passes(trainee.model, settings, base, world),
        num_steps=num_steps,
        steps_per_epoch=steps_per_epoch,
        keeps_gradients=_keeps_gradients(trainee.model, plan, world),
        plan=plan,
        memory=memory,
        noise=noise,
    )


def _mismatch(
    settings: RunSettings, data: PreferenceDataset, held_out: PreferenceDataset | None
) -> tuple[PreferenceDataset, PreferenceDataset | None]:
    """KTO's data with mismatched answers: of the first epoch's batches, and of all held-out examples together."""
    if len(data) < 2 or (held_out is not None and len(held_out) < 2):
        raise InputError("--objective kto needs at least two examples to train on, and two held out where any are")
    batch = settings.batch
    order = epoch_permutation(len(data), seed=batch.seed, epoch=0)
    data = mismatch(data, order, batch_size=batch.global_batch_size, max_length=batch.max_length)
    if held_out is not None:
        order = torch.arange(len(held_out))
        held_out = mismatch(held_out, order, batch_size=len(held_out), max_length=batch.max_length)
    return data, held_out


def _make_passes(model: nn.Module, settings: RunSettings, base: Base, world: World) -> Passes:
    return Passes(
        model=model,
        pad_id=base.tokenizer.fill_id,
        bf16=settings.model.autocasts,
        micro_batch_size=settings.batch.micro_batch_size,
        max_length=settings.batch.max_length,
        world=world,
    )


def _say_what_is_left_out(num_examples: int, steps_per_epoch: int, global_batch_size: int) -> None:
    rest = num_examples - steps_per_epoch * global_batch_size
    if rest > 0:
        logger.info(
            "%s steps an epoch: the %d examples that come last in its order are left out, as in the original run "
            "(transformers' Trainer takes them as one step more)",
            f"{steps_per_epoch:,}",
            rest,
        )


def _choose_checkpointing(settings: RunSettings, plan: Plan | None) -> RunSettings:
    """The settings with as many recomputed layers as the plan has chosen; with none where there is no plan."""
    if settings.model.checkpointing != AUTO:
        return settings
    chosen = plan.setup.num_checkpointed if plan else False
    return dataclasses.replace(
        settings,
        model=dataclasses.replace(settings.model, checkpointing=chosen),
        flags={**settings.flags, "gradient_checkpointing": chosen},
    )


def _limit_memory(settings: RunSettings, device: torch.device) -> None:
    """Limit torch's GPU allocator to `--memory_limit` less what CUDA's context takes. On a CPU only the plan obeys it.

    Raises NotEnoughSpace for a limit that the context alone exceeds.
    """
    if device.type != "cuda":
        return
    share = 1.0  # set in any case: an earlier run of this process may have set another
    if settings.memory_limit:
        total = torch.cuda.get_device_properties(device).total_memory
        room = parse_memory_limit(settings.memory_limit) - CUDA_CONTEXT_BYTES
        if room <= 0:
            raise NotEnoughSpace(
                f"--memory_limit {settings.memory_limit}: CUDA's context alone takes some "
                f"{CUDA_CONTEXT_BYTES / 1e9:.2f} GB of it; give more than that"
            )
        share = min(1.0, room / total)
    torch.cuda.set_per_process_memory_fraction(share, device)


def _keeps_gradients(model: nn.Module, plan: Plan | None, world: World) -> bool:
    """Whether whole gradients are kept between micro-batches: as planned, so that the planned peak holds."""
    if plan and is_sharded(model):
        return plan.setup.whole_gradients
    return decide_gradient_sync(model, world)


def _make_trainee(
    model: nn.Module, settings: RunSettings, base: Base, data: TrainingData, *, num_steps: int, world: World
) -> Trainee:
    on_gpu = world.device.type == "cuda" and not settings.model.sharding.offload
    optimizer = make_optimizer(model, settings.optimizer, by_chance=settings.model.is_fast, fused=on_gpu)
    warmup, num_parameters = count_warmup_steps(settings.optimizer, num_steps), count_parameters(model)
    factor = functools.partial(
        learning_rate_factor,
        schedule=settings.optimizer.schedule,
        least=settings.optimizer.least_rate,
        num_warmup_steps=warmup,
        num_steps=num_steps,
    )
    identity = _identify(settings, base, data, num_parameters=num_parameters, num_steps=num_steps, warmup=warmup)
    millions = (count_parameters(model, trained_only=True) / 1e6, num_parameters / 1e6)
    logger.info("%s steps, %s of warm-up; %.1f of %.1f M parameters are trained", f"{num_steps:,}", warmup, *millions)
    return Trainee(
        model=model,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
        optimizer_name=settings.optimizer.name,
        progress=Progress(),
        identity=identity,
        world=world,
    )


_BIN_END_BYTES = 1 << 20


def _identify(
    settings: RunSettings, base: Base, data: TrainingData, *, num_parameters: int, num_steps: int, warmup: int
) -> dict[str, object]:
    """What must be equal in a checkpoint and in the run that resumes it. The number of processes may differ.

    An adapter's checkpoint does not hold the frozen base, so its base must be the same model, too.
    """
    digest = hashlib.sha256()
    sequences = data.sequences
    tensors = [sequences.ids, sequences.offsets, sequences.prompt_lengths]
    if not sequences.trains_ends_alone:
        tensors.append(sequences.trained)
    if isinstance(data, PreferenceDataset) and data.is_good is not None:
        tensors.append(data.is_good)
    for tensor in tensors:
        digest.update(tensor.numpy())
    frozen = {} if settings.model.is_full else {"base": f"sha256 {_digest_base(base)[:16]}"}
    by_micro_batch = settings.batch.loss_average == "micro_batch"
    return {
        **frozen,
        "data": f"{len(data)} examples, sha256 {digest.hexdigest()[:16]}",
        "micro_batch_size": settings.batch.micro_batch_size if by_micro_batch else "any",
        "parameters": num_parameters,
        "steps": num_steps,
        "warmup_steps": warmup,
        **settings.identity,
    }


def _digest_base(base: Base) -> str:
    """A digest of the base's tensors, wherever its folder lies.

    Of a .bin file, a zip archive, its end is enough: the checksums of all its members stand there.
    """
    if base.fingerprint:
        return base.fingerprint
    digest = hashlib.sha256()
    for path in sorted(base.folder.glob("*.bin")):
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _BIN_END_BYTES))
            digest.update(f"{path.name} {path.stat().st_size}\n".encode() + file.read())
    return digest.hexdigest()
