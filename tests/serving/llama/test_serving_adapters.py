"""Adapters on the LLaMA engine: a request gets what PEFT's unmerged model gives it alone, whatever shares its steps."""

import json
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from alpaca.errors import InputError, MissingInput
from alpaca.formats.hf.adapters import AdapterFolder, open_adapter
from alpaca.formats.hf.folder import fingerprint
from alpaca.serving.kernels import ops
from alpaca.serving.llama.adapters import largest_ranks, stacked_bytes, with_adapters
from alpaca.serving.llama.network import LlamaModel
from alpaca.serving.llama.planning import plan_memory
from alpaca.serving.llama.weights import read_llama
from alpaca.serving.loading import load_engine
from alpaca.serving.plan import main
from alpaca.serving.request import AdapterNames, Request
from alpaca.serving.served_model import describe_other_bases, open_served_model
from alpaca.serving.settings import ServerSettings, parse_adapters
from tests.serving.llama.test_llama import KINDS, load, logits, save_model
from tests.serving.llama.test_llama_engine import MODES, make_engine, naive, random_request, request, tokens

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "all": dict(r=4, lora_alpha=8, target_modules=SEVEN),
    "alpaca-lora": dict(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    "v1.5": dict(
        r=3, lora_alpha=5, use_rslora=True, target_modules=["k_proj", "down_proj"], rank_pattern={"down_proj": 9},
        alpha_pattern={r"layers\.1\.mlp\.down_proj": 7}, layers_to_transform=[1, 2],
    ),
    "dora": dict(r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "k_proj", "o_proj", "up_proj"]),
}  # fmt: skip


def write_adapter(base: torch.nn.Module, folder: Path, *, seed: int, base_name: str = "", **values) -> Path:
    """A folder as PEFT saves one, of random numbers large enough to change every answer; `base` stays as it was."""
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.3) if "magnitude" in name else parameter.normal_(0, 0.2)
            elif parameter.requires_grad:  # whole modules, and rows of tokens
                parameter.normal_(0, 0.2)
    model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(folder, save_embedding_layers=False)
    model.unload()
    return folder


class Oracle:
    """PEFT's unmerged model, switched to a request's adapter."""

    def __init__(self, base: LlamaForCausalLM, folders: dict[str, Path]) -> None:
        self._peft_names = {name: f"slot{at}" for at, name in enumerate(folders)}
        for name, folder in folders.items():
            if self._peft_names[name] == "slot0":
                self.model = PeftModel.from_pretrained(base, folder, adapter_name="slot0").eval()
            else:
                self.model.load_adapter(folder, adapter_name=self._peft_names[name])

    def using(self, name: str | None) -> torch.nn.Module:
        if name is None:
            self.model.base_model.disable_adapter_layers()
        else:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(self._peft_names[name])
        return self.model


