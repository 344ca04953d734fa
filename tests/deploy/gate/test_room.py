"""Nothing goes to a runtime that may not be able to make its folders."""

import os

import pytest

from deploy.gate import room
from deploy.gate.room import Free, Room, free_room
from deploy.gate.rules import Refused
from tests.deploy.gate.test_gate import running

MIB = 1 << 20


def test_what_is_free_is_that_of_the_folder_above(tmp_path):
    free, system = free_room(tmp_path / "not" / "yet"), os.statvfs(tmp_path)
    assert free.is_writable
    assert abs(free.num_bytes - system.f_bavail * system.f_frsize) < 1 << 30  # others write meanwhile
    assert (free.files is None) == (system.f_files == 0)


@pytest.mark.parametrize(
    ("bounds", "said"),
    [({"_SPARE_BYTES": 1 << 60}, "too little room"), ({"_SPARE_FILES": 1 << 60}, "too few further files")],
)
def test_without_room_nothing_is_passed_on_and_it_is_told(tmp_path, bounds, said):
    if free_room().files is None and "_SPARE_FILES" in bounds:
        pytest.skip("the file system of /tmp has no bound to its files")
    with running(tmp_path, bounds=bounds) as gate:
        for method, path in (("POST", "/predictions"), ("PUT", "/predictions/x")):
            reply = gate.client.request(method, path, json={"input": {"prompt": "x"}})
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
            assert said in reply.json()["detail"]
        health = gate.health()
        assert (health["status"], health["gate"]["running"], gate.asked()) == ("READY", 0, [])
        assert said in health["gate"]["problem"]


def test_there_is_room_otherwise(tmp_path):
    with running(tmp_path) as gate:
        assert gate.health()["gate"]["problem"] is None
        assert gate.predict("x").status_code == 200


def test_inputs_that_go_by_files_have_room_for_all_of_them(monkeypatch):
    monkeypatch.setattr(room, "free_room", lambda: Free(num_bytes=24 * MIB, files=None, is_writable=True))
    room_of_two = Room(2)
    with room_of_two.held(8 * MIB), room_of_two.held(8 * MIB), room_of_two.held(6 * MIB), room_of_two.held(1):
        assert room_of_two.problem(room.free_room(), 6 * MIB) is None
        with pytest.raises(Refused, match="too little room; try again later"), room_of_two.held(7 * MIB):
            pass
    with room_of_two.held(16 * MIB):  # all was given back
        pass


@pytest.mark.parametrize(("concurrency", "has_room"), [(1, True), (16, True), (17, False)])
def test_each_place_has_its_files(concurrency, has_room):
    free = Free(num_bytes=1 << 30, files=320, is_writable=True)
    assert (Room(concurrency).problem(free) is None) == has_room


def test_a_folder_that_may_not_be_written_is_a_problem():
    free = Free(num_bytes=1 << 30, files=None, is_writable=False)
    assert "may not write" in str(Room(1).problem(free))
