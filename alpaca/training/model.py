"""The model that is trained: full fine-tuning, LoRA and QLoRA differ in this file and nowhere else.

full: every weight in float32 (fast numerics: bfloat16), the vocabulary grown to the tokenizer's, a whole model at the
end.
lora, qlora: PEFT's float32 matrices on a frozen base (in the dtype it computes in, or in 8 or 4 bit), whose embeddings
do not grow: `[PAD]` is not needed, since padding is masked by length. At the end there is an adapter folder.
"""

import functools
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from alpaca.adapters import CONFIG_NAME, WEIGHTS_STEM, AdapterFolder
from alpaca.errors import InputError, MissingInput
from alpaca.hf_files import (
    FLOAT_DTYPES,
    INDEX_NAME,
    WeightsFolder,
    find_fingerprint,
    list_folder,
    read_json,
    require_all_weights,
)
from alpaca.quantization import bitsandbytes_config, keep_trainable_on_cpu, require_readable_on_cpu
from alpaca.tokenizer import PAD_TOKEN, Tokenizer, load_tokenizer, tokenizer_summary
from alpaca.training import padding_free
from alpaca.training.config import ALL_LINEAR, TrainConfig, parse_fsdp, target_names
from alpaca.training.distributed import World, is_sharded, needs_sharding, shard_model
from alpaca.training.layers import checkpoint_layers, compile_layers, count_checkpointed, require_compiler, uncompiled

logger = logging.getLogger(__name__)

_HUB_IGNORES = ["*.msgpack", "*.h5", "*.ot", "*.onnx", "original/*"]


@dataclass(frozen=True, kw_only=True)
class Base:
    """What training starts from.

    folder: the base model's.    tokenizer: its own or the one named, for full fine-tuning with a padding token.
    dtype: of the weights in the folder; the final ones get it too unless asked otherwise.
    """

    folder: Path
    tokenizer: Tokenizer
    dtype: torch.dtype

    @functools.cached_property
    def fingerprint(self) -> str | None:
        """Of its tensors; None where they are no safetensors."""
        return find_fingerprint(self.folder)


def open_base(config: TrainConfig) -> Base:
    """Find the base model and its tokenizer, without reading weights. Raises MissingInput, InputError."""
    folder = locate_model(config.model_name_or_path, cache_dir=config.cache_dir)
    if not (folder / "config.json").is_file():
        raise MissingInput(_no_model(folder))
    tokenizer = load_tokenizer(_locate_tokenizer(config, folder))
    if config.method == "full" and tokenizer.add_pad_token():
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


def load_model(base: Base, config: TrainConfig, world: World) -> nn.Module:
    """The model to train, on this process's device and sharded over all of them; an adapter's is PEFT's around it.

    Where it is sharded, only rank 0 reads the weights, and no process but that one ever holds them whole; but a 4-bit
    base each process reads, since its scales are no parameters.
    """
    if config.compile_layers:
        require_compiler()
    sharding = parse_fsdp(config.fsdp)
    sharded, quantized = needs_sharding(world, sharding), _quantization(config) != "none"
    model = _make_empty(base, config) if sharded and not quantized else _load_whole(base, config, world)
    layer_class = find_layer_class(model)
    check_layer_class(config.fsdp_transformer_layer_cls_to_wrap, layer_class)
    if config.padding_free and not padding_free.enable(model):
        logger.info("micro-batches are padded: %s has attention of its own", type(model).__name__)
    layers = [module for module in model.modules() if type(module).__name__ == layer_class]
    checkpoint_layers(layers, count_checkpointed(config.gradient_checkpointing, len(layers)) or 0)
    model = add_adapter(model, config)
    if config.compile_layers:
        padding_free.keep_out_of_graphs()
        compile_layers(layers)
    if sharded:
        weights = None if quantized else {}
        if world.is_main and not quantized:
            weights = add_adapter(_load_whole(base, config, world), config).state_dict()
        shard_model(model, layer_class, weights, world=world, sharding=sharding, bf16=config.computes_low)
    elif not quantized:
        model.to(world.device)
    return model.train()


