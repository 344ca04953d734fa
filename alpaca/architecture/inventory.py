"""Whether a folder holds exactly the tensors that its config.json calls for: asked by serving, training and exports."""

import re
from collections.abc import Iterable, Mapping

from alpaca.architecture.description import ModelDescription
from alpaca.architecture.tensors import Shape, hf_name, is_rotary_table
from alpaca.errors import InputError

_SHOWN = 5


def check_tensors(description: ModelDescription, found: Mapping[str, Shape], *, where: str) -> None:
    """Raise InputError unless `found`, shapes by name, are the model's tensors: none missing, none more, all in shape.

    Two kinds may be there besides, which nobody reads: stored rotary tables, and the head of a model that ties it to
    its embedding. A model whose family has several namings is not checked. where: the folder, for errors.
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
    return is_rotary_table(name) or (description.ties_embeddings and name == hf_name("head"))


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
