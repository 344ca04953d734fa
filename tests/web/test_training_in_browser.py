"""The training tab in headless Chromium, in front of the real training server: what a person at it sees."""

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.local_server import LocalServer, running_server
from tests.web.test_page_in_browser import PageProcess, Person, browser, pytestmark  # noqa: F401
from tests.web.test_trainings import RECORDS

IS_DONE = "!document.querySelector('#training-start').disabled"


@pytest.fixture(scope="module")
def training_server(tmp_path_factory, llama_folder) -> Iterator[LocalServer]:
    env = {"ALPACA_BASE_MODELS": f"tiny={llama_folder}", "TMPDIR": str(tmp_path_factory.mktemp("scratch"))}
    with running_server(["--train"], env={**os.environ, **env, "OMP_NUM_THREADS": "1"}, on_failure=print) as server:
        yield server


@pytest.fixture(scope="module")
def trainer_page(training_server) -> Iterator[PageProcess]:
    process = PageProcess(training_server.url)
    yield process
    process.stop()


class Trainer(Person):
    """Somebody at the tab."""

    def begin(self, data: Path, max_steps: int) -> None:
        self.page.set_input_files("#training-data input[type=file]", str(data))
        self.wait_for_text("#training-data", data.name[:4])
        self.page.fill("#knob-model textarea, #knob-model input", "tiny")
        self.set_number("global_batch_size", 4)
        self.set_number("max_steps", max_steps)
        self.page.click("#training-start")

    def training_line(self) -> str:
        return self.page.inner_text("#training-line")


@pytest.fixture
def trainers(browser, trainer_page) -> Iterator[list[Trainer]]:  # noqa: F811
    people = [Trainer(browser, trainer_page.url) for _ in range(2)]
    for person in people:
        person.page.wait_for_selector("#training-start")
    yield people
    for person in people:
        person.context.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(RECORDS))
    return path


def test_a_person_trains_and_takes_the_weights(trainers, data, tmp_path: Path):
    """A file, a curve that is drawn while it trains, and an archive; the other person's page shows nothing of it."""
    person, other = trainers
    assert person.page.locator("#start").count() == 0, "a training server has no predictions"
    assert person.page.locator("#knob-objective").count() == 1
    person.begin(data, 60)
    person.wait_for("document.querySelectorAll('#training-curve polyline').length == 1")
    assert not person.page.evaluate(IS_DONE), "the curve is there before the end"
    person.picture("training")
    person.wait_for(IS_DONE)
    assert person.training_line().startswith("Done · step 60 of 60 · loss ")
    with person.page.expect_download() as download:
        person.page.click("#training-weights")
    path: Any = tmp_path / "weights.tar"
    download.value.save_as(path)
    assert download.value.suggested_filename.startswith("lora-")
    with tarfile.open(path) as tar:
        assert "adapter_model.safetensors" in tar.getnames()
    person.picture("trained", whole=True)
    assert other.page.locator("#training-curve svg").count() == 0
    assert other.page.locator("#training-weights:visible").count() == 0
    origin = person.page.url.rstrip("/")
    assert [url for url in person.asked if not url.startswith((origin, "data:", "blob:"))] == []


def test_one_trains_at_a_time_and_each_cancels_their_own(trainers, data):
    first, second = trainers
    first.begin(data, 100_000)
    first.wait_for("document.querySelectorAll('#training-curve polyline').length == 1")
    second.begin(data, 2)
    second.page.wait_for_selector("#training-line .complaint")
    assert second.page.locator("#training-curve svg").count() == 0
    assert not first.page.evaluate(IS_DONE), "the second's attempt leaves the first alone"
    first.page.click("#training-cancel")
    first.wait_for(IS_DONE)
    assert first.training_line().startswith("Canceled after ")


def test_without_a_file_nothing_is_sent(trainers):
    trainers[0].page.click("#training-start")
    trainers[0].page.wait_for_selector("#training-line .complaint")
    assert trainers[0].training_line() == "Choose a data file first."
