"""What has to be true: of each thing that a client is told, and of everything when all are at rest."""

import json
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import trio

from broker.core.memory import Part
from broker.core.messages import PUBLICATION_BYTES
from tests.simulation.clients import Asked, Client, Conn, Sub
from tests.simulation.ledger import Sent, Told, number_of
from tests.simulation.settings import CONFIG, RULES

if TYPE_CHECKING:
    from tests.simulation.world import Seat, World


@attrs.define(eq=False)
class Checks:
    """Each raises `AssertionError`, in words that say what is wrong."""

    world: "World"

    # what clients are told

    def connected(self, conn: Conn) -> None:
        before = self.world.by_fd.setdefault(conn.fd, conn)
        assert before is conn, f"the fd {conn.fd} was used again"

    def _decided(self, key: object, asked: Asked) -> int:
        return max(asked.since, self.world.ledger.decided.get(key, 0))

    def may_subscribe(self, conn: Conn, asked: Asked) -> None:
        since = self._decided(("subscribe", conn.fd, asked.topic), asked)
        if asked.topic == "vip":
            assert any(conn.could_be(since)), "nobody is subscribed to what is for users"
            assert self.world.vip_open(since), "somebody is subscribed to what is closed"

    def published(self, conn: Conn, asked: Asked) -> None:
        if asked.topic == "vip":
            since = self._decided(("publish", asked.number), asked)
            assert any(conn.could_be(since)), "nobody published to what is for users"
            assert self.world.vip_open(since), "somebody published to what is closed"
        if asked.topic in RULES and self.world.script.has_witness:
            number = asked.number
            if len(self.world.seats) == 1 and not self.world.living:
                return
            self.world.ledger.check_later(partial(self._check_told, number, len(self.world.seats)))

    def _check_told(self, number: int, seats: int) -> None:
        if seats == len(self.world.seats) and not any(seat.is_cut for seat in self.world.seats):
            assert self.world.ledger.was_published(number), (
                f"{number} is acknowledged, not delivered"
            )

    def refusal(self, conn: Conn, asked: Asked, code: int) -> None:
        """An innocent request to an open topic is not refused."""
        calm = not self.world.app.moods.by_kind and self.world.script.engine in ("memory", "sqlite")
        if calm and code == 103 and asked.kind == "subscribe":
            hooked = {"subscribe"} & self.world.script.hooks
            assert asked.topic == "vip" or hooked, f"{asked.topic} is open"

    def may_read(self, conn: Conn, asked: Asked) -> None:
        if asked.topic == "vip" and "vip" not in conn.client.subs:
            assert any(conn.could_be(asked.since)), "nobody reads what is for users"
            assert self.world.vip_open(asked.since), "somebody reads what is closed"

    def length(self, publications: Sequence[Any], limit: int) -> None:
        most = CONFIG.history_max_limit if limit < 0 else min(limit, CONFIG.history_max_limit)
        assert len(publications) <= most, (
            f"{len(publications)} publications, and the limit is {most}"
        )
        self._check_bytes(publications, "a history")

    def _check_bytes(self, publications: Sequence[Any], what: str) -> None:
        size = sum(len(json.dumps(each["data"])) + PUBLICATION_BYTES for each in publications)
        most = CONFIG.history_reply_bytes + 64  # written with spaces here
        assert len(publications) < 2 or size <= most, f"{what} of {size} bytes"

    def recovered(
        self,
        conn: Conn,
        topic: str,
        epoch: str,
        offset: int,
        missed: Sequence[Any],
        sub: Sub,
    ) -> None:
        self._check_bytes(missed, "a recovery")

    def rights(self, conn: Conn, sub: Sub, sent: Sent, topic: str) -> None:
        if topic != "vip":
            return
        if sub.name != topic:
            assert any(conn.could_be(sent.at)), f"{sent.number} is for users"
            assert self.world.vip_open(sent.at), f"{sent.number} is for nobody"
        elif "subscribe" not in self.world.script.hooks:  # else the hook's yes outlives a bind
            assert any(conn.could_be(sent.at)), f"{sent.number} is for users"

    def group(self, conn: Conn, sub: Sub, sent: Sent) -> None:
        key = f"{sub.group} of {sub.name}", sent.number
        before = self.world.ledger.group_members.setdefault(key, conn.fd)
        assert before == conn.fd, f"{key} came to fd {before} and to fd {conn.fd}"

    def present(self, conn: Conn, fd: int) -> None:
        other = self.world.by_fd.get(fd)
        assert other is None or other.let_in, f"fd {fd} is present and was never here"

    def message(self, conn: Conn, data: Any) -> None:
        assert data == f"for {conn.fd}" or str(data).startswith("heard"), data

    def plain(self, conn: Conn, text: str) -> None:
        if text.isdigit():
            sent = self.world.ledger.sent[int(text)]
            assert sent.topic == f"fd:{conn.fd}" or sent.topic[5:] in conn.could_be(sent.at), text
        else:
            assert text == f"for {conn.fd}" or text.startswith("heard"), text

    # at rest

    def client(self, client: Client) -> None:
        conn = client.conn
        if conn is None or not conn.is_open:
            return
        assert not client.open_asked, f"no answer to {client.open_asked}"
        if not self.world.script.has_witness or not conn.rested or conn.harmed:
            return
        for sub in client.subs.values():
            if sub.rested and not sub.group and sub.is_on:
                self._check_sub(conn, sub)

    def _check_sub(self, conn: Conn, sub: Sub) -> None:
        """All that was published since the last rest has come, or is reported as dropped."""
        witness = self.world.seat_of(conn).witness
        told = [each for each in witness.order[sub.place :] if self._is_for(conn, sub, *each)]
        expected = [number for _, number in told]
        certain = [n for t, n in told if t != "vip"]
        if sub.seen == expected:
            return
        seen = [n for n in sub.seen if self.world.ledger.sent[n].topic != "vip"]
        missing = sorted(set(certain) - set(seen))
        assert not set(sub.seen) - set(expected), "more came than was published"
        if not missing:
            assert seen == certain, f"{sub.name}: {seen} is not the order {certain}"
            return
        seat = self.world.seat_of(conn)
        details = seat.broker.node.connection_details(conn.fd)
        dropped = 0 if details is None else details.messages_dropped
        assert len(missing) <= dropped, f"{missing} never came on {sub.name} to fd {conn.fd}"

    def _is_for(self, conn: Conn, sub: Sub, topic: str, number: int) -> bool:
        sent = self.world.ledger.sent[number]
        if sub.name not in (topic, ">"):
            return False
        if sub.tag and (sent.tags or {}).get("k") != sub.tag:
            return False
        return conn.fd not in sent.not_to

    async def topic(self, topic: str) -> None:
        """What is acknowledged is kept, who is positioned is at the top, and presence is right."""
        seat = self.world.seats[0]
        rules = RULES[topic]
        publications, position = await seat.broker.history(topic)
        kept = [number_of(each.value) for each in publications]
        for each in publications:
            self.world.ledger.saw(topic, position.epoch, each.offset, number_of(each.value))
        told = self.told(topic)
        now = trio.current_time()
        sure = [
            each.number
            for each in told[-rules.history_size :]
            if each.at > max(self.world.sure_from[topic], now - rules.history_ttl + 0.1)
        ]
        if rules.history_size and self.world.script.has_witness:
            assert kept[len(kept) - len(sure) :] == sure, f"{topic} keeps {kept}, not {sure}"
        present = {int(client) for client in await seat.broker.presence(topic)}
        here = set()
        for client in self.world.clients:
            conn, sub = client.conn, client.subs.get(topic)
            if conn is not None and sub is not None and sub.is_on:
                here.add(conn.fd)
                spot = client.spots.get(topic)
                gaps = sub.tag or topic in conn.without_echo
                if sub.positioned and not gaps and spot is not None:
                    assert (spot.epoch, spot.offset) == (position.epoch, position.offset), (
                        f"fd {conn.fd} is at {spot.offset} of {topic}, which is at {position.offset}"
                    )
        for bystander in self.world.bystanders:
            present.discard(bystander.fd)
        going = {
            conn.fd for conn in self.world.conns.values() if conn.wire.is_over and not conn.closes
        }
        assert here <= present <= here | going, f"{present} are present on {topic}, not {here}"

    def told(self, topic: str) -> list[Told]:
        """All that was ever delivered to a topic, over restarts."""
        return [each for one in self.world.ledger.witnesses for each in one.told.get(topic, ())]

    def nothing_left(self, seat: "Seat") -> None:
        node = seat.broker.node
        services, router = node.services, node.router
        assert not services.connections, f"{len(services.connections)} connections are left"
        assert services.admission.count() == 0, "streams are left"
        assert not len(services.requests), "requests are left"
        assert not len(services.wills), "wills are left"
        assert not [t for t in router.hub.topics() if t != ">"], f"{router.hub.topics()} are left"
        parts = node.figures.statistics().memory.parts
        for part in (Part.OUTBOXES, Part.INCOMING, Part.SUBSCRIPTIONS, Part.WILLS, Part.REQUESTS):
            assert not parts.get(part, 0), f"{parts[part]} bytes of {part} are left"
