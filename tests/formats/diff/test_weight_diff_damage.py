"""Weight differences: a wrong base and damaged files are found, named, and nothing is written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alpaca.errors import InputError, MissingInput
from alpaca.formats.diff.making import DiffConfig, make_diff
from alpaca.formats.diff.manifest import MANIFEST_NAME
from alpaca.formats.diff.residual import RESIDUAL_NAME
from alpaca.formats.hf.folder import INDEX_NAME
from alpaca.formats.hf.pickled import PickledWeights
from tests.formats.diff_sources import (
    bits,
    both_commands,
    flip,
    read_all,
    recovered,
    rewrite,
    same_bits,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_a_config_without_the_vocabularys_size_is_named(tmp_path, llama_folder, trained):
    tuned = Path(shutil.copytree(trained, tmp_path / "tuned"))
    (tuned / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"tuned/config\.json lacks vocab_size, .* 400 and 401 rows of .*; get that"):
        make_diff(DiffConfig(path_raw=llama_folder, path_tuned=tuned, path_diff=tmp_path / "diff"))


def test_what_is_no_float_is_refused(tmp_path, llama_folder, trained):
    for dtype, message in ((torch.int8, "is int8"), (torch.float8_e4m3fn, "is float8_e4m3fn")):
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


DAMAGES = {
    "truncated": (InputError, "damaged or not a safetensors file"),
    "empty": (InputError, "damaged or not a safetensors file"),
    "missing": (MissingInput, r"no model\*\.safetensors or pytorch_model\*\.bin in"),
    "shard": (MissingInput, r"names files that are not there: model-00001-of-00002\.safetensors"),
    "wrong shard": (InputError, "lacks 'model.norm.weight', which its index says it holds"),
    "bad index": (InputError, "expected a weight_map"),
    "pointer": (InputError, r"is a Git LFS pointer, not the file: run `git lfs pull`"),
    "adapter": (InputError, r"is a LoRA adapter, no whole model: merge it first by convert\.export_hf_checkpoint"),
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
        file.unlink()
        index.write_text(json.dumps({"weight_map": names}))
        if kind == "wrong shard":
            save_file({"x": torch.ones(1)}, folder / "model-00001-of-00002.safetensors")
            index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}))
    elif kind == "bad index":
        file.unlink()
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
    with pytest.raises(MissingInput, match=r"names files that are not there: pytorch_model-00002-of-00002\.bin"):
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
