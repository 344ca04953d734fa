"""The page's trainings against the real training server: watched, canceled, refused, and their weights; the curve."""

import asyncio
import contextlib
import inspect
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import train as train_module
from alpaca.errors import InputError
from deploy import schema
from deploy.local_server import LocalServer, running_server
from web import trainings
from web.client import Server, ServerTrouble
from web.curve import describe, draw_curve
from web.knobs import read_knobs
from web.trainings import Progress, Training, as_data_url, read_data_url, serves_trainings

RECORDS = [{"instruction": f"Say {word}.", "output": f"{word}!"} for word in ("red", "green", "blue", "alpaca")]


@pytest.fixture(scope="module")
def running(tmp_path_factory, llama_folder) -> Iterator[LocalServer]:
    env = {"ALPACA_BASE_MODELS": f"tiny={llama_folder}", "TMPDIR": str(tmp_path_factory.mktemp("scratch"))}
    env = {**os.environ, **env, "OMP_NUM_THREADS": "1"}
    with running_server(["--train"], env=env, on_failure=print) as server:
        yield server


@pytest.fixture
def server(running) -> Server:
    return Server(running.url)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(RECORDS))
    return path


def inputs(data: Path, **changes: object) -> dict[str, object]:
    return {"data": as_data_url(data), "model": "tiny", "global_batch_size": 4, **changes}


async def follow(training: Training) -> list[Progress]:
    return [now async for now in training.progress()]


async def run_to_end(server: Server, values: dict[str, object]) -> Progress:
    """A training's end. The runtime frees its slot just after a reply, and a canceled one takes a moment to go."""
    for _ in range(100):
        end = (await follow(Training(server, values)))[-1]
        if "running already" not in end.error and "409" not in end.error:
            break
        await asyncio.sleep(0.1)
    return end


def test_the_inputs_are_train_pys_own():
    knobs = read_knobs(schema.build_schema(), of="TrainingInput")
    assert [knob.name for knob in knobs] == list(inspect.signature(train_module.train).parameters)
    by_name = {knob.name: knob for knob in knobs}
    assert by_name["objective"].choices == ("sft", "dpo", "orpo", "kto")
    assert [knob.name for knob in knobs if knob.required] == [trainings.DATA]


@pytest.mark.slow
def test_the_server_is_asked_whether_it_trains(server):
    assert asyncio.run(serves_trainings(server))
    with pytest.raises(ServerTrouble, match=r"No server answers at http://127\.0\.0\.1:1"):
        asyncio.run(serves_trainings(Server("http://127.0.0.1:1")))


@pytest.mark.slow
def test_a_training_is_watched_and_its_weights_come(server, data, monkeypatch):
    monkeypatch.setattr(trainings, "_LOOK_S", 0.05)
    seen = asyncio.run(follow(Training(server, inputs(data, max_steps=40))))
    end = seen[-1]
    assert end.status == "succeeded", end
    assert [now.is_over for now in seen[:-1]] == [False] * (len(seen) - 1)
    assert seen[0].status == "starting"
    assert any(now.status == "processing" and now.losses for now in seen), "its losses are seen while it trains"
    assert {1, 40} <= end.losses.keys() <= set(range(1, 41))
    assert end.losses[40] == pytest.approx(end.metrics["loss"], abs=1e-4)
    assert re.fullmatch(r"lora-[\w-]+\.tar", end.name)
    with tarfile.open(fileobj=io.BytesIO(read_data_url(end.output))) as tar:
        assert "adapter_model.safetensors" in tar.getnames()


@pytest.mark.slow
def test_two_see_only_their_own(server, data, monkeypatch):
    """One training runs at a time: the second is told so, and learns nothing of the first."""
    monkeypatch.setattr(trainings, "_LOOK_S", 0.05)

    async def both() -> tuple[list[Progress], Progress, Progress]:
        first = Training(server, inputs(data, max_steps=100_000))
        seen: list[Progress] = []
        watching = first.progress()
        async for now in watching:
            seen.append(now)
            if len(now.losses) > 1:
                break
        other = await follow(Training(server, inputs(data, max_steps=2)))
        await first.stop()
        async for now in watching:
            seen.append(now)
        return seen, other[-1], await run_to_end(server, inputs(data, max_steps=2))

    seen, other, after = asyncio.run(both())
    assert seen[-1].status == "canceled"
    assert other.status == "failed"
    assert "running already" in other.error or "409" in other.error
    assert (other.losses, other.output) == ({}, "")
    assert after.status == "succeeded", "a canceled training makes room"


