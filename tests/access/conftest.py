"""All commands that name a topic, asked at once."""

from broker.testing import Peer
from tests.conftest import code_of

COMMANDS = {
    "publish": {"data": 1},
    "subscribe": {},
    "presence": {},
    "presence_stats": {},
    "history": {"limit": 1},
}


async def codes(peer: Peer, topic: str) -> dict[str, int]:
    """The answer to each command that names a topic. Nothing is left subscribed."""
    answers = {
        method: await code_of(peer, **{method: {"channel": topic, **rest}})
        for method, rest in COMMANDS.items()
    }
    await peer.request(unsubscribe={"channel": topic})
    return answers
