"""The way of a publication from whoever publishes it to the outboxes of those who listen.

Publications to one topic that come in a row, from whomever, are joined into a *run* before they fan
out, so a thousand subscribers cost one append each per run, not per publication. The hot path of
the broker is `Router.publish_all` and the end of a run, then `PostOffice.deliver`.

Rules:

1. An open run ends when another topic is published to, when it holds `RUN_BYTES`, or when the
   postman begins his next round: within one turn of the event loop.
2. Everything else that goes to an outbox (a reply, a join, a push, a Close) goes through here, by
   `send` or `reply`, which end the run first; so does what changes who listens. So a run reaches
   those who listened when each of it was published, and order holds.
3. Nobody waits for a slow reader here; its outbox's rule deals with it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal

import trio

from broker.access.rights import Rights
from broker.config.settings import TopicRules
from broker.core.event_queue import EventKind
from broker.core.hub import Hub
from broker.core.messages import ClientInfo, Publication
from broker.core.names import PERSONAL, direct_fd
from broker.core.retained import Retained
from broker.core.session import Parcel, Recipient, Subscriber, Subscription
from broker.core.work import (
    AUDIENCE,
    COMMAND,
    FILTER_NODE,
    KILOBYTE,
    PEER,
    PUBLICATION,
    RUN,
    Meter,
)
from broker.engines.memory import MemoryEngine
from broker.errors import ErrorCode, Refused, UnsubscribeCode
from broker.events.dispatcher import Events
from broker.protocols.codec import Codec
from broker.routing.queue_groups import GroupRecipient
from broker.routing.recipients import Peer, PeerAudience, SlowMailbox
from broker.transport.outbox import Offer, Outbox, Run
from broker.transport.postman import PostOffice

RUN_BYTES: Final = 64 * 2**10
"""As much as one read from a publisher holds. Joining more gains nothing, and fills outboxes."""

DIRECT_RULES: Final = TopicRules(history_size=0, presence=False, join_leave=False)
"""The rules of `fd:N` and `user:NAME`."""


class Router:
    """See the module."""

    def __init__(
        self,
        hub: Hub[Peer],
        engine: MemoryEngine,
        office: PostOffice,
        rights: Rights,
        events: Events | None = None,
    ) -> None:
        self.hub = hub
        self.engine = engine
        self.office = office
        self.rights = rights
        self.events = events
        self.settings = rights.settings
        self.retained = Retained(self.settings.config.retained_bytes)
        self.published = 0
        self.meter = Meter()
        self.turns = trio.Lock()
        self._run_topic = ""
        self._run_rules = self.settings.config.topics
        self._run_recipients: list[Recipient] = []
        self._run_slow: SlowMailbox | None = None
        self._run = Parcel("", "close")
        self._run_now = 0.0
        self._run_bytes = 0
        self._run_work = 0.0  # of its fan-out
        self._run_filter_work = 0.0  # of the filters, for each batch
        office.before_round = self._end_run
        self.settings.watch(self._settings_changed)

    def _settings_changed(self) -> None:
        """Publications from here on go by other rules.

        A topic that keeps no history by now begins a new epoch if it ever does again: a client
        that was away meanwhile has missed something. Linear in the topics.
        """

        def keeps_none(topic: str) -> bool:
            rules = self.rights.book.find(topic)
            return rules is not None and not rules.history_size

        self._end_run()
        self.retained.resize(self.settings.config.retained_bytes)
        self.engine.forget(keeps_none)

    # publishing

    def publish_all(
        self,
        topic: str,
        contents: Sequence[bytes],
        info: ClientInfo | None = None,
        tags: Mapping[str, str] | None = None,
        opaque: bool = False,
    ) -> None:
        """Publish several things to one topic in their order, or to one fd by `fd:N`.

        The contents are raw JSON; `opaque` ones may be anything. They reach the outboxes when the
        run ends. 0.7 µs a publication, where one by one takes 2. Raises `Refused`, with nothing
        published: 102 for an fd that is not here and for an unknown namespace, 107 for what is no
        topic, 111 for an fd that is behind and for which too much of this publisher waits.
        """
        if topic != self._run_topic or not topic:
            self._begin_run(topic)
        if self._run_slow is not None:
            self._run_slow.check(info)
        work = self._run_filter_work
        if not self._run.batches:
            work += self._run_work
        topic = self._run_topic
        publications: Sequence[Publication]
        publications = [Publication(topic, data, info, 0, 0, tags, opaque) for data in contents]
        if self._run_rules.history_size:
            publications = self.engine.publish(topic, publications, self._run_rules, self._run_now)
        self._run.batches.append(publications)
        count, size = len(publications), sum(map(len, contents))
        self.published += count
        self.meter.done += work + count * PUBLICATION + size / 1024 * KILOBYTE
        self._run_bytes += size
        if self._run_bytes > RUN_BYTES:
            self._end_run()

    def weigh(self, topic: str) -> float:
        """Begin a run on a topic, if it is not the open one; return the work that a publication on it
        takes besides its own making: nothing where `publish_all` will refuse it."""
        if topic != self._run_topic or not topic:
            try:
                self._begin_run(topic)
            except Refused:
                return 0.0
        if self._run.batches:
            return self._run_filter_work
        return self._run_filter_work + self._run_work

    def publish_parcel(self, parcel: Parcel, *, keep: bool, retain: bool) -> Publication:
        """Publish a parcel of one publication by itself, at once, behind all that was published
        before; return it with its offset. `keep`: the history keeps it, where there is one.

        Linear in those who listen. Raises `Refused` as `publish_all` does.
        """
        self._end_run()
        ((publication,),) = parcel.batches
        rules, recipients, work, filter_work = self._resolve(parcel.topic)
        slow = _slow_one(rules, recipients)
        if slow is not None:
            slow.check(publication.info)
        self.meter.add(RUN + work + filter_work)
        parcel.rule = rules.slow_consumer
        if keep and rules.history_size:
            now = trio.current_time()
            (publication,) = self.engine.publish(parcel.topic, (publication,), rules, now)
            parcel.batches[0] = (publication,)
        self.published += 1
        if retain or rules.retain:
            recipients.append(self.retained)
        for recipient in recipients:
            recipient.deliver(parcel)
        return publication

    def _begin_run(self, topic: str) -> None:
        self._end_run()
        rules, recipients, self._run_work, self._run_filter_work = self._resolve(topic)
        self.meter.done += RUN
        if rules.retain:
            recipients.append(self.retained)
        self._run_rules, self._run_recipients = rules, recipients
        self._run_slow = _slow_one(rules, recipients)
        self._run = Parcel(topic, rules.slow_consumer)
        if rules.history_size:
            self._run_now = trio.current_time()
        self._run_bytes = 0
        self._run_topic = topic
        self.office.wake()

    def _end_run(self) -> None:
        """Send the open run out to the outboxes, if there is one."""
        if not self._run_topic:
            return
        recipients, run = self._run_recipients, self._run
        self._run_topic, self._run_recipients = "", []
        if run.batches:
            for recipient in recipients:
                recipient.deliver(run)

    def _resolve(self, topic: str) -> tuple[TopicRules, list[Recipient], float, float]:
        """The rules of a topic, the recipients of a run on it, the work of its fan-out, and that of the
        filters for each batch. Raises `Refused`."""
        fd = direct_fd(topic)
        if fd is not None:
            self.check_direct()
            peer = self.hub.sessions.get(fd)
            if peer is None or not peer.speaks:
                raise Refused(ErrorCode.UNKNOWN_CHANNEL, f"no connection has fd {fd}")
            if peer.outbox.is_behind():
                slow = SlowMailbox(topic, peer, is_one_of_several=False)
                return DIRECT_RULES, [slow], PEER, 0.0
            return DIRECT_RULES, [peer.mailbox], PEER, 0.0
        self.rights.check_topic(topic)
        if topic.startswith(PERSONAL):
            self.check_direct()
            user = topic[len(PERSONAL) :]
            peers = [self.hub.sessions.get(fd) for fd in self.hub.sessions.fds_of(user)]
            here = [peer for peer in peers if peer is not None and peer.speaks]
            if not here:
                raise Refused(ErrorCode.UNKNOWN_CHANNEL, f"user {user!r} has no connection")
            return DIRECT_RULES, self._direct(topic, here), PEER * len(here), 0.0
        book = self.rights.book
        rules = book.only or book.of(topic)
        return rules, *self._listeners(topic, rules)

    def _direct(self, topic: str, peers: Iterable[Peer]) -> list[Recipient]:
        audiences: dict[object, PeerAudience] = {}
        slow: list[Recipient] = []
        for peer in peers:
            if peer.outbox.is_behind():
                slow.append(SlowMailbox(topic, peer, is_one_of_several=True))
                continue
            assert peer.codec is not None, "it is known which protocol a peer speaks"
            audience = audiences.get(peer.codec)
            if audience is None:
                audience = audiences[peer.codec] = PeerAudience(topic, peer.codec, self.office)
            audience.outboxes[peer.outbox] = peer
        return [*audiences.values(), *slow]

    def _listeners(self, topic: str, rules: TopicRules) -> tuple[list[Recipient], float, float]:
        found = self.hub.listeners(topic)
        if len(found) == 1 and found[0].name == topic and not found[0].groups:
            # Nearly all topics: a third of the work of the loop below.
            (only,) = found
            everybody: list[Recipient] = list(only.audiences.values())
            work = len(everybody) * AUDIENCE + only.members * PEER
            return everybody, work, only.filter_nodes * FILTER_NODE
        recipients: list[Recipient] = []
        members = nodes = 0
        for listeners in found:
            admits = None if listeners.name == topic else self.rights.receiver(rules, topic)
            if admits is None:
                recipients += listeners.audiences.values()
            else:
                recipients += [each.narrowed(admits) for each in listeners.audiences.values()]
            for group in listeners.groups.values():
                recipients.append(GroupRecipient(group, admits))
            members += listeners.members
            nodes += listeners.filter_nodes
        work = len(recipients) * AUDIENCE + members * PEER
        return recipients, work, nodes * FILTER_NODE

    # the door to a peer

    def send(self, peer: Peer, frames: Sequence[bytes], *, messages: int = 0) -> Offer:
        """Queue frames for one peer, behind all that was published before. Never waits.

        `messages` is how many of them count as messages: replies and pushes about the connection
        itself do not. Without frames it only ends what was published before.
        """
        if not frames:
            self._end_run()
            return Offer.TAKEN
        return self.send_run(peer, Run(frames, messages=messages))

    def send_run(self, peer: Peer, run: Run) -> Offer:
        """The same for a run that the caller has made, to look for it in the outbox later."""
        self._end_run()
        return peer.outbox.offer(run)

    def reply(self, peer: Peer, frame: bytes) -> None:
        """Queue a reply, whatever its size; see `Outbox.offer_reply`."""
        self._end_run()
        peer.outbox.offer_reply(Run((frame,)))

    def drop_topics(self, peer: Peer, topics: Iterable[str]) -> None:
        """Forget what waits for a peer of these topics, and what is about to."""
        self._end_run()
        for topic in topics:
            peer.outbox.drop_topic(topic)

    def check_direct(self) -> None:
        """Raise `Refused` (108) where connections have no topics of their own."""
        if not self.settings.config.direct_topics:
            text = "direct_topics is off: connections have no topics of their own"
            raise Refused(ErrorCode.NOT_AVAILABLE, text)

    # subscribing

    def subscribe(self, subscription: Subscription) -> None:
        """Add a subscription; those who watch its topic learn of it with the next `announce`."""
        self._end_run()
        self.meter.add(COMMAND)
        self.hub.subscribe(subscription)
        if isinstance(subscription.subscriber, Peer):
            subscription.subscriber.weigh(subscription, 1)
        self._emit(EventKind.SUBSCRIBED, subscription)

    def unsubscribe(
        self,
        subscriber: Subscriber,
        name: str,
        code: int = UnsubscribeCode.CLIENT,
        reason: str = "unsubscribed",
    ) -> Subscription | None:
        """Remove a subscription and tell those who watch; None if there was none."""
        self._end_run()
        subscription = self.hub.unsubscribe(subscriber, name)
        if subscription is not None:
            self._note_left(subscription, code, reason)
        return subscription

    def announce(self, subscription: Subscription) -> None:
        """Tell those who watch a topic that somebody subscribed, the subscriber among them."""
        self._notify_watchers(subscription.name, subscription.info, "join")

    def leave_all(
        self,
        peer: Peer,
        code: int = UnsubscribeCode.DISCONNECT,
        reason: str = "disconnected",
    ) -> None:
        """Remove all subscriptions of a peer and tell those who watch. Linear in them."""
        self._end_run()
        for subscription in self.hub.leave_all(peer):
            self._note_left(subscription, code, reason)

    def bind(self, peer: Peer, user: str) -> list[str]:
        """Make a peer another user's, in one step, and tell those who watch its topics.

        Ends, and returns, the subscriptions that the new user may not have; the client is told by
        the caller.
        """
        self._end_run()
        before = {name: each.info for name, each in peer.subscriptions.items()}
        self.hub.sessions.bind(peer, user)
        kept = [each for each in peer.subscriptions.values() if self.rights.keeps(peer, each)]
        lost = [name for name in peer.subscriptions if name not in {each.name for each in kept}]
        for subscription in kept:
            self._notify_watchers(subscription.name, before[subscription.name], "leave")
            self._notify_watchers(subscription.name, subscription.info, "join")
        for name in lost:
            subscription = peer.subscriptions[name]
            self.hub.unsubscribe(peer, name)
            self._emit_left(subscription, UnsubscribeCode.SERVER, "other user")
            self._notify_watchers(name, before[name], "leave")
        return lost

    def _note_left(self, subscription: Subscription, code: int, reason: str) -> None:
        self._emit_left(subscription, code, reason)
        self._notify_watchers(subscription.name, subscription.info, "leave")

    def _emit_left(self, subscription: Subscription, code: int, reason: str) -> None:
        if isinstance(subscription.subscriber, Peer):
            subscription.subscriber.weigh(subscription, -1)
        self._emit(EventKind.UNSUBSCRIBED, subscription, code=code, reason=reason)

    def _emit(self, kind: EventKind, subscription: Subscription, **fields: Any) -> None:
        subscriber = subscription.subscriber
        if self.events is not None and subscriber.fd:  # not this very program
            name = subscription.name
            self.events.emit(kind, subscriber.fd, subscriber.user, topic=name, **fields)

    def _notify_watchers(
        self, name: str, info: ClientInfo | None, what: Literal["join", "leave"]
    ) -> None:
        # A namespace that a reload took away may still have subscribers, who leave one day.
        rules = self.rights.book.find(name)
        if info is None or rules is None or not rules.join_leave:
            return
        watchers: dict[Codec, list[Outbox]] = {}
        for watcher in self.hub.watchers(name):
            self.meter.done += PEER
            if isinstance(watcher, Peer) and isinstance(watcher.codec, Codec):
                watchers.setdefault(watcher.codec, []).append(watcher.outbox)
        for codec, outboxes in watchers.items():
            frame = codec.join(name, info) if what == "join" else codec.leave(name, info)
            self.office.deliver(Run((frame,)), outboxes)


def _slow_one(rules: TopicRules, recipients: Sequence[Recipient]) -> SlowMailbox | None:
    """The only recipient, if that is a peer which is behind: it may have to be asked first."""
    if rules is not DIRECT_RULES:
        return None
    first = recipients[0]
    return first if isinstance(first, SlowMailbox) and not first.is_one_of_several else None
