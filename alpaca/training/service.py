"""Training behind HTTP: one at a time. Its archive is returned or uploaded, and its size is checked before it starts.

Only train.py knows Cog: metrics leave this module through a function `record(name, value)`.
"""

import contextlib
import gc
import itertools
import logging
import os
import secrets
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from alpaca.errors import AlpacaError, BadExamples, InputError, MissingInput, MissingPackage
from alpaca.files.archives import pack
from alpaca.files.locks import ScratchFolder
from alpaca.files.network.addresses import parse_address, split_list
from alpaca.files.outputs import require_free_space
from alpaca.files.places import choose_base, open_weights
from alpaca.files.reading import read_json
from alpaca.files.uploads import upload
from alpaca.training.guards import Interrupted, stoppable
from alpaca.training.received import MOST_BYTES, ReceivedData, receive_data

if TYPE_CHECKING:
    from alpaca.training.configuration.config import TrainConfig

_one_training = threading.Lock()
_stop_of_last = threading.Event()  # set to stop the training that runs now, if one does
_last_output: ScratchFolder | None = None  # kept, for the runtime reads it after `train` has returned
_STOPPING_S = 120.0  # how long a training waits for one that was cancelled to end what it is at
_CANCEL_S = 3.0  # and for the cancel of one that still runs: the gate passes it on when the worker has the training
_TELL_S = 10.0  # seconds between two lines of the log
# The runtime returns a file in base64 inside its answer, and holds some 8 times the file in memory meanwhile: measured
# with Cog 0.23.1, 64 MiB took 0.5 GB and 0.5 s, 256 MiB 2.2 GB and 4.6 s.
_MOST_INLINE_BYTES = 256 << 20
_FLOATS = (
    "learning_rate", "num_train_epochs", "lora_alpha", "lora_dropout", "eval_fraction", "dpo_beta", "orpo_beta",
    "kto_beta",
)  # fmt: skip
_OTHER_FILES_BYTES = 1 << 20  # what a training adds to the base's own JSON files and tokenizer


def serve_training(
    values: Mapping[str, object], *, stop: threading.Event, record: Callable[[str, float], None]
) -> Path | str:
    """Train with train.py's inputs `values`. Returns the archive's path, or the address it was uploaded to.

    Only one training runs at a time. Setting `stop` ends it, within a step, too. Raises AlpacaErrors, Interrupted among
    them.
    """
    global _stop_of_last
    _wait_for_turn(stop)
    _stop_of_last = stop
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    archive: Path | None = None
    try:
        archive = _train_to_archive(values, stop, record)
        return _deliver(archive, stop)
    except Exception as error:
        if archive is None or stop.is_set():
            _remove_last_output()
        if isinstance(error, AlpacaError):
            print(f"ended: {error}")
        else:
            traceback.print_exc(file=sys.stdout)  # the runtime itself reports only the message
        traceback.clear_frames(error.__traceback__)  # the frames hold the model
        raise
    finally:
        _free_memory()
        _one_training.release()


def _wait_for_turn(stop: threading.Event) -> None:
    """Take `_one_training`, which one that was cancelled gives back only when it has ended its step.

    Raises InputError where another training goes on, Interrupted when `stop` is set.
    """
    begun = time.monotonic()
    while not _one_training.acquire(timeout=0.1):
        if stop.is_set():
            raise Interrupted("the training was stopped before it began")
        if time.monotonic() - begun > (_STOPPING_S if _stop_of_last.is_set() else _CANCEL_S):
            raise InputError("a training is running already; wait for its end, or cancel it")


def _remove_last_output() -> None:
    global _last_output
    if _last_output is not None:
        _last_output.remove()
    _last_output = None


def _free_memory() -> None:
    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()