def make_both(folder: Path, dtype: torch.dtype = torch.float64, **changes) -> tuple[Oracle, dict[str, AdapterFolder]]:
    """A model and all of ADAPTERS, written to `folder`; PEFT's view of them, and ours."""
    base = save_model(folder / "base", dtype, **changes)
    folders = {
        name: write_adapter(base, folder / name, seed=seed, base_name=str(folder / "base"), **values)
        for seed, (name, values) in enumerate(ADAPTERS.items())
    }
    return Oracle(base, folders), {name: open_adapter(path) for name, path in folders.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def both(place) -> tuple[Oracle, LlamaModel]:
    oracle, adapters = make_both(place, num_key_value_heads=2)
    return oracle, with_adapters(load(place / "base"), adapters)


def expect(oracle: Oracle, asked: Request, found: list[list[int]] | None = None) -> list[list[int]]:
    """`naive` of a request, with its adapter."""
    return naive(oracle.using(asked.adapter), asked, found)


# The equality -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_blocks", [200, 28], ids=["roomy", "preempting"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.fast_rows(2)
def test_any_mixture_gives_what_pefts_model_gives_alone(both, num_blocks, mode, one_thread):
    oracle, model = both
    chance = random.Random(f"{num_blocks}:{mode}")
    engine = make_engine(model, num_blocks=num_blocks, mode=mode)
    names = [None, *ADAPTERS]
    submitted = []
    for _ in range(14):
        asked = random_request(chance)
        generation = engine.submit(request(**{**vars(asked), "adapter": chance.choice(names)}))
        if chance.random() < 0.2:
            threading.Timer(chance.random() * 0.05, generation.cancel).start()
        else:
            submitted.append(generation)
    for generation in submitted:
        found = tokens(generation)
        assert found == expect(oracle, generation.request, found), generation.request
    engine.close()
    assert engine._scheduler.pool.num_free == engine._scheduler.pool.capacity
    assert (engine._scheduler.num_preemptions > 0) == (num_blocks == 28)


def test_adapters_answer_differently(both):
    """Or the tests above would show nothing."""
    asked = [request(adapter=name, min_new_tokens=12) for name in (None, *ADAPTERS)]
    assert len({str(expect(both[0], one)) for one in asked}) == len(asked)


@pytest.mark.parametrize("kind", ["LLaMA 1", "own head width", "Llama 3.2"])
@pytest.mark.fast_rows(1)
def test_logits_are_pefts(tmp_path, kind, one_thread):
    oracle, adapters = make_both(tmp_path, **KINDS[kind])
    plain = load(tmp_path / "base")
    prompt = list(range(3, 40))
    for name, adapter in adapters.items():
        # Alone, so that it has index 1; test_any_mixture has them together.
        model = with_adapters(plain, {name: adapter})
        with torch.inference_mode():
            expected = oracle.using(name)(torch.tensor([prompt])).logits[0]
            found = adapted_logits(model, prompt)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)  # transformers norms in float32


