"""`broker.cli.default_app`: what is served where nobody names an app."""

from trio.testing import MockClock

from broker.cli.default_app import ANSWER, create
from broker.config.settings import Config
from broker.testing import open_test_broker


async def test_every_plain_message_is_answered(autojump_clock: MockClock) -> None:
    async with open_test_broker(create(Config())) as net:
        async with await net.open_plain() as peer:
            for text in ("hello", ""):
                await peer.send_text(text)
                assert await peer.receive_text() == ANSWER == "this is server"
