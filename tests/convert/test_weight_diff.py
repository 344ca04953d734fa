"""Weight differences: the original's folder and arithmetic, every bit back, and nothing wrong goes unnoticed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alpaca.errors import InputError, MissingInput, NotEnoughSpace, OutputExists
from alpaca.hf_files import FLOAT_DTYPES, INDEX_NAME, replaced_folder
from alpaca.tokenizer import load_tokenizer
from convert import published_sum, weight_diff
from convert.diff_manifest import MANIFEST_NAME
from convert.diff_residual import RESIDUAL_NAME, ResidualWriter
from convert.pickled_weights import PickledWeights
from convert.weight_diff import DiffConfig, RecoverConfig, make_diff, parse_arguments, recover
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")
TABLE = "model.layers.{}.self_attn.rotary_emb.inv_freq"
Tensors = dict[str, torch.Tensor]


def load(folder: Path, dtype: torch.dtype | str = torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def add_pad_rows(model, num_rows: int) -> None:
    """The original's resizing: new input and output rows are the mean of those before."""
    old = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(num_rows, mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            table[old:] = table[:old].mean(dim=0, keepdim=True)


def train(model, num_steps: int) -> None:
    """Steps as large as fine-tuning's in all, so that float32 differences lose bits."""
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for _ in range(num_steps):
        ids = torch.randint(model.config.vocab_size, (2, 12), generator=generator)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, llama_folder) -> Path:
    """raw, fine-tuned in float32 with a [PAD] row more."""
    folder = tmp_path_factory.mktemp("trained") / "tuned"
    model, tokenizer = load(llama_folder), load_tokenizer(llama_folder)
    tokenizer.add_pad_token()
    add_pad_rows(model, model.config.vocab_size + 1)
    train(model, 40)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, llama_folder, trained) -> Path:
    """A diff of the trained model; not to be changed."""
    return make_diff(
        DiffConfig(path_raw=llama_folder, path_tuned=trained, path_diff=tmp_path_factory.mktemp("made") / "diff")
    )


@pytest.fixture
def diff(tmp_path, made) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "diff"))