def adapted_logits(model: LlamaModel, prompt: list[int]) -> torch.Tensor:
    """The logits [T, V] of a prompt whose rows all have the first adapter."""
    forward = LlamaModel.forward

    def with_first(self, token_ids, step, attention, cache):
        return forward(self, token_ids, step, attention, cache, adapters=ops_rows(len(token_ids)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaModel, "forward", with_first)
        return logits(model, [prompt], chunk=16)[0]


def ops_rows(num_rows: int):
    from alpaca.serving.kernels.low_rank import AdapterRows

    return AdapterRows(torch.ones(num_rows, dtype=torch.int32))


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
@pytest.mark.fast_rows(1)
def test_quantized_and_packed_weights_stay_as_they_are(tmp_path, quantization, one_thread):
    """PEFT's model on the very weights that the layers multiply by; DoRA's lengths are of these, too."""
    oracle, adapters = make_both(tmp_path, torch.float32, hidden_size=64, num_attention_heads=4, intermediate_size=128)
    plain = load(tmp_path / "base", torch.float32, quantization)
    base = oracle.using(None).base_model.model.model
    with torch.no_grad():
        for layer, ours in zip(base.layers, plain.layers, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            put(ours.qkv, attention.q_proj, attention.k_proj, attention.v_proj)
            put(ours.attention_out, attention.o_proj)
            put(ours.gate_up, mlp.gate_proj, mlp.up_proj)
            put(ours.down, mlp.down_proj)
    prompt = list(range(3, 40))
    for name, adapter in adapters.items():
        with torch.inference_mode():
            expected = oracle.using(name)(torch.tensor([prompt])).logits[0]
            found = adapted_logits(with_adapters(plain, {name: adapter}), prompt)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


def put(ours, *theirs) -> None:
    """Make the weights of PEFT's layers those that ours multiplies by."""
    weight = ours(torch.eye(ours.in_features)).T
    for layer, part in zip(
        theirs, weight.split([getattr(layer, "base_layer", layer).out_features for layer in theirs]), strict=True
    ):
        getattr(layer, "base_layer", layer).weight.copy_(part)


# The cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.fast_rows(1)
def test_a_prompt_cached_under_one_adapter_serves_no_other(both, mode):
    oracle, model = both
    engine = make_engine(model, mode=mode)
    prompt = tuple(range(3, 40))
    for name in (None, *ADAPTERS):
        asked = request(prompt_ids=prompt, adapter=name, max_new_tokens=5)
        for cached in (0, 36):
            generation = engine.submit(asked)
            found = tokens(generation)
            assert found == expect(oracle, asked, found)
            assert generation.metrics()["cached_tokens"] == cached
    engine.close()


# Steps without adapters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_steps_in_which_no_row_has_an_adapter_do_nothing_for_them(both, mode, monkeypatch):
    oracle, model = both
    engine = make_engine(model, mode=mode)
    calls = []
    add = ops.add_low_rank
    monkeypatch.setattr(ops, "add_low_rank", lambda *args: calls.append(0) or add(*args))
    tokens(engine.submit(request()))
    assert not calls
    asked = request(adapter="all")
    assert tokens(engine.submit(asked)) == expect(oracle, asked)
    assert calls
    engine.close()


def test_kernels_for_few_and_many_rows_are_built_at_start(both, monkeypatch):
    engine = make_engine(both[1])
    seen = []
    add = ops.add_low_rank
    monkeypatch.setattr(ops, "add_low_rank", lambda y, x, *rest: seen.append(len(x)) or add(y, x, *rest))
    engine._runner.compile_prefill()
    assert set(seen) == {16, 120}  # of 128, the context
    engine.close()


def test_rows_of_one_adapter_lie_together(both, monkeypatch):
    """However requests arrive: a step has one run of rows for each adapter in it."""
    oracle, model = both
    engine = make_engine(model)
    seen = []
    lay_out = engine._runner._lay_out

    def watched(scheduled):
        step = lay_out(scheduled)
        seen.append(step.adapter_indices)
        return step

    engine._runner._lay_out = watched
    names = ["all", None, "dora", "all", None, "dora", "all"]
    generations = [engine.submit(request(prompt_ids=(1, 9 + i), adapter=name)) for i, name in enumerate(names)]
    for generation in generations:
        found = tokens(generation)
        assert found == expect(oracle, generation.request, found)
    assert max(map(len, map(set, seen))) == 3
    assert all(indices == sorted(indices) for indices in seen)
    engine.close()


def test_an_unknown_adapter_is_refused_at_once(both):
    engine = make_engine(both[1])
    with pytest.raises(InputError, match="no adapter 'other'"):
        engine.submit(request(adapter="other"))
    engine.close()


# Memory -------------------------------------------------------------------------------------------------------------


def test_stacks_take_what_is_planned(both, place):
    adapters = {name: open_adapter(place / name) for name in ADAPTERS}
    model = both[1]
    assert model.adapters.num_bytes == stacked_bytes(adapters, model.config, torch.float64)
    assert largest_ranks(adapters) == 27
    plans = [
        plan_memory(model.config, ServerSettings(), free_bytes=3 * 10**7, device="cuda", dtype=torch.float64,
                    adapter_bytes=7, num_ranks=ranks)
        for ranks in (0, 27)
    ]  # fmt: skip
    assert plans[1].working_bytes > plans[0].working_bytes
    assert plans[1].num_blocks < plans[0].num_blocks
    assert plans[1].adapter_bytes == 7


@pytest.mark.usefixtures("both")
def test_the_plans_command_counts_adapters(place, monkeypatch, capsys):
    found = []
    for flags in ([], ["--adapters", f"a={place / 'all'},b={place / 'dora'}"]):
        monkeypatch.setattr("sys.argv", ["plan", "--weights", str(place / "base"), "--memory", "2GB", *flags])
        main()
        table, _, last = capsys.readouterr().out.rstrip("\n").rpartition("\n")
        found.append(json.loads(last))
        assert ("\nadapters  " in table) == bool(flags)
    adapters = {name: open_adapter(place / name) for name in ("all", "dora")}
    config = read_llama(place / "base")
    assert [plan["adapter_bytes"] for plan in found] == [0, stacked_bytes(adapters, config, torch.bfloat16)]
    assert found[1]["working_bytes"] > found[0]["working_bytes"]
    other = ["plan", "--weights", str(place / "all"), "--memory", "2GB", "--base_model", str(narrower(place))]
    monkeypatch.setattr("sys.argv", other)
    with pytest.raises(InputError, match=r"down_proj is for weights \[48, 80\], the base model's are \[48, 64\]"):
        main()


def narrower(place: Path) -> Path:
    folder = place / "narrow"
    folder.mkdir(exist_ok=True)
    shutil.copy(place / "base" / "config.json", folder)
    change(folder / "config.json", intermediate_size=64)
    return folder


# Which adapters, and which base --------------------------------------------------------------------------------------


def test_adapters_are_parsed_and_named():
    assert parse_adapters(" a=x/y, b-1.5 = z.tar ,") == {"a": "x/y", "b-1.5": "z.tar"}
    names = AdapterNames(named=("default", "a"), default="default")
    assert [names.resolve(asked) for asked in (None, "", "default", "none", "a")] == [
        "default", "default", "default", None, "a",
    ]  # fmt: skip
    assert AdapterNames().resolve("default") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "must be name=folder,name2=folder2; found 'a'"),
        ("a=", "must be name=folder"),
        ("none=x", "neither none nor default; found 'none'"),
        ("a/b=x", "found 'a/b'"),
        ("a=x,a=y", "names a twice: x and y"),
    ],
)
def test_bad_adapters_settings(text, message):
    with pytest.raises(InputError, match=message):
        ServerSettings(adapters=text)


