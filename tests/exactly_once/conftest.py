"""An app whose tasks have exactly_once, on each database, with and without BEGIN sent with the first statement."""

from collections.abc import Iterator

import pytest
from support.exactly_once import PLACES, Once, Place, place_of


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """A database, and the settings of an app on it."""
    yield from place_of(request)


@pytest.fixture
def once(place: Place) -> Iterator[Once]:
    once = Once(place[0], **place[1])
    yield once
    once.close()
