"""Phases as the server's log and the children's output tell them, and a child that does not end."""

import pytest

from bench import cold_start
from bench.cold_start import read_phases, start_script


def test_phases_of_the_servers_line():
    log = (
        "loading model weights took 3.0 s\n"
        "\x1b[2m12:00:01\x1b[0m INFO ready: imports 1.0 s, tokenizer 0.0 s, weights 0.3 s, kernels and graphs 12.5 s\n"
        "5 tokens after 3, 40.0 tokens/s, seed 1\n"
    )
    assert read_phases(log) == {"imports": 1.0, "tokenizer": 0.0, "weights": 0.3, "kernels and graphs": 12.5}


def test_child_that_tells_its_first_token():
    start = start_script("print('ready: imports 0.125 s'); print('first token', 7)", [])
    assert start.phases == {"imports": 0.125}
    assert start.first_token_s > 0


def test_child_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(cold_start, "_TIMEOUT_S", 0.5)
    with pytest.raises(RuntimeError, match="ended with status -9 after"):
        start_script("import time; time.sleep(60)", [])
