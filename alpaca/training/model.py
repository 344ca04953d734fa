"""The model that is trained: loaded in float32, its vocabulary grown to the tokenizer's, its decoder layer found.

How a method (full fine-tuning, adapters) differs from another is said in this file and nowhere else.
"""

import logging
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from alpaca.errors import InputError, MissingInput
from alpaca.hf_files import FLOAT_DTYPES, INDEX_NAME, WeightsFolder, list_folder, read_json, require_all_weights
from alpaca.tokenizer import PAD_TOKEN, Tokenizer, load_tokenizer, tokenizer_summary
from alpaca.training import padding_free
from alpaca.training.config import TrainConfig, parse_fsdp
from alpaca.training.distributed import World, needs_sharding, shard_model

logger = logging.getLogger(__name__)

_HUB_IGNORES = ["*.msgpack", "*.h5", "*.ot", "*.onnx", "original/*"]


@dataclass(frozen=True, kw_only=True)
class Base:
    """What training starts from.

    folder: the base model's.    tokenizer: its own or the one named, with a padding token.
    dtype: of the weights in the folder; the final ones get it too unless asked otherwise.
    """

    folder: Path
    tokenizer: Tokenizer
    dtype: torch.dtype


def open_base(config: TrainConfig) -> Base:
    """Find the base model and its tokenizer, without reading weights. Raises MissingInput, InputError."""
    folder = locate_model(config.model_name_or_path, cache_dir=config.cache_dir)
    if not (folder / "config.json").is_file():
        raise MissingInput(_no_model(folder))
    tokenizer = load_tokenizer(_locate_tokenizer(config, folder))
    if tokenizer.add_pad_token():
        logger.info("added %s as id %d: the tokenizer had no padding token", PAD_TOKEN, tokenizer.pad_id)
    logger.info("tokenizer: %s", tokenizer_summary(tokenizer))
    return Base(folder=folder, tokenizer=tokenizer, dtype=_weights_dtype(folder))


