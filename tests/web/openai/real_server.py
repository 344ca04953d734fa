"""The real server with OpenAI's API beside it, and the environment of other people's clients."""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from deploy.local_server import LocalServer, running_server
from tests.conftest import ROOT

CLIENTS = ROOT / ".bench" / "openai-clients"
PACKAGES = (
    "openai==3.54.0", "langchain-openai==1.7.4", "lm_eval[api]==0.4.13", "transformers==5.17.0",
    "sentencepiece==0.2.2", "protobuf==7.36.2",
)  # fmt: skip


@contextlib.contextmanager
def real_server(flags: list[str]) -> Iterator[tuple[LocalServer, str]]:
    """The server, and the address of OpenAI's API, once it answers."""
    with running_server([*flags, "--openai_port", "0"], on_failure=print) as server:
        yield server, f"{server.wait_for_openai()}/v1"


def clients_python() -> Path:
    """The interpreter of an environment that has the clients, none of this project's packages; made once."""
    python = CLIENTS / "bin" / "python"
    complete = CLIENTS / "complete"
    if not complete.exists() or complete.read_text() != str(PACKAGES):
        shutil.rmtree(CLIENTS, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(CLIENTS)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES]
        subprocess.run(install, check=True)
        complete.write_text(str(PACKAGES))
    return python
