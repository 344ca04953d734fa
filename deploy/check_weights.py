"""script/check on what the image serves: model, adapters and base are there, whole and of one kind; and their memory.

All that cog.yaml's environment names is looked at as the server will find it: its working directory is /src, where the
project's files go.
"""

import posixpath
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from alpaca.errors import InputError, MissingInput, NotEnoughSpace, UnsupportedModel
from alpaca.files.archives import unpack
from alpaca.files.model_folders import is_adapter, is_weights
from alpaca.files.network.addresses import is_address
from alpaca.files.places import TRAINED
from alpaca.files.reading import parse_size
from alpaca.formats.hf.adapters import AdapterFolder, open_adapter
from alpaca.formats.hf.folder import WeightsFolder, require_all_weights
from alpaca.memory import CUDA_CONTEXT_BYTES
from alpaca.serving.llama.adapters import check_for_llama, largest_ranks, stacked_bytes
from alpaca.serving.llama.planning import plan_memory, weights_bytes
from alpaca.serving.llama.weights import read_llama, require_tensors
from alpaca.serving.served_model import ServedModel, check_tokenizers, describe_other_bases
from alpaca.serving.settings import DEFAULT_ADAPTER, ServerSettings, parse_adapters
from alpaca.text.loading import load_tokenizer
from deploy.findings import Finding, Findings, collect, error, gigabytes, ok, warning
from deploy.image_files import ImageFile

_PROJECT = PurePosixPath("/src")  # the project's folder in the image, and the server's working directory
_NEEDED = (".safetensors", ".json", ".model", ".tiktoken", "adapter_model.bin")


@dataclass(frozen=True, kw_only=True)
class Image:
    """The project as its image will have it. files: None where .dockerignore cannot be read."""

    root: Path
    settings: ServerSettings
    files: list[ImageFile] | None


def named_places(settings: ServerSettings) -> dict[str, str]:
    """Folders, archives and addresses that the server will open, by what names them."""
    places = {"COG_WEIGHTS": settings.weights or str(TRAINED)}
    if settings.base_model:
        places["ALPACA_BASE_MODEL"] = settings.base_model
    adapters = parse_adapters(settings.adapters or "")
    return places | {f"ALPACA_ADAPTERS: {name}": place for name, place in adapters.items()}


def check_weights(image: Image, *, card: str | None = None) -> Findings:
    """What is served is there, whole, in the image and of one kind; and with `card` whether that memory holds it."""

    adapters: dict[str, AdapterFolder] = {}
    base = yield from collect("weights", _check_served(image, adapters))
    for name, place in parse_adapters(image.settings.adapters or "").items():
        found = yield from collect("weights", _check_adapter(image, f"ALPACA_ADAPTERS: {name}", place))
        if found:
            adapters[name] = found
    if base is None:
        if card:
            yield warning("memory", "not planned: there is no model to look at")
        return
    served = ServedModel(base=base, adapters=adapters)
    yield from collect("weights", _check_together(served, image.settings))
    if card:
        yield from collect("memory", _check_memory(served, image.settings, card))


def _check_served(image: Image, adapters: dict[str, AdapterFolder]) -> Generator[Finding, None, Path | None]:
    """The model's folder: COG_WEIGHTS, or the base under the adapter that it is, which is put into `adapters`."""
    place = named_places(image.settings)["COG_WEIGHTS"]
    folder = yield from _find(image, "COG_WEIGHTS", place)
    if folder is None:
        return None
    if not is_adapter(folder):
        if image.settings.base_model:
            yield warning("weights", f"ALPACA_BASE_MODEL is not used: {place} is no adapter but a whole model")
        yield from _check_whole(folder, image.settings.engine)
        return folder
    adapter = open_adapter(folder)
    yield ok("weights", adapter.describe())
    adapters[DEFAULT_ADAPTER] = adapter
    base = yield from _find_base(image, adapter, place)
    if base is None:
        return None
    if is_adapter(base):
        raise InputError(f"{base} is an adapter itself; the base model of {place} must be a whole model")
    yield from _check_whole(base, image.settings.engine)
    return base


def _find_base(image: Image, adapter: AdapterFolder, place: str) -> Generator[Finding, None, Path | None]:
    if image.settings.base_model:
        return (yield from _find(image, "ALPACA_BASE_MODEL", image.settings.base_model))
    if not adapter.base_name:
        raise InputError(f"{place} names no base model: set ALPACA_BASE_MODEL in cog.yaml's environment")
    try:
        return (yield from _find(image, f"the base model that {place} names", adapter.base_name))
    except (InputError, MissingInput) as reason:
        raise InputError(
            f"{reason}. Put that model into the project, and its folder as ALPACA_BASE_MODEL into cog.yaml's "
            "environment, such as ALPACA_BASE_MODEL=weights/llama-7b"
        ) from reason


def _check_adapter(image: Image, named: str, place: str) -> Generator[Finding, None, AdapterFolder | None]:
    folder = yield from _find(image, named, place, unpacks=True)
    if folder is None:
        return None
    if not is_adapter(folder):
        raise InputError(f"{named}={place} is no adapter: it has no adapter_config.json")
    adapter = open_adapter(folder)
    yield ok("weights", f"{named}: {adapter.describe()}")
    return adapter