def read_all(folder: Path) -> Tensors:
    return {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({4: torch.int32, 2: torch.int16}[tensor.dtype.itemsize])


def same_bits(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(bits(a[n]), bits(b[n])) for n in a
    )


def rewrite(source: Path, target: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A model folder with each tensor changed."""
    shutil.copytree(source, target)
    tensors = {name: change(name, tensor).contiguous() for name, tensor in read_all(source).items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def recovered(raw: Path, diff: Path, target: Path, **options) -> Tensors:
    recover(RecoverConfig(path_raw=raw, path_diff=diff, path_tuned=target, **{"test_inference": False, **options}))
    return read_all(target)


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


# There and back ---------------------------------------------------------------------------------------------------


def cast_with_oddities(dtype: torch.dtype) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Every tensor in `dtype`, with infinities, minus zero, the smallest subnormal and NaN of two payloads in it."""
    odd = {torch.float32: [0x7F800000, 0xFF800000, 0x80000000, 1, 0x7FC00000, 0xFFC0BEEF],
           torch.float16: [0x7C00, 0xFC00, 0x8000, 1, 0x7E00, 0xFE77],
           torch.bfloat16: [0x7F80, 0xFF80, 0x8000, 1, 0x7FC0, 0xFFC7]}[dtype]  # fmt: skip

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.to(dtype).clone()
        wide = torch.tensor(odd, dtype=torch.int64).to(bits(changed).dtype)
        bits(changed).view(-1)[3 : 3 + len(odd)] = wide
        return changed

    return change


def without_residual(raw: Path, diff: Path, dtype: torch.dtype) -> Tensors:
    """raw + diff in float32, rounded: what the difference alone gives. [PAD] rows from the mean."""
    base, differences = read_all(raw), read_all(diff)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        wide = base[name].float()
        base[name] = torch.cat([wide, wide.mean(dim=0, keepdim=True)])
    return {name: (base[name].float() + differences[name]).to(dtype) for name in differences}


@pytest.mark.parametrize("dtype", FLOAT_DTYPES.values(), ids=FLOAT_DTYPES)
@pytest.mark.parametrize("max_shard_size", [5 * 10**9, 100_000])
def test_every_bit_comes_back(tmp_path, llama_folder, trained, dtype, max_shard_size):
    tuned = rewrite(trained, tmp_path / "tuned", cast_with_oddities(dtype))
    target = DiffConfig(
        path_raw=llama_folder, path_tuned=tuned, path_diff=tmp_path / "diff", max_shard_size=max_shard_size
    )
    make_diff(target)
    back = recovered(llama_folder, tmp_path / "diff", tmp_path / "back", max_shard_size=max_shard_size)
    assert same_bits(back, read_all(tuned))
    assert not same_bits(without_residual(llama_folder, tmp_path / "diff", dtype), read_all(tuned))
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tuned / name).read_bytes()
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((tuned / "config.json").read_text())


def test_the_difference_alone_loses_bits_of_a_trained_model(llama_folder, trained, made):
    alone, tuned = without_residual(llama_folder, made, torch.float32), read_all(trained)
    lost = sum(int((bits(alone[n]) != bits(tuned[n])).sum()) for n in tuned) / sum(t.numel() for t in tuned.values())
    assert 0.001 < lost < 0.5
    listed = sum(entry["residual"][2] for entry in json.loads((made / MANIFEST_NAME).read_text())["tensors"].values())
    assert listed >= lost * sum(t.numel() for t in tuned.values())
    assert (made / RESIDUAL_NAME).stat().st_size < 5 * listed


@pytest.mark.parametrize("raw_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_any_bits_come_back(tmp_path, llama_folder, monkeypatch, raw_dtype, dtype):
    for module in ("diff_residual", "diff_arithmetic"):
        monkeypatch.setattr(f"convert.{module}.blocks", small_blocks)
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int, dtype: str) -> torch.Tensor:
        kind = FLOAT_DTYPES[dtype]
        wide = (*shape[:-1], shape[-1] * kind.itemsize)
        return torch.randint(0, 256, wide, generator=generator, dtype=torch.uint8).view(kind)

    shapes = {"a": (40, 7), "b": (65,), "empty": (0, 3), "c": (1, 2, 3)}
    for folder, kind, rows in (("raw", raw_dtype, 9), ("tuned", dtype, 12)):
        shutil.copytree(llama_folder, tmp_path / folder)
        (tmp_path / folder / "config.json").write_text(json.dumps({"vocab_size": rows, "torch_dtype": kind}))
        tensors = {name: noise(*shape, dtype=kind) for name, shape in {**shapes, "rows": (rows, 30)}.items()}
        save_file(tensors, tmp_path / folder / "model.safetensors")
    make_diff(DiffConfig(path_raw=tmp_path / "raw", path_tuned=tmp_path / "tuned", path_diff=tmp_path / "diff"))
    back = recovered(tmp_path / "raw", tmp_path / "diff", tmp_path / "back")
    assert same_bits(back, read_all(tmp_path / "tuned"))


def small_blocks(num_elements: int):
    return ((i, start, min(start + 64, num_elements)) for i, start in enumerate(range(0, num_elements, 64)))


def test_other_dtype_is_the_tuned_value_rounded(tmp_path, llama_folder, trained, made):
    back = recovered(llama_folder, made, tmp_path / "back", dtype="bfloat16")
    assert same_bits(back, {name: tensor.bfloat16() for name, tensor in read_all(trained).items()})
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_without_a_target_nothing_is_written(tmp_path, llama_folder, made):
    before = sorted(tmp_path.rglob("*"))
    assert recover(RecoverConfig(path_raw=llama_folder, path_diff=made, test_inference=False)) is None
    assert sorted(tmp_path.rglob("*")) == before


# The original's arithmetic ----------------------------------------------------------------------------------------


def original_difference(raw: Path, tuned: Path) -> Tensors:
    """make_diff as it was: both models in memory, [PAD] rows, state dict minus state dict."""
    base, model = load(raw), load(tuned)
    add_pad_rows(base, model.config.vocab_size)
    return {name: tensor - base.state_dict()[name] for name, tensor in model.state_dict().items()}


def test_folder_is_what_the_original_would_write_and_transformers_loads_it(llama_folder, trained, made):
    expected = original_difference(llama_folder, trained)
    assert same_bits(read_all(made), expected)
    model = load(made, "auto")
    assert model.dtype == torch.float32
    assert same_bits(dict(model.state_dict()), expected)


def test_the_originals_recovery_reads_our_folder(llama_folder, trained, made):
    base, model = load(llama_folder), load(made)
    add_pad_rows(base, model.config.vocab_size)
    for name, tensor in model.state_dict().items():
        tensor.add_(base.state_dict()[name])
    for name, tensor in load(trained).state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)


def frequencies(folder: Path) -> torch.Tensor:
    config = load(folder).config
    width = config.hidden_size // config.num_attention_heads
    return 1.0 / 10000.0 ** (torch.arange(0, width, 2).float() / width)


