"""Whether a folder holds exactly the tensors that its config.json calls for: asked by serving, training and exports."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping

from alpaca.architecture.description import ModelDescription
from alpaca.architecture.tensors import Shape, hf_name, is_rotary_table
from alpaca.errors import InputError

_SHOWN = 5
# Tensors that nobody reads: buffers that older programs stored, and the value head of reinforcement learning.
_UNREAD = re.compile(r"(.*\.)?(rotary_emb\.(cos|sin)_cached|masked_bias)|v_head\..*")


def untie(
    description: ModelDescription, found: Mapping[str, Shape], *, has_equal_head: Callable[[], bool]
) -> ModelDescription:
    """The model as its folder holds it: a head that is not the embedding is one of its own, whatever config.json says.

    So transformers has it since version 5; PEFT writes such folders where the head of a tied model was trained.
    found: shapes by name.    has_equal_head: compares the values of embedding and head; asked only where both are
    there in one shape.
    """
    ends = hf_name("embedding"), hf_name("head")
    if not (description.family.one_naming and description.ties_embeddings):
        return description
    is_still = is_tied(True, found, ends=ends, has_equal_head=has_equal_head)
    return description if is_still else dataclasses.replace(description, ties_embeddings=False)


def is_tied(
    flag: bool, found: Mapping[str, Shape], *, ends: tuple[str, str], has_equal_head: Callable[[], bool]
) -> bool:
    """Whether a model's head is its embedding: config.json says so, and the files hold no head or an equal one.

    ends: the names of embedding and head.    has_equal_head: as for `untie`.
    """
    embedding, head = ends
    if not flag or embedding not in found or head not in found:
        return flag
    return tuple(found[embedding]) == tuple(found[head]) and has_equal_head()


def check_tensors(description: ModelDescription, found: Mapping[str, Shape], *, where: str) -> None:
    """Raise InputError unless `found`, shapes by name, are the model's tensors: none missing, none more, all in shape.

    Some may be there besides, which nobody reads: stored buffers (rotary tables, `masked_bias`), a value head
    (`v_head`), and the head of a model that ties it to its embedding (`untie` comes first: that head may be another).
    A model whose family has several namings is not checked. where: the folder, for errors.
    """
    if not description.family.one_naming:
        return
    expected = description.tensor_shapes()
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise InputError(f"{where} lacks weights of its model: {_some(missing)}; copy it again")
    unknown = sorted(name for name in found.keys() - expected.keys() if not _is_tolerated(name, description))
    if unknown:
        raise InputError(f"{where} {_superfluous(unknown, description)}")
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise InputError(
                f"{where}: {name} is {list(found[name])}, config.json makes it {list(shape)}; they are not of one model"
            )


def check_layers(num_layers: int, unread: Iterable[str], *, where: str) -> None:
    """Raise InputError where a loader left tensors of further decoder layers unread: half a model would be served.

    unread: names of tensors in the folder for which the model had no place. For models of any family.
    """
    numbers = {number for name in unread if (number := _layer_number(name)) is not None}
    further = sorted(number for number in numbers if number >= num_layers)
    if further:
        raise InputError(f"{where} {_more_layers(further, num_layers)}")


def _is_tolerated(name: str, description: ModelDescription) -> bool:
    is_buffer = is_rotary_table(name) or _UNREAD.fullmatch(name) is not None
    return is_buffer or (description.ties_embeddings and name == hf_name("head"))


def _superfluous(unknown: list[str], description: ModelDescription) -> str:
    further = sorted({number for name in unknown if (number := _layer_number(name)) is not None})
    if further and further[0] >= description.num_layers:
        return _more_layers(further, description.num_layers)
    return f"holds tensors that its config.json does not call for: {_some(unknown)}; they are not of one model"


def _more_layers(further: list[int], num_layers: int) -> str:
    layers = f"layer {further[0]}" if len(further) == 1 else f"layers {further[0]} to {further[-1]}"
    return (
        f"holds weights of {layers} (counted from 0), and its config.json says that the model has {num_layers} layers: "
        "one of them is of another model; copy both again"
    )


def _layer_number(name: str) -> int | None:
    found = re.search(r"(?:^|\.)(?:layers|h)\.(\d+)\.", name)
    return int(found[1]) if found else None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
