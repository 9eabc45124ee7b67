"""The app that is served when nobody names one: it answers, as the article's server does."""

from broker.app import Broker
from broker.config.settings import Config
from broker.core.messages import Frame
from broker.hooks import Connection

ANSWER = "this is server"


def create(config: Config) -> Broker:
    """Make a broker that answers every plain message with `this is server`.

    An answer that finds the peer's outbox full or the peer gone is dropped: a peer that sends
    faster than it reads has chosen so.
    """
    broker = Broker(config)

    @broker.on_message
    async def answer(connection: Connection, frame: Frame) -> None:
        broker.push(connection.fd, ANSWER)

    return broker
