"""Shared by the tests of this folder."""

import pytest

from broker.testing import Network, Peer


@pytest.fixture
async def people(net: Network, autojump_clock: object) -> list[Peer]:
    """Three, of whom the first two listen to the news."""
    found = [await net.open_client(name="js", version=f"5.{number}") for number in range(3)]
    for peer in found[:2]:
        await peer.request(subscribe={"channel": "news"})
    return found