@pytest.fixture
def old_diff(tmp_path, llama_folder, trained) -> Path:
    """As Stanford's: two pickles with an index, rotary tables among the tensors, no manifest."""
    folder = tmp_path / "old"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = original_difference(llama_folder, trained)
    tensors |= {TABLE.format(layer): torch.zeros_like(frequencies(trained)) for layer in range(2)}
    names = list(tensors)
    files = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, part in files.items():
        torch.save({name: tensors[name].clone() for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def original_recovery(raw: Path, difference: Tensors) -> Tensors:
    """recover as it was, over the state dict of transformers 4.28, in its order, rotary tables included."""
    base = load(raw)
    add_pad_rows(base, base.config.vocab_size + 1)
    tensors = {**base.state_dict(), **{TABLE.format(layer): frequencies(raw) for layer in range(2)}}
    layer = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight",
             "self_attn.rotary_emb.inv_freq", "mlp.gate_proj.weight", "mlp.down_proj.weight", "mlp.up_proj.weight",
             "input_layernorm.weight", "post_attention_layernorm.weight"]  # fmt: skip
    order = ["model.embed_tokens.weight", *(f"model.layers.{i}.{n}" for i in range(2) for n in layer),
             "model.norm.weight", "lm_head.weight"]  # fmt: skip
    assert set(order) == set(tensors)
    return {name: difference[name] + tensors[name] if name in difference else tensors[name] for name in order}


@pytest.mark.parametrize("tables_in_diff", [True, False])
def test_old_diff_is_recovered_as_the_original_did_and_its_sum_checked(
    tmp_path, llama_folder, old_diff, monkeypatch, caplog, tables_in_diff
):
    difference = {name: PickledWeights(old_diff).tensor(name) for name in PickledWeights(old_diff).names}
    expected = original_recovery(llama_folder, difference)
    monkeypatch.setattr(published_sum, "PUBLISHED_SUM", float(sum(tensor.sum() for tensor in expected.values())))
    monkeypatch.setattr(published_sum, "TOLERANCE", 1e-6)  # the same order of addition: no tolerance is needed
    weights = {name: tensor for name, tensor in expected.items() if "rotary" not in name}
    if not tables_in_diff:  # saved anew by a later transformers
        for file in old_diff.glob("pytorch_model*"):
            file.unlink()
        save_file({name: difference[name] for name in weights}, old_diff / "model.safetensors")
    caplog.set_level("INFO")
    back = recovered(llama_folder, old_diff, tmp_path / "back", max_shard_size=70_000)
    assert same_bits(back, weights)
    assert ("leaving out 2 rotary tables" in caplog.text) == tables_in_diff
    assert "as published" in caplog.text
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "float32"
    assert load_tokenizer(tmp_path / "back").pad_id == load_tokenizer(old_diff).pad_id


def test_sum_that_is_not_the_published_one(tmp_path, llama_folder, old_diff):
    with pytest.raises(InputError, match=r"add up to [-\d.]+ with rotary tables, .*is 50637\.1836, .*both again"):
        recovered(llama_folder, old_diff, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    with pytest.raises(InputError, match="published for Stanford's 7B diff"):
        recover(RecoverConfig(path_raw=llama_folder, path_diff=old_diff, test_inference=False))
    recovered(llama_folder, old_diff, tmp_path / "back", check_integrity_naively=False)


def test_sum_is_not_met_by_a_damaged_element(tmp_path, llama_folder, old_diff, monkeypatch):
    difference = {name: PickledWeights(old_diff).tensor(name).clone() for name in PickledWeights(old_diff).names}
    total = float(sum(tensor.sum() for tensor in original_recovery(llama_folder, difference).values()))
    monkeypatch.setattr(published_sum, "PUBLISHED_SUM", total)
    difference["model.norm.weight"][5] += 0.02
    for file in old_diff.glob("pytorch_model*"):
        file.unlink()
    torch.save(difference, old_diff / "pytorch_model.bin")
    with pytest.raises(InputError, match="damaged or another model"):
        recovered(llama_folder, old_diff, tmp_path / "back")


def test_tables_of_float16_are_tried_too(tmp_path, llama_folder, old_diff, monkeypatch):
    rounded = {name: PickledWeights(old_diff).tensor(name) for name in PickledWeights(old_diff).names}
    tables = {name: frequencies(llama_folder).half().float() for name in rounded if "rotary" in name}
    expected = {**original_recovery(llama_folder, rounded), **tables}
    monkeypatch.setattr(published_sum, "PUBLISHED_SUM", float(sum(tensor.sum() for tensor in expected.values())))
    monkeypatch.setattr(published_sum, "TOLERANCE", 1e-6)
    recovered(llama_folder, old_diff, tmp_path / "back")


def test_tables_of_the_raw_model_count_as_they_are(tmp_path, llama_folder, old_diff, monkeypatch):
    raw = Path(shutil.copytree(llama_folder, tmp_path / "raw"))
    tables = {TABLE.format(layer): torch.full((4,), 0.3 + layer) for layer in range(2)}
    save_file({**read_all(llama_folder), **tables}, raw / "model.safetensors")
    difference = {name: PickledWeights(old_diff).tensor(name) for name in PickledWeights(old_diff).names}
    expected = {**original_recovery(llama_folder, difference), **tables}
    monkeypatch.setattr(published_sum, "PUBLISHED_SUM", float(sum(tensor.sum() for tensor in expected.values())))
    monkeypatch.setattr(published_sum, "TOLERANCE", 1e-6)
    recovered(raw, old_diff, tmp_path / "back")


def test_tables_of_older_folders_play_no_part_in_new_diffs(tmp_path, llama_folder, trained, made):
    raw = Path(shutil.copytree(llama_folder, tmp_path / "raw"))
    save_file({**read_all(llama_folder), TABLE.format(0): torch.ones(4)}, raw / "model.safetensors")
    make_diff(DiffConfig(path_raw=raw, path_tuned=trained, path_diff=tmp_path / "diff"))
    assert same_bits(read_all(tmp_path / "diff"), read_all(made))
    assert same_bits(recovered(llama_folder, tmp_path / "diff", tmp_path / "back"), read_all(trained))
    assert same_bits(recovered(raw, made, tmp_path / "other"), read_all(trained))


# The model answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_written", [True, False])
def test_recovered_model_answers_as_the_tuned_one(tmp_path, llama_folder, trained, made, capsys, is_written):
    target = tmp_path / "back" if is_written else None
    recover(RecoverConfig(path_raw=llama_folder, path_diff=made, path_tuned=target, test_inference=True))
    tokenizer = load_tokenizer(trained)
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\r\n\r\n### Instruction:\r\nList three technologies that make life easier.\r\n\r\n### Response:"
    )
    ids = torch.tensor([tokenizer.prefix_ids + tokenizer.encode(prompt)])
    out = load(trained).generate(ids, max_new_tokens=100, do_sample=False, pad_token_id=tokenizer.pad_id)
    answer = tokenizer.decode(out[0, ids.shape[1] :].tolist())
    assert capsys.readouterr().out == f"Input: {prompt}\nCompletion: {answer}\n"


def test_real_model_comes_back_with_its_published_text(tmp_path, real):
    from convert.convert_llama_weights_to_hf import convert
    from convert.convert_llama_weights_to_hf import parse_arguments as parse

    source = ["--input_dir", str(real / "unconverted-weights"), "--model_size", "260K"]
    tuned = convert(parse([*source, "--output_dir", str(tmp_path / "converted")]))
    generator = torch.Generator().manual_seed(5)
    raw = rewrite(
        tuned, tmp_path / "raw", lambda n, t: (t + 0.1 * torch.randn(t.shape, generator=generator)).to(torch.float16)
    )
    make_diff(DiffConfig(path_raw=raw, path_tuned=tuned, path_diff=tmp_path / "diff"))
    assert same_bits(recovered(raw, tmp_path / "diff", tmp_path / "back"), read_all(tuned))
    ids = load(tmp_path / "back").generate(torch.tensor([[1]]), max_new_tokens=256, do_sample=False)
    text = load_tokenizer(tmp_path / "back").decode(ids[0].tolist())
    assert text == (real / "stories260k-greedy.txt").read_text().rstrip("\n")


def test_model_that_memory_cannot_hold_is_recovered_and_not_tried(tmp_path, llama_folder, made, monkeypatch, caplog):
    monkeypatch.setattr(weight_diff, "free_memory", lambda device: 10**6)
    recovered(llama_folder, made, tmp_path / "back", test_inference=None)
    assert "needs 1.1 GB of memory and 0.0 GB are free: it is recovered and checked, but not tried" in caplog.text
    with pytest.raises(NotEnoughSpace, match="pass --test_inference False"):
        recovered(llama_folder, made, tmp_path / "other", test_inference=True)
    assert not (tmp_path / "other").exists()


# Wrong bases ------------------------------------------------------------------------------------------------------


def test_base_of_another_training_is_refused(tmp_path, llama_folder, made):
    raw = rewrite(llama_folder, tmp_path / "other", lambda name, tensor: tensor * 1.01)
    with pytest.raises(
        InputError,
        match=r"other is not the model the diff was made against, llama-t \(2 layers, 64 wide, 400 tokens, .*"
        r"21 of 21 tensors differ: .* and 16 more\. These are other weights of the same shape",
    ):
        recovered(raw, made, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_edited_base_is_refused_naming_the_tensor(tmp_path, llama_folder, made):
    name = "model.layers.1.mlp.up_proj.weight"
    raw = rewrite(llama_folder, tmp_path / "raw", lambda n, t: bits(t).bitwise_xor(int(n == name)).view(t.dtype))
    with pytest.raises(InputError, match=rf"1 of 21 tensors differ: {name}\. A damaged or edited copy"):
        recovered(raw, made, tmp_path / "back")


def test_rounded_base_is_refused_and_a_wider_copy_is_not(tmp_path, llama_folder, trained, made):
    rounded = rewrite(llama_folder, tmp_path / "rounded", lambda name, tensor: tensor.bfloat16())
    with pytest.raises(InputError, match="They are bfloat16 here and were float16: rounded on the way"):
        recovered(rounded, made, tmp_path / "back")
    wide = rewrite(llama_folder, tmp_path / "wide", lambda name, tensor: tensor.float())
    assert same_bits(recovered(wide, made, tmp_path / "back"), read_all(trained))


def test_base_of_another_size_is_refused(tmp_path, llama_folder, made, old_diff):
    raw = rewrite(llama_folder, tmp_path / "raw", lambda name, t: t[..., :32] if "norm" in name else t)
    with pytest.raises(InputError, match=r"raw is another model .*: it is .*, expected .*norm.weight is \(32,\), exp"):
        recovered(raw, made, tmp_path / "back")
    with pytest.raises(InputError, match=r"not of one model: .*norm.weight is \(32,\) in the first and \(64,\) in the"):
        recovered(raw, old_diff, tmp_path / "back")
    deep = read_all(llama_folder)
    del deep["model.norm.weight"]
    save_file(deep, raw / "model.safetensors")
    with pytest.raises(InputError, match=r"it lacks model\.norm\.weight, and has besides: nothing"):
        recovered(raw, made, tmp_path / "back")
    with pytest.raises(InputError, match=r"the first lacks \['model\.norm\.weight'\], the second \[\]"):
        recovered(raw, old_diff, tmp_path / "back")


def test_fewer_rows_of_vocabulary_than_raw(tmp_path, llama_folder, trained):
    with pytest.raises(InputError, match=r"weight is \(401, 64\) in the first and \(400, 64\)"):
        make_diff(DiffConfig(path_raw=trained, path_tuned=llama_folder, path_diff=tmp_path / "diff"))


def test_what_is_no_float_is_refused(tmp_path, llama_folder, trained):
    for dtype, message in ((torch.int8, "is int8"), (torch.float8_e4m3fn, "is F8_E4M3")):
        raw = rewrite(llama_folder, tmp_path / str(dtype), lambda name, tensor, dtype=dtype: tensor.to(dtype))
        with pytest.raises(InputError, match=f"{message}; expected one of "):
            make_diff(DiffConfig(path_raw=raw, path_tuned=trained, path_diff=tmp_path / "diff"))


def test_tied_embeddings_are_the_originals_trap(tmp_path, llama_folder, trained, old_diff, caplog):
    for folder in (Path(shutil.copytree(trained, tmp_path / "tied")), old_diff):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    make_diff(DiffConfig(path_raw=llama_folder, path_tuned=tmp_path / "tied", path_diff=tmp_path / "diff"))
    assert "the original tool would add them twice" in caplog.text
    assert same_bits(recovered(llama_folder, tmp_path / "diff", tmp_path / "back"), read_all(trained))
    with pytest.raises(InputError, match="has tied embeddings and no manifest"):
        recovered(llama_folder, old_diff, tmp_path / "other")


# Damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.77, 0.999])
def test_damaged_residual_is_found(tmp_path, llama_folder, diff, share):
    flip(diff / RESIDUAL_NAME, int(share * (diff / RESIDUAL_NAME).stat().st_size))
    with pytest.raises(InputError, match=RESIDUAL_NAME):
        recovered(llama_folder, diff, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_damaged_difference_is_found(tmp_path, llama_folder, diff):
    flip(diff / "model.safetensors", -97)  # a float's high byte: not lost in the addition
    with pytest.raises(InputError, match=r"does not come out as it was: the raw model was checked and is right"):
        recovered(llama_folder, diff, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_residual_of_another_size_or_missing(tmp_path, llama_folder, diff):
    residual = diff / RESIDUAL_NAME
    residual.write_bytes(residual.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"diff_residual\.dat has [\d,]+ bytes instead of [\d,]+"):
        recovered(llama_folder, diff, tmp_path / "back")
    residual.unlink()
    with pytest.raises(MissingInput, match=r"diff_residual\.dat is missing, which diff_manifest\.json calls for"):
        recovered(llama_folder, diff, tmp_path / "back")


def change_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    content = json.loads((folder / MANIFEST_NAME).read_text())
    change(content)
    (folder / MANIFEST_NAME).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), r"expected format 'weight-diff', version 1; found 'weight-diff', version 2"),
        (lambda m: m.pop("format"), "found None, version 1"),
        (lambda m: m.pop("tensors"), "is damaged, get it again: KeyError 'tensors'"),
        (lambda m: m["tensors"]["model.norm.weight"]["raw"].update(dtype="int4"), "ValueError dtype 'int4'"),
        (lambda m: m["tensors"]["model.norm.weight"].update(residual=[1]), "is damaged, get it again: ValueError"),
        (lambda m: m["tensors"].pop("model.norm.weight"), r"weights disagree on \['model\.norm\.weight'\]"),
        (lambda m: m["tensors"]["model.norm.weight"]["tuned"].update(shape=[3]), "manifest and weights disagree"),
        (lambda m: m["tensors"]["model.norm.weight"].update(residual=[0, 7, 1]), r"residual\.dat is damaged"),
        (lambda m: m["tensors"]["model.norm.weight"]["tuned"].update(sha256="0"), "does not come out as it was"),
    ],
)  # fmt: skip
def test_manifest_that_is_wrong(tmp_path, llama_folder, diff, change, message):
    change_manifest(diff, change)
    with pytest.raises(InputError, match=message):
        recovered(llama_folder, diff, tmp_path / "back")


