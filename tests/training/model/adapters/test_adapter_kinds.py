"""Ranks by name, starts from the base, whole modules and rows of tokens beside LoRA: each as PEFT trains it by itself,
and what is written is, by PEFT's plain loader on the original base, the model that was trained."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from alpaca.errors import InputError
from alpaca.formats.hf.adapters import open_adapter
from alpaca.formats.hf.merging import open_merged
from alpaca.serving.llama.adapters import with_adapters
from alpaca.text.loading import load_tokenizer
from alpaca.training.configuration.config import TrainConfig, config_json
from alpaca.training.loop import train
from alpaca.training.model.adapters.started_linear import StartedLinear
from alpaca.training.model.adapters.starts import add_starts, list_starts
from tests.serving.llama.test_llama import load as load_network
from tests.serving.llama.test_serving_adapters import adapted_logits
from tests.training.checkpoints.test_checkpoint import Crash, crash_after, without_rates
from tests.training.model.peers import PLAIN, train_plainly
from tests.training.model.test_methods import IDS, adapter_tensors, keep_run, load, logits, reload
from tests.training.test_distributed import train_in_processes
from tests.training.test_loop import history

Configure = Callable[..., TrainConfig]
CPU = torch.device("cpu")
LORA = {**PLAIN, "method": "lora", "lora_dropout": 0.0, "learning_rate": 1e-2}
TOKENS = [5, 17, 230]
BOTH_ENDS = {"model.embed_tokens": TOKENS, "lm_head": TOKENS}


@pytest.fixture(scope="module")
def tied_llama(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The tiny LLaMA with a head that is its embedding."""
    torch.manual_seed(1)
    folder = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("tied") / "llama")
    config = LlamaConfig.from_pretrained(tiny_llama, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


ROOTS = {"use_rslora": True}
KINDS = {  # base, our flags, PEFT's settings
    "ranks": (
        "tiny_llama",
        {"lora_rank_pattern": "q_proj=3,layers.1.self_attn.v_proj=5", "lora_alpha_pattern": "v_proj=4"},
        {"rank_pattern": {"q_proj": 3, "layers.1.self_attn.v_proj": 5}, "alpha_pattern": {"v_proj": 4}},
    ),
    "pissa": ("tiny_llama", {"lora_init": "pissa"}, {"init_lora_weights": "pissa"}),
    "olora": (
        "tiny_llama",
        {**ROOTS, "lora_init": "olora", "lora_rank_pattern": "v_proj=5", "lora_alpha_pattern": "q_proj=4"},
        {**ROOTS, "init_lora_weights": "olora", "rank_pattern": {"v_proj": 5}, "alpha_pattern": {"q_proj": 4}},
    ),
    "whole modules": (
        "tiny_llama",
        {"lora_modules_to_save": "embed_tokens,lm_head"},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "whole head of a tied base": ("tied_llama", {"lora_modules_to_save": "lm_head"}, {"modules_to_save": ["lm_head"]}),
    "rows": ("tiny_llama", {"trainable_token_indices": "5,17,230"}, {"trainable_token_indices": BOTH_ENDS}),
    "rows of a tied base": ("tied_llama", {"trainable_token_indices": "5 17 230"}, {"trainable_token_indices": TOKENS}),
    "two rates": ("tiny_llama", {"loraplus_lr_ratio": 4.0, "learning_rate": 3e-3}, {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|ensure_weight_tying|Rank-Stabilized)")
@pytest.mark.fast_rows(4)
def test_each_is_pefts_own_training_and_reloads_plainly(
    kind: str,
    configure: Configure,
    request: pytest.FixtureRequest,
    sentencepiece_model: Path,
    records: Path,
):
    fixture, flags, settings = KINDS[kind]
    base = request.getfixturevalue(fixture)
    config = configure(**{**LORA, **flags}, model_name_or_path=str(base))
    torch.manual_seed(config.seed)
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(
            **{"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **settings}, task_type="CAUSAL_LM"
        ),
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    if ratio := config.loraplus_lr_ratio:
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=3e-3, loraplus_lr_ratio=ratio)
    losses = train_plainly(model, [optimizer], config, records=records, model_file=sentencepiece_model)
    folder = train(config)
    assert history(folder) == pytest.approx(losses, abs=1e-4)
    trained = logits(model.eval())
    untrained = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval())
    assert (trained - untrained).abs().max() > 0.05
    assert torch.allclose(logits(reload(base, folder)), trained, atol=2e-3)


# Starts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa_niter_4", "olora"])
def test_what_starts_from_the_base_is_written_with_twice_the_rank(
    init: str, configure: Configure, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
):
    kept = keep_run(monkeypatch)
    folder = train(configure(**LORA, lora_init=init, lora_r=4))
    written = json.loads((folder / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["init_lora_weights"]) == (8, 32, True)
    assert {name.rpartition(".lora_")[2] for name in adapter_tensors(folder)} == {"A.weight", "B.weight"}
    model = kept["run"].trainee.model
    for name, start in list_starts(model).items():
        module, _, which = name.rpartition(".start_")
        own = adapter_tensors(folder)[f"{module}.lora_{which.upper()}.weight"]
        if which == "a":
            assert torch.equal(own[4:], start)
            assert not torch.equal(own[:4], start)
        else:
            assert torch.equal(own[:, 4:], -start)
            assert not torch.equal(own[:, :4], start)
    base = load_file(tiny_llama / "model.safetensors")
    for name, weight in model.state_dict().items():  # the base stays, bit for bit
        if name.endswith("base_layer.weight"):
            key = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(weight, base[key]), name


def test_a_start_with_dropout_is_pefts(tiny_llama: Path):
    """Dropout falls on what is trained alone, not on what is left of the base."""
    settings = dict(r=4, lora_alpha=8, lora_dropout=0.3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    peer = get_peft_model(
        LlamaForCausalLM.from_pretrained(tiny_llama), LoraConfig(**settings, init_lora_weights="pissa")
    )
    own = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_llama), LoraConfig(**settings))
    add_starts(own, "pissa", CPU)
    assert sum(isinstance(module, StartedLinear) for module in own.modules()) == 4
    found = []
    for model in (peer, own):
        torch.manual_seed(3)
        output = model.train()(input_ids=torch.tensor([IDS]), labels=torch.tensor([IDS]))
        output.loss.backward()
        gradients = [p.grad for name, p in model.named_parameters() if ".lora_" in name]
        found.append((output.logits, torch.cat([gradient.flatten() for gradient in gradients])))
    for expected, value in zip(*found, strict=True):
        assert torch.allclose(value, expected, atol=1e-4)


@pytest.mark.parametrize("flags", [{"lora_init": "pissa_niter_4"}, {"trainable_token_indices": "5,17"}])
@pytest.mark.fast_rows(1)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    flags: dict, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also where the start comes out otherwise in the second process: by chance it does here."""
    values = {**LORA, **flags, "max_steps": 4, "save_steps": 2, "save_strategy": "steps", "lora_dropout": 0.1}
    whole = train(configure(**values, output_dir=str(tmp_path / "whole")))
    interrupted = {**values, "output_dir": str(tmp_path / "interrupted")}
    with pytest.raises(Crash, match="crashed on purpose"):
        train(configure(**interrupted), on_step=crash_after(3))
    real = torch.svd_lowrank
    monkeypatch.setattr(torch, "svd_lowrank", lambda *given, **named: (torch.manual_seed(9), real(*given, **named))[1])
    resumed = train(configure(**interrupted, resume_from_checkpoint="auto"))
    assert without_rates(whole) == without_rates(resumed)
    for name, tensor in adapter_tensors(whole).items():
        assert torch.equal(tensor, adapter_tensors(resumed)[name]), name


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_the_engine_serves_what_was_trained(kind: str, configure: Configure, tiny_llama: Path):
    folder = train(configure(**LORA, **KINDS[kind][1]))
    model = with_adapters(load_network(tiny_llama), {"own": open_adapter(folder)})
    with torch.inference_mode():
        assert torch.allclose(adapted_logits(model, IDS).float(), logits(reload(tiny_llama, folder)), atol=1e-4)


# Merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pissa", "whole modules", "rows", "rows of a tied base"])
@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|ensure_weight_tying|Rank-Stabilized)")
@pytest.mark.fast_rows(1)
def test_merged_is_what_was_trained(kind: str, configure: Configure, request: pytest.FixtureRequest):
    fixture, flags, _ = KINDS[kind]
    base = request.getfixturevalue(fixture)
    folder = train(configure(**{**LORA, **flags}, model_name_or_path=str(base)))
    merged = open_merged(base, folder)
    assert merged.is_tied == (kind == "rows of a tied base")
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.load_state_dict({name: merged.tensor(name) for name in merged.names}, strict=not merged.is_tied)
    assert torch.allclose(logits(model.eval()), logits(reload(base, folder)), atol=1e-4)


# Tokens ---------------------------------------------------------------------------------------------------------


def grown(base: Path, folder: Path) -> Path:
    """The base with a padding token of its own, as a full fine-tune saves it."""
    shutil.copytree(base, folder)
    model = LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(481, mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer = load_tokenizer(base)
    assert tokenizer.add_pad_token()
    tokenizer.save(folder)
    return folder


def test_added_are_the_tokens_beyond_the_vocabulary(configure: Configure, tiny_llama: Path, tmp_path: Path):
    base = grown(tiny_llama, tmp_path / "grown")
    model = load(configure(method="lora", trainable_token_indices="added", model_name_or_path=str(base)))
    rows = {name: p for name, p in model.named_parameters() if "trainable_tokens_delta" in name}
    assert [tuple(row.shape) for row in rows.values()] == [(1, 48)] * 2
    assert all(row.requires_grad for row in rows.values())
    assert torch.equal(
        next(iter(rows.values()))[0], load_file(base / "model.safetensors")["model.embed_tokens.weight"][480]
    )
    assert model.peft_config["default"].trainable_token_indices == {"model.embed_tokens": [480], "lm_head": [480]}


# What is refused ------------------------------------------------------------------------------------------------


REFUSED = {
    "no layer that gets an adapter has a name that ends so; they are q_proj, v_proj": {"lora_rank_pattern": "o_proj=4"},
    "--lora_rank_pattern q_proj: expected a rank of 1 to 100,000, found '0'": {"lora_rank_pattern": "q_proj=0"},
    "'q_proj' is no pair": {"lora_rank_pattern": "q_proj"},
    "'q_proj=2' is named twice": {"lora_rank_pattern": "q_proj=1,q_proj=2"},
    "--lora_alpha_pattern q_proj: expected a number above 0, found 'nan'": {"lora_alpha_pattern": "q_proj=nan"},
    "no module named embeddings; outside the layers there are embed_tokens, norm, rotary_emb, lm_head":
        {"lora_modules_to_save": "embeddings"},
    "PEFT would take model.layers.0.input_layernorm, too": {"lora_modules_to_save": "norm"},
    "q_proj gets an adapter already": {"lora_modules_to_save": "self_attn"},
    "both train these rows": {"lora_modules_to_save": "lm_head", "trainable_token_indices": "4"},
    "the base has rows 0 to 479, and an adapter adds none": {"trainable_token_indices": "3,480"},
    "the tokenizer has no tokens beyond its vocabulary of 480": {"trainable_token_indices": "added"},
    "expected ids of tokens such as 32000,32001": {"trainable_token_indices": "4,-1"},
    "--lora_init: expected default, gaussian, pissa": {"lora_init": "eva"},
    "a quantized base has not": {"lora_init": "pissa", "method": "qlora"},
    "does not go with --use_dora True": {"lora_init": "olora", "use_dora": True},
    "rank 49 is more than": {"lora_init": "pissa", "lora_r": 49},
    "--lora_init pissa is for adapters": {"lora_init": "pissa", "method": "full"},
    "--trainable_token_indices added is for adapters": {"trainable_token_indices": "added", "method": "full"},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_meant_is_refused(message: str, configure: Configure):
    with pytest.raises(InputError, match=message):
        load(configure(**{"method": "lora", **REFUSED[message]}))


@pytest.mark.parametrize("flags", [{"lora_init": "olora"}, {"trainable_token_indices": "4"}])
def test_shards_are_refused_by_name(flags: dict, configure: Configure):
    from alpaca.training.configuration.resolving import resolve

    with pytest.raises(InputError, match=f"--{next(iter(flags))} .* cannot be sharded over processes"):
        resolve(configure(method="lora", **flags), num_processes=2, device=CPU)


def test_a_bfloat16_base_has_float32_copies_of_whole_modules(configure: Configure):
    model = nn.Module.to(load(configure(method="lora", lora_modules_to_save="lm_head")), torch.bfloat16)
    from alpaca.training.model.adapters.beside import train_in_float32

    train_in_float32(model)
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


@pytest.mark.slow
def test_two_processes_train_what_one_does(configure: Configure, tmp_path: Path):
    """Whole modules, ranks by name, two rates and noise, on shards."""
    values = {
        **LORA, "lora_modules_to_save": "embed_tokens,lm_head,model.norm", "lora_rank_pattern": "q_proj=3",
        "loraplus_lr_ratio": 2.0, "neftune_noise_alpha": 5.0, "learning_rate": 3e-3,
    }  # fmt: skip
    alone = train(configure(**values, output_dir=str(tmp_path / "alone")))
    together = configure(**values, output_dir=str(tmp_path / "together"))
    finished = train_in_processes(2, [config_json(together)], tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert history(Path(together.output_dir)) == pytest.approx(history(alone), abs=5e-5)
    tensors = adapter_tensors(Path(together.output_dir))
    assert len(tensors) == 11
    for name, tensor in adapter_tensors(alone).items():
        assert torch.allclose(tensors[name], tensor, atol=1e-4), name
