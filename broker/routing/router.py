"""The way of a publication from its publisher to the outboxes of those who listen.

Publications to one topic that come in a row, from any publishers, are joined into a *run* before they fan
out, so a thousand subscribers cost one append each per run, not per publication. The hot path of the broker
is `Router.publish_all` and the end of a run, then `PostOffice.deliver`.

Rules:

1. An open run ends when another topic is published to, when it holds `RUN_BYTES` (less where many
   audiences listen), or when the postman begins his next round: within one turn of the event loop.
2. Everything else that goes to an outbox (a reply, a join, a push, a Close) goes through here, by
   `send` or `reply`, which end the run first; so does any change of the subscribers. So a run reaches those
   who listened when each of it was published, and order holds.
3. Nobody waits for a slow reader here; its outbox's rule deals with it.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from math import inf
from typing import Final, Unpack

import trio

from broker.access.rights import Rights
from broker.config.reload import Settings
from broker.config.settings import TopicRules
from broker.core.event_queue import EventFields, EventKind
from broker.core.hub import Hub
from broker.core.messages import ClientInfo, Publication, Series, data_bytes
from broker.core.names import DIRECT, PERSONAL, direct_fd, is_connection_name
from broker.core.retained import Retained
from broker.core.session import Audience, Parcel, Recipient, Report, Subscriber, Subscription
from broker.core.topics import is_pattern
from broker.core.work import (
    ASKED,
    AUDIENCE,
    FILTER_NODE,
    FULL,
    KILOBYTE,
    LEFT,
    LISTENERS,
    PARCEL,
    PATTERN,
    PEER,
    PUBLICATION,
    RUN,
    SLICE,
    SUBSCRIPTION,
    TAG_KILOBYTE,
    Allowance,
    Meter,
)
from broker.engines.engine import Done, Engine, IdempotencyKey, Submission
from broker.errors import ErrorCode, Refused, UnsubscribeCode
from broker.events.dispatcher import Events, EventSink
from broker.events.spans import Spans
from broker.routing.elsewhere import Groups, Way, Ways
from broker.routing.queue_groups import GroupRecipient
from broker.routing.recipients import Peer, PeerAudience, SlowMailbox
from broker.routing.tallies import Recoveries, Tallies
from broker.routing.turns import Turns
from broker.routing.watchers import Watchers
from broker.transport.outbox import Offer, Run
from broker.transport.postman import PostOffice
from broker.transport.runs import SharedData

RUN_BYTES: Final = 64 * 2**10
"""As much as one read from a publisher holds. Joining more gains nothing, and fills outboxes."""

ENVELOPE: Final = 32
"""Bytes that a publication counts beside its data: a read holds so much more of each at least."""

NARROW: Final = 2
"""Audiences of a topic that nearly all have no more of. Each has a run encoded for itself, so where
there are more of them a run is as much shorter, and takes about as long as ever to be sent out."""

LARGE: Final = 4096
"""Bytes of data that are copied for each audience; where there are more audiences than `NARROW` they
share what is larger, until it goes out to one of them."""

MOST_TOGETHER: Final = 3 * SLICE
"""Work that the encoding of several publications may take in one step: of a whole read for up to
seven audiences."""

DIRECT_RULES: Final = TopicRules(history_size=0, presence=False, join_leave=False)
"""The rules of `fd:N` and `user:NAME`."""

_CONNECTIONS: Final = (DIRECT, PERSONAL)


class Returns:
    """The way back from the engine, its `Sink`: publications that it has kept are fanned out, then their
    publishers are answered."""

    def __init__(self, fan_out: Callable[..., float], hub: Hub[Peer]) -> None:
        self.deliver = fan_out
        self._hub = hub
        self._unsettled: list[Callable[[], None]] = []
        self.falls_to_groups: Callable[[str], bool] = lambda topic: False
        """Whether some of it may be this node's to deal out, though nobody here listens any more."""

    def when_settled(self, settle: Callable[[], None]) -> None:
        """Call this once, at the end of the batch that the engine gives back now."""
        self._unsettled.append(settle)

    def settled(self) -> None:
        unsettled, self._unsettled = self._unsettled, []
        for settle in unsettled:
            settle()

    def wants(self, topic: str) -> bool:
        if topic.startswith(PERSONAL):
            return bool(self._hub.sessions.fds_of(topic[len(PERSONAL) :]))
        return bool(self._hub.listeners(topic)) or self.falls_to_groups(topic)

    def listened(self) -> Sequence[str]:
        return [each.name for each in self._hub.named() if not is_pattern(each.name)]

    def gap(self, topic: str) -> Iterator[float]:
        for subscription in self._hub.subscriptions(topic):
            peer = subscription.subscriber
            is_here = peer.subscriptions.get(topic) is subscription
            if is_here and subscription.recoverable and isinstance(peer, Peer):
                peer.outbox.note_gap(topic)
                yield SUBSCRIPTION
            else:
                yield PEER