def test_manifest_lost(tmp_path, llama_folder, diff):
    (diff / MANIFEST_NAME).unlink()
    with pytest.raises(MissingInput, match=r"has a diff_residual\.dat and no diff_manifest\.json; copy the whole"):
        recovered(llama_folder, diff, tmp_path / "back")
    (diff / MANIFEST_NAME).write_text("{")
    with pytest.raises(InputError, match=r"diff_manifest\.json is not valid JSON"):
        recovered(llama_folder, diff, tmp_path / "back")


def both_commands(tmp_path: Path, raw: Path, tuned: Path, diff: Path) -> list[Callable[[], object]]:
    return [
        lambda: make_diff(DiffConfig(path_raw=raw, path_tuned=tuned, path_diff=tmp_path / "new")),
        lambda: recovered(raw, diff, tmp_path / "back"),
    ]


DAMAGES = {
    "truncated": (InputError, "damaged or not a safetensors file"),
    "empty": (InputError, "damaged or not a safetensors file"),
    "missing": (MissingInput, r"no model\*\.safetensors or pytorch_model\*\.bin in"),
    "shard": (MissingInput, r"names files that are not there: model-00001-of-00002\.safetensors"),
    "wrong shard": (InputError, "lacks 'model.norm.weight', which its index says it holds"),
    "bad index": (InputError, "expected a weight_map"),
    "pointer": (InputError, r"is a Git LFS pointer, not the file: run `git lfs pull`"),
    "adapter": (InputError, "is a LoRA adapter, no whole model"),
    "config": (MissingInput, r"config\.json is missing"),
    "folder": (MissingInput, "no folder"),
}


