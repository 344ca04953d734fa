"""Puts an adapter on a frozen base: which layers it changes, and its matrices."""

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from alpaca.architecture.families import FAMILIES, USUAL_TARGETS
from alpaca.errors import InputError
from alpaca.formats.hf.adapters import MOST_SERVED_RANK, matches
from alpaca.formats.hf.quantization import keep_trainable_on_cpu
from alpaca.text.tokenizer import Tokenizer
from alpaca.training.configuration.config import ALL_LINEAR, DEFAULT_INIT
from alpaca.training.configuration.settings import AdapterSettings, ModelSettings
from alpaca.training.model.adapters.beside import check_modules_to_save, choose_tokens, set_up_rows, train_in_float32
from alpaca.training.model.adapters.starts import add_starts, list_starts, takes_from_base
from alpaca.training.model.layers import find_layer_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def add_adapter(
    model: "PreTrainedModel", settings: ModelSettings, tokenizer: Tokenizer, device: torch.device
) -> nn.Module:
    """Wrap the model in PEFT's LoRA and freeze all else. Full fine-tuning gets the model itself back.

    The adapter's first values depend on the seed alone, or on the base where its start is taken from there (computed on
    `device`). Raises InputError for layers, modules and tokens that are not there.
    """
    adapter = settings.adapter
    if adapter is None:
        return model
    from peft import LoraConfig, get_peft_model

    if settings.base_quantization == "nf4":
        keep_trainable_on_cpu(model)
    targets, from_base = choose_targets(model, adapter.targets), takes_from_base(adapter.init)
    _check_patterns(model, adapter, targets)
    check_modules_to_save(model, adapter.modules_to_save, targets)
    plain = True if from_base or adapter.init == DEFAULT_INIT else adapter.init
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        rank_pattern=dict(adapter.ranks),
        alpha_pattern=dict(adapter.alphas),
        init_lora_weights=plain,
        modules_to_save=list(adapter.modules_to_save) or None,
        trainable_token_indices=choose_tokens(model, adapter.tokens, tokenizer, adapter.modules_to_save),
        bias="none",
        use_dora=adapter.use_dora,
        use_rslora=adapter.use_rslora,
    )
    torch.manual_seed(adapter.seed)
    with _quiet_about_tying():
        adapted = get_peft_model(model, config)
    set_up_rows(adapted)
    train_in_float32(adapted)
    if from_base:
        add_starts(adapted, adapter.init, device)
        _say_rank(adapter)
    config.base_model_name_or_path = adapter.base_name
    return adapted


def _say_rank(adapter: AdapterSettings) -> None:
    rank = 2 * max([adapter.rank, *adapter.ranks.values()])
    logger.info("--lora_init %s: the base stays as it is, and the adapter is written with rank %d", adapter.init, rank)
    if rank > MOST_SERVED_RANK:
        logger.warning(
            "an adapter of rank %d is more than the LLaMA engine serves (%d): it can be merged, or served by "
            "ALPACA_ENGINE=transformers; --lora_r %d would do",
            rank, MOST_SERVED_RANK, MOST_SERVED_RANK // 2,
        )  # fmt: skip


@contextlib.contextmanager
def _quiet_about_tying() -> Iterator[None]:
    """Suppress PEFT's warnings of tied modules: what they say was said before, in terms of the flags."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(ensure_weight_tying|tie_word_embeddings).*")
        yield


def _check_patterns(model: "PreTrainedModel", adapter: AdapterSettings, targets: Sequence[str]) -> None:
    """Raise InputError for a pattern that is no layer's which gets an adapter: PEFT would pass over it."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    adapted = [name for name in layers if name.rpartition(".")[2] in targets]
    for flag, patterns in (("lora_rank_pattern", adapter.ranks), ("lora_alpha_pattern", adapter.alphas)):
        for key in patterns:
            if not any(matches(key, name) for name in adapted):
                raise InputError(
                    f"--{flag} {key}: no layer that gets an adapter has a name that ends so; they are "
                    f"{', '.join(targets)}, as in {adapted[0]}"
                )


def choose_targets(model: "PreTrainedModel", asked: Sequence[str]) -> list[str]:
    """The names of the linear layers that get an adapter. Raises InputError for a name that no decoder layer has."""
    layer_class = find_layer_class(model)
    layers = [module for module in model.modules() if type(module).__name__ == layer_class]
    there = {
        name.rpartition(".")[2]
        for layer in layers
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    if list(asked) == [ALL_LINEAR]:
        return sorted(there)
    family = FAMILIES.get(model.config.model_type)
    wanted = list(asked or (family.adapter_targets if family else USUAL_TARGETS))
    unknown = [name for name in wanted if name not in there]
    if unknown:
        raise InputError(
            f"--lora_target_modules: no linear layer named {', '.join(unknown)} in {layer_class}; "
            f"there are {', '.join(sorted(there))}, or {ALL_LINEAR} for all of them"
        )
    return wanted


def is_adapted(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def adapter_config(model: nn.Module) -> dict[str, object]:
    """adapter_config.json, as PEFT writes it."""
    own = model.peft_config["default"]
    config = {**own.to_dict(), "inference_mode": True}
    if list_starts(model):  # the scale, alpha over the rank or over its root, stays what it is
        factor = math.sqrt(2) if own.use_rslora else 2
        config |= {
            "r": 2 * own.r,
            "lora_alpha": factor * own.lora_alpha,
            "rank_pattern": {key: 2 * rank for key, rank in own.rank_pattern.items()},
            "alpha_pattern": {key: factor * alpha for key, alpha in own.alpha_pattern.items()},
        }
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
