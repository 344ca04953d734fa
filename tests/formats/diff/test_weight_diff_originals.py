"""Weight differences and the original's: its folder and its arithmetic, its published diff and the sum it checks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from alpaca.errors import InputError
from alpaca.formats.diff import published_sum
from alpaca.formats.diff.making import DiffConfig, make_diff
from alpaca.formats.diff.recovering import RecoverConfig, recover
from alpaca.formats.hf.pickled import PickledWeights
from alpaca.text.loading import load_tokenizer
from tests.formats.diff_sources import (
    TABLE,
    add_pad_rows,
    frequencies,
    load,
    original_difference,
    original_recovery,
    read_all,
    recovered,
    same_bits,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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
