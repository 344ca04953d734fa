"""Files and folders outlive a power cut: the data is on the disk before the rename, the rename before the end."""

from pathlib import Path

import pytest
import torch

from alpaca.data.generation.journal import JOURNAL, Journal
from alpaca.data.generation.services import Completion
from alpaca.files.atomic import replaced_folder, write_text
from alpaca.formats.hf.folder import TensorSpec
from alpaca.formats.hf.writing import write_weights
from alpaca.training.checkpoints.final import _move_into
from tests.disk_events import Event, until_rename_to, watch_disk

FILLED = {".out.partial", ".out.partial/a", ".out.partial/sub", ".out.partial/sub/b"}


@pytest.fixture
def events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    return watch_disk(tmp_path, monkeypatch)


def fill(folder: Path) -> None:
    (folder / "sub").mkdir()
    for name in ("a", "sub/b"):
        (folder / name).write_text("1")


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, events):
    write_text(tmp_path / "f", "content")
    assert [(kind, name.partition(".")[0]) for kind, name in events] == [("fsync", ""), ("rename", "f")]


def test_everything_in_a_folder_is_on_the_disk_before_it_takes_its_name(tmp_path, events):
    with replaced_folder(tmp_path / "out") as folder:
        fill(folder)
    assert set(until_rename_to(events, "out")) == FILLED
    assert events[-2:] == [("rename", "out"), ("fsync", ".")]
    assert len(events) == len(FILLED) + 2


def test_the_old_folder_makes_room_only_when_the_new_one_is_on_the_disk(tmp_path, events):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("0")
    with replaced_folder(tmp_path / "out", overwrite=True) as folder:
        fill(folder)
    assert set(until_rename_to(events, ".out.replaced")) == FILLED
    assert events[-3:] == [("rename", ".out.replaced"), ("rename", "out"), ("fsync", ".")]


def test_each_weights_file_is_on_the_disk(tmp_path, events):
    specs = [TensorSpec(name=name, shape=(4,), dtype=torch.float32) for name in ("a", "b")]
    write_weights(tmp_path, specs, lambda spec: [torch.ones(4)], max_shard_size=16)
    names = [name for kind, name in events if kind == "fsync"]
    assert names[:2] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_a_final_model_is_on_the_disk_file_by_file_its_config_last(tmp_path, events):
    aside = tmp_path / "aside"
    aside.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (aside / name).write_text("1")
    _move_into(tmp_path, aside)
    order = ["model.safetensors", "tokenizer.json", "config.json"]
    expected = [event for name in order for event in (("fsync", f"aside/{name}"), ("rename", name))]
    found = [*sorted(events[:4], key=lambda event: order.index(Path(event[1]).name)), *events[4:]]
    assert found == [*expected, ("fsync", ".")]


def test_a_journal_and_each_of_its_lines_are_on_the_disk(tmp_path, events):
    answer = Completion(text="1", finish_reason="stop", prompt_tokens=1, output_tokens=1, model="m")
    with Journal(tmp_path) as journal:
        assert events[-2:] == [("rename", JOURNAL), ("fsync", ".")]
        for number in range(2):
            del events[:]
            journal.add_completion(number, answer, first_number=1, is_chat=False, endpoint="", date="")
            assert events == [("fsync", JOURNAL)]
