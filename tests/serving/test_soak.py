"""Ten thousand requests leave nothing behind: no memory, no block, no thread, no folder."""

import contextlib
import gc
import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from alpaca.errors import InputError, PromptTooLong
from alpaca.serving.engine import FinishedEvent, GenerationCancelledError, TokenEvent
from alpaca.serving.llama.engine import LlamaEngine
from alpaca.serving.request import Request
from deploy.local_server import LocalServer, running_server
from tests.serving.llama.test_llama import load, save_model
from tests.serving.llama.test_llama_engine import CONTEXT, MODES, make_engine, request

pytestmark = [pytest.mark.slow, pytest.mark.alone]

CLIENTS = 16
RUNTIME_FOLDERS = Path("/tmp/coglet/predictions")
MB = 2**20


def resident(process: psutil.Process) -> float:
    """MB of memory a process holds."""
    return process.memory_info().rss / MB


def run_clients(pool: ThreadPoolExecutor, count: int, ask: Callable[[random.Random], object], *, seed: str) -> None:
    """`ask` `count` times from all clients at once, each with its own random numbers."""
    number = itertools.count()

    def client(index: int) -> None:
        chance = random.Random(f"{seed}:{index}")
        while next(number) < count:
            ask(chance)

    for done in [pool.submit(client, index) for index in range(CLIENTS)]:
        done.result()


# The engine ---------------------------------------------------------------------------------------------------------


def random_request(chance: random.Random) -> Request:
    """Of any kind; one in three begins like others, so that the cache is used and churned."""
    prefix = tuple(range(3, 3 + chance.choice([0, 0, 9, 22])))
    prompt = prefix + tuple(chance.randrange(3, 120) for _ in range(chance.randint(1, 30)))
    n, length = chance.choice([1, 1, 1, 2, 5]), chance.randint(1, 12)
    options = chance.choice(
        [
            {"temperature": 0.0},
            {"temperature": 1.0, "top_p": 0.9},
            {"temperature": 0.8, "top_k": 20, "min_p": 0.01},
            {"temperature": 1.0, "repetition_penalty": 1.2, "presence_penalty": 0.5},
            {"temperature": 1.0, "min_new_tokens": length},
        ]
    )
    return request(
        prompt_ids=prompt, n=n, max_new_tokens=length, seed=chance.randrange(10**6), reads_along=chance.random() < 0.5,
        **options,
    )  # fmt: skip


def ask_engine(engine: LlamaEngine, chance: random.Random) -> None:
    """One request: most are read to their end, some are cancelled, stopped or refused."""
    kind = chance.random()
    if kind < 0.02:
        with pytest.raises(PromptTooLong, match="this server has room for"):
            engine.submit(request(max_new_tokens=CONTEXT))
    elif kind < 0.04:
        with pytest.raises(InputError, match="outside of the model's"):
            engine.submit(request(prompt_ids=(1, 10**6)))
    else:
        asked = random_request(chance)
        generation = engine.submit(asked)
        if kind < 0.14:
            if chance.random() < 0.5:
                next(generation.batches())
            generation.cancel()
            with pytest.raises(GenerationCancelledError):  # noqa: PT012  it may come with any of them
                for _ in generation.batches():
                    pass
                raise GenerationCancelledError  # its end was there before the cancellation was
            return
        counts, ends = [0] * asked.n, 0
        for event in generation.events():
            if isinstance(event, TokenEvent):
                counts[event.completion] += 1
                if kind < 0.19:
                    generation.stop(event.completion)
            ends += isinstance(event, FinishedEvent)
        assert ends == asked.n
        assert max(counts) <= asked.max_new_tokens
        if kind >= 0.19:
            assert min(counts) >= asked.min_new_tokens


@pytest.mark.parametrize("mode", MODES)
def test_ten_thousand_requests_leave_no_memory_pages_or_threads(tmp_path, mode):
    save_model(tmp_path, torch.float32, num_key_value_heads=2)
    process = psutil.Process()
    with ThreadPoolExecutor(CLIENTS) as pool:
        all_there = threading.Barrier(CLIENTS)
        for done in [pool.submit(all_there.wait) for _ in range(CLIENTS)]:
            done.result()
        before = set(threading.enumerate())
        engine = make_engine(load(tmp_path, torch.float32), num_blocks=60, mode=mode, max_running=16)
        found = []
        for count in (2_000, 4_000, 4_000):
            run_clients(pool, count, lambda chance: ask_engine(engine, chance), seed=f"{mode}:{len(found)}")
            while not is_idle(engine):
                time.sleep(0.01)
            gc.collect()
            found.append((resident(process), len(gc.get_objects())))
        (after_2000, objects_early), (after_6000, _), (after_10000, objects_late) = found
        assert objects_late - objects_early < 500
        assert after_10000 - after_2000 < 12  # 4 to 6 as measured: the allocators' arenas and oneDNN's kernels,
        assert after_10000 - after_6000 < 4  # which come to an end
        assert engine._scheduler.num_preemptions > 0, "the cache was full now and then"
        assert engine._scheduler.pool.num_used == 0
        assert sorted(engine._scheduler._free_state_rows) == list(range(1, 17))
        assert engine.is_healthy()
        engine.close()
        assert set(threading.enumerate()) == before


