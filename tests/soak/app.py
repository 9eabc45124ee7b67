"""The app of the broker that is soaked: it tells a plain peer how many tasks there are."""

import trio

from broker import Broker, Connection, Frame

soaked = Broker()


@soaked.on_message
async def _tell(connection: Connection, frame: Frame) -> None:
    soaked.push(connection.fd, str(trio.lowlevel.current_statistics().tasks_living))
