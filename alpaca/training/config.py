"""What a training run is: one frozen dataclass, its recipes, and the checks on it.

Its fields are the command line's flags (flags.py).
"""

import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from alpaca.errors import InputError
from alpaca.files.outputs import require_apart
from alpaca.formats.hf.folder import FLOAT_DTYPES
from alpaca.training.limits import check_each_value, parse_memory
from alpaca.training.model.layers import parse_checkpointing

logger = logging.getLogger(__name__)

DEFAULT_GLOBAL_BATCH_SIZE = 128
DEFAULT_MICRO_BATCH_SIZE = 4
# What a recipe sets where no flag does. The fields' defaults are alpaca-7b.
RECIPES: dict[str, dict[str, object]] = {
    "alpaca-7b": {},
    "alpaca-13b": {"learning_rate": 1e-5, "num_train_epochs": 5.0},
    "alpaca-lora": {
        "method": "lora", "base_quantization": "int8", "train_on_inputs": True, "learning_rate": 3e-4,
        "num_train_epochs": 3.0, "model_max_length": 256, "val_set_size": 2000, "lr_scheduler_type": "linear",
        "warmup_steps": 100.0, "logging_steps": 10, "eval_strategy": "steps", "eval_steps": 200, "save_steps": 200,
        "save_total_limit": 3,
    },
}  # fmt: skip
ADAPTER_LEARNING_RATE = 3e-4  # alpaca-lora's; a full fine-tune's hardly moves an adapter
ADAPTER_DEFAULTS: dict[str, object] = {"lora_r": 8, "lora_alpha": 16.0, "lora_dropout": 0.05}
ALL_LINEAR = "all-linear"
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt")
METHODS = ("full", "lora", "qlora")
NUMERICS = ("stanford", "fast")