@pytest.mark.slow
def test_leaving_cancels(server, data, monkeypatch):
    monkeypatch.setattr(trainings, "_LOOK_S", 0.05)

    async def leave() -> Progress:
        async with contextlib.aclosing(Training(server, inputs(data, max_steps=100_000)).progress()) as watching:
            async for now in watching:
                if now.losses:
                    break
        return await run_to_end(server, inputs(data, max_steps=2))

    assert asyncio.run(leave()).status == "succeeded"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"recipe": "other"}, r'recipe: "other" is not one of'),
        ({"model": "nobody"}, r"found 'nobody'"),
        ({"data": "data:application/json;base64,W10="}, r"holds no examples"),
        ({"objective": "dpo"}, r"--objective dpo needs chosen and rejected answers"),
    ],
)
@pytest.mark.slow
def test_what_is_refused_is_said(server, data, changes, expected):
    end = asyncio.run(run_to_end(server, {**inputs(data), **changes}))
    assert end.status == "failed"
    assert re.search(expected, end.error), end.error
    assert 'class="complaint"' in describe(end, 1.0)


def test_a_server_that_is_gone_is_said(data):
    end = asyncio.run(follow(Training(Server("http://127.0.0.1:1"), inputs(data))))[-1]
    assert end.status == "failed"
    assert "No server answers at http://127.0.0.1:1" in end.error


def test_data_there_and_back(data, monkeypatch):
    assert read_data_url(as_data_url(data)) == data.read_bytes()
    assert as_data_url(data).startswith("data:application/json;base64,")
    assert read_data_url("https://host/a.tar") is None
    monkeypatch.setattr(trainings, "MOST_DATA_BYTES", 3 << 20)
    data.write_bytes(bytes((3 << 20) + 1))
    with pytest.raises(InputError, match="the data file has 3 MiB; the server takes 3"):
        as_data_url(data)


# The curve ------------------------------------------------------------------------------------------------------


def points(svg: str) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in re.search(r'polyline points="([^"]*)"', svg)[1].split()]


def test_a_curve_goes_through_its_losses():
    places = points(draw_curve({1: 4.0, 5: float("nan"), 10: 2.0, 20: 3.0}, 40))
    assert len(places) == 3
    (x1, y1), (x2, y2), (x3, y3) = places
    assert (x3 - x1) / (x2 - x1) == pytest.approx(19 / 9, abs=0.02)
    assert (y2 - y1) / (y2 - y3) == pytest.approx(2, abs=0.02), "down is less"


@pytest.mark.parametrize("losses", [{}, {1: 2.0}, {1: float("nan"), 2: float("inf")}])
def test_without_two_losses_there_is_no_curve(losses):
    assert draw_curve(losses, 10) == ""


def test_a_long_curve_is_thinned_and_a_flat_one_drawn():
    assert len(points(draw_curve({step: 1.0 / step for step in range(1, 10_001)}, 10_000))) <= 500
    assert len(points(draw_curve({1: 2.0, 2: 2.0}, 2))) == 2


def test_what_the_page_says():
    metrics = {"step": 3, "max_steps": 9, "loss": 1.5, "eta_s": 12.2}
    assert "step 3 of 9 · loss 1.5000 · about 12 s to go" in describe(Progress(status="processing", metrics=metrics), 5)
    assert "reads the data" in describe(Progress(), 5)
    done = Progress(status="succeeded", metrics=metrics, output="https://host/<b>.tar")
    assert "The weights are at https://host/&lt;b&gt;.tar" in describe(done, 5)
    assert "Canceled after 5 s" in describe(Progress(status="canceled"), 5)
