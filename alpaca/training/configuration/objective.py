"""The flags of objectives: checked, filled in, and as settings."""

import dataclasses

from alpaca.errors import InputError
from alpaca.training.configuration.config import OBJECTIVE_DEFAULTS, TrainConfig
from alpaca.training.configuration.settings import ObjectiveSettings


def check_objective(config: TrainConfig) -> None:
    """Refuse flags of another objective than the one asked for, and SFT's flags where nothing would come of them."""
    for objective, names in OBJECTIVE_DEFAULTS.items():
        given = [name for name in names if getattr(config, name) is not None and objective != config.objective]
        if given:
            raise InputError(
                f"--{given[0]} is for --objective {objective}, found --objective {config.objective}; leave it out"
            )
    if config.dpo_label_smoothing is not None and not 0 <= config.dpo_label_smoothing < 0.5:
        raise InputError(
            "--dpo_label_smoothing: expected a number from 0 up to (not including) 0.5, where both answers count "
            f"alike; found {config.dpo_label_smoothing}"
        )
    if config.objective == "sft":
        return
    if config.objective != "orpo" and config.train_on_inputs:
        raise InputError(
            f"--train_on_inputs True: --objective {config.objective} compares answers, and prompts carry no "
            "loss; leave it out"
        )
    if config.label_smoothing_factor:
        instead = "; use --dpo_label_smoothing" if config.objective == "dpo" else ""
        raise InputError(f"--label_smoothing_factor is for --objective sft, found {config.objective}{instead}")
    if config.neftune_noise_alpha:
        raise InputError(
            f"--neftune_noise_alpha is for --objective sft, found {config.objective}, whose answers are compared with "
            "what the model says of them without noise; leave it out"
        )
    if config.loss_average != "token":
        raise InputError(
            f"--loss_average {config.loss_average} is for --objective sft: {config.objective} averages over a step's "
            "examples; leave it out"
        )


def resolve_objective(config: TrainConfig) -> TrainConfig:
    """Fill in the objective's own flags."""
    own = OBJECTIVE_DEFAULTS[config.objective]
    return dataclasses.replace(config, **{name: own[name] for name in own if getattr(config, name) is None})


def objective_identity(config: TrainConfig) -> dict[str, object]:
    """A preference objective and its own flags."""
    own = OBJECTIVE_DEFAULTS[config.objective]
    return {name: getattr(config, name) for name in ("objective", *own)} if own else {}


def objective_settings(config: TrainConfig) -> ObjectiveSettings:
    name = config.objective
    if name == "sft":
        return ObjectiveSettings()
    return ObjectiveSettings(
        name=name,
        beta=getattr(config, f"{name}_beta"),
        smoothing=config.dpo_label_smoothing or 0.0,
        desirable_weight=1.0 if config.kto_desirable_weight is None else config.kto_desirable_weight,
        undesirable_weight=1.0 if config.kto_undesirable_weight is None else config.kto_undesirable_weight,
    )