def _flag(help: str, *choices: str) -> dict[str, object]:
    return {"help": help, "choices": choices}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. None means "worked out" (`resolve`) or "none"; the defaults are the recipe alpaca-7b."""

    model_name_or_path: str = field(metadata=_flag("folder of the base model (or its Hugging Face name)"))
    data_path: str = field(metadata=_flag("JSON list, JSON lines, or the name of a Hugging Face data set"))
    tokenizer_name_or_path: str | None = field(default=None, metadata=_flag("folder of the tokenizer: the model's"))
    output_dir: str = field(default="alpaca_out", metadata=_flag("where the fine-tuned model goes"))
    recipe: str = field(
        default="alpaca-7b",
        metadata=_flag(
            "defaults of the flags not given. alpaca-lora: its 8-bit base, rank, rates, lengths and loss on prompts "
            "too; unlike the original: Stanford's prompt (no line feed after Response:, so that predict.py's fits), "
            "no left padding, bfloat16 for float16, a seeded order, and the last weights rather than the best",
            *RECIPES,
        ),
    )
    method: str = field(
        default="full",
        metadata=_flag(
            "full: every weight; lora: an adapter on a frozen base; qlora: the same on a base in 4 bit", *METHODS
        ),
    )
    lora_r: int | None = field(default=None, metadata=_flag("rank of the adapter: 8"))
    lora_alpha: float | None = field(
        default=None, metadata=_flag("scale of the adapter, divided by its rank (rsLoRA: by the root of it): 16")
    )
    lora_dropout: float | None = field(default=None, metadata=_flag("dropout before the adapter's matrices: 0.05"))
    lora_target_modules: str | None = field(
        default=None,
        metadata=_flag(
            f'layers that get one: "q_proj,v_proj" (BLOOM: query_key_value), or "{ALL_LINEAR}": all of a decoder layer'
        ),
    )
    use_dora: bool = field(default=False, metadata=_flag("learn magnitudes apart from directions (DoRA)"))
    use_rslora: bool = field(default=False, metadata=_flag("rank-stabilized scale (rsLoRA)"))
    base_quantization: str | None = field(
        default=None,
        metadata=_flag(
            "precision of an adapter's frozen base: none with lora, nf4 (double quantisation) with qlora",
            "none", "int8", "nf4",
        ),
    )  # fmt: skip
    train_on_inputs: bool = field(default=False, metadata=_flag("prompts carry loss too, as in alpaca-lora"))
    cache_dir: str | None = field(default=None, metadata=_flag("where models named by their hub name are kept"))

    model_max_length: int = field(default=512, metadata=_flag("tokens an example is cut to"))
    val_set_size: int = field(default=0, metadata=_flag("examples of data_path held out for evaluation"))
    eval_fraction: float = field(default=0.0, metadata=_flag("share of data_path held out, instead of a number"))
    eval_data_path: str | None = field(
        default=None, metadata=_flag("examples to evaluate on, instead of held-out ones")
    )

    num_train_epochs: float = field(default=3.0, metadata=_flag("passes over the data"))
    max_steps: int = field(default=-1, metadata=_flag("optimizer steps instead of epochs, where above 0"))
    global_batch_size: int | None = field(default=None, metadata=_flag("examples of an optimizer step: 128"))
    per_device_train_batch_size: int | None = field(default=None, metadata=_flag("examples of a micro-batch: 4"))
    per_device_eval_batch_size: int = field(default=4, metadata=_flag("examples of a micro-batch in evaluation"))
    gradient_accumulation_steps: int | None = field(default=None, metadata=_flag("micro-batches of a step: worked out"))
    padding_free: bool = field(
        default=True, metadata=_flag("lay examples end to end in micro-batches of as many tokens; False pads them")
    )
    loss_average: str = field(
        default="token",
        metadata=_flag("mean over a step's target tokens, or of the micro-batches' means", "token", "micro_batch"),
    )

    learning_rate: float = field(
        default=2e-5, metadata=_flag(f"highest learning rate; with lora and qlora {ADAPTER_LEARNING_RATE:g}")
    )
    lr_scheduler_type: str = field(default="cosine", metadata=_flag("schedule of the learning rate", *SCHEDULES))
    warmup_ratio: float = field(default=0.03, metadata=_flag("share of the steps with a rising learning rate"))
    warmup_steps: float = field(default=0.0, metadata=_flag("their number instead, where above 0 (below 1: a ratio)"))
    optim: str = field(
        default="adamw_torch", metadata=_flag("optimizer (fused on a GPU)", "adamw_torch", "adamw_torch_fused")
    )
    weight_decay: float = field(default=0.0, metadata=_flag("not applied to biases and norms"))
    adam_beta1: float = field(default=0.9, metadata=_flag("AdamW's first beta"))
    adam_beta2: float = field(default=0.999, metadata=_flag("AdamW's second beta"))
    adam_epsilon: float = field(default=1e-8, metadata=_flag("AdamW's epsilon"))
    max_grad_norm: float = field(default=1.0, metadata=_flag("gradients are clipped to this norm; 0 does not clip"))
    seed: int = field(default=42, metadata=_flag("of the order of the data, held-out examples and dropout"))

    numerics: str = field(
        default="stanford",
        metadata=_flag(
            "stanford: float32 weights, gradients and moments; fast: all of them bfloat16, what the optimizer writes "
            "rounded by chance: half the memory, or five eighths with several micro-batches, whose gradients are added "
            "up in float32 (--method full; computes in bfloat16 whatever --bf16 says)",
            *NUMERICS,
        ),
    )
    bf16: bool = field(default=True, metadata=_flag("bfloat16 autocast over float32 weights, where the GPU has it"))
    tf32: bool = field(default=True, metadata=_flag("TF32 matrix products, where the GPU has them"))
    gradient_checkpointing: bool | int | str = field(
        default="auto",
        metadata=_flag(
            "decoder layers whose activations are recomputed in the backward pass (less memory, slower, the same "
            "numbers): auto for the fewest with which the run fits, True for all, False for none, or how many"
        ),
    )
    compile_layers: bool = field(
        default=False, metadata=_flag("compile decoder layers by torch.compile (needs a C compiler): faster steps")
    )
    memory_limit: str | None = field(
        default=None,
        metadata=_flag('the most this run may take of each device ("80GB", "7.4GiB"): what is free there now'),
    )
    fsdp: str = field(
        default="", metadata=_flag('"full_shard auto_wrap", shard_grad_op or hybrid_shard, with "offload" added')
    )
    fsdp_transformer_layer_cls_to_wrap: str | None = field(
        default=None, metadata=_flag("taken from the model; a wrong name is corrected")
    )

    logging_steps: int = field(default=1, metadata=_flag("steps between log entries"))
    report_to: str = field(default="tensorboard", metadata=_flag("where they go", "tensorboard", "wandb", "none"))
    run_name: str | None = field(default=None, metadata=_flag("the run's name there: that of output_dir"))
    eval_strategy: str = field(default="no", metadata=_flag("when to evaluate", "no", "steps", "epoch"))
    eval_steps: int | None = field(default=None, metadata=_flag("steps between evaluations: logging_steps"))
    save_strategy: str = field(default="steps", metadata=_flag("when to save checkpoints", "no", "steps", "epoch"))
    save_steps: int = field(default=2000, metadata=_flag("steps between checkpoints"))
    save_minutes: float = field(default=10.0, metadata=_flag("minutes between checkpoints, besides; 0 is off"))
    save_total_limit: int = field(default=1, metadata=_flag("checkpoints that are kept"))
    save_dtype: str | None = field(
        default=None, metadata=_flag("dtype of the final weights: the base model's", *FLOAT_DTYPES)
    )
    resume_from_checkpoint: str | None = field(default=None, metadata=_flag('"auto", or the folder of a checkpoint'))
    overwrite_output_dir: bool = field(default=False, metadata=_flag("replace what output_dir holds"))

    num_samples: int = field(default=3, metadata=_flag("prompts answered before and after, for report.html"))
    plan_only: bool = field(default=False, metadata=_flag("show what the run will take, as a table and JSON, and end"))
    plan_memory: str | None = field(default=None, metadata=_flag('plan for GPUs of this memory ("80GB"): those here'))
    plan_gpus: int | None = field(default=None, metadata=_flag("plan for so many of them: torchrun's number"))
    plan_gpus_per_machine: int | None = field(
        default=None, metadata=_flag("of them in one machine, over which --fsdp hybrid_shard shards: 8")
    )
    plan_tflops: float | None = field(default=None, metadata=_flag("peak of each in TFLOP/s: a usual card's"))

    @property
    def computes_low(self) -> bool:
        """Whether matrix products are bfloat16's."""
        return self.bf16 or self.numerics == "fast"

    @property
    def autocasts(self) -> bool:
        """Whether that is by autocast, from weights in another dtype."""
        return self.bf16 and self.numerics != "fast"


