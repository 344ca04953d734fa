"""Where Meta's files lie, what the published sizes come to, and what does not fit together is said."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from alpaca.errors import InputError, MissingInput, OutputExists
from alpaca.formats.meta import layout
from alpaca.formats.meta.releases import check_size, find_release
from alpaca.formats.meta.to_hf import output_name
from alpaca.text.loading import load_tokenizer
from tests.formats.meta_sources import (
    FAMILIES,
    LLAMA_3,
    PUBLISHED,
    Family,
    published_shapes,
    random_model,
    run,
    split,
    write,
)
from tests.text.test_tiktoken_files import write_tiktoken


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_params_give_the_published_config(name):
    params, num_shards, axis, vocab_size, ffn, context, factor = PUBLISHED[name]
    shards = [published_shapes(params, num_shards, axis, vocab_size, ffn)] * num_shards
    shape, found_axis = layout.read_shape(params, shards)
    release = find_release(params, requested=None, has_tiktoken=vocab_size > 100000, is_tied=factor == 32)
    check_size(name, shape)
    assert (shape.ffn_width, shape.vocab_size) == (ffn, vocab_size)
    assert num_shards == 1 or found_axis == axis
    assert (release.context, release.rope_scaling and release.rope_scaling.factor) == (context, factor)
    assert sum(torch.Size(p.shape).numel() for p in layout.placements(shape)) > 1e9


@pytest.mark.parametrize("name", ["13B", "Meta-Llama-3-70B"])
def test_a_wrong_axis_does_not_pass(name):
    """Parts split the other way are read as what they are; a plan with the wrong axis fits no shard."""
    params, num_shards, axis, vocab_size, ffn, *_ = PUBLISHED[name]
    turned = [published_shapes(params, num_shards, 1 - axis, vocab_size, ffn)] * num_shards
    shape, found = layout.read_shape(params, turned)
    assert found == 1 - axis
    wrong = layout.placements(shape, embedding_axis=axis)[0]
    assert layout.shard_shape(wrong, num_shards) != turned[0]["tok_embeddings.weight"]
    for bad in ((vocab_size // num_shards, params["dim"] // num_shards), (vocab_size, params["dim"])):
        shards = [{**turned[0], "tok_embeddings.weight": bad}] * num_shards
        with pytest.raises(InputError, match=r"tok_embeddings\.weight|output\.weight"):
            layout.read_shape({**params, "vocab_size": -1}, shards)


# Layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "tokenizer_at", "input_dir", "size", "name"),
    [
        ("7B", "", "", "7B", "llama-7b"),  # LLaMA 1: the tokenizer a level up
        ("llama-2-7b", "", "", "7B", "llama-7b"),  # LLaMA 2's download.sh
        ("llama-2-7b-chat", "", "", "llama-2-7b-chat", "llama-2-7b-chat"),
        ("llama-2-7b", "", "llama-2-7b", None, "llama-2-7b"),
        ("CodeLlama-7b", "CodeLlama-7b", "", "7b", "llama-7b"),
        ("Meta-Llama-3-8B", "Meta-Llama-3-8B", "Meta-Llama-3-8B", "8B", "llama-8b"),  # as transformers' script takes it
        ("Meta-Llama-3-8B/original", "Meta-Llama-3-8B/original", "Meta-Llama-3-8B", None, "meta-llama-3-8b"),
        ("Meta-Llama-3-8B/original", "Meta-Llama-3-8B/original", "", "8B", "llama-8b"),
        ("Llama-3-8B/original", "Llama-3-8B/original", "Llama-3-8B/original", None, "llama-3-8b"),
        ("checkpoints/Llama3.2-1B", "checkpoints/Llama3.2-1B", "", "1B", "llama-1b"),  # ~/.llama
        ("checkpoints/Llama3.2-1B", "checkpoints/Llama3.2-1B", "checkpoints", "Llama3.2-1B", "llama3.2-1b"),
        ("8B", "8B", "", None, "llama-8b"),  # the only one there is
    ],
)
def test_layouts_meta_ships(tmp_path, tokenizers, path, tokenizer_at, input_dir, size, name):
    family = FAMILIES["Code Llama"]
    tokenizer, vocab_size = tokenizers[False]
    base = tmp_path / "in"
    folder = write(base / path, family, [random_model(family, vocab_size)], tokenizer)
    if tokenizer_at != path:  # the checklist names it where it is not: the one above it must match
        shutil.move(folder / "tokenizer.model", base / tokenizer_at / "tokenizer.model")
    if folder.name == "original":  # a Hugging Face repository: its own weights lie above
        (folder.parent / "config.json").write_text("{}")
        (folder.parent / "model.safetensors").touch()
    flags = [] if size is None else ["--model_size", size]
    made = run(tmp_path, *flags, source=base / input_dir)
    assert made.name == name
    assert load_tokenizer(made).size == vocab_size


def test_several_that_fit_are_named(tmp_path, tokenizers):
    family = FAMILIES["Code Llama"]
    tokenizer, vocab_size = tokenizers[False]
    for name in ("llama-2-7b", "llama-2-7b-chat"):
        write(tmp_path / "in" / name, family, [random_model(family, vocab_size)], tokenizer)
    with pytest.raises(InputError, match=r"several checkpoints that fit: llama-2-7b, llama-2-7b-chat; name one"):
        run(tmp_path, "--model_size", "7B")
    with pytest.raises(InputError, match="several checkpoints that fit"):
        run(tmp_path)
    with pytest.raises(MissingInput, match=r"no folder .*70B; found in .*llama-2-7b"):
        run(tmp_path, "--model_size", "70B")
    assert run(tmp_path, "--model_size", "llama-2-7b").name == "llama-2-7b"


def test_nested_params_are_read(tmp_path, tokenizers):
    family = FAMILIES["Llama 3.1"]
    tokenizer, vocab_size = tokenizers[True]
    folder = write(tmp_path / "in", family, [random_model(family, vocab_size)], tokenizer)
    (folder / "checklist.chk").unlink()
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({"model": params, "tokenizer": "tiktoken"}))
    assert json.loads((run(tmp_path) / "config.json").read_text())["rope_parameters"]["factor"] == 8.0


@pytest.mark.parametrize(
    ("folder", "expected"), [("a/Llama-2-7B", "llama-2-7b"), ("x/original", "llama-x"), ("30B", "llama-30b")]
)
def test_output_names(folder, expected):
    assert output_name(Path(folder), None) == expected


# What is refused --------------------------------------------------------------------------------------------------


def change_params(folder: Path, **changes: object) -> None:
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**params, **changes}))
    (folder / "checklist.chk").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({}, ["--llama_version", "2"], r"--llama_version 2, but by params\.json .* tiktoken tokenizer this is 3\.1"),
        ({}, ["--llama_version", "3"], "--llama_version 3, but .*this is 3.1; leave the flag out"),
        ({"use_scaled_rope": False}, ["--llama_version", "3.1"], "--llama_version 3.1, but .*False.* this is 3;"),
        ({"use_scaled_rope": 8}, [], "expected true or false for 'use_scaled_rope', found 8"),
        ({}, ["--num_shards", "4"], r"--num_shards 4, but .* holds 1 consolidated"),
        ({"quantization_args": {"group_size": 32}}, [], "has quantization_args: a quantized checkpoint"),
        ({"vision_chunk_size": 448}, [], "a model that sees images"),
        ({"n_kv_heads": 3}, [], "n_heads a multiple of n_kv_heads|must be an even multiple"),
        ({"dim": 256}, [], r"'tok_embeddings\.weight' is \(656, 128\) in each of 1 shards; with dim 256"),
        ({"rope_scaling_factor": -1}, [], "expected a positive number for 'rope_scaling_factor', found -1"),
    ],
)
def test_contradictions(tmp_path, llama_3_1, changes, flags, message):
    change_params(llama_3_1[0], **changes)
    with pytest.raises(InputError, match=message):
        run(tmp_path, *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "changes", "factor"),
    [
        (["--llama_version", "3.2"], {}, 32.0),
        (["--llama_version", "3.1", "--num_shards", "1"], {}, 8.0),
        (["--llama_version", "Guard-3"], {"use_scaled_rope": False}, 8.0),
        ([], {"rope_scaling_factor": 16}, 16.0),
    ],
)
def test_what_files_leave_open_a_flag_decides(tmp_path, llama_3_1, flags, changes, factor):
    change_params(llama_3_1[0], **changes)
    assert json.loads((run(tmp_path, *flags) / "config.json").read_text())["rope_parameters"]["factor"] == factor


@pytest.mark.parametrize(("version", "context"), [("1", 2048), ("2", 4096), ("code", 16384), (None, 2048)])
def test_llama_1_and_2_differ_by_the_flag(tmp_path, tokenizers, version, context):
    family = FAMILIES["LLaMA 2 70B"]
    tokenizer, vocab_size = tokenizers[False]
    write(tmp_path / "in", family, [random_model(family, vocab_size)], tokenizer)
    config = json.loads((run(tmp_path, *(["--llama_version", version] if version else [])) / "config.json").read_text())
    assert config["max_position_embeddings"] == context
    assert (config["rope_parameters"], config["rope_scaling"]) == (
        {"rope_type": "default", "rope_theta": 10000.0},
        None,
    )


def test_a_size_that_is_another_models(tmp_path):
    params, *_ = PUBLISHED["7B"]
    shape, _ = layout.read_shape(params, [published_shapes(params, 1, 1, 32000, 11008)])
    with pytest.raises(
        InputError, match=r"llama-2-13b names the 13B model, but .* dim 4096 and n_layers 32, which is 7B"
    ):
        check_size("llama-2-13b", shape)
    for name in ("7B", "7Bf", "Llama3.1-8B", "mine", "alpaca-99b"):
        check_size(name, shape)


def test_a_missing_head_is_not_taken_for_a_tied_one(tmp_path, tokenizers):
    family = Family(params=LLAMA_3, head="missing")
    tokenizer, vocab_size = tokenizers[True]
    write(tmp_path / "in", family, [random_model(family, vocab_size)], tokenizer)
    with pytest.raises(InputError, match=r"shard 0 has no tensor 'output\.weight'"):
        run(tmp_path)


def test_a_head_in_some_shards_only(tmp_path, tokenizers):
    family = FAMILIES["Llama 3.1"]
    tokenizer, vocab_size = tokenizers[True]
    shards = split(family, random_model(family, vocab_size), 2)
    del shards[1]["output.weight"]
    write(tmp_path / "in", family, shards, tokenizer)
    with pytest.raises(InputError, match=r"shard 1 has no tensor 'output\.weight'"):
        run(tmp_path)


def test_copies_of_a_head_that_differ(tmp_path, tokenizers):
    family = FAMILIES["Llama 3.1"]
    tokenizer, vocab_size = tokenizers[True]
    shards = split(family, random_model(family, vocab_size), 8)
    shards[3]["layers.1.attention.wv.weight"][0, 0] += 1
    write(tmp_path / "in", family, shards, tokenizer)
    with pytest.raises(InputError, match=r"layers\.1\.attention\.wv\.weight': shards 2 and 3 should hold the same"):
        run(tmp_path)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_weights_that_are_no_plain_floats(tmp_path, llama_3_1):
    folder, tensors, _ = llama_3_1
    for dtype in (torch.float8_e4m3fn, torch.int8):
        changed = {**tensors, "layers.0.attention.wo.weight": tensors["layers.0.attention.wo.weight"].to(dtype)}
        torch.save(changed, folder / "consolidated.00.pth")
        with pytest.raises(InputError, match=r"wo\.weight' is (float8_e4m3fn|int8); expected one of float32"):
            run(tmp_path, "--skip_checksums")


def test_shards_of_different_types(tmp_path, tokenizers):
    family = FAMILIES["Llama 3"]
    tokenizer, vocab_size = tokenizers[True]
    shards = split(family, random_model(family, vocab_size), 2)
    shards[1] = {name: tensor.half() for name, tensor in shards[1].items()}
    write(tmp_path / "in", family, shards, tokenizer)
    with pytest.raises(InputError, match=r"is bfloat16 and float16; expected one of"):
        run(tmp_path)


def test_tokenizers_of_the_other_kind(tmp_path, tokenizers, llama_3_1):
    folder, *_ = llama_3_1
    shutil.copy(tokenizers[False][0], folder / "tokenizer.model")
    with pytest.raises(InputError, match=r"has 400 tokens, the checkpoint's embedding 656 rows"):
        run(tmp_path, "--skip_checksums")
    (folder / "tokenizer.model").write_bytes(b"<html>not found</html>")
    with pytest.raises(InputError, match=r"not a SentencePiece model .* and not a tiktoken file"):
        run(tmp_path, "--skip_checksums")
    lines = tokenizers[True][0].read_bytes().splitlines(keepends=True)
    (folder / "tokenizer.model").write_bytes(b"".join(lines[:100]))
    with pytest.raises(InputError, match=r"\(100 tokens\) has no token for the byte"):
        run(tmp_path, "--skip_checksums")


def test_another_models_tiktoken_file_is_not_replaced_silently(tmp_path, llama_3_1):
    (tmp_path / "out" / "tokenizer").mkdir(parents=True)
    write_tiktoken(tmp_path / "out" / "tokenizer" / "tokenizer.tiktoken", num_ranks=300)
    with pytest.raises(OutputExists, match="another model's"):
        run(tmp_path)