def locate_model(name: str, *, cache_dir: str | None) -> Path:
    """A model's folder: `name` itself, or where the hub's model of that name was downloaded to. Raises MissingInput."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or folder.parent.exists()
    if looks_local:
        raise MissingInput(_no_model(folder))
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, cache_dir=cache_dir, ignore_patterns=_HUB_IGNORES))
    except Exception as error:  # hub, network and cache errors have no common class
        raise MissingInput(f"{_no_model(folder)}\n(nor could it be had from the Hugging Face hub: {error})") from error


def _no_model(folder: Path) -> str:
    return (
        f"no model at {folder} (found there: {list_folder(folder)}): expected a Hugging Face folder with config.json "
        "and weights; convert Meta's checkpoint first: python -m convert.convert_llama_weights_to_hf "
        "--input_dir unconverted-weights --model_size 7B --output_dir weights"
    )


def _locate_tokenizer(config: TrainConfig, model_folder: Path) -> Path:
    if not config.tokenizer_name_or_path:
        return model_folder
    return locate_model(config.tokenizer_name_or_path, cache_dir=config.cache_dir)


def _weights_dtype(folder: Path) -> torch.dtype:
    """The dtype most of the folder's weights have; safetensors' headers know, older formats leave it to the config."""
    if (folder / "model.safetensors").is_file() or (folder / INDEX_NAME).is_file():
        sizes: Counter[torch.dtype] = Counter()
        for spec in WeightsFolder(folder).specs():
            sizes[spec.dtype] += spec.num_bytes
        dtype = sizes.most_common(1)[0][0]
    else:
        config = read_json(folder / "config.json")
        dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), torch.float32)
    if dtype not in FLOAT_DTYPES.values():
        raise InputError(
            f"{folder} holds {dtype} weights; expected one of {', '.join(FLOAT_DTYPES)}: give it unquantized"
        )
    return dtype


# Loading ------------------------------------------------------------------------------------------------------


def load_model(base: Base, config: TrainConfig, world: World) -> PreTrainedModel:
    """The model to train, with float32 weights, on this process's device and sharded over all of them.

    Where it is sharded, only rank 0 reads the weights, and no process but that one ever holds them whole.
    """
    sharding = parse_fsdp(config.fsdp)
    sharded = needs_sharding(world, sharding)
    model = _make_empty(base) if sharded else _load_whole(base)
    layer_class = find_layer_class(model)
    check_layer_class(config.fsdp_transformer_layer_cls_to_wrap, layer_class)
    if config.padding_free and not padding_free.enable(model):
        logger.info("micro-batches are padded: %s has attention of its own", type(model).__name__)
    if sharded:
        weights = _load_whole(base).state_dict() if world.is_main else {}
        shard_model(model, layer_class, weights, world=world, sharding=sharding, bf16=config.bf16)
    else:
        model.to(world.device)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _load_whole(base: Base) -> PreTrainedModel:
    try:
        model, found = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{base.folder} cannot be loaded as a language model: {error}") from error
    require_all_weights(base.folder, found["missing_keys"])
    base.tokenizer.require_rows(model.get_input_embeddings().num_embeddings, base.folder)
    grow_embeddings(model, base.tokenizer.size)
    return _set_up(model, base.tokenizer)


def _make_empty(base: Base) -> PreTrainedModel:
    """The same model with its parameters on the meta device, and its buffers real."""
    from accelerate import init_empty_weights

    try:
        config = AutoConfig.from_pretrained(base.folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{base.folder / 'config.json'} cannot be read: {error}") from error
    config.vocab_size = max(config.vocab_size, base.tokenizer.size)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()  # replacing the parameters untied them
    return _set_up(model, base.tokenizer)


def _set_up(model: PreTrainedModel, tokenizer: Tokenizer) -> PreTrainedModel:
    """Settings that weights do not hold: the tokenizer's special tokens, and no key/value cache while training."""
    config = model.config
    config.bos_token_id, config.eos_token_id, config.pad_token_id = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    config.use_cache = False
    model.get_input_embeddings().padding_idx = None  # would stop that row's gradient, and may name a real token's
    return model


def grow_embeddings(model: PreTrainedModel, num_tokens: int) -> None:
    """Give the model a row for each token; new input and output rows are the mean of those before them.

    Rows beyond the tokenizer's are kept: some models are padded to a round number of them.
    """
    old = model.get_input_embeddings().num_embeddings
    if num_tokens <= old:
        return
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    tables = {id(layer.weight): layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    with torch.no_grad():
        for table in tables.values():  # one where input and output are tied
            table[old:] = table[:old].mean(dim=0, keepdim=True)
    logger.info("embeddings grown from %d to %d rows; each new row is the mean of the others", old, num_tokens)


# What the model is made of --------------------------------------------------------------------------------------


def find_layer_class(model: nn.Module) -> str:
    """The class name of the decoder layers, as transformers names it, else that of the longest list of modules."""
    counts = Counter(type(module).__name__ for module in model.modules())
    named = [name for name in getattr(model, "_no_split_modules", None) or () if name in counts]
    if named:
        return max(named, key=counts.__getitem__)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return type(max(lists, key=len)[0]).__name__ if lists else type(model).__name__


def check_layer_class(asked: str | None, layer_class: str) -> None:
    """Say so when `--fsdp_transformer_layer_cls_to_wrap` names another class than the model's own, which is used."""
    if asked and asked != layer_class:
        logger.warning(
            "--fsdp_transformer_layer_cls_to_wrap %s: the layers of this model are %s; they are used",
            asked,
            layer_class,
        )


def group_parameters(model: nn.Module, *, weight_decay: float) -> list[dict[str, object]]:
    """Parameters for the optimizer: matrices decay, biases and norms do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]


def count_parameters(model: nn.Module) -> int:
    return sum(math.prod(parameter.shape) for parameter in model.parameters())
