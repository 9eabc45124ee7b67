"""The history and the presence of a topic, within the size of one reply.

Rules:

1. A reply is bounded in time and in bytes, whoever asks. A history is cut, and the asker can see by the
   last offset and the top that there is more; a recovery and a presence are whole or not given.
2. A list is charged in the step that makes it.
"""

from collections.abc import Mapping, Sequence

from broker.core.messages import PUBLICATION_BYTES, ClientInfo, Position, Publication
from broker.core.work import KILOBYTE, LISTED, MEMBER
from broker.errors import ErrorCode, Refused
from broker.routing.router import Router


def listed_bytes(publications: Sequence[Publication]) -> int:
    """The bytes that count for a reply that lists these."""
    size = sum([len(publication.data) for publication in publications])
    return size + len(publications) * PUBLICATION_BYTES


def first_bytes(publications: list[Publication], most: int) -> list[Publication]:
    """As many of the first of these as take `most` bytes together, and one at least."""
    if listed_bytes(publications) <= most:
        return publications
    size = 0
    for number, publication in enumerate(publications):
        size += len(publication.data) + PUBLICATION_BYTES
        if size > most and number:
            return publications[:number]
    return publications


def listing_work(publications: Sequence[Publication]) -> float:
    """The work of a reply that lists these."""
    size = sum([len(publication.data) for publication in publications])
    return len(publications) * LISTED + size / 1024 * KILOBYTE


def history_page(
    router: Router, topic: str, since: Position | None, limit: int, reverse: bool
) -> tuple[list[Publication], Position]:
    """Publications of a topic, as many as one reply may hold and `limit` at most, and its top now; a
    negative limit asks for as many as there may be. Listing them is the caller's to charge.

    Raises `UnrecoverablePosition` when `since` is of another epoch.
    """
    config = router.settings.config
    limit = _most_listed(router, limit)
    publications, top = router.engine.history(topic, since, limit, reverse)
    return first_bytes(publications, config.history_reply_bytes), top


def weigh_history(
    router: Router, topic: str, since: int | None, limit: int, reverse: bool
) -> float:
    """The work of a reply with this part of a history."""
    found = router.engine.peek(topic, since, _most_listed(router, limit), reverse)
    return listing_work(first_bytes(found, router.settings.config.history_reply_bytes))


def weigh_recovery(router: Router, topic: str, since: int) -> float:
    """The work of a reply with all that was published since; of one that would hold too much, nothing is
    listed."""
    most = router.settings.config.history_reply_bytes
    found = router.engine.peek(topic, since, most // PUBLICATION_BYTES + 1)
    return listing_work(found) if listed_bytes(found) <= most else 0.0


def _most_listed(router: Router, limit: int) -> int:
    most = router.settings.config.history_max_limit
    return most if limit < 0 else min(limit, most)


def presence_page(router: Router, topic: str) -> Mapping[str, ClientInfo]:
    """The clients that are subscribed to `topic` itself, by client id, charged to the asker.

    Raises `Refused` (106) where they are more than one reply may hold.
    """
    config, hub = router.settings.config, router.hub
    if hub.count(topic) > config.presence_max_clients:
        text = f"more than {config.presence_max_clients} clients: ask for presence_stats"
        raise Refused(ErrorCode.LIMIT_EXCEEDED, text)
    return listed_clients(router, hub.presence(topic))


def listed_clients(router: Router, clients: Mapping[str, ClientInfo]) -> Mapping[str, ClientInfo]:
    """These clients, charged to the one that asks for a list of them. Raises `Refused` (106) where they are
    more bytes than one reply may hold."""
    config = router.settings.config
    router.meter.add(len(clients) * MEMBER)
    size = sum(
        [len(each.conn_info or b"") + len(each.chan_info or b"") for each in clients.values()]
    )
    if size > config.history_reply_bytes:
        text = f"more than {config.history_reply_bytes} bytes of info: ask for presence_stats"
        raise Refused(ErrorCode.LIMIT_EXCEEDED, text)
    router.meter.add(size / 1024 * KILOBYTE)
    return clients


def presence_counts(router: Router, topic: str) -> tuple[int, int]:
    """How many clients are subscribed to `topic` itself, and how many users, charged to the asker."""
    counts = router.hub.presence_stats(topic)
    router.meter.add(counts[0] * MEMBER / 10)
    return counts
