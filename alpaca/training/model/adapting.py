"""Puts an adapter on a frozen base: which layers it changes, and its matrices."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from alpaca.architecture.families import FAMILIES, USUAL_TARGETS
from alpaca.errors import InputError
from alpaca.formats.hf.quantization import keep_trainable_on_cpu
from alpaca.training.configuration.config import ALL_LINEAR
from alpaca.training.configuration.settings import ModelSettings
from alpaca.training.model.layers import find_layer_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_adapter(model: "PreTrainedModel", settings: ModelSettings) -> nn.Module:
    """Wrap the model in PEFT's LoRA and freeze all else. Full fine-tuning gets the model itself back.

    The adapter's first values depend on the seed alone. Raises InputError for target layers that are not there.
    """
    adapter = settings.adapter
    if adapter is None:
        return model
    from peft import LoraConfig, get_peft_model

    if settings.base_quantization == "nf4":
        keep_trainable_on_cpu(model)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=choose_targets(model, adapter.targets),
        bias="none",
        use_dora=adapter.use_dora,
        use_rslora=adapter.use_rslora,
    )
    torch.manual_seed(adapter.seed)
    adapted = get_peft_model(model, config)
    config.base_model_name_or_path = adapter.base_name
    return adapted


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
    config = {**model.peft_config["default"].to_dict(), "inference_mode": True}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