class Router:
    """See the module."""

    def __init__(
        self,
        hub: Hub[Peer],
        engine: Engine,
        office: PostOffice,
        rights: Rights,
        events: Events | None = None,
    ) -> None:
        self.hub = hub
        self.engine = engine
        self.office = office
        self.rights = rights
        self.events = events
        self.event_sink: EventSink | None = events
        """Takes what happens: the readers of events, and traces before them while there are any."""
        self.settings: Settings = rights.settings
        self.retained: Retained = engine.retained
        self._may_defer = engine.durability != "none" or engine.cluster.is_shared
        self.ways: Ways | None = None
        """The ways to connections of other nodes; None where there can be none."""
        self.count_for: Callable[[str, Report], None] | None = None
        """Tells another node what became of its publication here."""
        self.groups: Groups | None = None
        """Queue groups over nodes; None where those here are all."""
        self.spans: Spans | None = None
        """Makes spans of publications that carry a trace; None where they are off."""
        self.published: int = 0
        self.tallies: Tallies = Tallies()
        self.tallies.count_by(self.settings.config.namespaces)
        self.recoveries: Recoveries = Recoveries()
        self.meter: Meter = engine.meter
        self.turns: Turns = Turns(self.meter)
        self.watchers: Watchers = Watchers(hub, rights, office, self.meter, self._end_run)
        self.keeps_later: bool = False
        """Whether the engine, or another node, has to take first what is published to the open run."""
        self.latest: Sequence[Publication] = ()
        """The publications of the last `publish_all`, with their offsets where they are kept already."""
        self._run_topic = ""
        self._run_rules = self.settings.config.topics
        self._run_keeps = False  # its history, at once
        self._run_dones: list[Done] | None = None  # where the engine has to keep it first
        self._run_recipients: list[Recipient] = []
        self._run_slow: SlowMailbox | Way | None = None
        self._run = Parcel("", "close")
        self._run_now = 0.0
        self._run_bytes = 0
        self._run_most = RUN_BYTES
        self._run_width = 1  # audiences, and one where there are none
        self._run_work = 0.0  # of its fan-out
        # A topic for which all of that stands as it is, by these generations of hub and settings.
        self._steady_topic: str | None = None
        self._steady_since = -1, -1
        self._steady_recipients: list[Recipient] = []
        self.returns: Returns = Returns(self.fan_out, hub)
        office.before_round = self._end_run
        office.meter = self.meter
        self.settings.watch(self._settings_changed)
        self._rules: object = None
        """The rules of topics, as they were when the settings last changed."""
        self._settings_changed()  # what the engine has kept may be of other settings

    def _settings_changed(self) -> None:
        """Publications from here on go by other rules.

        A topic that keeps no history by now begins a new epoch if it ever does again: a client
        that was away meanwhile has missed something. The engine forgets it in its own time, and before anybody
        looks.
        """
        book = self.rights.book

        def keeps_none(topic: str) -> bool:
            rules = book.find(topic)
            return rules is not None and not rules.history_size

        self._end_run()
        self.tallies.count_by(self.settings.config.namespaces)
        self.retained.resize(self.settings.config.retained_bytes)
        config = self.settings.config
        rules = config.topics, config.namespaces, config.patterns
        if rules != self._rules and not book.all_keep:
            self.engine.forget(keeps_none)
        self._rules = rules

    def by_namespace(self) -> Mapping[str, int]:
        """Publications since `serve` began, by namespace; sends out the open run, to count it."""
        self._end_run()
        return self.tallies.by_namespace(self.published)

    # publishing

    def publish_all(
        self,
        topic: str,
        contents: Sequence[bytes],
        info: ClientInfo | None = None,
        opaque: bool = False,
        payer: Allowance | None = None,
    ) -> list[Done] | None:
        """Publish several things without tags to one topic in their order, or to one fd by `fd:N`.

        The contents are raw JSON; `opaque` ones may be anything. They reach the outboxes when the
        run ends. 0.7 µs a publication, where one by one takes 2. Where the engine has to keep them first,
        they do so later, and a list is returned: a caller that wants to know adds a `Done` to it at once.
        Raises `Refused`, with nothing published: 102 for an fd that is not here and for an unknown namespace,
        107 for what is no topic, 100 while the engine can keep nothing, 111 for an fd that is behind and for
        which too much of this publisher waits.

        Charged for the writes and the full outboxes of a run is the `payer` of the first in it: the others
        add little to them.
        """
        if topic != self._run_topic or not topic:
            self._begin_run(topic)
        if self._run_slow is not None:
            self._run_slow.check(info)
        if self._run.batches:
            work = 0.0
        else:
            work, self._run.payer = self._run_work, payer
        topic = self._run_topic
        publications: Sequence[Publication]
        if self._run_keeps:
            publications = self.engine.publish_run(
                topic, contents, info, opaque, self._run_rules, self._run_now
            )
        else:
            publications = Series(topic, contents, info, 0, opaque)
        self._run.batches.append(publications)
        self.latest = publications
        count = len(contents)
        size = len(contents[0]) if count == 1 else sum(map(len, contents))
        self.published += count
        if self._run_width == 1:  # as nearly always
            self.meter.done += work + count * PUBLICATION + size / 1024 * KILOBYTE
        else:
            self.meter.done += work + _encoding_work(self._run_width, count, size)
        self._run_bytes += size + count * ENVELOPE
        if self._run_bytes > self._run_most:
            self._end_run()
        return self._run_dones  # that of this run, also if it has ended

    def weigh(self, topic: str) -> float:
        """Begin a run on a topic, if it is not the open one; return the work that a publication on it
        takes besides its own making: nothing where `publish_all` will refuse it."""
        if topic != self._run_topic or not topic:
            try:
                self._begin_run(topic)
            except Refused:
                return 0.0
        work = (self._run_width - 1) * PUBLICATION
        return work if self._run.batches else work + self._run_work

    def takes_together(self, sizes: Iterable[int]) -> bool:
        """Whether publications of so many bytes may join the open run in one step. `sizes` is looked
        at only where more than one audience listens."""
        width = self._run_width
        return (
            width == 1
            or width * sum([PUBLICATION + size / 1024 * KILOBYTE for size in sizes])
            <= MOST_TOGETHER
        )

    def publish_parcel(
        self, parcel: Parcel, *, keep: bool, retain: bool, key: IdempotencyKey | None = None
    ) -> list[Done] | None:
        """Publish a parcel of one publication by itself, behind all that was published before. `keep`:
        the history keeps it, where there is one, and the parcel has it with its offset then.

        At once, unless the engine has to keep it first: a list is returned then, as by
        `publish_all`. Linear in those who listen. Raises `Refused` as `publish_all` does.
        """
        ((publication,),) = parcel.batches
        rules, recipients, work = self._resolve_parcel(parcel, publication.tags)
        slow = _slow_one(recipients) if rules is DIRECT_RULES else None
        if slow is not None:
            slow.check(publication.info)
        keep, retain = keep and rules.history_size > 0, retain or rules.retain
        more = retain or (key is not None and not is_connection_name(parcel.topic))
        defers = self._may_defer and _defers(self.engine, parcel.topic, rules, recipients, more)
        width, size = len(recipients) or 1, len(publication.data)
        self.meter.add(PARCEL + work + _encoding_work(width, 1, size))
        if width > NARROW:
            parcel.shared = _shared_data(parcel, self.office)
        parcel.rule = rules.slow_consumer
        self.published += 1
        if ":" in parcel.topic:
            self.tallies.note(parcel.topic, 1)
        span = None if self.spans is None else self.spans.publish(parcel)
        if defers:
            submission = Submission(parcel, rules, keep, retain, key)
            if span is not None:
                submission.dones.append(span.done)
            return _hand_over(self.engine, submission, recipients)
        if keep:
            now = trio.current_time()
            parcel.batches[0] = self.engine.publish(parcel.topic, (publication,), rules, now)
        if retain and not rules.retain:
            recipients.append(self.retained)
        if self.spans is not None:
            self.spans.deliver(parcel)
        self._deliver(parcel, recipients)
        if span is not None:
            kept = parcel.batches[0][0].offset
            span.done(self.engine.position(parcel.topic) if kept else None)
        return None

    def _resolve_parcel(
        self, parcel: Parcel, tags: Mapping[str, str] | None
    ) -> tuple[TopicRules, list[Recipient], float]:
        """As `_resolve`; a look-up of `weigh` a moment ago is not repeated, because it may be linear in those
        who listen."""
        topic = parcel.topic
        if tags:
            self._end_run()
            rules, recipients, work = self._resolve(topic, tags)
            self.meter.add(RUN)
            if rules.retain:
                recipients.append(self.retained)
            return rules, recipients, work
        if topic != self._run_topic or not topic or self._run.batches:
            self._begin_run(topic)
        rules, recipients = self._run_rules, [*self._run_recipients]
        self._run_topic, self._run_recipients = "", []
        return rules, recipients, self._run_work

    def _begin_run(self, topic: str) -> None:
        if self._run_topic:
            self._end_run()
            self.office.carry_full()
        if (
            topic == self._steady_topic
            and self._steady_since == (self.hub.changes, self.settings.version)
            and self.groups is None
        ):
            self._run_recipients = self._steady_recipients
        else:
            self._look_up(topic)
        self.meter.done += RUN
        self._run = Parcel(topic, self._run_rules.slow_consumer)
        if self._run_keeps:
            self._run_now = trio.current_time()
        self._run_bytes = 0
        self._run_topic = topic
        self.office.wake()

    def _look_up(self, topic: str) -> None:
        """Find out all that a run on a topic goes by, and whether the next one may go by the same. Raises
        `Refused`."""
        rules, recipients, self._run_work = self._resolve(topic, None)
        self._steady_topic, self._steady_recipients = None, []
        defers = self._may_defer and _defers(self.engine, topic, rules, recipients)
        self._run_width = width = len(recipients) or 1
        self._run_most = RUN_BYTES if width <= NARROW else RUN_BYTES * NARROW // width
        if rules.retain:
            recipients.append(self.retained)
        self._run_keeps = rules.history_size > 0 and not defers
        self._run_dones = [] if defers else None
        self.keeps_later = defers
        self._run_rules, self._run_recipients = rules, recipients
        slow = _slow_one(recipients) if rules is DIRECT_RULES else None
        self._run_slow = slow
        if isinstance(slow, Way):
            self._run_most = 0  # it is answered for each publisher
        if rules is not DIRECT_RULES and not self._may_defer and self.hub.is_plain(topic):
            self._steady_topic, self._steady_recipients = topic, recipients
            self._steady_since = self.hub.changes, self.settings.version

    def _end_run(self) -> None:
        """Send the open run out to the outboxes, if there is one."""
        if not self._run_topic:
            return
        recipients, run = self._run_recipients, self._run
        self._run_topic, self._run_recipients = "", []
        if not run.batches:
            return
        if ":" in run.topic:
            self.tallies.note(run.topic, sum(map(len, run.batches)))
        if self._run_dones is not None:
            rules, dones = self._run_rules, self._run_dones
            keep = rules.history_size > 0
            submission = Submission(run, rules, keep, rules.retain, dones=dones)
            _hand_over(self.engine, submission, recipients)
            return
        if self._run_width > NARROW:
            run.shared = _shared_data(run, self.office)
        self._deliver(run, recipients)

    def fan_out(self, parcel: Parcel, *, retain: bool) -> float:
        """Fan out publications that the engine has kept, to those who listen now; return the work of it, for
        which its publisher has paid."""
        self._end_run()
        recipients: list[Recipient] = [self.retained] if retain else []
        total = RUN
        with suppress(Refused):  # a reload took the namespace away: nobody may have it any more
            rules, listeners, work = self._resolve(parcel.topic, parcel.batches[0][0].tags)
            parcel.rule = rules.slow_consumer
            if len(listeners) > NARROW:
                parcel.shared = _shared_data(parcel, self.office)
            recipients += listeners
            count = sum(map(len, parcel.batches))
            size = sum(map(data_bytes, parcel.batches))
            total += work + _encoding_work(len(listeners) or 1, count, size)
        if self.spans is not None:
            self.spans.deliver(parcel)
        if parcel.report_to and parcel.report is None:
            parcel.report = Report()
            work = self._deliver(parcel, recipients)
            if self.count_for is not None:
                self.count_for(parcel.report_to, parcel.report)
        else:
            work = self._deliver(parcel, recipients)
        return total + work

    def deliver_direct(self, parcel: Parcel) -> float:
        """Deliver what comes from another node to a connection of this one; return the work of it. Raises
        `Refused`: 102 for one that is not here, 111 for one that is behind."""
        self._end_run()
        _, recipients, work = self._resolve(parcel.topic, None)
        slow = _slow_one(recipients)
        if slow is not None:
            slow.check(parcel.batches[0][0].info)
        work += self._deliver(parcel, recipients)
        size = data_bytes(parcel.batches[0])
        return PARCEL + work + _encoding_work(1, len(parcel.batches[0]), size)

    def _deliver(self, parcel: Parcel, recipients: Sequence[Recipient]) -> float:
        """Deliver a parcel; return the work of this step that is known only now, such as full outboxes. Its
        publisher pays for that and for the writes."""
        office, meter = self.office, self.meter
        before, written = meter.done, office.written
        if len(recipients) <= NARROW:
            for recipient in recipients:
                recipient.deliver(parcel)
        else:
            # An outbox may be in many audiences, and is judged once all have delivered.
            with office.judging_later():
                for recipient in recipients:
                    recipient.deliver(parcel)
        if office.judged:
            meter.add(office.take_judged() * FULL)
        if parcel.report is not None:
            parcel.report.settle()
        work = meter.done - before - (office.written - written)
        if parcel.payer is not None:
            meter.charge(parcel.payer, before)
        return work

    def _resolve(
        self, topic: str, tags: Mapping[str, str] | None
    ) -> tuple[TopicRules, list[Recipient], float]:
        """The rules of a topic, the recipients of what is published to it with these tags, and the work
        of the fan-out. Raises `Refused`."""
        if not topic.startswith(_CONNECTIONS):
            self.rights.check_topic(topic)
            book = self.rights.book
            rules = book.only or book.of(topic)
            recipients, work = self._listeners(topic, rules, tags)
            if self.groups is not None:
                shares = list(self.groups.recipients(topic, rules))
                recipients += shares
                work += AUDIENCE * len(shares)
            return rules, recipients, work
        fd = direct_fd(topic)
        if fd is not None:
            self.rights.check_direct()
            peer = self.hub.sessions.get(fd)
            if peer is None and self.ways is not None:
                return DIRECT_RULES, [self.ways.way_to(topic, fd)], PEER
            if peer is None or not peer.takes_direct:
                raise Refused(ErrorCode.UNKNOWN_CHANNEL, f"no connection has fd {fd}")
            if peer.outbox.is_behind():
                return DIRECT_RULES, [SlowMailbox(topic, peer, is_one_of_several=False)], PEER
            return DIRECT_RULES, [peer.mailbox], PEER
        self.rights.check_topic(topic)
        self.rights.check_direct()
        user = topic[len(PERSONAL) :]
        peers = [self.hub.sessions.get(fd) for fd in self.hub.sessions.fds_of(user)]
        here = [peer for peer in peers if peer is not None and peer.takes_direct]
        if not here and self.ways is None:
            raise Refused(ErrorCode.UNKNOWN_CHANNEL, f"user {user!r} has no connection")
        return DIRECT_RULES, _direct(topic, here, self.office), PEER * len(here)

    def _listeners(
        self, topic: str, rules: TopicRules, tags: Mapping[str, str] | None
    ) -> tuple[list[Recipient], float]:
        found = self.hub.listeners(topic)
        if len(found) == 1 and found[0].name == topic and found[0].is_plain:
            # Nearly all topics: a third of the work of the loop below.
            (only,) = found
            everybody: list[Recipient] = list(only.audiences.values())
            return everybody, len(everybody) * AUDIENCE + only.members * PEER
        if not found:
            return [], 0.0
        recipients: list[Recipient] = []
        work = len(found) * LISTENERS
        node = FILTER_NODE + (_longest(tags) / 1024 * TAG_KILOBYTE if tags else 0.0)
        receiver = self.rights.receiver(rules, topic)
        for listeners in found:
            admits = None if listeners.name == topic else receiver
            audiences: Collection[Audience] = listeners.audiences.values()
            members = listeners.members
            if not listeners.is_plain:
                if listeners.picky is not None:
                    wanting, nodes = listeners.picky.wanting(tags)
                    audiences = [*audiences, *wanting]
                    work += nodes * node
                members = sum(map(len, audiences))
            work += len(audiences) * AUDIENCE + members * PEER
            if admits is None:
                recipients += audiences
            else:
                recipients += [each.narrowed(admits) for each in audiences]
                work += members * ASKED
            if self.groups is not None:
                continue
            for group in listeners.groups.values():
                recipients.append(GroupRecipient(group, admits))
                work += AUDIENCE + group.looks * ASKED
        return recipients, work

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

    # subscribing

    def subscribe(self, subscription: Subscription) -> None:
        """Add a subscription; those who watch its topic learn of it with the next `announce`."""
        self._end_run()
        self.meter.add(SUBSCRIPTION + (PATTERN if is_pattern(subscription.name) else 0.0))
        self.hub.subscribe(subscription)
        if isinstance(subscription.subscriber, Peer):
            subscription.subscriber.weigh(subscription, 1)
        if self.watchers.roster is not None:
            self.watchers.roster.entered(subscription)
        _emit(self.event_sink, EventKind.SUBSCRIBED, subscription)

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
            self._emit_left(subscription, code, reason)
            self.watchers.left(subscription)
        return subscription

    def leave(self, peer: Peer, work: float = inf) -> None:
        """Remove the subscriptions of a peer that goes, and tell those who watch; as many of them as
        so much work goes for. That may be none: see `Watchers.weigh_leaving`."""
        self._end_run()
        until = self.meter.done + work
        for name in list(peer.subscriptions):
            needed = LEFT + self.watchers.weigh(name)  # as `weigh_leaving` has it, to the last bit
            if self.meter.done + needed > until:
                break
            self.meter.add(LEFT)
            self.unsubscribe(peer, name, UnsubscribeCode.DISCONNECT, "disconnected")

    def bind(self, peer: Peer, user: str) -> list[str]:
        """Make a peer another user's, in one step, and tell those who watch its topics.

        Ends, and returns, the subscriptions that the new user may not have; the client is told by
        the caller.
        """
        self._end_run()
        roster = self.watchers.roster
        before = {name: each.info for name, each in peer.subscriptions.items()}
        self.hub.sessions.bind(peer, user)
        kept = [each for each in peer.subscriptions.values() if self.rights.keeps(peer, each)]
        lost = [name for name in peer.subscriptions if name not in {each.name for each in kept}]
        for subscription in kept:
            self.watchers.left_as(subscription, before[subscription.name])
            self.watchers.joined(subscription)
            if roster is not None:
                roster.entered(subscription)
        for name in lost:
            subscription = peer.subscriptions[name]
            self.hub.unsubscribe(peer, name)
            self._emit_left(subscription, UnsubscribeCode.SERVER, "other user")
            self.watchers.left_as(subscription, before[name])
        return lost

    def _emit_left(self, subscription: Subscription, code: int, reason: str) -> None:
        if isinstance(subscription.subscriber, Peer):
            subscription.subscriber.weigh(subscription, -1)
        if self.watchers.roster is not None:
            self.watchers.roster.left(subscription)
        _emit(self.event_sink, EventKind.UNSUBSCRIBED, subscription, code=code, reason=reason)


