"""Builds the model that is trained. Full fine-tuning, LoRA and QLoRA differ here and in `adapters`, nowhere else."""

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from alpaca.architecture.inventory import check_layers
from alpaca.architecture.tensors import hf_name
from alpaca.errors import InputError
from alpaca.files.reading import read_json
from alpaca.formats.hf.folder import loading_errors, require_all_weights
from alpaca.formats.hf.loading import keep_score_cap, load_causal_lm
from alpaca.formats.hf.pickled import find_tied, open_model_weights
from alpaca.formats.hf.quantization import require_readable_on_cpu
from alpaca.formats.hf.saved.unpacking import saved_quantization
from alpaca.text.tokenizer import Tokenizer
from alpaca.training.configuration.parsing import count_checkpointed
from alpaca.training.configuration.settings import ModelSettings
from alpaca.training.distributed import World, needs_sharding, shard_model
from alpaca.training.model import padding_free
from alpaca.training.model.adapters.adapting import add_adapter
from alpaca.training.model.base import Base
from alpaca.training.model.layers import (
    check_layer_class,
    checkpoint_layers,
    compile_layers,
    find_layer_class,
    require_compiler,
)
from alpaca.training.model.wide_products import multiplies_bfloat16, widen_products

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def import_libraries() -> None:
    """Import what `load_model` needs, before a run's memory is measured: some 100 MB that are not the run's own."""
    from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: F401


def load_model(base: Base, settings: ModelSettings, world: World) -> nn.Module:
    """Load the model to train onto this process's device, sharded over all processes, with its adapter if there is one.

    A sharded model is read by rank 0 alone, and no other process ever holds it whole. A 4-bit base is the exception:
    every process reads it, because its scales are not parameters that could be sent.
    """
    if settings.compile_layers:
        require_compiler()
    sharding = settings.sharding
    sharded, quantized = needs_sharding(world, sharding), settings.base_quantization != "none"
    model = _make_empty(base, settings) if sharded and not quantized else _load_whole(base, settings, world)
    layer_class = find_layer_class(model)
    check_layer_class(settings.layer_class, layer_class)
    if settings.padding_free and not padding_free.enable(model):
        logger.info("micro-batches are padded: %s has attention or logits of its own", type(model).__name__)
    if settings.is_fast and world.device.type == "cpu" and not multiplies_bfloat16():
        widen_products(model)
        padding_free.widen_head(model)
    layers = [module for module in model.modules() if type(module).__name__ == layer_class]
    checkpoint_layers(layers, count_checkpointed(settings.checkpointing, len(layers)) or 0)
    model = add_adapter(model, settings, base.tokenizer, world.device)
    if settings.compile_layers:
        padding_free.keep_out_of_graphs()
        compile_layers(layers)
    if sharded:
        weights = None if quantized else {}
        if world.is_main and not quantized:
            weights = add_adapter(
                _load_whole(base, settings, world), settings, base.tokenizer, world.device
            ).state_dict()
        shard_model(model, layer_class, weights, world=world, sharding=sharding, bf16=settings.computes_low)
    elif not quantized:
        model.to(world.device)
    return model.train()


def add_up_in_float32(model: nn.Module) -> None:
    """Have autograd sum the gradients of bfloat16 parameters in float32, which takes two bytes more an element.

    In bfloat16 the sum of 128 micro-batches would be off by 1.3 % (rounded by chance 1.9 %), where one rounding is
    0.17 %; and it would depend on how a step is cut into micro-batches. Call it once a checkpoint is loaded: torch
    gives the parameters gradients of their own dtype then.
    """
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16 and parameter.requires_grad:
            parameter.grad_dtype = torch.float32


def _dtype(settings: ModelSettings) -> torch.dtype:
    """The dtype of weights in memory: float32 if trained (fast: bfloat16); a frozen base has the dtype of products."""
    low = settings.is_fast if settings.is_full else settings.bf16
    return torch.bfloat16 if low else torch.float32