def add_up_in_float32(model: nn.Module) -> None:
    """Have autograd add up bfloat16 parameters' gradients in float32, at two bytes more each; not for sharded ones.

    In bfloat16 the sum of 128 micro-batches would be off by 1.3 % (rounded by chance 1.9 %), where one rounding is
    0.17 %; and it would depend on how a step is cut into micro-batches. Call it once a checkpoint is loaded: torch
    gives the parameters gradients of their own dtype then.
    """
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16 and parameter.requires_grad:
            parameter.grad_dtype = torch.float32


def _quantization(config: TrainConfig) -> str:
    return config.base_quantization or "none"


def _dtype(config: TrainConfig) -> torch.dtype:
    """Of weights in memory: what is trained is float32 (fast: bfloat16); a frozen base has the dtype it computes in."""
    low = config.bf16 if config.method != "full" else config.numerics == "fast"
    return torch.bfloat16 if low else torch.float32


def _load_whole(base: Base, config: TrainConfig, world: World) -> PreTrainedModel:
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            base.folder, dtype=_dtype(config), output_loading_info=True, **_quantized_loading(config, world)
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{base.folder} cannot be loaded as a language model: {error}") from error
    require_all_weights(base.folder, found["missing_keys"])
    num_rows = model.get_input_embeddings().num_embeddings
    base.tokenizer.require_rows(num_rows, base.folder)
    if config.method != "full" and base.tokenizer.size > num_rows:
        raise InputError(
            f"the tokenizer has {base.tokenizer.size} tokens, the embedding of {base.folder} {num_rows} rows, and an "
            "adapter adds none: use the base model's own tokenizer, or --method full"
        )
    if _quantization(config) == "nf4" and world.device.type == "cpu":
        require_readable_on_cpu(model)
    grow_embeddings(model, base.tokenizer.size)
    return _set_up(model, base.tokenizer)


def _quantized_loading(config: TrainConfig, world: World) -> dict[str, object]:
    """What from_pretrained needs to load linear layers in 8 or 4 bit on the device; nothing where they stay whole."""
    quantization = _quantization(config)
    if quantization == "none":
        return {}
    if quantization == "int8":  # it says in each call that it computes in float16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    storage = _dtype(config) if needs_sharding(world, parse_fsdp(config.fsdp)) else torch.uint8
    settings = bitsandbytes_config(quantization, _dtype(config), storage_dtype=storage)
    return {"quantization_config": settings, "device_map": {"": str(world.device)}}


def _make_empty(base: Base, config: TrainConfig) -> PreTrainedModel:
    """The same model with its parameters on the meta device, and its buffers real."""
    from accelerate import init_empty_weights

    try:
        model_config = AutoConfig.from_pretrained(base.folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{base.folder / 'config.json'} cannot be read: {error}") from error
    model_config.vocab_size = max(model_config.vocab_size, base.tokenizer.size)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(model_config, dtype=_dtype(config))
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


# Adapters -------------------------------------------------------------------------------------------------------

_OWN_TARGETS = {"bloom": ["query_key_value"]}  # by model_type; q_proj and v_proj in others, as alpaca-lora has them


def add_adapter(model: PreTrainedModel, config: TrainConfig) -> nn.Module:
    """The model with PEFT's LoRA around it, all else frozen; for full fine-tuning the model itself.

    The adapter's first values depend on the seed alone. Raises InputError for target layers that are not there.
    """
    if config.method == "full":
        return model
    from peft import LoraConfig, get_peft_model

    if _quantization(config) == "nf4":
        keep_trainable_on_cpu(model)
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=choose_targets(model, config.lora_target_modules),
        bias="none",
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
    )
    torch.manual_seed(config.seed)
    adapted = get_peft_model(model, settings)
    settings.base_model_name_or_path = config.model_name_or_path
    return adapted