def _find(image: Image, named: str, place: str, *, unpacks: bool = False) -> Generator[Finding, None, Path | None]:
    """The folder of what the image serves by `place`; None for what is not looked at: addresses and large archives.

    unpacks: archives are, into the cache, as the server does. Raises InputError, MissingInput.
    """
    if is_address(place):
        yield warning("weights", f"{named} is a URL: every start downloads it, and nothing of it was looked at")
        return None
    path = _path_of(image.root, named, place)
    if path.is_file():
        yield from _check_in_image([path], image)
        hint = "" if unpacks else " and not looked at here"
        yield warning(
            "weights", f"{named}: {place} is an archive, unpacked at every start{hint}: put the folder into the image"
        )
        return unpack(path) if unpacks else None
    if not is_weights(path):
        raise MissingInput(
            f"no model in {place} ({named}): train one into {TRAINED}, or name another folder in cog.yaml's environment"
        )
    if not path.resolve().is_relative_to(image.root.resolve()):
        raise InputError(f"{named}: {place} leads out of the project, by a link, and does not go into the image")
    yield from _check_in_image([file for file in sorted(path.iterdir()) if file.name.endswith(_NEEDED)], image)
    return path


def _path_of(root: Path, named: str, place: str) -> Path:
    """Where a path in the image lies here. Raises InputError for one outside of the project's folder there."""
    inside = PurePosixPath(posixpath.normpath(_PROJECT / place))
    if not inside.is_relative_to(_PROJECT):
        hint = ""
        if Path(place).is_relative_to(root):
            hint = f"; in the image it is {_PROJECT / Path(place).relative_to(root).as_posix()}"
        raise InputError(
            f"{named}: {place} is not in the image, where the project's folder is {_PROJECT}: expected a path in "
            f"there, or one from there on{hint}"
        )
    return root / inside.relative_to(_PROJECT)


def _check_in_image(needed: list[Path], image: Image) -> Findings:
    if image.files is None:
        return
    there = {file.path for file in image.files}
    for path in needed:
        inside = PurePosixPath(path.relative_to(image.root).as_posix())
        if inside not in there:
            yield error("weights", f".dockerignore keeps {inside} out of the image")
        elif path.is_symlink():
            yield error("weights", f"{inside} is a link, which goes into the image without what it names")


def _check_whole(folder: Path, wanted: str) -> Findings:
    """Every tensor and the tokenizer, for the engine that ALPACA_ENGINE (`wanted`) and the model choose."""

    weights = WeightsFolder(folder)
    specs = weights.specs()
    try:
        config = read_llama(folder)
        require_tensors(weights, config)
        load_tokenizer(folder).require_rows(config.vocab_size, folder)
        engine = "the LLaMA engine" if wanted != "transformers" else "transformers (ALPACA_ENGINE)"
    except UnsupportedModel as unsupported:
        if wanted == "llama":
            raise
        require_all_weights(folder, [])
        load_tokenizer(folder)
        engine = f"transformers ({unsupported})"
    size = gigabytes(sum(spec.num_bytes for spec in specs))
    yield ok("weights", f"{folder.name}: {len(specs)} tensors, {size}, whole; served by {engine}")


def _check_together(served: ServedModel, settings: ServerSettings) -> Findings:
    """The adapters are this base's, and of a kind that the engine serves."""

    for text in describe_other_bases(served, settings):
        yield warning("weights", text)
    check_tokenizers(served.adapters, load_tokenizer(served.base))
    if settings.engine == "transformers":
        return
    try:
        config = read_llama(served.base)
    except UnsupportedModel:
        return
    check_for_llama(served.adapters, config)


def _check_memory(served: ServedModel, settings: ServerSettings, card: str) -> Findings:
    """The memory plan of the chosen card, adapters included, as alpaca.serving.llama.planning makes it."""

    try:
        if settings.engine == "transformers":
            raise UnsupportedModel("ALPACA_ENGINE=transformers")
        model = read_llama(served.base)
    except UnsupportedModel as reason:
        yield warning("memory", f"served by transformers ({reason}), whose memory is not planned")
        return
    check_for_llama(served.adapters, model)
    dtype = getattr(torch, settings.dtype or "bfloat16")
    weights = weights_bytes(model, dtype, settings.quantization)
    adapters = stacked_bytes(served.adapters, model, dtype)
    uses = f"weights {gigabytes(weights)}" + (f", adapters {gigabytes(adapters)}" if adapters else "")
    free = parse_size(card) - weights - adapters - CUDA_CONTEXT_BYTES
    try:
        if free <= 0:
            raise NotEnoughSpace(f"{uses}, and CUDA itself {gigabytes(CUDA_CONTEXT_BYTES)}: they do not fit")
        plan = plan_memory(
            model, settings, free_bytes=free, device="cuda", dtype=dtype, adapter_bytes=adapters,
            num_ranks=largest_ranks(served.adapters),
        )  # fmt: skip
    except NotEnoughSpace as reason:
        yield error("memory", f"{card}: {reason}")
        return
    lengths = sorted({min(512, plan.max_context), plan.max_context})
    at_once = ", ".join(f"{plan.num_requests(length)} requests of {length} tokens" for length in lengths)
    yield ok("memory", f"{card}: {uses}, cache {gigabytes(plan.kv_bytes)}; at once {at_once}")