def _slow_one(recipients: Sequence[Recipient]) -> SlowMailbox | Way | None:
    """The only recipient of `fd:N` or `user:NAME`, if that is a peer which is behind, or on another node: it
    may have to be asked first."""
    if not recipients:
        return None
    first = recipients[0]
    if isinstance(first, Way):
        return first
    return first if isinstance(first, SlowMailbox) and not first.is_one_of_several else None


def _defers(
    engine: Engine,
    topic: str,
    rules: TopicRules,
    recipients: Sequence[Recipient],
    more: bool = False,
) -> bool:
    """Whether somebody has to take it before it is delivered: the engine, or another node. Raises
    `Refused`."""
    if rules is DIRECT_RULES and topic.startswith(DIRECT):
        return isinstance(recipients[0], Way)
    return engine.defers(topic, rules, more=more)


def _hand_over(
    engine: Engine, submission: Submission, recipients: Sequence[Recipient]
) -> list[Done]:
    """Hand deferred publications to those who have to take them."""
    first = recipients[0] if recipients else None
    if isinstance(first, Way):
        first.send(submission.parcel, submission.dones)
    else:
        engine.submit(submission)
    return submission.dones


def _emit(
    sink: EventSink | None,
    kind: EventKind,
    subscription: Subscription,
    **fields: Unpack[EventFields],
) -> None:
    subscriber = subscription.subscriber
    if sink is not None and subscriber.fd:  # not this very program
        fields["topic"] = subscription.name
        sink.emit(kind, subscriber.fd, subscriber.user, **fields)


