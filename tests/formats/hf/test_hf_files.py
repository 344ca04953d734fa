"""Weight folders: what is written is what safetensors reads, and damage is named."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alpaca.errors import InputError, MissingInput, NotEnoughSpace, OutputExists
from alpaca.files.atomic import replaced_folder, write_text
from alpaca.files.outputs import check_overwrite, require_apart, require_free_space
from alpaca.files.reading import list_folder, read_json
from alpaca.formats.hf.folder import TensorSpec, WeightsFolder, fingerprint
from alpaca.formats.hf.writing import group_by_size, write_weights

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
    (tmp_path / "model.safetensors").unlink()
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


# Fingerprints -----------------------------------------------------------------------------------------------------


def write_model(folder: Path, tensors: dict[str, torch.Tensor], *, max_shard_size: int = 10**9) -> Path:
    folder.mkdir()
    specs = [TensorSpec(name=name, shape=tuple(t.shape), dtype=t.dtype) for name, t in tensors.items()]
    write_weights(folder, specs, lambda spec: [tensors[spec.name]], max_shard_size=max_shard_size)
    return folder


def test_a_fingerprint_is_of_the_tensors_however_they_are_stored(tmp_path):
    expected = hashlib.sha256()
    for name in sorted(TENSORS):  # the whole of small ones, twice, for both ends are all of it
        tensor = TENSORS[name].contiguous()
        kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}[tensor.dtype]
        expected.update(json.dumps([name, list(tensor.shape), kind]).encode())
        expected.update(tensor.view(-1).view(torch.uint8).numpy().tobytes() * 2)
    one = fingerprint(write_model(tmp_path / "one", TENSORS))
    assert one == expected.hexdigest()
    turned = dict(reversed(TENSORS.items()))
    assert fingerprint(write_model(tmp_path / "many", turned, max_shard_size=60)) == one
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "one" / "model.safetensors")
    assert fingerprint(tmp_path / "one") == one


@pytest.mark.parametrize("change", ["name", "shape", "dtype", "first", "last", "middle"])
def test_a_fingerprint_tells_models_apart(tmp_path, change: str):
    tensor = torch.arange(3000, dtype=torch.float32).view(2, 1500)
    other = tensor.clone()
    if change in ("first", "last", "middle"):
        other.view(-1)[{"first": 0, "last": -1, "middle": 1500}[change]] += 1
    changed = {"shape": other.view(1500, 2), "dtype": other.view(torch.int32)}.get(change, other)
    folders = [
        write_model(tmp_path / "a", {"w": tensor}),
        write_model(tmp_path / "b", {"v" if change == "name" else "w": changed}),
    ]
    assert (fingerprint(folders[0]) == fingerprint(folders[1])) == (change == "middle")  # only the ends are read


# Outputs and inputs -----------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "all" / "model" / "deeper").mkdir(parents=True)
    for name in ("model.safetensors", "model.gguf", "deeper/notes.txt"):
        (tmp_path / "all" / "model" / name).write_text("kept")
    return tmp_path / "all" / "model"


def test_outputs_that_hold_an_input_are_refused(tmp_path: Path, model: Path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "all")
    (tmp_path / "blobs").mkdir()
    (model / "linked.json").symlink_to(tmp_path / "blobs" / "0")
    (tmp_path / "blobs" / "into").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    for output in (
        model, tmp_path, tmp_path / "all", tmp_path / "link" / "model", tmp_path / "link", Path("all"),
        Path("all/model/../../all"), tmp_path / "blobs", model / "model.safetensors", model / "deeper" / "notes.txt",
    ):  # fmt: skip
        for source in (model, Path("link/model")):
            with pytest.raises(InputError, match=r"is, or holds, what is read from: --input_dir \(.*choose another"):
                require_apart(output, {"--adapter": None, "--input_dir": source})
    with pytest.raises(InputError, match=r"what is read from: the tokenizer \(.*notes\.txt"):
        require_apart(model / "deeper", {"the tokenizer": model / "deeper" / "notes.txt"})
    with pytest.raises(InputError, match=r"what is read from: --input_dir \(.*into"):  # the name would be lost
        require_apart(tmp_path / "blobs", {"--input_dir": tmp_path / "blobs" / "into"})


def test_outputs_beside_or_new_within_an_input_are_let_be(tmp_path: Path, model: Path):
    for output in (tmp_path / "out", model.with_name("model-2"), model / "new", model / "deeper", model / "model.gguf"):
        require_apart(output, {"--input_dir": model})


def test_a_file_is_no_folder_to_replace(tmp_path: Path):
    (tmp_path / "out").write_text("kept")
    for _ in range(2):
        refused = pytest.raises(InputError, match=r"the output .*out is a file, expected a folder's name")
        with refused, replaced_folder(tmp_path / "out", overwrite=True):
            pass
    refused = pytest.raises(InputError, match=r"the output .*out/deep/er would lie in .*out, which is a file")
    with refused, replaced_folder(tmp_path / "out" / "deep" / "er"):
        pass
    with pytest.raises(InputError, match=r"is a folder, expected a file's name"):
        check_overwrite(tmp_path, True, is_folder=False)
    assert list_folder(tmp_path) == "out"
    assert (tmp_path / "out").read_text() == "kept"


def test_a_link_to_a_folder_is_replaced_as_often_as_asked(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for number in range(3):
        with replaced_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / "x").write_text(str(number))
        assert (tmp_path / "out" / "x").read_text() == str(number)
        assert list_folder(tmp_path) == "disk, out"
