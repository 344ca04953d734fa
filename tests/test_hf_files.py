"""Weight folders: what is written is what safetensors reads, and damage is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from alpaca.errors import InputError, MissingInput, NotEnoughSpace, OutputExists
from alpaca.hf_files import (
    TensorSpec,
    WeightsFolder,
    group_by_size,
    list_folder,
    read_json,
    replaced_folder,
    require_free_space,
    write_text,
    write_weights,
)

TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.randn(7).half(),
    "c": torch.randn(2, 3, 4).bfloat16().transpose(0, 2),  # not contiguous
    "d": torch.arange(6),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(3.5),
}
SPECS = [TensorSpec(name=name, shape=tuple(t.shape), dtype=t.dtype) for name, t in TENSORS.items()]


@pytest.mark.parametrize("max_shard_size", [10**9, 60, 1])
def test_what_is_written_is_what_safetensors_reads(tmp_path, max_shard_size):
    written: list[int] = []
    write_weights(
        tmp_path, SPECS, lambda spec: [TENSORS[spec.name]], max_shard_size=max_shard_size, progress=written.append
    )
    assert sum(written) == sum(spec.num_bytes for spec in SPECS)
    loaded = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert loaded.keys() == TENSORS.keys()
    ours = WeightsFolder(tmp_path)
    assert {spec.name: spec for spec in ours.specs()} == {spec.name: spec for spec in SPECS}
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded[name], tensor)
        assert torch.equal(ours.tensor(name), tensor)


def test_files_of_safetensors_own_writer_are_read(tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    assert torch.equal(WeightsFolder(tmp_path).tensor("x"), torch.ones(2))
    with pytest.raises(MissingInput, match="holds no tensor 'y'"):
        WeightsFolder(tmp_path).tensor("y")


def test_groups_keep_order_and_size():
    specs = [TensorSpec(name=str(i), shape=(n,), dtype=torch.uint8) for i, n in enumerate([4, 4, 4, 20, 1, 9])]
    assert [[spec.num_bytes for spec in group] for group in group_by_size(specs, 9)] == [[4, 4], [4], [20], [1], [9]]


def test_damage_is_named(tmp_path):
    with pytest.raises(MissingInput, match=r"no model\.safetensors or .*; found: nothing"):
        WeightsFolder(tmp_path)
    save_file({"x": torch.ones(200)}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    for broken in (content[:-1], content[:4], b"", b"\xff" * 100):
        (tmp_path / "model.safetensors").write_bytes(broken)
        with pytest.raises(InputError, match=r"model\.safetensors is damaged or not a safetensors file"):
            WeightsFolder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    with pytest.raises(MissingInput, match=r"names files that are not there: gone\.safetensors"):
        WeightsFolder(tmp_path)


def test_json_errors_name_the_file(tmp_path):
    with pytest.raises(MissingInput, match=r"config\.json is missing; found there: nothing"):
        read_json(tmp_path / "config.json")
    for text in ("{", "\udc80"):
        (tmp_path / "config.json").write_text(text, errors="surrogateescape")
        with pytest.raises(InputError, match=r"config\.json is not valid JSON"):
            read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="expected a JSON object, found list"):
        read_json(tmp_path / "config.json")


def test_write_text_replaces_whole_files_only(tmp_path, monkeypatch):
    write_text(tmp_path / "f", "old")

    def fail(descriptor):
        raise OSError(5, "I/O error")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="I/O error"):
        write_text(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old"


def test_writers_of_the_same_file_do_not_disturb_each_other(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: write_text(tmp_path / "f", f"{i:03d}" * 1000), range(200)))
    text = (tmp_path / "f").read_text()
    assert text == text[:3] * 1000
    assert list_folder(tmp_path) == "f"


def test_a_failed_block_leaves_the_old_folder(tmp_path):
    with replaced_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")

    def fail() -> None:
        with replaced_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / "x").write_text("2")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert (tmp_path / "out" / "x").read_text() == "1"
    assert list_folder(tmp_path) == "out"
    with pytest.raises(OutputExists, match="exists already"), replaced_folder(tmp_path / "out"):
        pass


def test_an_empty_folder_is_no_output(tmp_path):
    (tmp_path / "out").mkdir()
    with replaced_folder(tmp_path / "out") as folder:
        (folder / "x").touch()
    assert list_folder(tmp_path / "out") == "x"


def test_free_space_is_that_of_the_disk_which_will_hold_it(tmp_path):
    require_free_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(NotEnoughSpace, match="free some space or choose another folder"):
        require_free_space(tmp_path / "not" / "yet", 10**18)
