"""Start the real Cog server on this machine: schema written, environment right, then `python -m cog.server.http`.

The process becomes the runtime (exec), so that one signal stops server and worker together.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from alpaca.errors import InputError, run_command
from alpaca.files.network.addresses import parse_address
from alpaca.serving.settings import ServerSettings, parse_adapters, setting_type
from deploy import schema

ROOT = Path(__file__).resolve().parent.parent


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse host, port, mode, and a flag for each server setting; settings not given are taken from the environment."""
    parser = argparse.ArgumentParser(prog="script/serve", description="Serve the model over HTTP with Cog's runtime.")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=5000, help="0 picks a free one and prints it (default: 5000)")
    parser.add_argument("--train", action="store_true", help="serve /trainings instead of /predictions")
    parser.add_argument(
        "--upload_url",
        help="http(s) address below which a training's archive is PUT, instead of returned in the answer",
    )
    for item in dataclasses.fields(ServerSettings):
        text = f"{item.metadata['help']} [{item.metadata['variable']}]"
        parser.add_argument(f"--{item.name}", type=setting_type(item), choices=item.metadata["choices"], help=text)
    return parser.parse_args(arguments)


def _port(text: str) -> int:
    if not text.isdigit() or int(text) >= 2**16:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 65535, found {text!r}")
    return int(text)


def runtime_environment(options: argparse.Namespace, environment: dict[str, str]) -> dict[str, str]:
    """The variables the runtime and the Predictor read. Raises InputError for a bad setting."""
    made = {"LOG_FORMAT": "console", "HF_HUB_OFFLINE": "1", **environment}
    made.setdefault("COG_MAX_CONCURRENCY", str(ServerSettings.concurrency))
    caller = Path(environment.get("ALPACA_CALLER", "."))
    options.weights, options.base_model = (_seen_from(caller, path) for path in (options.weights, options.base_model))
    if options.adapters:
        places = parse_adapters(options.adapters).items()
        options.adapters = ",".join(f"{name}={_seen_from(caller, place)}" for name, place in places)
    for item in dataclasses.fields(ServerSettings):
        if (value := getattr(options, item.name)) is not None:
            made[item.metadata["variable"]] = str(value)
    ServerSettings.from_environment(made)
    if options.upload_url:
        made["ALPACA_UPLOAD_URL"] = options.upload_url  # for train.py: the runtime keeps its own to itself
    made["PORT"] = str(options.port)
    made["COG_PREDICT_TYPE_STUB"] = schema.PREDICTOR
    made["COG_TRAIN_TYPE_STUB"] = schema.TRAINER
    # The runtime starts its worker as `python`, which must be this environment's.
    made["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), made.get("PATH", os.defpath)])
    return made


def _seen_from(caller: Path, path: str | None) -> str | None:
    """A flag's path as the runtime, which works in another folder, finds it; an address as it stands."""
    return path if not path or "://" in path else str((caller / path).absolute())


def runtime_command(options: argparse.Namespace) -> list[str]:
    """What becomes the server. Raises InputError for an upload address that is none, or without trainings."""
    command = [sys.executable, "-m", "cog.server.http", "--host", options.host]
    if options.train:
        command += ["--x-mode", "train"]
    if options.upload_url:
        if not options.train or not options.upload_url.startswith(("http://", "https://")):
            raise InputError(
                "--upload_url: expected an http or https address, and --train beside it, found "
                f"{'another scheme' if options.train else 'no --train'}; predictions return no files"
            )
        try:
            parse_address(options.upload_url)
        except InputError as error:
            raise InputError(f"--upload_url: {error}") from error
        command += ["--upload-url", options.upload_url]
    return command


def main() -> None:
    options = parse_arguments()
    command = runtime_command(options)
    environment = runtime_environment(options, dict(os.environ))
    os.chdir(ROOT)
    schema.write_schema()
    os.execve(sys.executable, command, environment)


if __name__ == "__main__":
    run_command(main)