def _train_to_archive(
    values: Mapping[str, object], stop: threading.Event, record: Callable[[str, float], None]
) -> Path:
    global _last_output
    _check_upload_address()
    _remove_last_output()
    from alpaca.training.loop import train as run_training

    base = _open_base(str(values["model"]))
    _last_output = ScratchFolder("alpaca-training-")
    folder = _last_output.path
    allowed = split_list(os.environ.get("ALPACA_DATA_ADDRESSES", ""))
    data = receive_data(str(values["data"]), folder, allowed=allowed, stop=stop)
    config = _make_config(values, base=base, data_path=data.path, output_dir=folder / "alpaca_out")
    _check_size(config, folder)
    report = _Report(record)
    with _hides_what_was_not_sent(data), stoppable(stop.is_set):
        trained = run_training(config, on_step=report.step, should_stop=stop.is_set)
    data.path.unlink()
    report.end(read_json(trained / "trainer_state.json")["log_history"])
    # An upload's address ends in the file's name, so each training needs a name of its own.
    archive = pack(trained, folder / f"{config.method}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}.tar")
    shutil.rmtree(trained)
    print(f"packed: {archive.name}, {archive.stat().st_size / 1e6:,.1f} MB")
    return archive


def _open_base(model: str) -> Path:
    allowed = os.environ.get("ALPACA_BASE_MODELS", "")
    place = choose_base(model, allowed=allowed, root=Path.cwd())
    try:
        base = open_weights(place, named="model", lists=False)
    except MissingInput as error:  # a client need not know where the server's folders lie
        raise MissingInput(str(error).replace(place, model)) from None
    if not (base / "config.json").is_file():
        raise InputError(f"model: {model} is an adapter, and training starts from a whole model: name its base")
    return base


@contextlib.contextmanager
def _hides_what_was_not_sent(data: ReceivedData) -> Iterator[None]:
    """Errors name no path of the data; those of examples that cannot be read quote only what the client sent."""
    try:
        yield
    except BadExamples as error:
        if data.is_upload:
            raise InputError(str(error).replace(str(data.path), data.shown)) from None
        raise InputError(
            f"{data.shown} holds no examples that can be read. What is in it is not shown, since it was not uploaded; "
            "`python -m alpaca.data.report` says what is amiss"
        ) from None
    except (InputError, MissingPackage) as error:
        if str(data.path) not in str(error):
            raise
        raise type(error)(str(error).replace(str(data.path), data.shown)) from None


def _make_config(values: Mapping[str, object], *, base: Path, data_path: Path, output_dir: Path) -> "TrainConfig":
    """The run's configuration. An `eval_fraction` has it evaluated, too: by the recipe's steps, else each epoch."""
    from alpaca.training.configuration.config import RECIPES, make_config

    flags = {
        **values,
        "data_path": str(data_path),
        "data_limit_mib": MOST_BYTES >> 20,
        "model_name_or_path": str(base),
    }
    del flags["data"], flags["model"]
    if "eval_fraction" in flags:
        often = RECIPES[str(flags["recipe"])].get("eval_strategy", "epoch")
        flags |= {"val_set_size": 0, "eval_strategy": often if flags["eval_fraction"] else "no"}
    for name in _FLOATS:
        if name in flags:
            flags[name] = float(flags[name])  # a JSON client may write 1 for 1.0
    return make_config({**flags, "output_dir": str(output_dir), "save_strategy": "no", "report_to": "none"})


# The size of what is returned -----------------------------------------------------------------------------------


def _check_size(config: "TrainConfig", folder: Path) -> None:
    """Refuse a training whose archive the runtime could not return or the disk could not hold."""
    num_bytes = _estimate_archive(config)
    require_free_space(folder, 2 * num_bytes)  # the trained folder, and the archive of it
    if num_bytes <= _MOST_INLINE_BYTES or _upload_address():
        return
    raise InputError(
        f"expected an archive of at most {_MOST_INLINE_BYTES / 1e6:,.0f} MB, found that method {config.method} makes "
        f"one of about {num_bytes / 1e6:,.0f} MB: without an upload address Cog's runtime returns a file inside its "
        "JSON answer, and holds some 8 times its size in memory. Use method lora or qlora, which return an adapter; or "
        "start the server with --upload-url ADDRESS (script/serve: --upload_url), for any size; or train by hand in "
        "the image: python train.py --model_name_or_path … --data_path …"
    )


