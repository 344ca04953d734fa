"""Tiny base models, the sample's first records, and runs of the command in processes of its own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from alpaca.text.sentencepiece import write_llama_tokenizer
from alpaca.training.configuration.config import TrainConfig, make_config
from tests.conftest import ROOT
from tests.training.worker import leave_out_charts

SAMPLE = ROOT / "alpaca" / "data" / "sample.json"
SETTINGS = {  # float32, no files but what a test looks at
    "bf16": False,
    "tf32": False,
    "report_to": "none",
    "num_samples": 0,
    "learning_rate": 1e-3,
    "global_batch_size": 8,
    "model_max_length": 256,
}


@pytest.fixture(autouse=True, scope="module")
def small_sums() -> Iterator[None]:
    """Compute on one thread, also in a module's own fixtures: of so small a model's sums threads make more work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def drawing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave the charts out of a run where the test does not ask for `charts`: they take longer than a tiny training."""
    with pytest.MonkeyPatch.context() as patch:
        if "charts" not in request.fixturenames:
            leave_out_charts(patch.setattr)
        yield


@pytest.fixture
def charts() -> None:
    """The charts of a run are drawn, as users get them."""


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: Path) -> Path:
    """A LLaMA folder without a padding token, as conversion leaves it, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "llama-tiny"
    config = LlamaConfig(
        vocab_size=480, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    write_llama_tokenizer(sentencepiece_model, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OPT folder: tied embeddings, dropout, biases, its own padding token, a byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "opt-tiny"
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train([str(SAMPLE)], trainer)
    backend.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    config = OPTConfig(
        vocab_size=408, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, dropout=0.1, init_std=0.1,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bloom(tmp_path_factory: pytest.TempPathFactory, tiny_opt: Path) -> Path:
    """A BLOOM folder: ALiBi, one fused layer for query, key and value, tied embeddings."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    folder = shutil.copytree(tiny_opt, tmp_path_factory.mktemp("base") / "bloom-tiny")
    config = BloomConfig(vocab_size=408, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.1)
    BloomForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 records of the sample."""
    path = tmp_path_factory.mktemp("data") / "records.json"
    path.write_text(json.dumps(json.loads(SAMPLE.read_text())[:40]))
    return path


@pytest.fixture
def configure(tiny_llama: Path, records: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """A configuration of the tiny LLaMA and the records; values given go over SETTINGS."""

    def make(**values: object) -> TrainConfig:
        defaults = {
            "model_name_or_path": str(tiny_llama),
            "data_path": str(records),
            "output_dir": str(tmp_path / "out"),
        }
        return make_config({**defaults, **SETTINGS, **values})

    return make


def flags(config: TrainConfig) -> list[str]:
    """The command line that gives `config`."""
    values = {name: value for name, value in vars(config).items() if value not in (None, "")}
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def run_train(
    arguments: list[str], *, num_processes: int = 1, folder: Path = ROOT, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """train.py in one process, or under torchrun in several; OMP_NUM_THREADS=1 keeps those off each other's cores."""
    finished = subprocess.run(
        command(arguments, num_processes=num_processes),
        capture_output=True, text=True, cwd=folder, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if check:
        assert finished.returncode == 0, finished.stderr[-3000:]
    return finished


def command(arguments: list[str], *, num_processes: int = 1) -> list[str]:
    launcher = torchrun(num_processes) if num_processes > 1 else [sys.executable]
    return [*launcher, str(ROOT / "train.py"), *arguments]


def torchrun(num_processes: int) -> list[str]:
    """torchrun on a free port."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={num_processes}"]
    return [*launcher, "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]


@pytest.fixture(scope="session")
def packable_llama(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A LLaMA whose layers bitsandbytes would repack on a CPU: multiples of 32 and of 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("base") / "llama-packable")
    config = LlamaConfig(
        vocab_size=480, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
