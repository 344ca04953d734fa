"""Adapters through the transformers engine, and beam search with them on the LLaMA engine: PEFT's own answers."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BloomConfig, GenerationConfig, LlamaConfig, OPTConfig

from alpaca.errors import InputError
from alpaca.formats.hf.quantization import allow_any_width_on_cpu, bitsandbytes_config
from alpaca.serving.engine import Engine
from alpaca.serving.hugging_face.engine import TransformersEngine
from alpaca.serving.llama.engine import LlamaEngine
from alpaca.serving.loading import load_engine
from alpaca.serving.request import Request
from alpaca.serving.settings import ServerSettings
from tests.serving.llama.test_llama_engine import DEFAULTS, tokens
from tests.serving.llama.test_serving_adapters import change, write_adapter

SMALL = dict(vocab_size=400, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
FAMILIES = {
    "bloom": (BloomConfig(vocab_size=400, hidden_size=64, n_layer=2, n_head=4), ["query_key_value"]),
    "opt": (
        OPTConfig(**SMALL, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=256),
        ["q_proj", "v_proj", "fc1"],
    ),
    "llama": (LlamaConfig(**SMALL, intermediate_size=128), ["q_proj", "v_proj", "lm_head"]),
}
PROMPT = (1, 300, 310, 320)


def request(**changes) -> Request:
    return Request(**{**DEFAULTS, "prompt_ids": PROMPT, **changes})


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory, llama_folder) -> Path:
    """A folder with `base`, and two adapters of it, `one` and `two`."""
    folder = tmp_path_factory.mktemp(request.param)
    config, targets = FAMILIES[request.param]
    return write_family(folder, config, targets, llama_folder)


def write_family(folder: Path, config, targets: list[str], tokenizer_from: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # far enough from uniform that greedy has no ties
    model.save_pretrained(folder / "base")
    for file in tokenizer_from.glob("tokenizer*"):
        shutil.copy(file, folder / "base")
    for seed, name in enumerate(("one", "two")):
        values = dict(r=4 + 4 * seed, lora_alpha=16, target_modules=targets, use_dora=seed == 1)
        write_adapter(model, folder / name, seed=seed, base_name=str(folder / "base"), **values)
    return folder


@pytest.fixture
def load() -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def load(folder: Path, **settings) -> Engine:
        engines.append(load_engine(folder, ServerSettings(**settings)))
        return engines[-1]

    yield load
    for engine in engines:
        engine.close()


def generate(folder: Path, adapter: str | None, *, quantization: str = "none", **options) -> list[int]:
    """Greedy, or by beams: transformers and PEFT alone, loaded anew."""
    model = AutoModelForCausalLM.from_pretrained(
        folder / "base", dtype=torch.float32, quantization_config=bitsandbytes_config(quantization, torch.float32)
    )
    if quantization == "nf4":
        allow_any_width_on_cpu(model)
    if adapter:
        model = PeftModel.from_pretrained(model, folder / adapter)
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0, **options)
    prompt = torch.tensor([PROMPT])
    out = model.eval().generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    return [token_id for token_id in out[0, len(PROMPT) :].tolist() if token_id != 2]


@pytest.mark.fast_rows(1)
def test_every_request_gets_its_own_adapter(family, load):
    engine = load(family / "one", adapters=f"two={family / 'two'}", engine="transformers")
    expected = {name: [generate(family, name)] for name in (None, "one", "two")}
    assert len({str(found) for found in expected.values()}) == 3
    order = ["default", "two", None, "default", None, "two", "two", "default"]
    generations = [engine.submit(request(adapter=name)) for name in order]
    for name, generation in zip(order, generations, strict=True):
        assert tokens(generation) == expected["one" if name == "default" else name]
    with pytest.raises(InputError, match="no adapter 'three'"):
        engine.submit(request(adapter="three"))


@pytest.mark.parametrize("kind", ["whole", "rows"])
def test_whole_modules_and_rows_of_tokens_are_served(kind: str, tmp_path, load, llama_folder):
    folder = write_family(tmp_path, FAMILIES["llama"][0], ["q_proj"], llama_folder)
    rows = {"embed_tokens": [300, 310], "lm_head": [5]}
    values = {"whole": {"modules_to_save": ["lm_head"]}, "rows": {"trainable_token_indices": rows}}[kind]
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    write_adapter(
        model, folder / kind, seed=5, r=4, target_modules=["q_proj"], base_name=str(folder / "base"), **values
    )
    others = {"whole": ["two"], "rows": []}[kind]
    settings = {"adapters": ",".join(f"{name}={folder / name}" for name in others), "engine": "transformers"}
    engine = load(folder / kind, **settings)
    expected = {name: [generate(folder, name)] for name in (None, kind, *others)}
    assert len({str(found) for found in expected.values()}) == len(expected)
    for name in ("default", *others, None, *others, "default"):
        assert tokens(engine.submit(request(adapter=name))) == expected[kind if name == "default" else name], name
    if kind == "rows":  # PEFT's own limit
        with pytest.raises(InputError, match=r"adapter two .* cannot be laid on this model"):
            load(folder / "rows", adapters=f"two={folder / 'two'}", engine="transformers")


def test_bloom_and_opt_need_no_flag(family, load, caplog):
    """Alpacoom: an adapter's folder is enough."""
    caplog.set_level("INFO")
    if family.name.startswith("llama"):
        with pytest.raises(InputError, match=r"it changes lm_head.*ALPACA_ENGINE=transformers serves"):
            load(family / "one")
        return
    engine = load(family / "one")
    assert isinstance(engine, TransformersEngine)
    assert (engine.adapters.default, engine.adapters.named) == ("default", ("default",))
    assert f"adapter default: LoRA adapter of {family / 'base'}: rank 4" in caplog.text
    beams = tokens(engine.submit(request(adapter="default", num_beams=4)))  # as Alpacoom decodes
    assert beams == [generate(family, "one", num_beams=4)]


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.slow
def test_on_a_quantized_base(tmp_path, load, llama_folder, quantization):
    folder = write_family(tmp_path, *FAMILIES["bloom"], llama_folder)
    engine = load(folder / "one", quantization=quantization)
    layers = {"int8": "Linear8bitLt", "nf4": "Linear4bit"}
    assert layers[quantization] in {type(module).__name__ for module in engine._model.modules()}
    for name, adapter in (("default", "one"), (None, None)):
        expected = generate(folder, adapter, quantization=quantization)
        assert tokens(engine.submit(request(adapter=name))) == [expected]