def is_idle(engine: LlamaEngine) -> bool:
    return not engine._sequences and engine._in_flight is None and engine._arrivals.empty()


# The server ---------------------------------------------------------------------------------------------------------


def random_input(chance: random.Random) -> dict:
    words = " ".join(
        chance.choice(["alpaca", "llama", "Lima", "wool", "red", "7"]) for _ in range(chance.randint(1, 9))
    )
    length = chance.randint(1, 12)
    asked = {
        "prompt": words, "prompt_template": "{prompt}", "max_new_tokens": length, "min_new_tokens": length // 2,
        "seed": chance.randrange(10**6), "temperature": chance.choice([0, 0.8]),
    }  # fmt: skip
    return asked | chance.choice([{}, {"stream": True}, {"n": 3}, {"stop": ["e", "a"]}])


def ask_server(server: LocalServer, client: httpx.Client, ids: list[str], chance: random.Random) -> None:
    """One prediction, some of them streamed and some of these left before their end."""
    if chance.random() < 0.8:
        prediction = server.predict(random_input(chance))
        assert prediction["status"] == "succeeded", prediction
        ids.append(prediction["id"])
        return
    asked = {**random_input(chance), "n": 1, "stream": True, "max_new_tokens": 60, "min_new_tokens": 60}
    leaves = chance.random() < 0.5
    with client.stream(
        "POST", f"{server.url}/predictions", json={"input": asked}, headers={"Accept": "text/event-stream"}
    ) as reply:
        for line in reply.iter_lines():
            if leaves and line.startswith("event: output"):
                return


@contextlib.contextmanager
def serve(folder: Path, *flags: str) -> Iterator[LocalServer]:
    # A cache so small that all of its blocks are in memory after the first few hundred requests.
    small = ["--weights", str(folder), "--concurrency", str(CLIENTS), "--max_context", "128", *flags]
    with running_server(small, on_failure=lambda logs: print(logs[-2000:])) as server:
        yield server


def ask_many(server: LocalServer, count: int) -> list[str]:
    """`count` predictions by all clients at once; the ids of those that told theirs."""
    ids: list[str] = []
    with httpx.Client(timeout=60) as client, ThreadPoolExecutor(CLIENTS) as pool:
        run_clients(pool, count, lambda chance: ask_server(server, client, ids, chance), seed=f"http:{count}")
    time.sleep(0.5)
    return ids


@pytest.mark.parametrize(("dtype", "most_mb"), [("float16", 6), ("float32", 30)])
def test_a_thousand_requests_leave_the_servers_memory_flat(llama_folder, dtype, most_mb):
    """float16 is multiplied without oneDNN on a CPU: what is measured is the engine and the runtime alone.

    oneDNN makes a kernel for every number of rows it meets and keeps 16; what their coming and going leaves in the
    allocator levels off slowly.
    """
    with serve(llama_folder, "--dtype", dtype) as server:
        (worker,) = psutil.Process(server.process.pid).children()
        found = []
        for count in (1200, 1200):
            ask_many(server, count)
            found.append((resident(worker), worker.num_threads(), worker.num_fds()))
        (resident_early, threads_early, fds_early), (resident_late, threads_late, fds_late) = found
        assert threads_late <= threads_early + 2
        assert fds_late <= fds_early + 2
        assert resident_late - resident_early < most_mb
        assert server.request("/health-check")["status"] == "READY"


def test_the_runtimes_folders_are_swept(llama_folder):
    """A server sweeps 60 s after its start at the earliest, and only what is old.

    Instead of waiting 10 minutes the folders of this test's own predictions are dated back.
    """
    with serve(llama_folder) as server:
        ready_at = time.monotonic()
        ids = ask_many(server, 300)
        assert len(ids) > 200
        folders = [RUNTIME_FOLDERS / name for name in ids]
        assert all(folder.is_dir() for folder in folders), "Cog removes them itself now: the sweep can go"
        for folder in folders:
            os.utime(folder, (time.time() - 3600,) * 2)
        time.sleep(max(0.0, ready_at + 61 - time.monotonic()))
        last = server.predict({"prompt": "the end of this one is the occasion", "max_new_tokens": 1})
        deadline = time.monotonic() + 10
        while (left := [folder for folder in folders if folder.exists()]) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == []
        assert (RUNTIME_FOLDERS / last["id"]).is_dir()  # young
