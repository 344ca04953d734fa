"""LoRA and QLoRA: our loop against a plain one with PEFT, and all that users lost with adapters, kept."""

import dataclasses
import importlib.util
import json
import math
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from alpaca.data.batching import pack, step_examples
from alpaca.errors import InputError, MissingInput, OutputExists
from alpaca.formats.hf.adapters import open_adapter
from alpaca.formats.hf.folder import fingerprint
from alpaca.training import loop, run
from alpaca.training.checkpoints import final, loading
from alpaca.training.configuration.config import TrainConfig, config_json
from alpaca.training.configuration.flags import parse_flags
from alpaca.training.configuration.resolving import make_settings, resolve
from alpaca.training.dataset import encode_data
from alpaca.training.distributed import World
from alpaca.training.loop import train
from alpaca.training.model import padding_free
from alpaca.training.model.base import Base, open_base
from alpaca.training.model.building import count_parameters, load_model
from alpaca.training.model.final import probe_logits
from alpaca.training.run import Run
from tests.samples import sampled
from tests.training.checkpoints.test_checkpoint import Crash, crash_after, without_rates
from tests.training.test_distributed import train_in_processes
from tests.training.test_loop import history, plain_examples, plain_training

Configure = Callable[..., TrainConfig]
CPU = torch.device("cpu")
ALONE = World(rank=0, num_processes=1, device=CPU)
IDS = [1, 5, 17, 230, 99, 42, 7, 301]
LORA = {"method": "lora", "lora_dropout": 0.0}
QLORA = {"method": "qlora", "lora_dropout": 0.0}
with_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


@pytest.fixture(autouse=True)
def eager_bitsandbytes() -> Iterator[None]:
    """What bitsandbytes would compile on a CPU is run as it stands: each shape would take seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


def adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def reload(base: Path, folder: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    """As other people's programs do."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), folder).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=torch.tensor([IDS])).logits[0]


def load(config: TrainConfig) -> torch.nn.Module:
    config = resolve(config, num_processes=1, device=CPU)
    return load_model(open_base(make_settings(config).base), make_settings(config).model, ALONE)


def keep_run(monkeypatch: pytest.MonkeyPatch) -> dict[str, Run]:
    """A dictionary that holds the run under "run" once it ended."""
    kept, real = {}, loop.finish

    def finish(run: Run, **values: object) -> None:
        kept["run"] = run
        real(run, **values)

    monkeypatch.setattr(loop, "finish", finish)
    return kept


# The same as PEFT's own way -------------------------------------------------------------------------------------


