"""The flags of adapters: their small languages, the checks of them against each other, and the settings they make."""

import math
import re

from alpaca.architecture.families import USUAL_TARGETS
from alpaca.errors import InputError
from alpaca.training.configuration.config import ALL_LINEAR, DEFAULT_INIT, TrainConfig
from alpaca.training.configuration.parsing import target_names
from alpaca.training.configuration.settings import AdapterSettings

_FLAGS = (
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_rank_pattern", "lora_alpha_pattern",
    "lora_init", "lora_modules_to_save", "trainable_token_indices", "loraplus_lr_ratio", "use_dora", "use_rslora",
    "base_quantization",
)  # fmt: skip
ADDED = "added"
_INITS = re.compile(rf"{DEFAULT_INIT}|gaussian|pissa|pissa_niter_[1-9]\d{{0,2}}|olora")
_MOST_RANK, _MOST_TOKEN = 10**5, 10**9
_MOST_DIGITS = 10


def check_adapter(config: TrainConfig) -> None:
    """Refuse flags of another method than the one asked for, and numbers that no adapter can have."""
    for name in _FLAGS if config.method == "full" else ():
        if getattr(config, name) not in (None, False, "none", DEFAULT_INIT):
            raise InputError(
                f"--{name} {getattr(config, name)} is for adapters, and --method full trains every weight: add "
                "--method lora or qlora, or leave it out"
            )
    _check_base(config)
    if config.lora_alpha is not None and not config.lora_alpha > 0:
        raise InputError(f"--lora_alpha: expected a number above 0, found {config.lora_alpha}")
    if config.lora_target_modules is not None and not target_names(config.lora_target_modules):
        raise InputError(
            f'--lora_target_modules: expected names such as "{",".join(USUAL_TARGETS)}", or "{ALL_LINEAR}"; '
            f"found {config.lora_target_modules!r}"
        )
    if config.lora_modules_to_save is not None and not target_names(config.lora_modules_to_save):
        raise InputError(
            '--lora_modules_to_save: expected names of modules such as "embed_tokens,lm_head", found '
            f"{config.lora_modules_to_save!r}"
        )
    parse_ranks(config.lora_rank_pattern)
    parse_alphas(config.lora_alpha_pattern)
    parse_tokens(config.trainable_token_indices)
    _check_start(config)
    _check_rates(config)


def _check_base(config: TrainConfig) -> None:
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


def _check_start(config: TrainConfig) -> None:
    if not _INITS.fullmatch(config.lora_init):
        raise InputError(
            f"--lora_init: expected {DEFAULT_INIT}, gaussian, pissa, pissa_niter_N (N: 1 to 999 iterations) or olora, "
            f"found {config.lora_init!r}"
        )
    if not config.lora_init.startswith(("pissa", "olora")):
        return
    if config.method == "qlora" or config.base_quantization not in (None, "none"):
        raise InputError(
            f"--lora_init {config.lora_init} is taken from the base's weights, which a quantized base has not: use "
            "--method lora with --base_quantization none, or leave it out"
        )
    if config.use_dora:
        raise InputError(
            f"--lora_init {config.lora_init} does not go with --use_dora True: DoRA's magnitudes would be of what is "
            "left of the base in training, and of the whole base afterwards; leave one of them out"
        )


def _check_rates(config: TrainConfig) -> None:
    if config.loraplus_lr_ratio is not None and config.optim in ("adafactor", "muon"):
        raise InputError(
            f"--loraplus_lr_ratio goes with AdamW, found --optim {config.optim}, whose updates have another size: use "
            "--optim adamw_torch or adamw_8bit, or leave it out"
        )


def parse_ranks(text: str | None) -> dict[str, int]:
    """The ranks of `--lora_rank_pattern q_proj=16,v_proj=4`. Raises InputError."""
    ranks = {}
    for key, number in _pairs("lora_rank_pattern", text).items():
        if not number.isdecimal() or len(number) > _MOST_DIGITS or not 1 <= int(number) <= _MOST_RANK:
            raise InputError(f"--lora_rank_pattern {key}: expected a rank of 1 to {_MOST_RANK:,}, found {number!r}")
        ranks[key] = int(number)
    return ranks


def parse_alphas(text: str | None) -> dict[str, float]:
    """The same of `--lora_alpha_pattern`. Raises InputError."""
    alphas = {}
    for key, number in _pairs("lora_alpha_pattern", text).items():
        try:
            alphas[key] = float(number)
        except ValueError:
            alphas[key] = math.nan
        if not 0 < alphas[key] < math.inf:
            raise InputError(f"--lora_alpha_pattern {key}: expected a number above 0, found {number!r}")
    return alphas


def _pairs(flag: str, text: str | None) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for part in (text or "").replace(",", " ").split():
        key, equals, number = part.partition("=")
        if not key or not equals or key in pairs:
            why = "named twice" if key in pairs else "no pair"
            raise InputError(
                f"--{flag}: expected NAME=NUMBER,NAME=NUMBER such as q_proj=16,v_proj=4; {part!r} is {why}"
            )
        try:
            re.compile(key)
        except re.error as error:
            raise InputError(f"--{flag} {key}: no regular expression for the end of a name: {error}") from error
        pairs[key] = number
    if text is not None and not pairs:
        raise InputError(f"--{flag}: expected NAME=NUMBER,NAME=NUMBER such as q_proj=16,v_proj=4; found {text!r}")
    return pairs


def parse_tokens(text: str | None) -> tuple[int, ...] | str:
    """The ids of `--trainable_token_indices`, or "added"; () where there are none. Raises InputError."""
    if text is None or text.strip().lower() == ADDED:
        return ADDED if text else ()
    words = text.replace(",", " ").split()
    wrong = [word for word in words if not word.isdecimal() or len(word) > _MOST_DIGITS or int(word) > _MOST_TOKEN]
    if wrong or not words:
        found = repr(wrong[0][:40] if wrong else text)
        raise InputError(
            f'--trainable_token_indices: expected ids of tokens such as 32000,32001, or "{ADDED}"; found {found}'
        )
    return tuple(int(word) for word in words)


def make_adapter_settings(config: TrainConfig) -> AdapterSettings | None:
    """The adapter of a resolved configuration; None for full fine-tuning."""
    if config.method == "full":
        return None
    return AdapterSettings(
        rank=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        targets=tuple(target_names(config.lora_target_modules or "")),
        ranks=parse_ranks(config.lora_rank_pattern),
        alphas=parse_alphas(config.lora_alpha_pattern),
        init=config.lora_init,
        modules_to_save=tuple(target_names(config.lora_modules_to_save or "")),
        tokens=parse_tokens(config.trainable_token_indices),
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        seed=config.seed,
        base_name=config.model_name_or_path,
    )
