"""A run's settings once everything is worked out: one typed part for each room of `training`.

`resolving.make_settings` makes them, once, from the resolved command line. No field is None for "not worked out yet": a
None that is left means that there is none of the thing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from alpaca.training.configuration.parsing import Sharding


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """Where training starts: the base model's folder or hub name, and its tokenizer's where that is another.

    needs_pad_token: whole models are trained with a padding token of their own; an adapter adds no token.
    """

    model: str
    tokenizer: str | None
    cache_dir: str | None
    needs_pad_token: bool


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which examples are trained and evaluated on, and how they are encoded.

    num_held_out, held_out_share: at most one of them is above 0.    max_length: tokens an example is cut to.
    most_bytes: of a data file, unpacked.
    """

    path: str
    format: str
    response_mark: str
    most_bytes: int
    prompt_template: str
    prompt_boundary: str
    eval_path: str | None
    num_held_out: int
    held_out_share: float
    max_length: int
    train_on_inputs: bool
    seed: int
    objective: str = "sft"


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """What is learnt from the data. name: sft, dpo, orpo or kto.    beta: the preference objectives' strength.

    smoothing: DPO's.    weights: KTO's, of good and of bad answers.
    """

    name: str = "sft"
    beta: float = 0.1
    smoothing: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """A LoRA adapter. targets: names of linear layers, or ("all-linear",); () stands for the usual ones of the model.

    ranks, alphas: of layers whose name ends so, by PEFT's patterns.    init: how its matrices start.
    modules_to_save: trained whole beside it.    tokens: those whose rows are; "added": see `adapting.choose_tokens`.
    base_name: what adapter_config.json calls the base.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    init: str
    modules_to_save: tuple[str, ...]
    tokens: tuple[int, ...] | str
    use_dora: bool
    use_rslora: bool
    seed: int
    base_name: str


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How the model is loaded and computed.

    adapter: None for full fine-tuning.    checkpointing: the decoder layers whose activations are recomputed: True for
    all, False for none, their number, or "auto" until the plan has chosen.    layer_class: the decoder layers' class as
    the user named it, which is only checked.
    """

    method: str
    adapter: AdapterSettings | None
    base_quantization: str
    numerics: str
    bf16: bool
    padding_free: bool
    checkpointing: bool | int | str
    compile_layers: bool
    layer_class: str | None
    sharding: Sharding

    @property
    def is_full(self) -> bool:
        return self.adapter is None

    @property
    def is_fast(self) -> bool:
        """Whether weights, gradients and moments are bfloat16."""
        return self.numerics == "fast"

    @property
    def computes_low(self) -> bool:
        """Whether matrix products are computed in bfloat16."""
        return self.bf16 or self.is_fast

    @property
    def autocasts(self) -> bool:
        """Whether they are so by autocast, from weights in another dtype."""
        return self.bf16 and not self.is_fast


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """How many examples a step and a micro-batch have, and how many steps there are.

    max_steps: instead of epochs, where above 0.    max_length: tokens of an example at the most.
    noise: NEFTune's alpha; 0 for none.
    """

    global_batch_size: int
    micro_batch_size: int
    num_micro_batches: int
    eval_micro_batch_size: int
    max_length: int
    loss_average: str
    label_smoothing: float
    noise: float
    num_epochs: float
    max_steps: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The optimizer, the learning rate's schedule, and the norm that gradients are clipped to (0: they are not).

    name: of `config.OPTIMIZERS`, one for each kind.    b_ratio: LoRA+'s, None for one rate.
    least_rate: the share of the highest learning rate that the schedule ends at.
    """

    name: str
    b_ratio: float | None
    learning_rate: float
    schedule: str
    least_rate: float
    warmup_ratio: float
    warmup_steps: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    max_grad_norm: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """When checkpoints are written and how many are kept; the final weights' dtype (None: the base's).

    resume: "auto" or a folder; None starts anew.
    """

    output_dir: Path
    strategy: str
    steps: int
    minutes: float
    keep: int
    resume: str | None
    overwrite: bool
    final_dtype: str | None

    @property
    def saves(self) -> bool:
        return self.strategy != "no"


@dataclass(frozen=True, kw_only=True)
class BestSettings:
    """Whether the weights of the best evaluation become the final ones.    patience: evaluations; 0 has no end."""

    is_loaded: bool
    patience: int


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """What is logged and evaluated while the run goes on, and how many prompts the report shows answers to."""

    output_dir: Path
    report_to: str
    run_name: str
    logging_steps: int
    eval_strategy: str
    eval_steps: int
    num_samples: int
    eval_tasks: str | None


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """All of a run's settings.

    flags: the resolved command line, as JSON has it.    identity: those flags in which a checkpoint must agree with a
    run that resumes it.    memory_limit: of each device, as the user wrote it.
    """

    base: BaseSettings
    data: DataSettings
    objective: ObjectiveSettings
    model: ModelSettings
    batch: BatchSettings
    optimizer: OptimizerSettings
    checkpoints: CheckpointSettings
    best: BestSettings
    report: ReportSettings
    memory_limit: str | None
    tf32: bool
    identity: Mapping[str, object]
    flags: Mapping[str, object]
