"""A run before its first step: data, plan, model, optimizer and schedule, and what a checkpoint must share with it."""

import dataclasses
import functools
import hashlib
import logging
from dataclasses import dataclass

import torch
from torch import nn

from alpaca.data.batching import count_steps_per_epoch
from alpaca.data.examples import EncodedDataset
from alpaca.errors import NotEnoughSpace
from alpaca.memory import CUDA_CONTEXT_BYTES
from alpaca.training.checkpoints.state import Progress, Trainee
from alpaca.training.config import (
    TrainConfig,
    count_steps,
    count_warmup_steps,
    learning_rate_factor,
    parse_fsdp,
    parse_memory_limit,
)
from alpaca.training.dataset import encode_data
from alpaca.training.distributed import World, decide_gradient_sync, is_sharded
from alpaca.training.model.base import Base, open_base
from alpaca.training.model.building import count_parameters, group_parameters, load_model
from alpaca.training.model.layers import AUTO, parse_checkpointing
from alpaca.training.model.optimizer import StochasticAdamW
from alpaca.training.planning.feasibility import check_plan, survey
from alpaca.training.planning.plan import Plan
from alpaca.training.report.summary import MemoryMeter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything the loop works with, made by `prepare`.

    held_out: None where nothing is evaluated.    keeps_gradients: see `decide_gradient_sync`.
    """

    config: TrainConfig
    base: Base
    data: EncodedDataset
    held_out: EncodedDataset | None
    trainee: Trainee
    num_steps: int
    steps_per_epoch: int
    keeps_gradients: bool
    plan: Plan | None = None  # for a model of a kind that can be planned
    memory: MemoryMeter

    @property
    def world(self) -> World:
        return self.trainee.world

    @property
    def progress(self) -> Progress:
        return self.trainee.progress


def prepare(config: TrainConfig, world: World) -> Run:
    """Read the data, load the model, make optimizer and schedule. `config` is resolved."""
    base = open_base(config)
    data, held_out = encode_data(config, base.tokenizer, progress=world.is_main)
    steps_per_epoch = count_steps_per_epoch(len(data), global_batch_size=config.global_batch_size)
    num_steps = count_steps(config, steps_per_epoch)
    memory = MemoryMeter(world.device)
    hardware = survey(config, world)
    plan = world.together(lambda: check_plan(config, base, data, hardware, num_processes=world.num_processes))
    config = _settle(config, plan)
    _limit_memory(config, world.device)
    if config.tf32:
        torch.set_float32_matmul_precision("high")
    trainee = _make_trainee(load_model(base, config, world), config, base, data, num_steps=num_steps, world=world)
    torch.manual_seed(config.seed + world.rank)  # dropout; each process draws its own
    return Run(
        config=config,
        base=base,
        data=data,
        held_out=held_out,
        trainee=trainee,
        num_steps=num_steps,
        steps_per_epoch=steps_per_epoch,
        keeps_gradients=_keeps_gradients(trainee.model, plan, world),
        plan=plan,
        memory=memory,
    )


def _settle(config: TrainConfig, plan: Plan | None) -> TrainConfig:
    """With the number of recomputed layers that the plan has chosen; none where there is no plan."""
    if parse_checkpointing(config.gradient_checkpointing) != AUTO:
        return config
    return dataclasses.replace(config, gradient_checkpointing=plan.setup.num_checkpointed if plan else False)


def _limit_memory(config: TrainConfig, device: torch.device) -> None:
    """Hold torch's allocator to `--memory_limit`, less CUDA's context. On a CPU the plan alone keeps to it.

    Raises NotEnoughSpace for a limit that the context alone exceeds.
    """
    if device.type != "cuda":
        return
    share = 1.0  # also takes back what an earlier run of this process set
    if config.memory_limit:
        total = torch.cuda.get_device_properties(device).total_memory
        room = parse_memory_limit(config.memory_limit) - CUDA_CONTEXT_BYTES
        if room <= 0:
            raise NotEnoughSpace(
                f"--memory_limit {config.memory_limit}: CUDA's context alone takes some "
                f"{CUDA_CONTEXT_BYTES / 1e9:.2f} GB of it; give more than that"
            )
        share = min(1.0, room / total)
    torch.cuda.set_per_process_memory_fraction(share, device)


def _keeps_gradients(model: nn.Module, plan: Plan | None, world: World) -> bool:
    """As planned, so that the planned peak is what happens."""
    if plan and is_sharded(model):
        return plan.setup.whole_gradients
    return decide_gradient_sync(model, world)


def _make_trainee(
    model: nn.Module, config: TrainConfig, base: Base, data: EncodedDataset, *, num_steps: int, world: World
) -> Trainee:
    optimizer = _make_optimizer(model, config, world)
    warmup, num_parameters = count_warmup_steps(config, num_steps), count_parameters(model)
    factor = functools.partial(
        learning_rate_factor, schedule=config.lr_scheduler_type, num_warmup_steps=warmup, num_steps=num_steps
    )
    identity = _identify(config, base, data, num_parameters=num_parameters, num_steps=num_steps, warmup=warmup)
    millions = (count_parameters(model, trained_only=True) / 1e6, num_parameters / 1e6)
    logger.info("%s steps, %s of warm-up; %.1f of %.1f M parameters are trained", f"{num_steps:,}", warmup, *millions)
    return Trainee(
        model=model,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
        progress=Progress(),
        identity=identity,
        world=world,
    )


def _make_optimizer(model: nn.Module, config: TrainConfig, world: World) -> torch.optim.Optimizer:
    groups, betas = group_parameters(model, weight_decay=config.weight_decay), (config.adam_beta1, config.adam_beta2)
    if config.numerics == "fast":
        logger.info("numerics fast: weights, gradients and moments are bfloat16, updates rounded by chance")
        return StochasticAdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, seed=config.seed)
    on_gpu = world.device.type == "cuda" and not parse_fsdp(config.fsdp).offload
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=on_gpu or None
    )


_IDENTITY_FIELDS = (
    "adam_beta1", "adam_beta2", "adam_epsilon", "base_quantization", "global_batch_size", "learning_rate", "lora_alpha",
    "lora_dropout", "lora_r", "lora_target_modules", "loss_average", "lr_scheduler_type", "max_grad_norm", "method",
    "numerics", "seed", "use_dora", "use_rslora", "weight_decay",
)  # fmt: skip
_BIN_END_BYTES = 1 << 20


def _identify(
    config: TrainConfig, base: Base, data: EncodedDataset, *, num_parameters: int, num_steps: int, warmup: int
) -> dict[str, object]:
    """What a checkpoint must share with a run that resumes it; the layout of processes is not among it.

    An adapter's checkpoint does not hold the frozen base, so the base must be the same; a whole model's holds it all.
    """
    digest = hashlib.sha256()
    for tensor in (data.ids, data.offsets, data.prompt_lengths):
        digest.update(tensor.numpy())
    frozen = {} if config.method == "full" else {"base": f"sha256 {_digest_base(base)[:16]}"}
    by_micro_batch = config.loss_average == "micro_batch"
    return {
        **frozen,
        "data": f"{len(data)} examples, sha256 {digest.hexdigest()[:16]}",
        "micro_batch_size": config.per_device_train_batch_size if by_micro_batch else "any",
        "parameters": num_parameters,
        "steps": num_steps,
        "warmup_steps": warmup,
        **{name: getattr(config, name) for name in _IDENTITY_FIELDS},
    }


def _digest_base(base: Base) -> str:
    """Of the base's tensors, wherever its folder is; of a .bin file, of its end, where the checksums of all stand."""
    if base.fingerprint:
        return base.fingerprint
    digest = hashlib.sha256()
    for path in sorted(base.folder.glob("*.bin")):
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _BIN_END_BYTES))
            digest.update(f"{path.name} {path.stat().st_size}\n".encode() + file.read())
    return digest.hexdigest()
