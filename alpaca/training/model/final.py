"""The final weights of a run: its tensors, their dtype, and the proof that an adapter reads back as it was."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alpaca.architecture.rope import spell_for_all
from alpaca.architecture.tensors import hf_name
from alpaca.files.model_folders import CONFIG_NAME
from alpaca.files.reading import read_json
from alpaca.formats.hf.adapters import WEIGHTS_STEM, AdapterFolder
from alpaca.formats.hf.folder import FLOAT_DTYPES
from alpaca.training.configuration.settings import RunSettings
from alpaca.training.distributed import is_sharded
from alpaca.training.model import padding_free
from alpaca.training.model.adapters.adapting import adapter_config, is_adapted
from alpaca.training.model.adapters.starts import join_starts
from alpaca.training.model.base import Base
from alpaca.training.model.layers import uncompiled

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Final:
    """The final weights and configs of a run.

    tensors: by their names in the files; shards where the model is sharded.    stem: how the files' names begin.
    configs: contents of JSON files by name; a folder that has the first of them is whole.
    """

    tensors: dict[str, Tensor]
    stem: str
    configs: dict[str, dict[str, object]]


def describe_final(model: nn.Module, base: Base, dtype: torch.dtype) -> Final:
    """The whole model, or the adapter alone, with its configs. dtype: of the weights that will be written."""
    if is_adapted(model):
        return Final(tensors=final_tensors(model), stem=WEIGHTS_STEM, configs={CONFIG_NAME: adapter_config(model)})
    tokenizer = base.tokenizer
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.fill_id}
    dtype_name = str(dtype).removeprefix("torch.")
    tensors = final_tensors(model)
    config = {
        **spell_for_all(read_json(base.folder / "config.json")),
        **ids,
        "vocab_size": model.config.vocab_size,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,  # older programs read this name
    }
    config.pop("quantization_config", None)  # what is written is whole
    if hf_name("head") in tensors:
        config["tie_word_embeddings"] = False  # programs that trust the flag would drop the head
    return Final(tensors=tensors, stem="model", configs={"config.json": config, "generation_config.json": ids})


def final_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the final files: the model's (of tied ones the first), or the adapter's under PEFT's names."""
    if is_adapted(model):
        from peft import get_peft_model_state_dict

        return join_starts(get_peft_model_state_dict(model, save_embedding_layers=False), model)
    persistent = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {**dict(model.named_parameters()), **buffers}


def choose_save_dtype(settings: RunSettings, base: Base) -> torch.dtype:
    """The dtype of the final weights: as asked for, else the base's, or float32 for an adapter."""
    if settings.checkpoints.final_dtype:
        return FLOAT_DTYPES[settings.checkpoints.final_dtype]
    return base.dtype if settings.model.is_full else torch.float32


_SAME_LOGITS = 1e-3  # how far a reloaded adapter's logits may be off, as a share of the largest
_SAME_ROUNDED_LOGITS = 0.03  # the same for an adapter that was saved in another dtype than float32


def find_adapter_fault(
    model: nn.Module, adapter: AdapterFolder | None, ids: Sequence[int], *, learned: bool, device: torch.device
) -> str:
    """Say why a written adapter is not the one in memory, or does nothing; "" where all is well.

    adapter: what was read back, on the main process.    ids: a text to compare logits on.
    learned: whether a step was taken with a learning rate above 0.
    All processes call it together. Onto a sharded base nothing is reloaded: the files were compared bit for bit.
    """
    own = probe_logits(model, ids, device)
    with model.disable_adapter():
        effect = (own - probe_logits(model, ids, device)).abs().max().item()
    if adapter is None:
        return ""
    if adapter.is_base and learned:
        return "the adapter is its base, every lora_B is zero, though it was trained: no gradient reaches it"
    if learned and effect == 0:
        return (
            "the adapter moves no logit of the base, though it was trained: what it adds is lost in rounding; use a "
            "higher --lora_alpha or --learning_rate"
        )
    if adapter.is_base:
        logger.warning("the adapter changes nothing: no step had a learning rate above 0")
    if not is_sharded(model):
        difference = (own - _reloaded_logits(model, adapter, ids, device)).abs().max().item()
        exact = all(tensor.dtype == torch.float32 for tensor in adapter.tensors.values())
        allowed = (_SAME_LOGITS if exact else _SAME_ROUNDED_LOGITS) * own.abs().max().item()
        if not difference <= allowed:
            return (
                f"reloaded onto the base, the adapter gives logits that differ by {difference:.3g} from those in "
                f"memory (allowed {allowed:.3g})"
            )
    logger.info("%s; it moves logits by up to %.3g", adapter.describe(), effect)
    return ""


def _reloaded_logits(model: nn.Module, adapter: AdapterFolder, ids: Sequence[int], device: torch.device) -> Tensor:
    """Logits of the base in memory with the adapter that PEFT reads from the folder."""
    model.load_adapter(str(adapter.path), "reloaded")
    try:
        model.set_adapter("reloaded")
        return probe_logits(model, ids, device)
    finally:
        model.set_adapter("default")
        model.delete_adapter("reloaded")


@torch.no_grad()
def probe_logits(model: nn.Module, ids: Sequence[int], device: torch.device) -> Tensor:
    """Logits of one text without dropout, float32 [T, V]."""
    was_training = model.training
    inputs: dict[str, object] = {}
    if padding_free.is_enabled(model):
        positions = torch.arange(len(ids), device=device)[None]
        inputs = {"position_ids": positions, "packing": padding_free.Packing([len(ids)])}
    model.eval()
    with uncompiled(model):
        logits = model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False, **inputs).logits
    model.train(was_training)
    return logits[0].float()