def make_config(given: Mapping[str, object]) -> TrainConfig:
    """Given values over those of their recipe. Raises InputError."""
    recipe = given.get("recipe", "alpaca-7b")
    if recipe not in RECIPES:
        raise InputError(f"--recipe: expected one of {', '.join(RECIPES)}, found {recipe!r}")
    missing = [f"--{name}" for name in ("model_name_or_path", "data_path") if not given.get(name)]
    if missing:
        raise InputError(f"{' and '.join(missing)} must be given; --help lists the flags")
    values = {**RECIPES[recipe], **given}
    if values.get("method", "full") != "full" and "learning_rate" not in given:
        values["learning_rate"] = ADAPTER_LEARNING_RATE
    if given.get("method") == "qlora" and given.get("base_quantization") is None:
        values["base_quantization"] = None  # a recipe's gives way: qlora is 4 bit
    if "val_set_size" not in given and (given.get("eval_fraction") or given.get("eval_data_path")):
        values["val_set_size"] = 0  # a recipe's gives way
    return TrainConfig(**values)


# Resolving ----------------------------------------------------------------------------------------------------


def resolve(config: TrainConfig, *, num_processes: int, device: torch.device) -> TrainConfig:
    """The configuration with everything worked out that does not depend on the data.

    Checks every value; drops bf16 and tf32 where the hardware has none. Raises InputError.
    """
    check_values(config)
    config = _resolve_method(config, num_processes)
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


def count_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    return config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * steps_per_epoch)


