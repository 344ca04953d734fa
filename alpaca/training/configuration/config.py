"""What a training run is asked to be: one frozen dataclass of plain values, and the recipes that fill it.

Its fields are the command line's flags (flags.py).
"""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from alpaca.architecture.families import USUAL_TARGETS
from alpaca.data.encoding.choosing import AUTO, BOUNDARIES
from alpaca.data.records import DATA_FORMATS
from alpaca.data.sources.formats import RESPONSE_MARK
from alpaca.data.sources.opening import MOST_BYTES
from alpaca.errors import InputError
from alpaca.formats.precisions import DTYPES

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
SCHEDULES = ("cosine", "cosine_with_min_lr", "linear", "constant", "constant_with_warmup", "inverse_sqrt")
DEFAULT_INIT = "default"
OPTIMIZERS = (
    "adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adafactor", "muon",
)  # fmt: skip
METHODS = ("full", "lora", "qlora")
# What a preference objective's own flags are where they are not given: TRL's.
OBJECTIVE_DEFAULTS: dict[str, dict[str, object]] = {
    "sft": {},
    "dpo": {"dpo_beta": 0.1, "dpo_label_smoothing": 0.0},
    "orpo": {"orpo_beta": 0.1},
    "kto": {"kto_beta": 0.1, "kto_desirable_weight": 1.0, "kto_undesirable_weight": 1.0},
}
PREFERENCE_RATES = {"full": 1e-6, "lora": 1e-5, "qlora": 1e-5}  # learning rates; SFT's would break the model
NUMERICS = ("stanford", "fast")


