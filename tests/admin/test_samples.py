"""The samples of the last quarter of an hour, and the tick that tells each."""

import pytest
import trio

from broker import Config
from broker.admin.samples import FIELDS, KEPT
from broker.testing import Network, Peer
from tests.conftest import ADMIN_KEY, done, log_in, told


async def test_a_tick_a_second_has_the_figures_of_then(
    net: Network, people: list[Peer], autojump_clock: object
) -> None:
    peer = await log_in(net)
    await people[0].request(publish={"channel": "news", "data": {"a": 1}})
    tick = dict(zip(FIELDS, (await told(peer))["tick"], strict=True))
    assert tick["connections"] == 4
    assert tick["published"] == 1
    assert tick["delivered"] == 2
    assert tick["messages_in"] >= 5
    assert tick["subscriptions"] == 2
    later = dict(zip(FIELDS, (await told(peer))["tick"], strict=True))
    assert later["time"] - tick["time"] == pytest.approx(1, abs=0.01)
    assert later["published"] == 1


async def test_samples_are_kept_for_a_quarter_of_an_hour(
    net: Network, autojump_clock: object
) -> None:
    await trio.sleep(2 * KEPT)
    peer = await log_in(net)
    assert len((await done(peer, "admin.overview"))["samples"]["rows"]) == KEPT


async def test_without_a_dashboard_no_samples_are_kept(
    net: Network, autojump_clock: object
) -> None:
    await trio.sleep(5)
    net.broker.reload(Config())
    await trio.sleep(5)
    net.broker.reload(Config(admin_key=ADMIN_KEY))
    peer = await log_in(net)
    assert len((await done(peer, "admin.overview"))["samples"]["rows"]) <= 1
