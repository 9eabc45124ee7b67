"""Fixtures that the tests of the client share."""

import pytest
import trio

from broker.client.testing import FakeBroker


@pytest.fixture
async def fake(nursery: trio.Nursery) -> FakeBroker:
    return FakeBroker(nursery)
