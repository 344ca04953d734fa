"""Folders whose tensors carry names of a wrapper: read under the model's own names where that is certain.

A compiled module saves `_orig_mod.` before its names, DistributedDataParallel `module.`, PEFT `base_model.model.`, and
a model without its head leaves out `model.`. Each is taken away, or added, only where every tensor agrees.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from alpaca.architecture.families import FAMILIES
from alpaca.architecture.tensors import LAYER_PREFIX, OUTER, hf_name
from alpaca.errors import InputError

_COMPILED = re.compile(r"(^|(?<=\.))_orig_mod\.")
_WRAPPERS = ("module.", "base_model.model.", "_fsdp_wrapped_module.", "_forward_module.")
_TEXT_PART = "language_model."  # of a model that sees, too
_LAYER_MARK = re.compile(r"(^|\.)(layers|h|blocks)\.\d+\.")
# A LLaMA without its head is saved as the module `model` alone: these are its names, with `model.` taken away.
_INNER = "model."
_BARE_NAMES = tuple(
    name.removeprefix(_INNER) for name in (LAYER_PREFIX, *(tensor.hf for tensor in OUTER.values())) if _INNER in name
)


def find_names(stored: Iterable[str], config: Mapping[str, Any], *, where: Path) -> dict[str, str]:
    """The model's own name of each stored tensor's, for those that have another; {} where all are plain.

    Raises InputError, naming what the folder holds, for an adapter that was saved inside its base.
    """
    stored = list(stored)
    _refuse_unmerged(stored, where)
    own = {name: name for name in stored}
    for rename in (_without_compiler, _without_wrappers(_has_layers_in_model(config)), _with_model(config, where)):
        own = dict(zip(own, rename(list(own.values())), strict=True))
    if len(set(own.values())) < len(own):
        twice = sorted(name for name in own.values() if list(own.values()).count(name) > 1)
        raise InputError(
            f"{where} holds {twice[0]!r} under two names, plain and wrapped (_orig_mod., module.): keep one of them"
        )
    return {name: renamed for name, renamed in own.items() if name != renamed}


def describe_renaming(names: Mapping[str, str]) -> str:
    """One line for a log."""
    first = next(iter(names))
    return f"{len(names)} tensors have another program's names, such as {first!r}, which is read as {names[first]!r}"


def alias_tied_head(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """The embedding by the head's name, where a tied model was saved with its head alone; else {}."""
    names, family = set(names), FAMILIES.get(str(config.get("model_type")))
    if family is None or not family.one_naming or not config.get("tie_word_embeddings", family.ties_by_default):
        return {}
    embedding, head = hf_name("embedding"), hf_name("head")
    return {head: embedding} if head in names and embedding not in names else {}


def _without_compiler(names: list[str]) -> list[str]:
    return [_COMPILED.sub("", name) for name in names]


def _has_layers_in_model(config: Mapping[str, Any]) -> bool:
    """Whether the names of the whole model are known to begin with `model.layers.`."""
    family = FAMILIES.get(str(config.get("model_type")))
    return family is not None and family.prefix == LAYER_PREFIX


def _without_wrappers(is_known: bool) -> Callable[[list[str]], list[str]]:
    """Takes away the wrappers that all names carry, from the outside in. is_known: see `_has_layers_in_model`."""

    def rename(names: list[str]) -> list[str]:
        while wrapper := _find_wrapper(names, is_known):
            names = _without_compiler([name.removeprefix(wrapper) for name in names])
        return names

    return rename


def _find_wrapper(names: list[str], is_known: bool) -> str | None:
    """What all names begin with; `model.` is a wrapper where another `model.` or the head follows it."""
    wrappers = (*_WRAPPERS, _TEXT_PART) if is_known else _WRAPPERS
    wrapped = [wrapper for wrapper in wrappers if names and all(name.startswith(wrapper) for name in names)]
    inner = (f"{_INNER}{_INNER}", f"{_INNER}{hf_name('head')}")
    is_inner = is_known and all(name.startswith(_INNER) for name in names)
    if not wrapped and is_inner and any(name.startswith(inner) for name in names):
        return _INNER
    return wrapped[0] if wrapped else None


def _with_model(config: Mapping[str, Any], where: Path) -> Callable[[list[str]], list[str]]:
    """Adds `model.` where every tensor but the head lacks it, in families whose models have it."""

    def rename(names: list[str]) -> list[str]:
        family = FAMILIES.get(str(config.get("model_type")))
        inner = [name for name in names if name != hf_name("head")]
        is_bare = bool(inner) and all(name.startswith(_BARE_NAMES) for name in inner)
        if family is None or not _has_layers_in_model(config) or not is_bare:
            return names
        if inner == names and not config.get("tie_word_embeddings", family.ties_by_default):
            raise InputError(
                f"{where} holds a bare model without {hf_name('head')}, which its config.json does not tie to the "
                "embedding: save the model with its head (AutoModelForCausalLM)"
            )
        return [name if name == hf_name("head") else _INNER + name for name in names]

    return rename


def _refuse_unmerged(names: list[str], where: Path) -> None:
    adapted = [name for name in names if ".lora_" in name or ".base_layer." in name or ".modules_to_save." in name]
    if not adapted:
        return
    whole = [name for name in names if name not in adapted and _LAYER_MARK.search(name)]
    inside = any(".base_layer." in name for name in adapted) or whole
    what = (
        "a model with an adapter that was not merged into it"
        if inside
        else "a LoRA adapter without its adapter_config.json, no whole model"
    )
    raise InputError(
        f"{where} holds {what} ({adapted[0]!r}): merge it where it was trained, by PEFT's merge_and_unload(), and save "
        "the result; or save the adapter alone, and give its folder with the base model"
    )
