"""What all tests share: no model hub, and the real inputs where they are."""

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
# Workers that share the cores compute with one thread each: two would spin while they wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
# torch.set_num_threads turns it off for the rest of a process. So that a test that calls it changes no later one's last
# bits, it is off in all of them, and in the processes they start.
os.environ.setdefault("MKL_DYNAMIC", "FALSE")

import pytest

from alpaca import cpu_threads

if TYPE_CHECKING:
    from deploy.local_server import LocalServer

cpu_threads.set_defaults()
# Until all tests are collected: imports stay, and to search them for garbage takes a third of the collection.
gc.disable()

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real inputs: a trained tiny LLaMA in Meta's layout, Meta's tokenizer, 4,000 Alpaca examples.

    The project ships none of it. ALPACA_REAL names the folder; without it the tests that need it are skipped.
    """
    folder = os.environ.get("ALPACA_REAL")
    if not folder:
        pytest.skip("ALPACA_REAL is not set: it names a folder of real inputs, which the project does not ship")
    assert Path(folder).is_dir(), f"ALPACA_REAL names no folder: {folder}"
    return Path(folder)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors on a busy machine: threads would mostly wait for each other."""
    yield from _computing_with(1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For what divides its work among threads: those of a worker are one, unless a test asks for more."""
    yield from _computing_with(2)


def _computing_with(num_threads: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaMA in Hugging Face format, converted from Meta's."""
    from alpaca.formats.meta.to_hf import convert
    from convert.convert_llama_weights_to_hf import parse_arguments
    from tests.tiny import TinyLlama, train_tokenizer, write_meta

    base = tmp_path_factory.mktemp("llama")
    train_tokenizer(base)
    model = TinyLlama(vocab_size=400, n_kv_heads=4)
    write_meta(base / "T", model.tensors(), model.params())
    return convert(parse_arguments(["--input_dir", str(base), "--model_size", "T", "--output_dir", str(base / "out")]))


@pytest.fixture(scope="session")
def server_without_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator["LocalServer"]:
    """A real server that found no model in a folder `nothing`, so that its setup failed."""
    from deploy.local_server import LocalServer

    server = LocalServer(["--weights", str(tmp_path_factory.mktemp("weights") / "nothing")])
    try:
        server.wait_until("SETUP_FAILED", timeout_s=60)
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece BPE model of Meta's kind, trained on the sample."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    texts = [
        text
        for record in json.loads((ROOT / "alpaca/data/sample.json").read_text())
        for text in record.values()
        if text
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "tokenizer"), vocab_size=480, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return folder / "tokenizer.model"


# Files whose tests take longest come first: each file is one worker's, and a long one at the end would leave the other
# worker idle.
LONGEST = (
    "bench/test_model_types.py", "test_mutations.py", "test_predict.py", "deploy/gate/test_gate.py",
    "test_triton_interpreter.py",
    "training/checkpoints/test_checkpoint.py", "training/model/optimizers/test_optimizer.py",
    "training/model/test_methods.py",
    "test_train.py", "training/test_distributed.py", "training/test_loop.py", "serving/llama/test_llama_engine.py",
    "data/generation/test_generate_instruction.py", "deploy/gate/test_places.py", "serving/llama/test_families.py",
    "test_readme_calls.py", "serving/kernels/test_triton_ops.py", "deploy/gate/test_real_runtime.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    from tests.costs import Costs

    config.pluginmanager.register(Costs(), "costs")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from tests.samples import mark_slow_rows

    mark_slow_rows(items)

    def rank(item: pytest.Item) -> int:
        path = item.path.relative_to(ROOT / "tests").as_posix() if item.path.is_relative_to(ROOT / "tests") else ""
        return LONGEST.index(path) if path in LONGEST else len(LONGEST)

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    """Keep the garbage collector off all that the imports made, which it would otherwise go through again and again."""
    gc.collect()
    gc.freeze()
    gc.enable()