def _encoding_work(width: int, count: int, size: int) -> float:
    """The work of encoding so many publications of so many bytes together for `width` audiences."""
    copies = 1 if width > NARROW and size > count * LARGE else width
    return width * count * PUBLICATION + copies * size / 1024 * KILOBYTE


def _shared_data(parcel: Parcel, office: PostOffice) -> SharedData | None:
    """The data of one publication that is too large to be encoded for each of many audiences."""
    batches = parcel.batches
    if len(batches) > 1 or len(batches[0]) > 1 or len(batches[0][0].data) <= LARGE:
        return None
    return SharedData(batches[0][0].data, office.ledger)


def _longest(tags: Mapping[str, str]) -> int:
    return max(map(len, tags.values()))


def _direct(topic: str, peers: Iterable[Peer], office: PostOffice) -> list[Recipient]:
    audiences: dict[object, PeerAudience] = {}
    slow: list[Recipient] = []
    for peer in peers:
        if peer.outbox.is_behind():
            slow.append(SlowMailbox(topic, peer, is_one_of_several=True))
            continue
        assert peer.codec is not None, "it is known which protocol a peer speaks"
        audience = audiences.get(peer.codec)
        if audience is None:
            audience = audiences[peer.codec] = PeerAudience(topic, peer.codec, office)
        audience.outboxes[peer.outbox] = peer
    return [*audiences.values(), *slow]