def damage(folder: Path, kind: str) -> None:
    file, index = folder / "model.safetensors", folder / INDEX_NAME
    if kind in ("truncated", "empty"):
        file.write_bytes(file.read_bytes()[: -10 if kind == "truncated" else 0])
    elif kind == "missing":
        file.unlink()
    elif kind in ("shard", "wrong shard"):
        names = dict.fromkeys(load_file(file), "model-00001-of-00002.safetensors")
        index.write_text(json.dumps({"weight_map": names}))
        if kind == "wrong shard":
            save_file({"x": torch.ones(1)}, folder / "model-00001-of-00002.safetensors")
            index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}))
    elif kind == "bad index":
        index.write_text("{}")
    elif kind == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    elif kind == "adapter":
        (folder / "adapter_config.json").write_text("{}")
    elif kind == "config":
        (folder / "config.json").unlink()
    else:
        shutil.rmtree(folder)


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("which", ["raw", "tuned", "diff"])
def test_damaged_folders_are_named_and_nothing_is_written(tmp_path, llama_folder, trained, diff, kind, which):
    raw, tuned = shutil.copytree(llama_folder, tmp_path / "raw"), shutil.copytree(trained, tmp_path / "tuned")
    damage({"raw": raw, "tuned": tuned, "diff": diff}[which], kind)
    error, message = DAMAGES[kind]
    for number, run in enumerate(both_commands(tmp_path, raw, tuned, diff)):
        if which in (("raw", "tuned"), ("raw", "diff"))[number]:
            with pytest.raises(error, match=message) as caught:
                run()
            assert f"{tmp_path}/{which}" in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path.name not in ("raw", "tuned", "diff")]


