"""What the tests of OpenAI's API share."""

from collections.abc import Iterator

import pytest

from tests.web.openai.fake_server import FakeServer


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    """A stand-in for a model server."""
    fake = FakeServer()
    yield fake
    fake.stop()
