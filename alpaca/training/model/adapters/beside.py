"""What is trained beside an adapter: whole modules, and rows of the embedding and the head for some tokens."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from alpaca.errors import InputError
from alpaca.text.tokenizer import Tokenizer
from alpaca.training.configuration.adapters import ADDED
from alpaca.training.model.padding_free import TargetHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
_MOST_SHOWN = 8


def check_modules_to_save(model: "PreTrainedModel", names: Sequence[str], targets: Sequence[str]) -> None:
    """Raise InputError for a name that stands for no module, for more than was meant, or for adapted layers."""
    modules = dict(model.named_modules())
    outside = [name.rpartition(".")[2] for name, module in modules.items() if _is_outside(name, module)]
    for asked in names:
        taken = [name for name in modules if name.endswith(asked)]  # PEFT's rule
        meant = [name for name in taken if name == asked or name.endswith(f".{asked}")]
        if not meant:
            raise InputError(
                f"--lora_modules_to_save: no module named {asked}; outside the layers there are {', '.join(outside)}"
            )
        if others := [name for name in taken if name not in meant]:
            raise InputError(
                f"--lora_modules_to_save {asked}: PEFT would take {others[0]}, too, whose name ends so; write more of "
                f"the name, such as {meant[0]}"
            )
        inner = [part for name in meant for part, module in modules[name].named_modules(prefix=name)
                 if part.rpartition(".")[2] in targets and isinstance(module, nn.Linear)]  # fmt: skip
        if inner:
            raise InputError(
                f"--lora_modules_to_save {asked}: {inner[0]} gets an adapter already; take it out of one of the flags"
            )
        if not all(p.is_floating_point() for name in meant for p in modules[name].parameters()):
            raise InputError(f"--lora_modules_to_save {asked}: {meant[0]} is quantized, so it cannot be trained whole")
    _say_untied(model, names)


def _is_outside(name: str, module: nn.Module) -> bool:
    """Whether a module is a table, the head or a norm of the model's own, outside its layers."""
    return bool(name) and not any(module.children()) and not any(part.isdigit() for part in name.split("."))


def _say_untied(model: "PreTrainedModel", names: Sequence[str]) -> None:
    ends = [find_name(model, part) for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part]
    if is_tied(model) and any(end.endswith(name) for end in ends for name in names):
        logger.warning(
            "--lora_modules_to_save %s: the base's head is its embedding; from here on they are two matrices, as PEFT "
            "has it, and each of them is trained only if it is named",
            ",".join(names),
        )


def is_tied(model: "PreTrainedModel") -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def find_name(model: nn.Module, part: nn.Module) -> str:
    """A module's name in its model."""
    return next(name for name, module in model.named_modules() if module is part)


def choose_tokens(
    model: "PreTrainedModel", tokens: Sequence[int] | str, tokenizer: Tokenizer, modules_to_save: Sequence[str] = ()
) -> dict[str, list[int]] | None:
    """PEFT's trainable_token_indices: ids by the names of the modules whose rows are trained; None where none are.

    tokens: ids, or "added": all that the tokenizer has beyond its vocabulary. Where head and embedding are tied there
    is one row for both ends; else the head's row is trained, too. Raises InputError.
    """
    if not tokens:
        return None
    _check_ends(model, modules_to_save)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ids = list(range(tokenizer.base_size, tokenizer.size)) if tokens == ADDED else sorted(set(tokens))
    if not ids:
        raise InputError(
            f"--trainable_token_indices {ADDED}: the tokenizer has no tokens beyond its vocabulary of "
            f"{tokenizer.base_size}; name ids instead, such as {tokenizer.eos_id}"
        )
    if beyond := [one for one in ids if one >= embedding.num_embeddings]:
        raise InputError(
            f"--trainable_token_indices {beyond[0]}: the base has rows 0 to {embedding.num_embeddings - 1}, and an "
            "adapter adds none; grow the base first (resize_token_embeddings), and save it with its tokenizer"
        )
    tied = is_tied(model)
    _say_tokens(ids, tied=tied, tokenizer=tokenizer)
    ends = [embedding] if tied else [embedding, head]
    return {find_name(model, end): ids for end in ends}


def _check_ends(model: "PreTrainedModel", modules_to_save: Sequence[str]) -> None:
    """Raise InputError where PEFT could not train rows of this model's embedding and head, or would do it wrongly."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        found = f"a {type(embedding).__name__} and a {type(head).__name__}"
        raise InputError(f"--trainable_token_indices: expected a table of embeddings and a linear head, found {found}")
    if head.bias is not None:
        raise InputError(
            "--trainable_token_indices: the head has a bias, which PEFT would leave out; leave the flag out"
        )
    ends = [find_name(model, part) for part in (embedding, head)]
    if both := [name for name in modules_to_save if any(end == name or end.endswith(f".{name}") for end in ends)]:
        raise InputError(
            f"--trainable_token_indices and --lora_modules_to_save {both[0]} both train these rows: give the first for "
            "some rows, or the second for all of them"
        )
    if bool(model.config.tie_word_embeddings) != is_tied(model):
        raise InputError(
            f"--trainable_token_indices: config.json says tie_word_embeddings {model.config.tie_word_embeddings}, the "
            "weights say otherwise, and PEFT goes by the first: mend the base's config.json"
        )


def _say_tokens(ids: Sequence[int], *, tied: bool, tokenizer: Tokenizer) -> None:
    shown = ", ".join(map(str, ids[:_MOST_SHOWN])) + (", …" if len(ids) > _MOST_SHOWN else "")
    where = "one row each, for embedding and head are tied" if tied else "a row of the embedding and one of the head"
    logger.info("beside the adapter %d tokens are trained (%s): %s", len(ids), shown, where)


def set_up_rows(model: nn.Module) -> None:
    """Where rows of embedding and head are trained: have them looked up apart, and the head give losses.

    PEFT's own layer computes logits from a copy of the whole matrix, past the TargetHead that holds it.
    """
    adapters = [
        getattr(end, "token_adapter", None) for end in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    if adapters == [None, None]:
        return
    from alpaca.training.model.adapters.token_rows import TokenHead, TokenTable

    for adapter in filter(None, adapters):
        if isinstance(adapter.base_layer, TargetHead):
            adapter.__class__ = TokenHead
        elif isinstance(adapter.base_layer, nn.Embedding):
            adapter.__class__ = TokenTable


def train_in_float32(model: nn.Module) -> None:
    """Make all trained parameters float32, as PEFT does with its matrices but not with whole modules."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
