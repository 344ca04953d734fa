"""Folders whose tensors carry names of a wrapper: read under the model's own names where that is certain.

A compiled module saves `_orig_mod.` before its names, DistributedDataParallel `module.`, PEFT `base_model.model.`, TRL
`pretrained_model.`, and a model without its head leaves out `model.`. Each is taken away, or added, only where every
tensor agrees; those that are no module of any model are taken away wherever they stand. What TRL trains beside a
model, its value head, is left out.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from alpaca.architecture.families import FAMILIES
from alpaca.architecture.tensors import LAYER_PREFIX, OUTER, hf_name
from alpaca.errors import InputError

_INSIDE = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module)\.")
_WRAPPERS = ("module.", "base_model.model.", "pretrained_model.", "_forward_module.")
_TEXT_PART = "language_model."  # of a model that sees, too
_NEWER_TEXT_PART = f"model.{_TEXT_PART}"  # beside its head
_OTHER_PART = re.compile(r"(^|\.)(visual|vision_tower|vision_model|audio_tower|multi_modal_projector|mm_projector)\.")
_VALUE_HEAD = re.compile(r"(^|\.)v_head\.summary\.")
_CLASSES = "score."
_LAYER_MARK = re.compile(r"(^|\.)(layers|h|blocks)\.\d+\.")
# A LLaMA without its head is saved as the module `model` alone: these are its names, with `model.` taken away.
_INNER = "model."
_BARE_NAMES = tuple(
    name.removeprefix(_INNER) for name in (LAYER_PREFIX, *(tensor.hf for tensor in OUTER.values())) if _INNER in name
)


def find_names(stored: Iterable[str], config: Mapping[str, Any], *, where: Path) -> dict[str, str]:
    """The model's own name of each stored tensor's, for those that have another; {} where all are plain.

    Raises InputError, naming what the folder holds, for an adapter that was saved inside its base, a classifier, a
    model that sees, and parameters that FSDP saved flat.
    """
    stored = [name for name in stored if not _VALUE_HEAD.search(name)]
    _refuse_unmerged(stored, where)
    _refuse_flat(stored, where)
    own, is_known = {name: name for name in stored}, _has_layers_in_model(config)
    for rename in (
        _without_inner_wrappers, _without_wrappers(is_known), _without_text_part(is_known), _with_model(config, where),
    ):  # fmt: skip
        own = dict(zip(own, rename(list(own.values())), strict=True))
    _refuse_classifier(own.values(), where)
    if is_known:
        _refuse_other_parts(own.values(), where)
    if len(set(own.values())) < len(own):
        twice = sorted(name for name in own.values() if list(own.values()).count(name) > 1)
        raise InputError(
            f"{where} holds {twice[0]!r} under two names, plain and wrapped (_orig_mod., module.): keep one of them"
        )
    return {name: renamed for name, renamed in own.items() if name != renamed}


def find_value_head(stored: Iterable[str]) -> list[str]:
    """Tensors of the head by which TRL's PPO rates a text, `v_head.summary.*`: no language model has a use for them."""
    return [name for name in stored if _VALUE_HEAD.search(name)]


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


def _without_inner_wrappers(names: list[str]) -> list[str]:
    return [_INSIDE.sub("", name) for name in names]


def _has_layers_in_model(config: Mapping[str, Any]) -> bool:
    """Whether the names of the whole model are known to begin with `model.layers.`."""
    family = FAMILIES.get(str(config.get("model_type")))
    return family is not None and family.prefix == LAYER_PREFIX


def _without_wrappers(is_known: bool) -> Callable[[list[str]], list[str]]:
    """Takes away the wrappers that all names carry, from the outside in. is_known: see `_has_layers_in_model`."""

    def rename(names: list[str]) -> list[str]:
        while wrapper := _find_wrapper(names, is_known):
            names = _without_inner_wrappers([name.removeprefix(wrapper) for name in names])
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


def _without_text_part(is_known: bool) -> Callable[[list[str]], list[str]]:
    """Reads `model.language_model.` as `model.`, where all tensors but the head have it. is_known: as above."""

    def rename(names: list[str]) -> list[str]:
        inner = [name for name in names if name != hf_name("head")]
        if not is_known or not inner or not all(name.startswith(_NEWER_TEXT_PART) for name in inner):
            return names
        bare = [name.removeprefix(_NEWER_TEXT_PART) for name in names]
        if any(name.startswith(_INNER) for name in bare):  # a whole model, with its own head
            return bare
        return [name if name == hf_name("head") else _INNER + name for name in bare]

    return rename


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


def _refuse_classifier(names: Iterable[str], where: Path) -> None:
    names = list(names)
    found = next((name for name in names if name.startswith(_CLASSES)), None)
    if found and hf_name("head") not in names:
        raise InputError(
            f"{where} holds a classifier or reward model, no language model: it has {found!r} in place of "
            f"{hf_name('head')}; give the language model that it was made from"
        )


def _refuse_other_parts(names: Iterable[str], where: Path) -> None:
    if found := next((name for name in names if _OTHER_PART.search(name)), None):
        raise InputError(
            f"{where} holds a model that takes images or sound ({found!r}), and its config.json is that of a text "
            "model: save its text part alone, with its head, where the whole can be loaded"
        )


def _refuse_flat(names: Iterable[str], where: Path) -> None:
    if found := next((name for name in names if name.rpartition(".")[2].startswith("_flat_param")), None):
        raise InputError(
            f"{where} holds parameters that FSDP keeps flat, many in one ({found!r}): save the whole model where it "
            "was trained, with StateDictType.FULL_STATE_DICT"
        )