def _load_whole(base: Base, settings: ModelSettings, world: World) -> "PreTrainedModel":
    model, found = load_causal_lm(
        base.folder, dtype=_dtype(settings), unpacks=True, **_quantized_loading(base, settings, world)
    )
    require_all_weights(base.folder, found["missing_keys"])
    check_layers(model.config.num_hidden_layers, found["unexpected_keys"], where=str(base.folder))
    num_rows = model.get_input_embeddings().num_embeddings
    base.tokenizer.require_rows(num_rows, base.folder)
    if not settings.is_full and base.tokenizer.size > num_rows:
        raise InputError(
            f"the tokenizer has {base.tokenizer.size} tokens, the embedding of {base.folder} {num_rows} rows, and an "
            "adapter adds none: use the base model's own tokenizer, or --method full"
        )
    if settings.base_quantization == "nf4" and world.device.type == "cpu":
        require_readable_on_cpu(model)
    grow_embeddings(model, base.tokenizer.size)
    return _set_up(model, base.tokenizer)


def _quantized_loading(base: Base, settings: ModelSettings, world: World) -> dict[str, Any]:
    """Arguments with which linear layers are loaded in 8 or 4 bit; empty where they stay whole.

    Raises InputError for a base that was saved in 4 bit and is to be sharded: its bytes are stored otherwise.
    """
    quantization = settings.base_quantization
    if quantization == "none":
        return {}
    if quantization == "int8":  # bitsandbytes warns in each call that it computes in float16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    is_sharded = needs_sharding(world, settings.sharding)
    if is_sharded and saved_quantization(read_json(base.folder / "config.json")) == quantization:
        raise InputError(
            f"{base.folder} was saved as {quantization}, which cannot be sharded over processes: use one process, or "
            "the model that it was made from"
        )
    storage = _dtype(settings) if is_sharded else torch.uint8
    return {"quantization": quantization, "storage_dtype": storage, "device_map": {"": str(world.device)}}


def _make_empty(base: Base, settings: ModelSettings) -> "PreTrainedModel":
    """The model with its parameters on the meta device, which take no memory, and with real buffers."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        model_config = AutoConfig.from_pretrained(base.folder)
    except loading_errors() as error:
        raise InputError(f"{base.folder / 'config.json'} cannot be read: {error}") from error
    if hasattr(model_config, "quantization_config"):
        del model_config.quantization_config  # it is unpacked when it is read
    weights = open_model_weights(base.folder)
    if hf_name("head") in weights.names and find_tied(weights) is None:
        model_config.tie_word_embeddings = False
    model_config.vocab_size = max(model_config.vocab_size, base.tokenizer.size)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(model_config, dtype=_dtype(settings))
    model.tie_weights()  # replacing the parameters untied them
    keep_score_cap(model)
    return _set_up(model, base.tokenizer)


def _set_up(model: "PreTrainedModel", tokenizer: Tokenizer) -> "PreTrainedModel":
    """Set what the weights do not hold: the tokenizer's special tokens, and no key/value cache while training."""
    config = model.config
    config.bos_token_id, config.eos_token_id, config.pad_token_id = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    config.use_cache = False
    model.get_input_embeddings().padding_idx = (
        None  # it would stop that row's gradient, and it may be a real token's row
    )
    return model


def grow_embeddings(model: "PreTrainedModel", num_tokens: int) -> None:
    """Give the model a row for each token; new input and output rows are the mean of those before them.

    Rows beyond the tokenizer's are kept: some models are padded to a round number of them.
    """
    old = model.get_input_embeddings().num_embeddings
    if num_tokens <= old:
        return
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    tables = {id(layer.weight): layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    with torch.no_grad():
        for table in tables.values():  # a single table where input and output are tied
            table[old:] = table[:old].mean(dim=0, keepdim=True)
    logger.info("embeddings grown from %d to %d rows; each new row is the mean of the others", old, num_tokens)


def count_parameters(model: nn.Module, *, trained_only: bool = False) -> int:
    """The number of parameters by their shapes: stored in 4 bit, several of them share one element."""
    sizes: dict[int, int] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            matrix = name == "weight" and isinstance(module, nn.Linear)
            if parameter.requires_grad or not trained_only:
                shape = (module.out_features, module.in_features) if matrix else parameter.shape
                sizes[id(parameter)] = math.prod(shape)
    return sum(sizes.values())
