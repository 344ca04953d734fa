"""From the flags as given to the settings of a run: all is worked out here, once, that does not depend on the data."""

import dataclasses
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING

from alpaca.errors import InputError
from alpaca.training.configuration.adapters import make_adapter_settings
from alpaca.training.configuration.checks import check_processes, check_values
from alpaca.training.configuration.config import (
    ADAPTER_DEFAULTS,
    DEFAULT_GLOBAL_BATCH_SIZE,
    DEFAULT_INIT,
    DEFAULT_MICRO_BATCH_SIZE,
    OPTIMIZERS,
    TrainConfig,
    config_json,
)
from alpaca.training.configuration.objective import objective_identity, objective_settings, resolve_objective
from alpaca.training.configuration.parsing import parse_checkpointing, parse_fsdp
from alpaca.training.configuration.settings import (
    BaseSettings,
    BatchSettings,
    BestSettings,
    CheckpointSettings,
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    ReportSettings,
    RunSettings,
)

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


# The flags in which a checkpoint must agree with the run that resumes it.
_IDENTITY_FLAGS = (
    "adam_beta1", "adam_beta2", "adam_epsilon", "base_quantization", "global_batch_size", "learning_rate", "lora_alpha",
    "lora_dropout", "lora_r", "lora_target_modules", "loss_average", "lr_scheduler_type", "max_grad_norm", "method",
    "numerics", "seed", "use_dora", "use_rslora", "weight_decay",
)  # fmt: skip
_LATER_FLAGS = (
    "min_lr_rate", "label_smoothing_factor", "neftune_noise_alpha", "lora_rank_pattern", "lora_alpha_pattern",
    "lora_init", "lora_modules_to_save", "trainable_token_indices", "loraplus_lr_ratio",
)  # fmt: skip
_KINDS = {  # spellings of --optim by what they are; fused or not is the device's
    **{name: name for name in OPTIMIZERS},
    "adamw_torch_fused": "adamw_torch",
    "adamw_bnb_8bit": "adamw_8bit",
}


def resolve_settings(config: TrainConfig, *, num_processes: int, device: "torch.device") -> RunSettings:
    """The settings of a run on this hardware. Raises InputError as `resolve` does."""
    return make_settings(resolve(config, num_processes=num_processes, device=device))


def make_settings(config: TrainConfig) -> RunSettings:
    """A resolved configuration as one typed part for each room."""
    return RunSettings(
        base=BaseSettings(
            model=config.model_name_or_path,
            tokenizer=config.tokenizer_name_or_path,
            cache_dir=config.cache_dir,
            needs_pad_token=config.method == "full",
        ),
        data=_data_settings(config),
        objective=objective_settings(config),
        model=_model_settings(config),
        batch=_batch_settings(config),
        optimizer=_optimizer_settings(config),
        checkpoints=_checkpoint_settings(config),
        best=BestSettings(is_loaded=config.load_best_model_at_end, patience=config.early_stopping_patience),
        report=_report_settings(config),
        memory_limit=config.memory_limit,
        tf32=config.tf32,
        identity={name: getattr(config, name) for name in _IDENTITY_FLAGS}
        | _later_identity(config)
        | objective_identity(config),
        flags=config_json(config),
    )


def _later_identity(config: TrainConfig) -> dict[str, object]:
    """Flags of later versions, where they are used: checkpoints of earlier ones do not know them."""
    values = {**{name: getattr(config, name) for name in _LATER_FLAGS}, "optim": _KINDS[config.optim]}
    usual = {"lora_init": DEFAULT_INIT, "optim": OPTIMIZERS[0]}
    return {name: value for name, value in values.items() if value and value != usual.get(name)}


def _data_settings(config: TrainConfig) -> DataSettings:
    return DataSettings(
        path=config.data_path,
        format=config.data_format,
        response_mark=config.response_mark,
        most_bytes=config.data_limit_mib << 20,
        prompt_template=config.prompt_template,
        prompt_boundary=config.prompt_boundary,
        eval_path=config.eval_data_path,
        num_held_out=config.val_set_size,
        held_out_share=config.eval_fraction,
        max_length=config.model_max_length,
        train_on_inputs=config.train_on_inputs,
        seed=config.seed,
        objective=config.objective,
    )


def _batch_settings(config: TrainConfig) -> BatchSettings:
    return BatchSettings(
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.per_device_train_batch_size,
        num_micro_batches=config.gradient_accumulation_steps,
        eval_micro_batch_size=config.per_device_eval_batch_size,
        max_length=config.model_max_length,
        loss_average=config.loss_average,
        label_smoothing=config.label_smoothing_factor,
        noise=config.neftune_noise_alpha,
        num_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        seed=config.seed,
    )


def _optimizer_settings(config: TrainConfig) -> OptimizerSettings:
    return OptimizerSettings(
        name=_KINDS[config.optim],
        b_ratio=config.loraplus_lr_ratio,
        learning_rate=config.learning_rate,
        schedule=config.lr_scheduler_type,
        least_rate=config.min_lr_rate,
        warmup_ratio=config.warmup_ratio,
        warmup_steps=config.warmup_steps,
        betas=(config.adam_beta1, config.adam_beta2),
        epsilon=config.adam_epsilon,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
    )


def _checkpoint_settings(config: TrainConfig) -> CheckpointSettings:
    return CheckpointSettings(
        output_dir=Path(config.output_dir),
        strategy=config.save_strategy,
        steps=config.save_steps,
        minutes=config.save_minutes,
        keep=config.save_total_limit,
        resume=config.resume_from_checkpoint,
        overwrite=config.overwrite_output_dir,
        final_dtype=config.save_dtype,
    )