@pytest.mark.parametrize(
    "asked",
    ["other", "/etc", "../a", "https://example.com/a.tar", "a,b", "x" * 10**6, "ALL"],
    ids=lambda text: text[:9],
)
def test_a_client_names_adapters_and_nothing_else(asked):
    with pytest.raises(InputError, match=r"never a path or an address: one of default, none, all; found ") as refused:
        AdapterNames(named=("all",)).resolve(asked)
    assert len(str(refused.value)) < 300


@pytest.mark.usefixtures("both")
def test_the_base_is_found_by_the_config_or_the_setting(place, tmp_path, monkeypatch):
    adapter = shutil.copytree(place / "all", tmp_path / "adapter")
    assert open_served_model(adapter, ServerSettings()).base == place / "base"
    change(adapter / "adapter_config.json", base_model_name_or_path="base")
    monkeypatch.chdir(place)
    served = open_served_model(adapter, ServerSettings(adapters=f"a={place / 'dora'}"))
    assert (served.base, list(served.adapters)) == (Path("base"), ["default", "a"])
    monkeypatch.chdir(tmp_path)
    assert open_served_model(adapter, ServerSettings(base_model=str(place / "base"))).base == place / "base"
    with pytest.raises(
        MissingInput, match=rf"base model 'base' is not here \(no folder {tmp_path}/base\)\. Set ALPACA_B"
    ):
        open_served_model(adapter, ServerSettings())
    change(adapter / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(MissingInput, match=r"base model '' is not here \(no base_model_name_or_path\)"):
        open_served_model(adapter, ServerSettings())
    with pytest.raises(InputError, match="is an adapter itself"):
        open_served_model(adapter, ServerSettings(base_model=str(place / "all")))
    with pytest.raises(InputError, match=r"ALPACA_ADAPTERS: a=\S+base is no adapter"):
        open_served_model(place / "base", ServerSettings(adapters=f"a={place / 'base'}"))
    with pytest.raises(MissingInput, match="ALPACA_ADAPTERS: a must name a folder"):
        open_served_model(place / "base", ServerSettings(adapters=f"a={tmp_path / 'nothing'}"))


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def record(folder: Path, **values: object) -> None:
    """As train.py leaves it beside an adapter."""
    (folder / "train_config.json").write_text(json.dumps({"method": "qlora", "bf16": True, **values}))


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize(
    ("trained", "served", "warned"),
    [("nf4", "none", True), ("int8", "none", True), ("nf4", "int8", True), ("none", "nf4", True),
     ("nf4", "nf4", False), ("none", "none", False), (None, "none", False)],
)  # fmt: skip
def test_a_base_quantized_otherwise_than_in_training_is_warned_of(place, tmp_path, trained, served, warned):
    adapter = shutil.copytree(place / "all", tmp_path / "adapter")
    if trained:
        record(adapter, base_quantization=trained)
    settings = ServerSettings(quantization=served)
    said = list(describe_other_bases(open_served_model(adapter, settings), settings))
    assert len(said) == warned
    if warned:
        assert f"adapter default was trained on its base with quantization {trained}" in said[0]
        assert f"set ALPACA_QUANTIZATION={trained} to serve" in said[0]


@pytest.mark.usefixtures("both")
def test_a_base_of_other_tensors_than_in_training_is_warned_of(place, tmp_path):
    adapter = shutil.copytree(place / "all", tmp_path / "adapter")
    second = shutil.copytree(place / "dora", tmp_path / "second")
    mine, other = fingerprint(place / "base"), "0123456789abcdef" * 4
    settings = ServerSettings(adapters=f"second={second}")

    def said(folder: Path, settings: ServerSettings = settings) -> list[str]:
        return list(describe_other_bases(open_served_model(folder, settings), settings))

    record(adapter, base_fingerprint=mine)
    assert not said(adapter)
    record(second, base_fingerprint=mine, base_quantization="none")
    assert not said(adapter)
    record(second, base_fingerprint=other)
    (text,) = said(adapter)
    assert f"adapter second was trained on a base of other tensors (fingerprint {other[:16]})" in text
    assert f"than {place / 'base'} ({mine[:16]})" in text
    unread = tmp_path / "unread"  # in PyTorch's format: nothing to compare with, and no reason to stop
    shutil.copytree(place / "base", unread, ignore=shutil.ignore_patterns("*.safetensors"))
    assert not said(second, ServerSettings(base_model=str(unread)))


def test_the_server_warns_when_it_loads(llama_folder, tmp_path, caplog):
    base = LlamaForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    adapter = write_adapter(base, tmp_path / "a", seed=0, base_name=str(llama_folder), **ADAPTERS["alpaca-lora"])
    record(adapter, base_quantization="nf4", base_fingerprint="f" * 64)
    load_engine(adapter, ServerSettings(memory_fraction=0.1)).close()
    said = "\n".join(entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING")
    assert "set ALPACA_QUANTIZATION=nf4" in said
    assert "(fingerprint ffffffffffffffff)" in said


@pytest.fixture
def refuse(both, tmp_path) -> Iterator[Callable]:
    """Make an adapter with PEFT, change its config, and expect to be refused."""

    def refuse(message: str, *, config: dict | None = None, base: dict | None = None, **values) -> None:
        model = save_model(tmp_path / "base", **(base or {"num_key_value_heads": 2}))
        folder = write_adapter(model, tmp_path / "adapter", seed=0, **{**ADAPTERS["all"], **values})
        change(folder / "adapter_config.json", **(config or {}))
        with pytest.raises(InputError, match=message):
            with_adapters(load(both_base(both)), {"a": open_adapter(folder)})

    return refuse


def both_base(both) -> Path:
    return Path(both[0].model.peft_config["slot0"].base_model_name_or_path)


def test_what_the_llama_engine_cannot_serve_is_refused_by_name(refuse):
    refuse("it changes lm_head.*ALPACA_ENGINE=transformers", target_modules=["q_proj", "lm_head"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(target_modules=["q_proj", "embed_tokens"]), r"holds model\.embed_tokens\.lora_embedding_A"),
        (dict(modules_to_save=["lm_head"]), r"holds lm_head\.weight \(modules_to_save, or a bias\)"),
        (dict(trainable_token_indices=[3]), r"rows of its own for some tokens of model\.embed_tokens\.weight"),
        (dict(config={"layer_replication": [[0, 2]]}), "asks for layer_replication, which is more than LoRA"),
        (dict(config={"init_lora_weights": "pissa_niter_4"}), "asks for init_lora_weights pissa_niter_4 .it changed"),
        (dict(r=300), "has rank 300; this engine takes up to 256"),
        (dict(base={"num_key_value_heads": 6}), r"k_proj is for weights \[48, 48\], the base model's are \[16, 48\]"),
        (dict(base={"num_hidden_layers": 4, "num_key_value_heads": 2}), r"layers\.3\.\S+ is no layer of this base"),
    ],
)  # fmt: skip
@pytest.mark.fast_rows(2)
def test_and_so_is_what_does_not_fit(refuse, values, message):
    refuse(message, **values)