def test_our_loop_is_a_plain_loop_with_peft(
    configure: Configure, tiny_llama: Path, sentencepiece_model: Path, records: Path
):
    config = configure(
        **LORA, num_train_epochs=1.4, per_device_train_batch_size=3, model_max_length=160, learning_rate=1e-2
    )
    folder = train(config)
    examples = plain_examples(records, sentencepiece_model, config.model_max_length)
    taught = [pair for pair in examples if any(label != -100 for label in pair[1])]
    base = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    torch.manual_seed(42)
    settings = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, settings).train()
    num_steps = math.ceil(1.4 * (len(taught) // 8))
    batches = [
        step_examples(len(taught), global_batch_size=8, seed=42, step=step).tolist() for step in range(num_steps)
    ]
    expected = plain_training(model, taught, batches, micro=3, lr=1e-2, num_steps=num_steps, average="token", pad_id=0)
    assert expected[-1] < expected[0] - 0.05
    assert history(folder) == pytest.approx(expected, abs=2e-5)
    plain = {name.replace(".default", ""): tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    written = adapter_tensors(folder)
    assert written.keys() == plain.keys()
    for name, tensor in plain.items():
        assert torch.allclose(written[name], tensor, atol=2e-5), name


# Bases and settings ---------------------------------------------------------------------------------------------


ATTENTION = {"q_proj", "v_proj"}
CASES = {  # base, flags, layers that get an adapter
    "llama": ("tiny_llama", {}, ATTENTION),
    "opt": ("tiny_opt", {"val_set_size": 4, "eval_strategy": "epoch"}, ATTENTION),
    "bloom": ("tiny_bloom", {}, {"query_key_value"}),
    "bloom all": ("tiny_bloom", {"lora_target_modules": "all-linear"},
                  {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    "all": ("tiny_llama", {"lora_target_modules": "all-linear", "lora_r": 4, "lora_alpha": 5.0, "use_rslora": True},
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    "dora": ("tiny_opt", {"use_dora": True, "lora_target_modules": "fc1,q_proj"}, {"fc1", "q_proj"}),
    "checkpointing": ("tiny_llama", {"gradient_checkpointing": True}, ATTENTION),
    "padded": ("tiny_llama", {"padding_free": False}, ATTENTION),
}  # fmt: skip


@pytest.mark.parametrize("case", sampled(CASES, "bloom all", "all", "dora", "padded"))
@pytest.mark.fast_rows(1)
def test_an_adapter_reloads_and_merges_to_what_was_trained(
    case: str, configure: Configure, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    """Rows 2, 9, 10 and 20 of what users complained of: it is not empty, reloads, and merging is not a no-op."""
    fixture, values, layers = CASES[case]
    base, kept = request.getfixturevalue(fixture), keep_run(monkeypatch)
    folder = train(configure(**{**LORA, "max_steps": 4, "learning_rate": 1e-2, **values}, model_name_or_path=str(base)))
    losses, trained = history(folder), kept["run"].trainee.model
    assert losses[-1] < losses[0]
    own = probe_logits(trained, IDS, CPU)
    reloaded, plain = reload(base, folder), AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert torch.allclose(logits(reloaded), own, atol=1e-5)
    assert (own - logits(plain.eval())).abs().max() > 0.01
    adapter, settings = open_adapter(folder), reloaded.peft_config["default"]
    assert adapter.base_name == settings.base_model_name_or_path == str(base)
    assert {target.rpartition(".")[2] for target in adapter.targets} == layers == set(settings.target_modules)
    assert (settings.r, settings.lora_alpha) == (values.get("lora_r", 8), values.get("lora_alpha", 16.0))
    assert (settings.use_dora, settings.use_rslora) == (case == "dora", case == "all")
    assert all(name in dict(plain.named_modules()) for name in adapter.targets)
    assert torch.allclose(logits(reloaded.merge_and_unload()), own, atol=2e-5)


@pytest.mark.slow
def test_padded_checkpointed_and_padding_free_runs_are_one(configure: Configure, tmp_path: Path):
    """What is padded is padded with EOS here, which the attention mask does not take for padding (row 7)."""
    ways = {"free": {}, "padded": {"padding_free": False}, "checkpointing": {"gradient_checkpointing": True}}
    folders = [
        train(configure(**LORA, **values, max_steps=4, learning_rate=1e-2, output_dir=str(tmp_path / name)))
        for name, values in ways.items()
    ]
    first = adapter_tensors(folders[0])
    for folder in folders[1:]:
        assert history(folder) == pytest.approx(history(folders[0]), abs=2e-5)
        assert all(torch.allclose(tensor, first[name], atol=2e-5) for name, tensor in adapter_tensors(folder).items())


def test_only_the_adapter_is_trained_and_saved(configure: Configure, tiny_llama: Path, monkeypatch):
    """No [PAD], no embedding in the file, no frozen weight in optimizer or checkpoint, and the base as it was."""
    kept = keep_run(monkeypatch)
    folder = train(configure(**LORA, max_steps=3, save_steps=2))
    model, optimizer = kept["run"].trainee.model, kept["run"].trainee.optimizer
    expected = 2 * 2 * 8 * (48 + 48)  # layers x targets x rank x (in + out)
    assert count_parameters(model, trained_only=True) == expected
    assert sum(tensor.numel() for tensor in adapter_tensors(folder).values()) == expected
    assert {tensor.dtype for tensor in adapter_tensors(folder).values()} == {torch.float32}
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == expected
    assert all(("lora_" in name) == parameter.requires_grad for name, parameter in model.named_parameters())
    before = load_file(tiny_llama / "model.safetensors")
    after = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): p for name, p in model.named_parameters()
    }
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    saved = FileSystemReader(folder / "checkpoint-2").read_metadata().state_dict_metadata
    weights = {
        name: item for name, item in saved.items() if isinstance(item, TensorStorageMetadata) and item.size.numel() > 1
    }
    assert sum(item.size.numel() for item in weights.values()) == 3 * expected
    assert all("lora_" in name for name in weights)
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.model", "tokenizer.json"} <= names
    assert not {"config.json", "generation_config.json", "model.safetensors"} & names
    assert len(AutoTokenizer.from_pretrained(folder)) == 480


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_adapters_record_says_which_base_it_is_of(method: str, configure: Configure, tiny_llama: Path):
    folder = train(configure(method=method, max_steps=1, save_strategy="no"))
    record = json.loads((folder / "train_config.json").read_text())
    assert record["method"] == method
    assert record.get("base_fingerprint") == (fingerprint(tiny_llama) if method == "lora" else None)


def test_a_base_without_a_fingerprint_trains(configure: Configure, tiny_llama: Path, tmp_path: Path):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    folder = train(configure(model_name_or_path=str(base), method="lora", max_steps=1, save_strategy="no"))
    assert "base_fingerprint" not in json.loads((folder / "train_config.json").read_text())


def test_an_adapter_whose_effect_underflows_is_a_fault(configure: Configure, tmp_path: Path):
    """Its lora_B is not zero, but what it adds is lost in rounding: the model answers as its base does."""
    config = configure(**{**LORA, "lora_alpha": 1e-30}, max_steps=2, save_strategy="no", warmup_ratio=0.0)
    with pytest.raises(InputError, match=r"the adapter moves no logit of the base, though it was trained: .* replaced"):
        train(config)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_targets_that_are_not_there_are_named(configure: Configure):
    with pytest.raises(
        InputError, match="no linear layer named query_key_value in LlamaDecoderLayer; there are down_proj"
    ):
        load(configure(**LORA, lora_target_modules="q_proj,query_key_value"))
    with pytest.raises(InputError, match="no linear layer named lm_head, embed_tokens in LlamaDecoderLayer"):
        load(configure(**LORA, lora_target_modules="lm_head embed_tokens"))


def test_a_tokenizer_that_needs_more_rows_is_refused(configure: Configure, tmp_path: Path):
    full = train(configure(max_steps=1, output_dir=str(tmp_path / "full")))  # its tokenizer has [PAD], 481 tokens
    with pytest.raises(InputError, match=r"the tokenizer has 481 tokens, .* 480 rows, and an adapter adds none"):
        load(configure(**LORA, tokenizer_name_or_path=str(full)))
    folder = train(
        configure(**LORA, model_name_or_path=str(full), max_steps=2)
    )  # of a base with that row it is no matter
    assert history(folder)


def test_the_first_adapter_depends_on_the_seed_alone(configure: Configure):
    def first(**values: object) -> torch.Tensor:
        torch.manual_seed(int(torch.randint(99, ()).item()))
        return load(configure(**LORA, **values)).state_dict()[
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
        ]

    assert torch.equal(first(), first())
    assert not torch.equal(first(), first(seed=1))


# Never empty, never another -------------------------------------------------------------------------------------


def tamper(monkeypatch: pytest.MonkeyPatch, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    """Have the written tensors be others than those of the model, behind the back of the bitwise comparison."""
    real = final.final_tensors

    def changed(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        tensors = {name: change(name, tensor) for name, tensor in real(model).items()}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    monkeypatch.setattr(final, "final_tensors", changed)
    monkeypatch.setattr("alpaca.training.model.final.final_tensors", changed)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda name, tensor: tensor * ("lora_A" in name), "every lora_B is zero, though it was trained"),
        (lambda name, tensor: None, r"no adapter_model.safetensors or adapter_model.bin in"),
        (lambda name, tensor: tensor if "lora_A" in name else None, r"rank 8 for .* found A \[8, 48\], B missing"),
        (lambda name, tensor: tensor * 1.2, "reloaded onto the base, the adapter gives logits that differ by"),
    ],
    ids=["base", "empty", "half", "other"],
)  # fmt: skip
@pytest.mark.fast_rows(1)
def test_an_adapter_that_is_not_the_trained_one_is_never_put_in_place(change, text, configure: Configure, monkeypatch):
    """Row 2: alpaca-lora's adapters of 443 bytes, saved without an error."""
    tamper(monkeypatch, change)
    config = configure(**LORA, max_steps=3, learning_rate=1e-2, save_strategy="no")
    with pytest.raises((InputError, MissingInput), match=text):
        train(config)
    assert not {path.name for path in Path(config.output_dir).iterdir()} & {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_without_a_learning_rate_it_is_the_base_and_said(configure: Configure, caplog: pytest.LogCaptureFixture):
    assert open_adapter(train(configure(**LORA, max_steps=2, learning_rate=0.0))).is_base
    assert "the adapter changes nothing: no step had a learning rate above 0" in caplog.text


def test_a_rounded_adapter_is_still_the_trained_one(configure: Configure, tmp_path: Path):
    folder = train(configure(**LORA, max_steps=4, learning_rate=1e-2, save_dtype="bfloat16"))
    assert {tensor.dtype for tensor in adapter_tensors(folder).values()} == {torch.bfloat16}


@pytest.mark.slow
def test_full_and_adapter_take_turns_in_one_folder(configure: Configure, tmp_path: Path):
    config = configure(output_dir=str(tmp_path / "out"), max_steps=2, save_strategy="no")
    train(config)
    adapter = dataclasses.replace(config, **LORA, overwrite_output_dir=True)
    names = {path.name for path in train(adapter).iterdir()}
    assert not {"config.json", "generation_config.json", "model.safetensors"} & names
    with pytest.raises(OutputExists, match="is not empty"):
        train(dataclasses.replace(adapter, overwrite_output_dir=False, resume_from_checkpoint="auto"))
    names = {path.name for path in train(dataclasses.replace(config, overwrite_output_dir=True)).iterdir()}
    assert {"config.json", "model.safetensors"} <= names
    assert not {"adapter_config.json", "adapter_model.safetensors"} & names


# Resuming -------------------------------------------------------------------------------------------------------


@with_bitsandbytes
@pytest.mark.parametrize(
    ("base", "values"),
    [
        ("tiny_llama", {"method": "lora", "lora_dropout": 0.1}),
        pytest.param("tiny_opt", {"method": "lora", "use_dora": True}, marks=pytest.mark.slow),
        ("packable_llama", {"method": "qlora", "lora_target_modules": "all-linear"}),
        pytest.param("tiny_llama", {"method": "lora", "base_quantization": "int8"}, marks=pytest.mark.slow),
    ],
    ids=["lora", "dora", "qlora", "int8"],
)
@pytest.mark.slow
def test_a_resumed_adapter_is_the_uninterrupted_one_bit_for_bit(base, values, configure, tmp_path, request):
    """Row 10: alpaca-lora's resume took the weights alone, or the wrong ones; optimizer and schedule began anew."""
    values = {**values, "model_name_or_path": str(request.getfixturevalue(base)), "learning_rate": 1e-2}
    values |= {"save_steps": 3, "max_steps": 7, "val_set_size": 4, "eval_strategy": "steps", "eval_steps": 2}
    whole = train(configure(output_dir=str(tmp_path / "whole"), **values))
    config = configure(output_dir=str(tmp_path / "resumed"), **values)
    with pytest.raises(Crash, match="on purpose"):
        train(config, on_step=crash_after(4))
    resumed = train(dataclasses.replace(config, resume_from_checkpoint="auto"))
    assert without_rates(whole) == without_rates(resumed)
    names = ("adapter_model.safetensors", "adapter_config.json")
    assert all((whole / name).read_bytes() == (resumed / name).read_bytes() for name in names)


def test_a_checkpoint_of_another_method_or_adapter_is_refused(configure: Configure):
    config = configure(**LORA, save_steps=2, max_steps=4)
    with pytest.raises(Crash, match="on purpose"):
        train(config, on_step=crash_after(2 + 1))
    again = dataclasses.replace(config, resume_from_checkpoint="auto")
    changes = {
        "lora_r was 8 and is 4": {"lora_r": 4},
        "lora_alpha was 16.0 and is 8.0": {"lora_alpha": 8.0},
        "lora_target_modules was None and is 'all-linear'": {"lora_target_modules": "all-linear"},
        "use_rslora was False and is True": {"use_rslora": True},
        "method was 'lora' and is 'full'": {"method": "full", "lora_dropout": None},
    }
    for text, values in changes.items():
        with pytest.raises(InputError, match=f"belongs to another run: .*{text}"):
            train(dataclasses.replace(again, **values))
    assert history(train(again))


@pytest.mark.slow
def test_an_adapter_resumes_on_its_own_base_alone(configure: Configure, tiny_llama: Path, tmp_path: Path):
    """The checkpoint holds the adapter only: on other weights of the same shape it would go on without a word."""
    config = configure(**LORA, save_steps=2, max_steps=4)
    with pytest.raises(Crash, match="on purpose"):
        train(config, on_step=crash_after(2 + 1))
    moved = shutil.copytree(tiny_llama, tmp_path / "moved")
    again = dataclasses.replace(config, resume_from_checkpoint="auto", model_name_or_path=str(moved))
    weights = load_file(moved / "model.safetensors")
    weights["model.norm.weight"] += 1
    other = shutil.copytree(moved, tmp_path / "other")
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"another run: base was 'sha256 \w{16}' and is 'sha256 \w{16}'\. Resume"):
        train(dataclasses.replace(again, model_name_or_path=str(other)))
    assert history(train(again)), "the same base in another folder"


def test_what_a_checkpoint_of_another_version_lacks_is_said(tmp_path: Path):
    with pytest.raises(InputError, match=r"base was not written down, by an older version, and is 'sha256 5'\. Resume"):
        loading._check_identity(tmp_path, {"seed": 1}, {"seed": 1, "base": "sha256 5"})
    with pytest.raises(InputError, match=r"base was 'sha256 5' and is of no account; method was 'lora' and is 'full'"):
        loading._check_identity(tmp_path, {"method": "lora", "base": "sha256 5"}, {"method": "full"})


def test_bases_in_older_files_are_told_apart(tiny_llama: Path, tmp_path: Path):
    weights = load_file(tiny_llama / "model.safetensors")
    bases = []
    for number in (0, 0, 1):
        folder = tmp_path / str(len(bases))
        folder.mkdir()
        weights["lm_head.weight"][7, 7] += number
        torch.save(weights, folder / "pytorch_model.bin")
        bases.append(Base(folder=folder, tokenizer=None, dtype=torch.float32))
    first, same, other = map(run._digest_base, bases)
    assert first == same != other


# 8 and 4 bit ----------------------------------------------------------------------------------------------------


@with_bitsandbytes
@pytest.mark.parametrize(
    "values",
    [
        QLORA,
        pytest.param({**LORA, "base_quantization": "int8"}, marks=pytest.mark.slow),
        pytest.param({**QLORA, "use_dora": True}, marks=pytest.mark.slow),
    ],
    ids=["nf4", "int8", "dora"],
)
@pytest.mark.slow
def test_it_goes_on_learning_after_an_evaluation(values, configure: Configure, packable_llama: Path):
    """The AVX512 trap: an evaluation repacks 4-bit weights, and no gradient passes them afterwards."""
    config = configure(
        **values, model_name_or_path=str(packable_llama), learning_rate=1e-2, max_steps=6,
        val_set_size=4, eval_strategy="steps", eval_steps=2, lr_scheduler_type="constant",
    )  # fmt: skip
    losses = history(train(config), "eval_loss")
    drops = [before - after for before, after in pairwise(losses)]
    assert len(drops) == 3
    assert all(drop > 0.005 for drop in drops), losses


@with_bitsandbytes
@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit. an autograd kernel was not registered")
def test_the_trap_is_there_to_fall_into(configure: Configure, packable_llama: Path, monkeypatch: pytest.MonkeyPatch):
    """The test above must be able to fail: without our setting, this CPU's evaluation ends the learning."""
    from bitsandbytes.nn.modules import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("a CPU without AVX512-BF16")
    monkeypatch.setattr("alpaca.training.model.adapters.adapting.keep_trainable_on_cpu", lambda model: None)
    model = load(configure(**QLORA, model_name_or_path=str(packable_llama)))
    probe_logits(model, IDS, CPU)
    loss = model(input_ids=torch.tensor([IDS]), labels=torch.tensor([IDS]), position_ids=torch.arange(8)[None],
                 packing=padding_free.Packing([8]), use_cache=False).loss  # fmt: skip
    loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "layers.0" in name and "lora_B" in name]
    assert not any(bool(gradient.any()) for gradient in gradients if gradient is not None)


@with_bitsandbytes
def test_a_quantized_base_is_what_bitsandbytes_makes_of_it(configure: Configure, packable_llama: Path):
    """Double-quantised nf4 or int8 in the decoder layers, float32 elsewhere; gradients in the adapter alone."""
    import bitsandbytes
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    original = LlamaForCausalLM.from_pretrained(packable_llama, dtype=torch.float32)
    for values, kind in ((QLORA, Linear4bit), ({**LORA, "base_quantization": "int8"}, Linear8bitLt)):
        model = load(configure(**values, model_name_or_path=str(packable_llama)))
        layers = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
        assert len(layers) == 14
        others = {p.dtype for name, p in model.named_parameters() if name.removesuffix(".weight") not in layers}
        assert others == {torch.float32}
        for module in layers.values():
            if kind is Linear4bit:
                assert (module.weight.quant_state.quant_type, module.weight.quant_state.nested) == ("nf4", True)
                assert not module.support_avx512bf16_for_cpu
        model(input_ids=torch.tensor([IDS]), labels=torch.tensor([IDS]), position_ids=torch.arange(8)[None],
              packing=padding_free.Packing([8])).loss.backward()  # fmt: skip
        with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert with_gradient == {name for name, _ in model.named_parameters() if "lora_" in name}
    nf4 = load(configure(**QLORA, model_name_or_path=str(packable_llama))).get_submodule(
        "base_model.model.model.layers.0.mlp.up_proj"
    )
    back = bitsandbytes.functional.dequantize_4bit(nf4.weight.data, nf4.weight.quant_state)
    weight = original.model.layers[0].mlp.up_proj.weight
    assert 0.07 < (back - weight).norm() / weight.norm() < 0.12


@with_bitsandbytes
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_with_bf16_the_base_is_in_bfloat16_and_the_adapter_in_float32(method, configure, packable_llama):
    config = configure(method=method, lora_dropout=0.0, model_name_or_path=str(packable_llama))
    config = dataclasses.replace(resolve(config, num_processes=1, device=CPU), bf16=True)  # which a CPU would drop
    model = load_model(open_base(make_settings(config).base), make_settings(config).model, ALONE)
    dtypes = {name: p.dtype for name, p in model.named_parameters() if p.is_floating_point()}
    assert {dtype for name, dtype in dtypes.items() if "lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "lora_" not in name} == {torch.bfloat16}
    batch = pack([(torch.tensor(IDS), torch.tensor(IDS))], pad_id=2)
    loss = padding_free.sum_packed_losses(model, batch, bf16=True)
    loss.backward()
    assert loss.dtype == torch.float32
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert all(gradient.dtype == torch.float32 and gradient.any() for gradient in gradients)
    whole = load(dataclasses.replace(config, bf16=False))
    assert loss.item() == pytest.approx(padding_free.sum_packed_losses(whole, batch, bf16=False).item(), rel=0.02)


def bitsandbytes_error(width: int) -> float:
    """How far bitsandbytes' own 4-bit weights of a width are from the weights, relatively; rounding makes 0.09."""
    import bitsandbytes

    weight = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    read = bitsandbytes.functional.dequantize_4bit(*bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4"))
    return float((read - weight).norm() / weight.norm())


@with_bitsandbytes
def test_a_width_that_bitsandbytes_reads_wrongly_is_refused(configure: Configure):
    """Its 0.50.2 on a CPU with AVX-512, at 48 columns: weights 20 % off, silently."""
    if bitsandbytes_error(48) < 0.15:
        pytest.skip("bitsandbytes reads this width rightly on this CPU")
    with pytest.raises(
        InputError, match=r"reads 4-bit weights of this width wrongly on a CPU: .*q_proj has 48 columns"
    ):
        load(configure(**QLORA))


@with_bitsandbytes
def test_packed_examples_do_not_see_each_other_through_an_adapter(configure: Configure, packable_llama: Path):
    """The packing trap: with a key/value cache, or without lengths, examples laid end to end attend across."""
    for values in (LORA, QLORA):
        config = configure(**values, model_name_or_path=str(packable_llama), lora_target_modules="all-linear")
        model = load(config).eval()
        with torch.no_grad():
            for parameter in (p for name, p in model.named_parameters() if "lora_B" in name):
                parameter.normal_(std=0.3)
        rows = [IDS, [1, 44, 300], [1, 7, 7, 19, 250, 3]]
        positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
        ids = torch.cat([torch.tensor(row) for row in rows])[None]
        lengths = [len(row) for row in rows]
        with torch.no_grad():
            packing = padding_free.Packing(lengths)
            packed = model(input_ids=ids, position_ids=positions, use_cache=False, packing=packing).logits[0]
        alone = torch.cat([probe_logits(model, row, CPU) for row in rows])
        assert torch.allclose(packed, alone, atol=1e-4)


# Flags ----------------------------------------------------------------------------------------------------------

NEEDED = ["--model_name_or_path", "weights/llama-7b", "--data_path", "data.json"]


def settle(*arguments: str, num_processes: int = 1) -> TrainConfig:
    return resolve(parse_flags([*NEEDED, *arguments]), num_processes=num_processes, device=CPU)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--lora_r", "8"], "--lora_r 8 is for adapters, and --method full trains every weight: add --method lora"),
        (["--use_dora"], "--use_dora True is for adapters"),
        (["--base_quantization", "nf4"], "--base_quantization nf4 is for adapters"),
        (["--method", "qlora", "--base_quantization", "none"], "contradict each other; --method lora is that"),
        (["--method", "lora", "--base_quantization", "int8", "--use_dora"], "--use_dora True does not go with"),
        (["--method", "lora", "--lora_r", "0"], "--lora_r: expected at least 1"),
        (["--method", "lora", "--lora_alpha", "0"], "--lora_alpha: expected a number above 0"),
        (["--method", "lora", "--lora_dropout", "1"], "--lora_dropout: expected a number from 0 up to"),
        (["--method", "lora", "--lora_target_modules", " , "], "--lora_target_modules: expected names such as"),
        (["--method", "lora", "--base_quantization", "int8", "--fsdp", "full_shard offload"], "cannot be sharded"),
        (["--method", "ia3"], "invalid choice: 'ia3'"),
        (["--method", "lora", "--base_quantization", "fp4"], "invalid choice: 'fp4'"),
    ],
)
def test_combinations_that_make_no_sense(arguments: list[str], text: str):
    with pytest.raises(InputError, match=text):
        settle(*arguments)


def test_an_8_bit_base_is_for_one_process():
    """Row 14: 8-bit models on several devices ended in errors of two devices."""
    with pytest.raises(InputError, match=r"--base_quantization int8 cannot be sharded over processes .* use --base_q"):
        settle("--method", "lora", "--base_quantization", "int8", num_processes=2)
    assert settle("--method", "qlora", num_processes=2).base_quantization == "nf4"


def test_what_an_adapter_is_by_default():
    for method, quantization in (("lora", "none"), ("qlora", "nf4")):
        config = settle("--method", method)
        assert (config.lora_r, config.lora_alpha, config.lora_dropout, config.learning_rate) == (8, 16, 0.05, 3e-4)
        assert config.base_quantization == quantization
        assert resolve(config, num_processes=1, device=CPU) == config
    assert settle("--method", "lora", "--learning_rate", "1e-4", "--recipe", "alpaca-13b").learning_rate == 1e-4
    assert settle("--method", "full", "--base_quantization", "none").learning_rate == 2e-5


def test_alpaca_loras_recipe():
    config = settle("--recipe", "alpaca-lora")
    values = (config.method, config.base_quantization, config.train_on_inputs, config.lora_r, config.lora_alpha)
    assert values == ("lora", "int8", True, 8, 16)
    assert (config.learning_rate, config.num_train_epochs, config.global_batch_size) == (3e-4, 3, 128)
    assert (config.per_device_train_batch_size, config.model_max_length, config.val_set_size) == (4, 256, 2000)
    assert (config.warmup_steps, config.lr_scheduler_type, config.save_total_limit) == (100, "linear", 3)
    adapter = ["--lora_r", "16", "--lora_target_modules", "q_proj,k_proj,v_proj,o_proj", "--base_quantization", "none"]
    official = settle("--recipe", "alpaca-lora", *adapter, "--model_max_length", "512", "--num_train_epochs", "10")
    assert (official.lora_r, official.base_quantization, official.train_on_inputs) == (16, "none", True)


def test_training_on_inputs_is_transformers_loss_over_everything(configure: Configure, tiny_llama: Path, records: Path):
    config = configure(**LORA, train_on_inputs=True, max_steps=1, loss_average="token")
    loss = history(train(config))[0]
    data = encode_data(
        make_settings(config).data, open_base(make_settings(config).base).tokenizer, progress=False
    ).train
    assert data.target_counts.tolist() == (data.lengths - 1).tolist()
    batch = step_examples(len(data), global_batch_size=8, seed=42, step=0).tolist()
    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    total = sum(
        (model(input_ids=ids[None], labels=ids[None]).loss * (len(ids) - 1)).item()
        for ids, labels in map(data.example, batch)
        if torch.equal(ids, labels)
    )
    assert loss == pytest.approx(total / int(data.target_counts[batch].sum()), abs=2e-5)


# Several processes ----------------------------------------------------------------------------------------------


@with_bitsandbytes
@pytest.mark.parametrize(
    "names",
    [
        ("dora, tied, padded, accumulated", "nf4, recomputed"),
        pytest.param(("lora", "dora, padded, accumulated", "tied", "nf4"), marks=pytest.mark.slow),
    ],
    ids=["combined", "one by one"],
)
@pytest.mark.slow
def test_two_processes_train_the_adapter_that_one_does(
    names: tuple[str, ...], configure, tiny_opt: Path, packable_llama: Path, tmp_path: Path
):
    opt = shutil.copytree(tiny_opt, tmp_path / "opt")
    settings = json.loads((opt / "config.json").read_text())
    (opt / "config.json").write_text(json.dumps({**settings, "dropout": 0.0}))
    common = {"learning_rate": 1e-2, "val_set_size": 5, "eval_strategy": "epoch", "max_steps": 3, "save_steps": 2}
    dora = {**LORA, "use_dora": True, "padding_free": False, "per_device_train_batch_size": 2}
    tied = {**LORA, "model_name_or_path": str(opt), "fsdp": "shard_grad_op auto_wrap"}
    nf4 = {**QLORA, "model_name_or_path": str(packable_llama), "lora_target_modules": "all-linear"}
    runs = {
        "lora": {**LORA, "fsdp": "full_shard auto_wrap"},
        "dora, padded, accumulated": dora,
        "tied": tied,
        "dora, tied, padded, accumulated": {**dora, **tied},
        "nf4": nf4,
        "nf4, recomputed": {**nf4, "gradient_checkpointing": True},
    }
    many = {name: configure(**{**common, **runs[name]}, output_dir=str(tmp_path / "two" / name)) for name in names}
    for config in many.values():  # what one process saved, two take up
        alone = train(dataclasses.replace(config, output_dir=str(tmp_path / "one" / Path(config.output_dir).name)))
        assert open_adapter(alone)
    resumed = {
        name: dataclasses.replace(
            many[name],
            output_dir=str(tmp_path / "resumed" / name),
            resume_from_checkpoint=str(tmp_path / "one" / name / "checkpoint-2"),
        )
        for name in names
        if name in ("lora", "nf4, recomputed")
    }
    finished = train_in_processes(2, [config_json(config) for config in [*many.values(), *resumed.values()]], tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    for config in [*many.values(), *resumed.values()]:
        together = Path(config.output_dir)
        alone = tmp_path / "one" / together.name
        for key in ("loss", "eval_loss"):
            assert history(together, key) == pytest.approx(history(alone, key), abs=5e-5), together
        tensors = adapter_tensors(alone)
        assert adapter_tensors(together).keys() == tensors.keys()
        for name, tensor in adapter_tensors(together).items():
            assert torch.allclose(tensor, tensors[name], atol=1e-4), (together, name)
        assert (together / "adapter_config.json").read_text() == (alone / "adapter_config.json").read_text()
