"""Adapters behind the real Cog server: a folder is served, requests choose among names, and nothing else is opened."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

from alpaca.errors import InputError
from alpaca.files.archives import pack
from alpaca.serving.detokenize import CompletionText
from alpaca.text.loading import load_tokenizer
from deploy import serve
from deploy.local_server import LocalServer, ServerFailedError, running_server
from tests.serving.hugging_face.test_peft_adapters import FAMILIES, write_family
from tests.serving.llama.test_serving_adapters import ADAPTERS, write_adapter
from tests.test_predict import in_threads

ASKED = {"prompt": "", "prompt_template": "{prompt}", "temperature": 0, "max_new_tokens": 16, "min_new_tokens": 16}


@pytest.fixture(scope="module")
def place(llama_folder, tmp_path_factory) -> Path:
    """A base and three adapters of it, of which one is packed, too."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(llama_folder, folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    for seed, (name, kind) in enumerate({"first": "alpaca-lora", "second": "all", "third": "dora"}.items()):
        write_adapter(base, folder / name, seed=seed, base_name=str(folder / "base"), **ADAPTERS[kind])
    pack(folder / "third", folder / "third.tar")
    return folder


@pytest.fixture(scope="module")
def server(place) -> Iterator[LocalServer]:
    flags = ["--weights", str(place / "first"), "--adapters", f"second={place / 'second'},v3.0={place / 'third.tar'}"]
    with running_server([*flags, "--concurrency", "16"], on_failure=print) as server:
        yield server


def answer(place: Path, adapter: str | None) -> str:
    """transformers' and PEFT's text, alone."""
    tokenizer = load_tokenizer(place / "base")
    model = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, place / adapter)
    prompt = torch.tensor([tokenizer.prefix_ids])
    settings = GenerationConfig(
        max_new_tokens=16, min_new_tokens=16, do_sample=False, eos_token_id=tokenizer.eos_id, pad_token_id=0
    )
    out = model.eval().generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    text = CompletionText(tokenizer, tokenizer.prefix_ids, strip_leading=False)
    return "".join([*map(text.push, out[0, prompt.shape[1] :].tolist()), text.finish()])


def test_each_request_gets_its_own_adapter_whatever_runs_beside_it(server, place):
    adapters = {"default": "first", "": "first", "second": "second", "v3.0": "third", "none": None}
    expected = {name: answer(place, adapter) for name, adapter in adapters.items()}
    assert len(set(expected.values())) == 4
    names = list(expected) * 3
    found = in_threads(len(names), lambda i: server.predict({**ASKED, "replicate_weights": names[i]}))
    assert [prediction["output"] for prediction in found] == [[expected[name]] for name in names]
    absent = server.predict(ASKED)
    assert absent["output"] == [expected["default"]]
    assert absent["metrics"]["adapter"] == "default"
    assert "tokens/s, seed " in absent["logs"]
    assert absent["logs"].rstrip().endswith(", adapter default")
    assert "adapter" not in server.predict({**ASKED, "replicate_weights": "none"})["metrics"]
    second = server.predict({**ASKED, "replicate_weights": "second", "n": 2, "stop": ["never"]})
    assert second["output"] == [expected["second"]] * 2


@pytest.mark.parametrize("asked", ["{place}/second", "../second", "https://example.com/second.tar", "first", "Second"])
def test_a_path_is_never_opened(server, place, asked):
    prediction = server.predict({**ASKED, "replicate_weights": asked.format(place=place)})
    assert prediction["status"] == "failed"
    assert "one of default, none, second, v3.0; found " in prediction["error"]
    assert server.request("/health-check")["status"] == "READY"


def test_the_log_says_what_is_served(server, place):
    log = server.log_text()
    assert f"adapter default: LoRA adapter of {place / 'base'}: rank 8" in log
    assert f"adapter v3.0: DoRA adapter of {place / 'base'}: rank 4" in log
    assert "no graphs; 3 adapters, 0.00 GB" in log


@pytest.mark.slow
def test_a_blooms_adapter_is_served(tmp_path, llama_folder):
    """As Alpacoom was made: BLOOM, an adapter's folder, four beams."""
    folder = write_family(tmp_path, *FAMILIES["bloom"], llama_folder)
    with running_server(["--weights", str(folder / "one")], on_failure=print) as server:
        assert server.predict(ASKED)["output"] == [answer(folder, "one")]
        assert server.predict({**ASKED, "replicate_weights": "none"})["output"] == [answer(folder, None)]
        assert len(server.predict({"prompt": "hi", "num_beams": 4, "max_new_tokens": 8})["output"]) == 1


@pytest.mark.slow
def test_without_its_base_an_adapter_says_what_was_looked_for(place, tmp_path):
    adapter = shutil.copytree(place / "first", tmp_path / "adapter")
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(str(place / "base"), "weights/nowhere"))
    server = LocalServer(["--weights", str(adapter)])
    with pytest.raises(ServerFailedError, match=r"base model 'weights/nowhere' is not here .* Set ALPACA_BASE_MODEL"):
        server.wait_until("READY", timeout_s=60)
    server.stop()


def test_flags_are_paths_of_the_caller(place, tmp_path):
    flags = ["--weights", "a", "--base_model", "b", "--adapters", "x=c, y=/d"]
    made = serve.runtime_environment(serve.parse_arguments(flags), {**os.environ, "ALPACA_CALLER": str(tmp_path)})
    assert made["COG_WEIGHTS"] == str(tmp_path / "a")
    assert made["ALPACA_BASE_MODEL"] == str(tmp_path / "b")
    assert made["ALPACA_ADAPTERS"] == f"x={tmp_path / 'c'},y=/d"
    with pytest.raises(InputError, match="ALPACA_ADAPTERS must be name=folder"):
        serve.runtime_environment(serve.parse_arguments(["--adapters", "x"]), {})