def test_what_is_not_for_the_model_is_refused(tmp_path, load, llama_folder):
    folder = write_family(tmp_path / "wide", *FAMILIES["bloom"], llama_folder)
    narrow = BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=4)
    write_family(tmp_path / "narrow", narrow, ["query_key_value"], llama_folder)
    with pytest.raises(InputError, match=r"is for weights \[192, 64\], the base model's are \[96, 32\]"):
        load(folder / "one", base_model=str(tmp_path / "narrow" / "base"))
    with pytest.raises(InputError, match=r"adapter default .* which this llama model has not: it is another model's"):
        load(folder / "one", base_model=str(llama_folder), engine="transformers")
    change(folder / "one" / "adapter_config.json", target_modules=["dense_h_to_4h"])
    with (
        pytest.warns(UserWarning, match="Found missing adapter keys"),
        pytest.raises(InputError, match=r"differ in what they change: transformer.h.0.mlp.dense_h_to_4h"),
    ):
        load(folder / "one")


def test_another_tokenizer_is_refused(tmp_path, load, llama_folder):
    from tests.tiny import train_tokenizer

    folder = write_family(tmp_path, *FAMILIES["opt"], llama_folder)
    for file in (folder / "base").glob("tokenizer*"):
        shutil.copy(file, folder / "one")
    load(folder / "one")
    for file in (folder / "one").glob("tokenizer*"):
        file.unlink()
    train_tokenizer(folder / "one", vocab_size=380)
    with pytest.raises(
        InputError, match=r"adapter default: the tokenizer in \S+ \(380 tokens\) is not the base model's"
    ):
        load(folder / "one")


# Beam search on the LLaMA engine --------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_shared", [True, False], ids=["its own weights", "loaded again"])
@pytest.mark.slow
def test_beam_search_with_an_adapter(llama_folder, tmp_path, load, monkeypatch, is_shared):
    if is_shared:
        monkeypatch.setattr("alpaca.serving.kernels.linear.make_packed", lambda *weight: None)
    shutil.copytree(llama_folder, tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    values = dict(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
    for seed, name in enumerate(("one", "two")):
        write_adapter(base, tmp_path / name, seed=seed, base_name=str(tmp_path / "base"), **values)
    kind = {} if is_shared else {"beam_search": "copy"}
    engine = load(tmp_path / "one", adapters=f"two={tmp_path / 'two'}", **kind)
    assert isinstance(engine, LlamaEngine)
    for name, adapter in (("default", "one"), (None, None), ("two", "two")):
        found = tokens(engine.submit(request(adapter=name, num_beams=3)))
        assert found == [generate(tmp_path, adapter, num_beams=3)]
        assert tokens(engine.submit(request(adapter=name))) == [generate(tmp_path, adapter)]


def test_a_second_copy_of_the_weights_is_the_operators_choice(llama_folder, tmp_path, load):
    shutil.copytree(llama_folder, tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    write_adapter(base, tmp_path / "one", seed=0, base_name=str(tmp_path / "base"), r=4, target_modules=["q_proj"])
    engine = load(tmp_path / "one", quantization="int8")
    with pytest.raises(InputError, match=r"needs the model a second time: .* ALPACA_BEAM_SEARCH=copy"):
        engine.submit(request(num_beams=2))