def test_old_files_that_are_damaged(tmp_path, llama_folder, old_diff):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trapped"),))

    options = {"check_integrity_naively": False}
    file = old_diff / "pytorch_model-00002-of-00002.bin"
    content = file.read_bytes()
    for broken in (content[:-1], content[:1000], b"", b"x" * 1000):
        file.write_bytes(broken)
        with pytest.raises(InputError, match=r"00002-of-00002\.bin .* is damaged, truncated or no PyTorch file"):
            recovered(llama_folder, old_diff, tmp_path / "back", **options)
    torch.save({"lm_head.weight": Trap()}, file)
    with pytest.raises(InputError, match="no PyTorch file"):
        recovered(llama_folder, old_diff, tmp_path / "back", **options)
    assert not (tmp_path / "trapped").exists()
    torch.save({"model": 3}, file)
    with pytest.raises(InputError, match="something else than a plain table of tensors"):
        recovered(llama_folder, old_diff, tmp_path / "back", **options)
    torch.save({"x": torch.ones(1)}, file)
    with pytest.raises(InputError, match=r"lacks .*, which its index says it holds"):
        recovered(llama_folder, old_diff, tmp_path / "back", **options)
    file.unlink()
    with pytest.raises(MissingInput, match=r"names files not there: pytorch_model-00002-of-00002\.bin"):
        recovered(llama_folder, old_diff, tmp_path / "back", **options)
    (old_diff / "pytorch_model.bin.index.json").write_text('{"weight_map": [1]}')
    with pytest.raises(InputError, match="expected a weight_map of names and files"):
        recovered(llama_folder, old_diff, tmp_path / "back", **options)
    assert not (tmp_path / "back").exists()