def _estimate_archive(config: "TrainConfig") -> int:
    """Estimate the bytes of a run's archive from the planned number of trained parameters; no weight is read."""
    import torch

    from alpaca.training.configuration.resolving import resolve_settings
    from alpaca.training.model.base import open_base
    from alpaca.training.model.final import choose_save_dtype
    from alpaca.training.planning.trained import count_trained
    from alpaca.training.planning.workload import make_setup, read_model

    with _quiet():  # the run itself logs the same again
        settings = resolve_settings(config, num_processes=1, device=torch.device("cpu"))
        base = open_base(settings.base)
    kept = [*base.folder.glob("*.json"), *base.folder.glob("tokenizer.model"), *base.folder.glob("*.txt")]
    others = sum(file.stat().st_size for file in kept) + _OTHER_FILES_BYTES
    try:
        shape = read_model(base.folder, num_tokens=base.tokenizer.size if config.method == "full" else 0)
    except InputError:  # a kind of model that cannot be planned; a whole one is as large as its base
        weights = [*base.folder.glob("*.safetensors"), *base.folder.glob("*.bin")]
        return others + (sum(file.stat().st_size for file in weights) if config.method == "full" else 0)
    setup = make_setup(settings, shape, num_processes=1, on_gpu=False)
    return others + count_trained(shape, setup) * choose_save_dtype(settings, base).itemsize


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("alpaca")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _upload_address() -> str | None:
    """Where files are uploaded to: the runtime's --upload-url, else ALPACA_UPLOAD_URL.

    The flag is read from the command line of the parent process, which is the server in Cog 0.23. That is a detail of
    that release, so the variable can be set instead.
    """
    with contextlib.suppress(OSError, ValueError):
        command = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
        for word, following in itertools.pairwise(command):
            if word == "--upload-url" or word.startswith("--upload-url="):
                return word.partition("=")[2] or following
    return os.environ.get("ALPACA_UPLOAD_URL") or None


def _check_upload_address() -> None:
    """Raise InputError, before hours of training, for an upload address that cannot work."""
    if place := _upload_address():
        try:
            parse_address(place)
        except InputError as error:
            raise InputError(f"the server's upload address: {error}; start the server with another") from error


def _deliver(archive: Path, stop: threading.Event) -> Path | str:
    """Upload an archive if an upload address is set. Returns the archive's new address, or else its path.

    The runtime would upload it, too, but it gives up after 25 s (measured, Cog 0.23.1: "upload request timed out") and
    holds the file twice in memory; an address it passes on as it is. If the upload fails the archive is kept.
    """
    place = _upload_address()
    if place is None:
        return archive

    def end_if_stopped() -> None:
        if stop.is_set():
            raise InputError("stopped while uploading")

    try:
        return upload(archive, place, on_piece=end_if_stopped)
    except Exception as error:  # whatever the error is, the trained weights must not be lost
        if stop.is_set():
            raise
        kept = f"while this server runs, and until its next training, the archive stays here as {archive}"
        if isinstance(error, AlpacaError):
            raise InputError(f"{error}; {kept}") from error
        raise RuntimeError(f"the upload failed ({type(error).__name__}: {error}); {kept}") from error


# Progress -------------------------------------------------------------------------------------------------------


class _Report:
    """Records metrics of each step, and prints a line every few seconds."""

    def __init__(self, record: Callable[[str, float], None]) -> None:
        self._record = record
        self._start: tuple[int, float] | None = None  # the number of the first step, and when it ended
        self._told_at = 0.0

    def step(self, entry: Mapping[str, float]) -> None:
        """Record a step. A metric keeps the type of its first value, so numbers are always floats and steps ints."""
        now, step, last = time.monotonic(), int(entry["step"]), int(entry["max_steps"])
        self._start = self._start or (step, now)
        rest_s = (last - step) * (now - self._start[1]) / max(1, step - self._start[0])
        self._record("step", step)
        self._record("max_steps", last)
        if step > self._start[0]:
            self._record("eta_s", round(float(rest_s), 1))
        for name in ("loss", "learning_rate", "tokens_per_second", "eval_loss"):
            if name in entry:
                self._record(name, float(entry[name]))
        if step in (1, last) or now - self._told_at >= _TELL_S:
            self._told_at = now
            rest = f", about {rest_s:,.0f} s to go" if self._start[0] < step < last else ""
            print(f"step {step}/{last}: loss {entry['loss']:.4f}{rest}")

    def end(self, history: list[dict[str, float]]) -> None:
        """Record what is known only at the end: the last held-out loss and the mean rate."""
        from alpaca.training.report.summary import mean_rate

        self._record("tokens_per_second", round(float(mean_rate(history)), 1))
        if held_out := [entry["eval_loss"] for entry in history if "eval_loss" in entry]:
            self._record("eval_loss", float(held_out[-1]))
