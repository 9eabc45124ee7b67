"""Connections by what is known of them: user, topic, address, the name of the app."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import attrs

from broker.core.messages import Fd
from broker.core.topics import is_pattern
from broker.core.work import SURVEYED_AT_ONCE
from broker.session.services import ServedConnection, Services


@attrs.frozen
class ConnectionQuery:
    """All connections with an fd beyond `after` that fit each of the others that is not empty.

    `topic` is one that they are subscribed to, or a pattern, by the very name. `address` is the beginning of
    theirs: `10.1.` or `10.1.2.3:`. `app` is what the client calls itself, alone or with its version behind
    a space: `js` or `js 5.3.0`.
    """

    after: Fd = 0
    user: str = ""
    topic: str = ""
    address: str = ""
    app: str = ""


def search(services: Services, query: ConnectionQuery) -> Iterator[Sequence[Fd]]:
    """See `Node.search`. The connections are those of the first step; who has gone since is left out."""
    connections = services.connections
    candidates = _candidates(services, query)
    start = bisect_right(candidates, query.after)
    for first in range(start, len(candidates), SURVEYED_AT_ONCE):
        piece = candidates[first : first + SURVEYED_AT_ONCE]
        yield [fd for fd in piece if fd in connections and _fits(connections[fd], query)]


def _candidates(services: Services, query: ConnectionQuery) -> Sequence[Fd]:
    """In growing order. Linear in them, 5 ns each where nothing is asked for that leads to few."""
    hub = services.router.hub
    if query.user:
        return hub.sessions.fds_of(query.user)
    if query.topic and not is_pattern(query.topic):
        found = [each.subscriber.fd for each in hub.subscriptions(query.topic)]
        return sorted({fd for fd in found if fd})  # 0 is a reader in this program
    return list(services.connections)  # they come in the order of their fds


def _fits(connection: ServedConnection, query: ConnectionQuery) -> bool:
    peer = connection.peer
    if query.topic and query.topic not in peer.subscriptions:
        return False
    if not connection.address.startswith(query.address):
        return False
    return not query.app or query.app in (peer.app_name, f"{peer.app_name} {peer.app_version}")
