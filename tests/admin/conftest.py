"""A broker named `here` with keys for operators, and some people on it."""

import pytest

from broker import Config
from broker.testing import Network, Peer
from tests.conftest import ADMIN_KEY, VIEW_KEY


@pytest.fixture
def config() -> Config:
    return Config(admin_key=ADMIN_KEY, admin_view_key=VIEW_KEY, name="here")


@pytest.fixture
async def people(net: Network, autojump_clock: object) -> list[Peer]:
    """Three, of whom the first two listen to the news."""
    found = [await net.open_client(name="js", version=f"5.{number}") for number in range(3)]
    for peer in found[:2]:
        await peer.request(subscribe={"channel": "news"})
    return found