def _flag(help: str, *choices: str) -> dict[str, object]:
    return {"help": help, "choices": choices}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. None means "worked out" (`resolve`) or "none"; the defaults are the recipe alpaca-7b."""

    model_name_or_path: str = field(metadata=_flag("folder of the base model (or its Hugging Face name)"))
    data_path: str = field(
        metadata=_flag(
            "JSON, CSV, Parquet or Arrow (packed by gzip or zstd, too), or the name of a Hugging Face data set; "
            "several: the flag more than once, each PATH or PATH=WEIGHT (2: twice in an epoch; 0.5: half of it)"
        )
    )
    data_format: str = field(
        default=AUTO, metadata=_flag("form of the records; auto: as the first of them looks", *DATA_FORMATS)
    )
    response_mark: str = field(
        default=RESPONSE_MARK, metadata=_flag("of data_format text: what the answer stands behind")
    )
    data_limit_mib: int = field(default=MOST_BYTES >> 20, metadata=_flag("MiB of a data file, unpacked, at the most"))
    prompt_template: str = field(
        default=AUTO,
        metadata=_flag(
            "alpaca; alpaca_newline (a line feed after Response:); llama2, llama3, chatml; model (its own chat "
            "template); a Jinja file; or a text with {prompt}. auto: alpaca, and for conversations the model's own"
        ),
    )
    prompt_boundary: str = field(
        default=BOUNDARIES[0],
        metadata=_flag("merged: prompt and answer tokenized as one, the recipe; split: apart", *BOUNDARIES),
    )
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
    objective: str = field(
        default="sft",
        metadata=_flag(
            "sft: learn the answers; dpo, orpo: prefer chosen answers to rejected ones; kto: learn from answers that "
            "are labelled good or bad",
            *OBJECTIVE_DEFAULTS,
        ),
    )
    dpo_beta: float | None = field(default=None, metadata=_flag("dpo: how closely the base is kept to: 0.1"))
    dpo_label_smoothing: float | None = field(
        default=None, metadata=_flag("dpo: the probability that a pair is the wrong way round: 0")
    )
    orpo_beta: float | None = field(default=None, metadata=_flag("orpo: weight of the odds ratio (lambda): 0.1"))
    kto_beta: float | None = field(default=None, metadata=_flag("kto: how closely the base is kept to: 0.1"))
    kto_desirable_weight: float | None = field(default=None, metadata=_flag("kto: weight of good answers: 1"))
    kto_undesirable_weight: float | None = field(default=None, metadata=_flag("kto: weight of bad answers: 1"))

    lora_r: int | None = field(default=None, metadata=_flag("rank of the adapter: 8"))
    lora_alpha: float | None = field(
        default=None, metadata=_flag("scale of the adapter, divided by its rank (rsLoRA: by the root of it): 16")
    )
    lora_dropout: float | None = field(default=None, metadata=_flag("dropout before the adapter's matrices: 0.05"))
    lora_target_modules: str | None = field(
        default=None,
        metadata=_flag(
            f'layers that get one: "{",".join(USUAL_TARGETS)}" (BLOOM: query_key_value), or "{ALL_LINEAR}": all of a '
            "decoder layer"
        ),
    )
    lora_rank_pattern: str | None = field(
        default=None, metadata=_flag("ranks of layers by name that differ from lora_r: q_proj=16,v_proj=4")
    )
    lora_alpha_pattern: str | None = field(default=None, metadata=_flag("the same for lora_alpha"))
    lora_init: str = field(
        default=DEFAULT_INIT,
        metadata=_flag(
            "start of its matrices. default: it changes nothing; gaussian: the same, by another distribution; pissa, "
            "pissa_niter_N (by N iterations) and olora: the base's largest part; the base stays and is not changed, so "
            "what is written has twice the rank, less the start"
        ),
    )
    lora_modules_to_save: str | None = field(
        default=None, metadata=_flag("modules trained whole and saved beside it: embed_tokens,lm_head")
    )
    trainable_token_indices: str | None = field(
        default=None,
        metadata=_flag(
            "ids of tokens whose rows of embedding and head are trained beside it: 32000,32001; or added: those that "
            "the tokenizer has beyond its vocabulary"
        ),
    )
    loraplus_lr_ratio: float | None = field(
        default=None, metadata=_flag("learning rate of the adapter's B matrices over that of all else (LoRA+)")
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

    label_smoothing_factor: float = field(
        default=0.0,
        metadata=_flag("share of each target's weight spread over the vocabulary, in training; not in evaluation"),
    )

    neftune_noise_alpha: float = field(
        default=0.0,
        metadata=_flag("noise on embeddings in training (NEFTune), by each example's own length: 5 is usual; 0: none"),
    )

    learning_rate: float = field(
        default=2e-5,
        metadata=_flag(
            f"highest learning rate; with lora and qlora {ADAPTER_LEARNING_RATE:g}; of objectives that compare answers "
            f"{PREFERENCE_RATES['full']:g}, with adapters {PREFERENCE_RATES['lora']:g}"
        ),
    )
    lr_scheduler_type: str = field(default="cosine", metadata=_flag("schedule of the learning rate", *SCHEDULES))
    min_lr_rate: float = field(
        default=0.0, metadata=_flag("share of the highest rate that cosine_with_min_lr ends at, such as 0.1")
    )
    warmup_ratio: float = field(default=0.03, metadata=_flag("share of the steps with a rising learning rate"))
    warmup_steps: float = field(default=0.0, metadata=_flag("their number instead, where above 0 (below 1: a ratio)"))
    optim: str = field(
        default=OPTIMIZERS[0],
        metadata=_flag(
            "optimizer. adamw_torch: fused on a GPU; the 8-bit ones: bitsandbytes' (paged: moments move to main memory "
            "where the GPU's is short); adafactor: transformers', by the rate that is given; muon: torch's for the "
            "matrices inside the layers, AdamW for the rest",
            *OPTIMIZERS,
        ),
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
        default=None, metadata=_flag("dtype of the final weights: the base model's", *DTYPES)
    )
    resume_from_checkpoint: str | None = field(default=None, metadata=_flag('"auto", or the folder of a checkpoint'))
    overwrite_output_dir: bool = field(default=False, metadata=_flag("replace what output_dir holds"))

    load_best_model_at_end: bool = field(
        default=False,
        metadata=_flag("the final weights are those with the lowest held-out loss, whose checkpoint is kept"),
    )
    early_stopping_patience: int = field(
        default=0, metadata=_flag("end after so many evaluations without a lower held-out loss; 0: never")
    )

    num_samples: int = field(default=3, metadata=_flag("prompts answered before and after, for report.html"))
    eval_tasks: str | None = field(
        default=None,
        metadata=_flag(
            "lm-eval's tasks (or YAML files of tasks), separated by commas, for the final model: report.html"
        ),
    )
    plan_only: bool = field(default=False, metadata=_flag("show what the run will take, as a table and JSON, and end"))
    plan_memory: str | None = field(default=None, metadata=_flag('plan for GPUs of this memory ("80GB"): those here'))
    plan_gpus: int | None = field(default=None, metadata=_flag("plan for so many of them: torchrun's number"))
    plan_gpus_per_machine: int | None = field(
        default=None, metadata=_flag("of them in one machine, over which --fsdp hybrid_shard shards: 8")
    )
    plan_tflops: float | None = field(default=None, metadata=_flag("peak of each in TFLOP/s: a usual card's"))


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
    objective = values.get("objective", "sft")
    if objective != "sft" and "learning_rate" not in given:
        values["learning_rate"] = PREFERENCE_RATES.get(str(values.get("method", "full")), ADAPTER_LEARNING_RATE)
    if objective in ("dpo", "kto") and "train_on_inputs" not in given:
        values["train_on_inputs"] = False  # a recipe's gives way: prompts are not compared
    if given.get("method") == "qlora" and given.get("base_quantization") is None:
        values["base_quantization"] = None  # a recipe's gives way: qlora is 4 bit
    if "val_set_size" not in given and (given.get("eval_fraction") or given.get("eval_data_path")):
        values["val_set_size"] = 0  # a recipe's gives way
    return TrainConfig(**values)


def config_json(config: TrainConfig) -> dict[str, object]:
    """The configuration for a JSON file; `TrainConfig(**…)` of it is the same."""
    return dataclasses.asdict(config)
