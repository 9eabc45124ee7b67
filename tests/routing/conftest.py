"""A router over real outboxes that nobody empties: each run that it delivers is still there to see."""

import json
from typing import Any

import trio

from broker.access.rights import Rights
from broker.config.reload import Settings
from broker.config.settings import Config, TopicRules
from broker.core.hub import Hub
from broker.core.messages import ClientInfo, Fd
from broker.core.session import Decider, Grant, PhaseEvent, Subscriber, Subscription
from broker.core.tags import CompiledFilter
from broker.engines.memory import MemoryEngine
from broker.hooks import Hooks
from broker.protocols.centrifuge_json import CENTRIFUGE_JSON
from broker.protocols.codec import PeerCodec
from broker.protocols.plain import PLAIN
from broker.routing.recipients import Peer
from broker.routing.router import Router
from broker.testing import Peer as TestPeer
from broker.transport.outbox import Outbox
from broker.transport.postman import PostOffice
from tests.transport.calls import Calls

PRICEY = {"op": "and", "nodes": [{"key": "price", "cmp": "gt", "val": "100"}]}
"""A filter as a client sends it."""


async def receive_pushes(peer: TestPeer, count: int) -> list[Any]:
    """The next pushes, each of which has to come in a message of its own."""
    return [(await peer.receive_json())["push"] for _ in range(count)]


def make_router(config: Config | None = None, **rules: Any) -> Router:
    """A router whose postman is the test; see `end_round`. `rules` are those of all topics."""
    config = config or Config(topics=TopicRules(**{"history_size": 0, **rules}))
    rights = Rights(Settings(config), Hooks())
    return Router(Hub(), MemoryEngine(2**20, config.retained_bytes), PostOffice(), rights)


def make_outbox(
    office: PostOffice, *, max_messages: int = 1000, on_slow: Any = lambda: None
) -> Outbox:
    """An outbox over a stream in memory, whose writer never begins."""
    ours, _ = trio.testing.memory_stream_pair()
    return Outbox(
        ours,
        post=office.post,
        owner=Calls(slow=on_slow),
        max_bytes=2**20,
        max_messages=max_messages,
        stall_seconds=10,
    )


def attach(router: Router, codec: PeerCodec | None = CENTRIFUGE_JSON, user: str = "") -> Peer:
    """A new peer that speaks `codec`; with None it has not spoken yet."""

    def make(fd: Fd) -> Peer:
        peer = Peer(fd, office=router.office, codec=codec)
        peer.outbox = make_outbox(router.office)
        return peer

    peer = router.hub.sessions.attach(make)
    if codec is not None:
        peer.transition(PhaseEvent.MESSAGE if codec is PLAIN else PhaseEvent.CONNECT)
    router.hub.sessions.bind(peer, user)
    return peer


def subscription(
    subscriber: Subscriber,
    name: str,
    *,
    by: Decider = Decider.RULES,
    group: str = "",
    join_leave: bool = False,
    wanted: CompiledFilter | None = None,
) -> Subscription:
    grant = Grant(name, by, subscriber.user)
    return Subscription(subscriber, name, grant, group=group, join_leave=join_leave, wanted=wanted)


def listen(
    router: Router, *names: str, codec: PeerCodec = CENTRIFUGE_JSON, user: str = "", group: str = ""
) -> Peer:
    """A new peer that is subscribed to these names."""
    peer = attach(router, codec, user)
    for name in names:
        router.subscribe(subscription(peer, name, group=group))
    return peer


def publish(router: Router, topic: str, data: bytes, info: ClientInfo | None = None) -> None:
    router.publish_all(topic, (data,), info)


def end_round(router: Router) -> None:
    """End the open run, as the postman's next round would."""
    router.office.before_round()


def runs(peer: Peer) -> list[list[Any]]:
    """All that waits for a peer: of each run, the data of its publications."""
    return [[data_of(frame) for frame in run.frames] for run in peer.outbox.mail]


def data_of(frame: bytes) -> Any:
    """The data of a publication's frame, the kind of any other push, or the text."""
    text = frame[4 if frame[1] == 126 else 2 :]
    try:
        push = json.loads(text)["push"]
    except (ValueError, TypeError, KeyError):
        return text.decode()
    return next(v["data"] if k == "pub" else k for k, v in push.items() if k != "channel")