def choose_targets(model: PreTrainedModel, asked: str | None) -> list[str]:
    """The names of the linear layers that get an adapter. Raises InputError for one that no decoder layer has."""
    layer_class = find_layer_class(model)
    layers = [module for module in model.modules() if type(module).__name__ == layer_class]
    there = {
        name.rpartition(".")[2]
        for layer in layers
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    if asked == ALL_LINEAR:
        return sorted(there)
    wanted = target_names(asked) if asked else _OWN_TARGETS.get(model.config.model_type, ["q_proj", "v_proj"])
    unknown = [name for name in wanted if name not in there]
    if unknown:
        raise InputError(
            f"--lora_target_modules: no linear layer named {', '.join(unknown)} in {layer_class}; "
            f"there are {', '.join(sorted(there))}, or {ALL_LINEAR} for all of them"
        )
    return wanted


# The end of a run -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Final:
    """What a finished run leaves, the tokenizer apart.

    tensors: by the names in the files; shards where the model is sharded.    stem: of the names of these files.
    configs: JSON files by name; the first is the one by which a folder is known to be whole.
    """

    tensors: dict[str, Tensor]
    stem: str
    configs: dict[str, dict[str, object]]


def describe_final(model: nn.Module, base: Base, dtype: torch.dtype) -> Final:
    """The whole model with its configs, or the adapter with PEFT's. `dtype`: of the weights that will be written."""
    if _is_adapted(model):
        return Final(tensors=final_tensors(model), stem=WEIGHTS_STEM, configs={CONFIG_NAME: _adapter_config(model)})
    tokenizer = base.tokenizer
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.fill_id}
    dtype_name = str(dtype).removeprefix("torch.")
    config = {
        **read_json(base.folder / "config.json"),
        **ids,
        "vocab_size": model.config.vocab_size,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,  # the name that older programs read
    }
    return Final(
        tensors=final_tensors(model), stem="model", configs={"config.json": config, "generation_config.json": ids}
    )


def final_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the final files; of tied ones the first; of an adapter its own, under PEFT's names."""
    if _is_adapted(model):
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(model, save_embedding_layers=False)
    persistent = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {**dict(model.named_parameters()), **buffers}


def choose_save_dtype(config: TrainConfig, base: Base) -> torch.dtype:
    """The dtype of the final weights: the one asked for, else that of the base model's, and an adapter's float32."""
    if config.save_dtype:
        return FLOAT_DTYPES[config.save_dtype]
    return base.dtype if config.method == "full" else torch.float32


def _is_adapted(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def _adapter_config(model: nn.Module) -> dict[str, object]:
    """adapter_config.json, as PEFT writes it."""
    config = {**model.peft_config["default"].to_dict(), "inference_mode": True}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


_SAME_LOGITS = 1e-3  # of the largest logit: how far those of a reloaded adapter may be off
_SAME_ROUNDED_LOGITS = 0.03  # where it was saved in another dtype than float32


def find_adapter_fault(
    model: nn.Module, adapter: AdapterFolder | None, ids: Sequence[int], *, learned: bool, device: torch.device
) -> str:
    """Why a written adapter is not the one in memory, or is the base; "" where all is well.

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
    """Logits by the adapter that PEFT reads from the folder, on the base in memory."""
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


def count_parameters(model: nn.Module, *, trained_only: bool = False) -> int:
    """Parameters, however they are stored: several 4-bit ones may be one element, of a type that sharding asks for."""
    sizes: dict[int, int] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            matrix = name == "weight" and isinstance(module, nn.Linear)
            if parameter.requires_grad or not trained_only:
                shape = (module.out_features, module.in_features) if matrix else parameter.shape
                sizes[id(parameter)] = math.prod(shape)
    return sum(sizes.values())