def _report_settings(config: TrainConfig) -> ReportSettings:
    output_dir = Path(config.output_dir)
    return ReportSettings(
        output_dir=output_dir,
        report_to=config.report_to,
        run_name=config.run_name or output_dir.absolute().name,
        logging_steps=config.logging_steps,
        eval_strategy=config.eval_strategy,
        eval_steps=config.eval_steps,
        num_samples=config.num_samples,
        eval_tasks=config.eval_tasks,
    )


def _model_settings(config: TrainConfig) -> ModelSettings:
    return ModelSettings(
        method=config.method,
        adapter=make_adapter_settings(config),
        base_quantization=config.base_quantization or "none",
        numerics=config.numerics,
        bf16=config.bf16,
        padding_free=config.padding_free,
        checkpointing=parse_checkpointing(config.gradient_checkpointing),
        compile_layers=config.compile_layers,
        layer_class=config.fsdp_transformer_layer_cls_to_wrap,
        sharding=parse_fsdp(config.fsdp),
    )


def resolve(config: TrainConfig, *, num_processes: int, device: "torch.device") -> TrainConfig:
    """The flags with every open one filled in.

    Checks every value; drops bf16 and tf32 where the hardware has none. Raises InputError.
    """
    check_values(config)
    check_processes(config, num_processes)
    config = resolve_objective(_resolve_method(config))
    config = _resolve_batch(config, num_processes)
    config = _resolve_hardware(config, device)
    if config.loss_average == "micro_batch" and config.padding_free:
        logger.info("padded micro-batches: --loss_average micro_batch averages over the original's")
        config = dataclasses.replace(config, padding_free=False)
    asked = config.resume_from_checkpoint
    resume = {"true": "auto", "auto": "auto", "false": None, "none": None, "": None}.get(str(asked).lower(), asked)
    return dataclasses.replace(
        config, eval_steps=config.eval_steps or config.logging_steps, resume_from_checkpoint=resume
    )


def _resolve_method(config: TrainConfig) -> TrainConfig:
    """Fill in an adapter's numbers and its base's precision."""
    if config.method == "full":
        return dataclasses.replace(config, base_quantization="none")
    given = {name: getattr(config, name) for name in ADAPTER_DEFAULTS if getattr(config, name) is not None}
    if config.objective != "sft":  # dropout in one of two models that are compared is noise
        given = {"lora_dropout": 0.0, **given}
    quantization = config.base_quantization or ("nf4" if config.method == "qlora" else "none")
    return dataclasses.replace(config, **{**ADAPTER_DEFAULTS, **given}, base_quantization=quantization)


def _resolve_batch(config: TrainConfig, num_processes: int) -> TrainConfig:
    """Fill in global batch, micro-batch and accumulation, whichever of them were not given."""
    micro, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    product = micro * accumulation * num_processes if micro and accumulation else None
    batch = config.global_batch_size or product or DEFAULT_GLOBAL_BATCH_SIZE
    if product and accumulation != math.ceil(batch / (micro * num_processes)):
        raise InputError(
            f"--global_batch_size {batch} contradicts {_product(config, num_processes)} = {product}; "
            "leave one of the three out"
        )
    if not micro and accumulation:
        micro = math.ceil(batch / (accumulation * num_processes))
    micro = micro or DEFAULT_MICRO_BATCH_SIZE
    accumulation = math.ceil(batch / (micro * num_processes))
    resolved = dataclasses.replace(
        config, global_batch_size=batch, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation
    )
    _log_batch(resolved, num_processes)
    return resolved


def _log_batch(config: TrainConfig, num_processes: int) -> None:
    batch, product = config.global_batch_size, _product(config, num_processes)
    full = config.per_device_train_batch_size * config.gradient_accumulation_steps * num_processes
    text = f"global batch {batch}: {product} = {full}"
    if full != batch:
        text += ", the last micro-batches of a step are smaller or empty"
    if batch != DEFAULT_GLOBAL_BATCH_SIZE:
        text += f"; the recipe's is {DEFAULT_GLOBAL_BATCH_SIZE}"
    logger.info("%s", text)


def _product(config: TrainConfig, num_processes: int) -> str:
    processes = "1 process" if num_processes == 1 else f"{num_processes} processes"
    return f"{processes} × {config.per_device_train_batch_size} × {config.gradient_accumulation_steps}"


def _resolve_hardware(config: TrainConfig, device: "torch.device") -> TrainConfig:
    """Drop what the hardware lacks, with one warning. Raises InputError for fast numerics on a GPU without bfloat16.

    A CPU computes in bfloat16 for fast numerics, if slowly; there is no autocast then that bf16 could ask for.
    """
    if config.numerics == "fast" and device.type == "cuda" and not _has_bf16(device):
        import torch

        raise InputError(
            f"--numerics fast computes in bfloat16, and {torch.cuda.get_device_name(device)} has none; "
            "use --numerics stanford"
        )
    has = {"bf16": _has_bf16(device) or config.numerics == "fast", "tf32": _has_tf32(device)}
    dropped = [name for name, there in has.items() if getattr(config, name) and not there]
    if dropped:
        logger.warning("%s dropped: this %s has none; float32 is used", " and ".join(dropped), device.type.upper())
    return dataclasses.replace(config, **dict.fromkeys(dropped, False))


def _has_bf16(device: "torch.device") -> bool:
    import torch

    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _has_tf32(device: "torch.device") -> bool:
    import torch

    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