def test_pickles_of_before_torch_1_6_are_read(tmp_path):
    torch.save({"x": torch.arange(3.0)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    weights = PickledWeights(tmp_path)
    assert torch.equal(weights.tensor("x"), torch.arange(3.0))
    with pytest.raises(MissingInput, match="holds no tensor 'y'"):
        weights.tensor("y")


def test_tuned_model_without_a_tokenizer(tmp_path, llama_folder, trained):
    tuned = shutil.copytree(trained, tmp_path / "tuned", ignore=shutil.ignore_patterns("token*"))
    with pytest.raises(MissingInput, match=r"no tokenizer in .*tuned"):
        make_diff(DiffConfig(path_raw=llama_folder, path_tuned=tuned, path_diff=tmp_path / "diff"))
    assert not (tmp_path / "diff").exists()


# Disks and outputs ------------------------------------------------------------------------------------------------


def test_not_enough_disk_is_said_before_writing(tmp_path, llama_folder, trained, made, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    for run in both_commands(tmp_path, llama_folder, trained, made):
        with pytest.raises(NotEnoughSpace, match=r"needs 0\.02 GB and its disk has 0\.00 GB free"):
            run()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["weights", "residual"])
def test_disk_that_runs_full_leaves_the_old_output(tmp_path, llama_folder, trained, made, monkeypatch, where):
    def full(*args):
        raise OSError(28, "No space left on device")

    for name in ("new", "back"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
    if where == "weights":
        monkeypatch.setattr("alpaca.hf_files._write_piece", full)
    else:
        monkeypatch.setattr(ResidualWriter, "add", full)
    with pytest.raises(NotEnoughSpace, match="the disk ran full"):
        make_diff(DiffConfig(path_raw=llama_folder, path_tuned=trained, path_diff=tmp_path / "new", overwrite=True))
    if where == "weights":
        with pytest.raises(NotEnoughSpace, match="the disk ran full"):
            recovered(llama_folder, made, tmp_path / "back", overwrite=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["back", "new", "old", "old"]


def test_what_the_disk_changes_is_found(tmp_path, llama_folder, trained, made, monkeypatch):
    from alpaca import hf_files

    write = hf_files._write_piece

    def rot(file, piece, dtype, progress):
        return write(file, torch.where(torch.arange(len(piece)) == 7, 0, piece).to(dtype), dtype, progress)

    monkeypatch.setattr(hf_files, "_write_piece", rot)
    with pytest.raises(InputError, match=r"the diff cannot be read back as written: is the disk failing\?"):
        make_diff(DiffConfig(path_raw=llama_folder, path_tuned=trained, path_diff=tmp_path / "diff"))
    with pytest.raises(InputError, match="cannot be read back as written"):
        recovered(llama_folder, made, tmp_path / "back")
    assert not list(tmp_path.iterdir())


def test_existing_output_needs_overwrite(tmp_path, llama_folder, trained, made):
    for name in ("new", "back"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stale").touch()
    for run in both_commands(tmp_path, llama_folder, trained, made):
        with pytest.raises(OutputExists, match="pass --overwrite"):
            run()
    make_diff(DiffConfig(path_raw=llama_folder, path_tuned=trained, path_diff=tmp_path / "new", overwrite=True))
    recovered(llama_folder, made, tmp_path / "back", overwrite=True)
    assert not list(tmp_path.rglob("stale"))
    assert [file.read_bytes() for file in sorted(made.iterdir())] == [
        file.read_bytes() for file in sorted((tmp_path / "new").iterdir())
    ]  # a diff is the same bytes each time


def test_output_that_is_an_input(tmp_path, llama_folder, trained, made):
    with pytest.raises(InputError, match="--path_diff and --path_tuned are the same folder"):
        make_diff(DiffConfig(path_raw=llama_folder, path_tuned=trained, path_diff=trained, overwrite=True))
    with pytest.raises(InputError, match="--path_tuned and --path_raw are the same folder"):
        recovered(llama_folder, made, llama_folder, overwrite=True)


def test_second_writer_is_refused(tmp_path, llama_folder, trained, made):
    for name, run in zip(("new", "back"), both_commands(tmp_path, llama_folder, trained, made), strict=True):
        with replaced_folder(tmp_path / name), pytest.raises(OutputExists, match="another process is writing"):
            run()


# The command as a process -----------------------------------------------------------------------------------------


def test_flags_are_spelt_as_the_originals(tmp_path):
    spaced = [
        "recover",
        "--path_raw",
        "r",
        "--path_diff",
        "d",
        "--path_tuned",
        "t",
        "--check_integrity_naively",
        "False",
    ]
    joined = ["recover", "--path_raw=r", "--path-diff=d", "--path_tuned=t", "--check_integrity_naively=false"]
    expected = RecoverConfig(
        path_raw=Path("r"), path_diff=Path("d"), path_tuned=Path("t"), check_integrity_naively=False
    )
    assert parse_arguments(spaced) == parse_arguments(joined) == expected
    base = ["recover", "--path_raw=r", "--path_diff=d"]
    tests = {flag: parse_arguments([*base, *flag]).test_inference for flag in [
        (), ("--test_inference",), ("--test_inference", "True"), ("--test_inference=False",), ("--test-inference", "0"),
    ]}  # fmt: skip
    assert list(tests.values()) == [None, True, True, False, False]
    assert parse_arguments([*base, "--device", "cuda"]).device == "cuda"
    made = parse_arguments(["make_diff", "--path_raw=r", "--path_tuned=t", "--path_diff=d", "--max_shard_size=1GB"])
    assert made == DiffConfig(path_raw=Path("r"), path_tuned=Path("t"), path_diff=Path("d"), max_shard_size=10**9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: task"),
        (["undo"], "invalid choice: 'undo'"),
        (["recover", "--path_raw=r"], "required: --path_diff"),
        (["make_diff", "--path_raw=r", "--path_diff=d"], "required: --path_tuned"),
        (["recover", "--path_raw=r", "--path_diff=d", "--test_inference", "maybe"], "expected True or False, found 'm"),
        (["recover", "--path_raw=r", "--path_diff=d", "--device=tpu"], "expected cpu, cuda or cuda:N, found 'tpu'"),
    ],
)
def test_bad_command_lines(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_no_gpu_is_said(tmp_path, llama_folder, made, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--device cuda is asked for and no GPU is there"):
        recovered(llama_folder, made, tmp_path / "back", test_inference=True, device="cuda")


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "convert.weight_diff", *map(str, arguments)]


def run(arguments: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)


def test_command_says_what_it_does_and_a_mistake_is_one_line(tmp_path, llama_folder, trained):
    diff, back = tmp_path / "diff", tmp_path / "back"
    make = run(command("make_diff", "--path_raw", llama_folder, f"--path_tuned={trained}", "--path_diff", diff))
    assert make.returncode == 0, make.stderr
    assert f"wrote {diff} in" in make.stdout
    assert re.search(r"diff_residual\.dat holds what float32 lost: \d+ elements \([\d.]+ %\)", make.stderr)
    arguments = ["--path_raw", llama_folder, "--path_diff", diff, "--path_tuned", back, "--test_inference", "False"]
    good = run(command("recover", *arguments))
    assert good.returncode == 0, good.stderr
    for step in ("checking the raw model", "adding", "verifying"):
        assert re.search(rf"{step}: 100%.*B/s", good.stderr)
    assert same_bits(read_all(back), read_all(trained))
    again = run(command("recover", *arguments))
    assert again.returncode == 1
    assert again.stderr.startswith("error: ")
    assert "Traceback" not in again.stderr


STOPPED = """
import sys, time
import alpaca.hf_files as files
from convert import diff_arithmetic, diff_manifest, weight_diff
module, name, calls = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1))
module = {"files": files, "arithmetic": diff_arithmetic, "command": weight_diff, "manifest": diff_manifest}[module]
original, count = getattr(module, name), 0
def stop(*args, **options):
    global count
    count += 1
    if count == calls:
        print("here", flush=True)
        time.sleep(60)
    return original(*args, **options)
setattr(module, name, stop)
weight_diff.run_command(weight_diff.main)
"""
STAGES = {  # command, module, function in which it is stopped, at which call
    "writing the diff": ("make_diff", "files", "_write_piece", 9),
    "copying files": ("make_diff", "command", "_copy_small_files", 1),
    "before the manifest": ("make_diff", "command", "write_manifest", 1),
    "proving": ("make_diff", "arithmetic", "TensorResidual", 5),
    "renaming the diff": ("make_diff", "files", "fsync", 3),
    "checking": ("recover", "manifest", "sha256", 4),
    "writing the model": ("recover", "files", "_write_piece", 9),
    "verifying": ("recover", "command", "differing", 1),
    "renaming the model": ("recover", "files", "fsync", 3),
}
QUICK_STAGES = ("writing the diff", "verifying")


@pytest.mark.parametrize(
    ("stage", "signal_number"),
    [(name, signal.SIGKILL) if name in QUICK_STAGES else pytest.param(name, signal.SIGKILL, marks=pytest.mark.slow)
     for name in STAGES]
    + [pytest.param(name, number, marks=pytest.mark.slow) for name in QUICK_STAGES
       for number in (signal.SIGINT, signal.SIGTERM)],
)  # fmt: skip
def test_killed_at_any_stage_it_can_be_run_again(tmp_path, llama_folder, trained, made, stage, signal_number):
    task, *stop = STAGES[stage]
    target = tmp_path / "out"
    inputs = {"make_diff": ("--path_tuned", trained, "--path_diff", target),
              "recover": ("--path_diff", made, "--path_tuned", target, "--test_inference=False")}  # fmt: skip
    arguments = [task, "--path_raw", llama_folder, *inputs[task]]
    script = [sys.executable, "-c", STOPPED, *map(str, [*stop, *arguments])]
    process = subprocess.Popen(script, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal_number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "Traceback" not in errors
    assert not target.exists()
    config = parse_arguments(list(map(str, arguments)))
    make_diff(config) if isinstance(config, DiffConfig) else recover(config)
    assert same_bits(read_all(target), read_all(made if task == "make_diff" else trained))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Size -------------------------------------------------------------------------------------------------------------

MEMORY_PROBE = """
import re, sys, threading, time
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
import torch
imported = peak = anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
from convert import weight_diff as command
command.main()
print("kib", imported, peak)
"""


def write_large(folder: Path, source: Path, *, rows: int, dtype: torch.dtype, seed: int) -> int:
    """A folder of random weights with the source's small files; the bytes of the largest tensor in float32."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": rows, "torch_dtype": "float16", "model_type": "x"}))
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed": (rows, 1024), **{f"layer{i}": (4096, 1024) for i in range(32)}}
    tensors = {name: (torch.randn(*shape, generator=generator) / 30).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return rows * 1024 * 4


@pytest.mark.slow
def test_memory_stays_at_the_largest_tensor(tmp_path, llama_folder):
    write_large(tmp_path / "raw", llama_folder, rows=32000, dtype=torch.float16, seed=1)
    largest = write_large(tmp_path / "tuned", llama_folder, rows=32001, dtype=torch.float32, seed=2)
    assert (tmp_path / "tuned" / "model.safetensors").stat().st_size > 600e6
    raw, diff = ("--path_raw", tmp_path / "raw"), ("--path_diff", tmp_path / "diff")
    back = ("--path_tuned", tmp_path / "back", "--overwrite", "--test_inference=False")
    for arguments in (
        ("make_diff", *raw, "--path_tuned", tmp_path / "tuned", *diff),
        ("recover", *raw, *diff, *back),
        ("recover", *raw, *diff, *back, "--check_integrity_naively=False"),
    ):
        if arguments[-1] == "--check_integrity_naively=False":  # as an old diff
            (tmp_path / "diff" / MANIFEST_NAME).unlink()
            (tmp_path / "diff" / RESIDUAL_NAME).unlink()
        start = time.monotonic()
        done = run([sys.executable, "-c", MEMORY_PROBE, *map(str, arguments)])
        assert done.returncode == 0, done.stderr
        imported, peak = (int(kib) * 1024 for kib in done.stdout.split()[-2:])
        print(arguments[0], f"{(peak - imported) / 1e6:.0f} MB over torch, {time.monotonic() - start:.1f} s")
        assert peak - imported < 2 * largest + 160e6  # 300 MB, of which torch itself takes 140