def count_held_out(config: TrainConfig, num_examples: int) -> int:
    """Examples of data_path that are held out: `--val_set_size`, or `--eval_fraction` of them, at least one.

    Raises InputError for a fraction that leaves none to train on.
    """
    if not config.eval_fraction:
        return config.val_set_size
    held_out = max(1, round(config.eval_fraction * num_examples))
    if held_out >= num_examples:
        raise InputError(
            f"--eval_fraction {config.eval_fraction:g} holds out {held_out} of {num_examples} examples of "
            f"{config.data_path}, and leaves none to train on; give a smaller share, or --eval_data_path"
        )
    return held_out


def count_warmup_steps(config: TrainConfig, num_steps: int) -> int:
    """Steps with a rising learning rate, rounded up as transformers does."""
    if config.warmup_steps >= 1:
        return int(config.warmup_steps)
    return math.ceil((config.warmup_steps or config.warmup_ratio) * num_steps)


def learning_rate_factor(step: int, *, schedule: str, num_warmup_steps: int, num_steps: int) -> float:
    """The share of the highest learning rate in a step (counted from 0), by transformers' schedules.

    Written here because transformers' own, with what they import, take four seconds of a start.
    """
    if schedule == "constant":
        return 1.0
    if step < num_warmup_steps:
        return step / num_warmup_steps
    if schedule == "constant_with_warmup":
        return 1.0
    if schedule == "inverse_sqrt":
        timescale = num_warmup_steps or 10_000
        return ((step - num_warmup_steps + timescale) / timescale) ** -0.5
    progress = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    return max(0.0, 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


def check_values(config: TrainConfig) -> None:
    """Raise InputError for the first value that cannot be meant."""
    check_each_value(config)
    if config.max_steps == 0 or config.max_steps < -1:
        raise InputError(f"--max_steps: expected a number above 0 (or -1 for none), found {config.max_steps}")
    parse_fsdp(config.fsdp)
    parse_checkpointing(config.gradient_checkpointing)
    _check_method(config)
    _check_numerics(config)
    _check_evaluation(config)
    for name in ("model_name_or_path", "tokenizer_name_or_path"):
        source = getattr(config, name)
        if source and Path(source).resolve() == Path(config.output_dir).resolve():
            raise InputError(f"--output_dir is also --{name} ({source}), which would be lost; choose another folder")
    for name in ("model_name_or_path", "tokenizer_name_or_path", "data_path", "eval_data_path"):
        for folder in Path(config.output_dir).glob("checkpoint-*"):  # a new run removes them, others' too
            require_apart(folder, {f"--{name}": Path(source) if (source := getattr(config, name)) else None})


def parse_memory_limit(text: str) -> int:
    """Bytes of `--memory_limit`. Raises InputError."""
    return parse_memory("memory_limit", text)


def _check_evaluation(config: TrainConfig) -> None:
    given = [name for name in ("val_set_size", "eval_fraction", "eval_data_path") if getattr(config, name)]
    if config.eval_strategy != "no" and not given:
        raise InputError(
            f"--eval_strategy {config.eval_strategy} needs examples to evaluate on: hold some out with "
            "--val_set_size N or --eval_fraction 0.02, or name a file with --eval_data_path"
        )
    if len(given) > 1:
        raise InputError(f"--{' and --'.join(given)} both say what to evaluate on; give one of them")


_ADAPTER_FLAGS = (
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora", "use_rslora", "base_quantization",
)  # fmt: skip


def _check_method(config: TrainConfig) -> None:
    """Refuse flags of another method than the one asked for, and numbers that no adapter can have."""
    for name in _ADAPTER_FLAGS if config.method == "full" else ():
        if getattr(config, name) not in (None, False, "none"):
            raise InputError(
                f"--{name} {getattr(config, name)} is for adapters, and --method full trains every weight: add "
                "--method lora or qlora, or leave it out"
            )
    if config.method == "qlora" and config.base_quantization == "none":
        raise InputError("--method qlora --base_quantization none contradict each other; --method lora is that")
    if config.compile_layers and config.base_quantization == "int8":
        raise InputError(
            "--compile_layers True does not go with --base_quantization int8 (bitsandbytes' 8-bit layers keep state of "
            "their own between calls); use --base_quantization nf4 or none, or leave --compile_layers out"
        )
    if config.use_dora and config.base_quantization == "int8":
        raise InputError(
            "--use_dora True does not go with --base_quantization int8 (PEFT loses the scales of bitsandbytes' 8-bit "
            "layers when it measures them); use --base_quantization nf4 or none"
        )
    if config.lora_alpha is not None and not config.lora_alpha > 0:
        raise InputError(f"--lora_alpha: expected a number above 0, found {config.lora_alpha}")
    if config.lora_target_modules is not None and not target_names(config.lora_target_modules):
        raise InputError(
            f'--lora_target_modules: expected names such as "q_proj,v_proj", or "{ALL_LINEAR}"; '
            f"found {config.lora_target_modules!r}"
        )


def _check_numerics(config: TrainConfig) -> None:
    if config.numerics == "fast" and config.method != "full":
        raise InputError(
            f"--numerics fast is for --method full, found --method {config.method}: an adapter is a few float32 "
            "matrices on a base that is frozen in bfloat16 or fewer bits already, so nothing would be won; leave it out"
        )


def target_names(text: str) -> list[str]:
    """The names in `--lora_target_modules`, separated by commas or spaces."""
    return text.replace(",", " ").split()


def _resolve_method(config: TrainConfig, num_processes: int) -> TrainConfig:
    """Fill in an adapter's numbers and its base's precision. Raises InputError for an 8-bit base that is sharded."""
    if config.method == "full":
        return dataclasses.replace(config, base_quantization="none")
    if config.base_quantization == "int8" and (num_processes > 1 or parse_fsdp(config.fsdp).offload):
        raise InputError(
            "--base_quantization int8 cannot be sharded over processes or offloaded (the scales of bitsandbytes' "
            "8-bit layers do not travel); use --base_quantization nf4 or none, or one process"
        )
    given = {name: getattr(config, name) for name in ADAPTER_DEFAULTS if getattr(config, name) is not None}
    quantization = config.base_quantization or ("nf4" if config.method == "qlora" else "none")
    return dataclasses.replace(config, **{**ADAPTER_DEFAULTS, **given}, base_quantization=quantization)


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """What the words of `--fsdp` ask for. hybrid: over the processes of one machine, with a copy on each machine."""

    reshard_after_forward: bool = True
    hybrid: bool = False
    offload: bool = False


_SHARDINGS = {
    "full_shard": Sharding(),
    "shard_grad_op": Sharding(reshard_after_forward=False),
    "hybrid_shard": Sharding(hybrid=True),
    "hybrid_shard_zero2": Sharding(hybrid=True, reshard_after_forward=False),
}


def parse_fsdp(text: str) -> Sharding:
    """The words of `--fsdp`; empty, True and False mean full sharding where there are several processes."""
    words = [word for word in text.replace(",", " ").split() if word.lower() not in ("true", "false", "auto_wrap")]
    unknown = [word for word in words if word not in (*_SHARDINGS, "offload")]
    kinds = [word for word in words if word in _SHARDINGS]
    if unknown or len(kinds) > 1:
        raise InputError(
            f"--fsdp: expected one of {', '.join(_SHARDINGS)}, with auto_wrap and offload added or not; found {text!r}"
        )
    return dataclasses.replace(_SHARDINGS[kinds[0] if kinds else "full_shard"], offload="offload" in words)


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


def _resolve_hardware(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Drop what the hardware lacks, with one warning. Raises InputError for fast numerics on a GPU without bfloat16.

    A CPU computes in bfloat16 for fast numerics, if slowly; there is no autocast then that bf16 could ask for.
    """
    if config.numerics == "fast" and device.type == "cuda" and not _has_bf16(device):
        raise InputError(
            f"--numerics fast computes in bfloat16, and {torch.cuda.get_device_name(device)} has none; "
            "use --numerics stanford"
        )
    has = {"bf16": _has_bf16(device) or config.numerics == "fast", "tf32": _has_tf32(device)}
    dropped = [name for name, there in has.items() if getattr(config, name) and not there]
    if dropped:
        logger.warning("%s dropped: this %s has none; float32 is used", " and ".join(dropped), device.type.upper())
    return dataclasses.replace(config, **dict.fromkeys(dropped, False))


def _has_bf16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def config_json(config: TrainConfig) -> dict[str, object]:
    """The configuration for a JSON file; `TrainConfig(**…)` of it is the same."""
    return dataclasses.asdict(config)
