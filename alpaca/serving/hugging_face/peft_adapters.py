"""Adapters on a transformers model, by PEFT. It wraps the model's layers in place; one adapter is active at a time."""

from collections.abc import Mapping

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from transformers import PreTrainedModel

from alpaca.errors import InputError
from alpaca.formats.hf.adapters import AdapterFolder

_SHOWN = 3


class PeftAdapters:
    """Switches a model between its adapters. Only the thread that owns the model may use it."""

    def __init__(self, model: PreTrainedModel, adapters: Mapping[str, AdapterFolder]) -> None:
        """Wraps layers of `model`. Raises InputError for an adapter that does not fit it."""
        self._peft_names = {name: f"adapter_{at}" for at, name in enumerate(adapters)}  # PEFT's names may hold no dot
        self._active: str | None = None
        for name, adapter in adapters.items():
            _check_targets(model, name, adapter)
        peft: PeftModel | None = None
        for name, adapter in adapters.items():
            try:
                if peft is None:
                    peft = PeftModel.from_pretrained(model, str(adapter.path), adapter_name=self._peft_names[name])
                else:
                    peft.load_adapter(str(adapter.path), adapter_name=self._peft_names[name])
            except (ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
                raise InputError(f"adapter {name} ({adapter.path}) cannot be laid on this model: {error}") from error
            _check_wrapped(model, name, adapter, self._peft_names[name])
        self._peft = peft
        if peft is not None:
            peft.base_model.disable_adapter_layers()

    def use(self, name: str | None) -> None:
        """Make the model compute with this adapter, or with none."""
        if self._peft is None or name == self._active:
            return
        if name is None:
            self._peft.base_model.disable_adapter_layers()
        else:
            self._peft.base_model.enable_adapter_layers()
            self._peft.set_adapter(self._peft_names[name])
        self._active = name


def _check_targets(model: PreTrainedModel, name: str, adapter: AdapterFolder) -> None:
    """Check that the model has every layer the adapter changes, in the same shape. Raises InputError.

    PEFT itself ignores layers that it does not find.
    """
    modules = dict(model.named_modules())
    missing = [target for target in adapter.targets if target not in modules]
    if missing:
        raise InputError(
            f"adapter {name} ({adapter.path}) changes {', '.join(missing[:_SHOWN])}, which this "
            f"{model.config.model_type} model has not: it is another model's"
        )
    for target in adapter.targets:
        module, change = modules[target], adapter.low_rank(target)
        found = [change.b.shape[0], change.a.shape[1]]
        own = [getattr(module, "out_features", found[0]), getattr(module, "in_features", found[1])]
        if found != own:
            raise InputError(
                f"adapter {name} ({adapter.path}): {target} is for weights {found}, the base model's are {own}: it is "
                "another model's"
            )


def _check_wrapped(model: PreTrainedModel, name: str, adapter: AdapterFolder, peft_name: str) -> None:
    """Check that PEFT wrapped every layer for which the adapter has weights, and no other. Raises InputError."""
    wrapped = {
        path for path, module in model.named_modules() if isinstance(module, LoraLayer) and peft_name in module.lora_A
    }
    if wrapped != set(adapter.targets):
        differ = sorted(wrapped ^ set(adapter.targets))
        raise InputError(
            f"adapter {name} ({adapter.path}): adapter_config.json and the weights' file differ in what they change: "
            f"{', '.join(differ[:_SHOWN])}"
        )
