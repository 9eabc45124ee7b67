"""The clients of a simulation: each keeps to the protocol, and finds out when the broker does not.

The rules that a client holds the broker to:

- Nothing of a topic comes unless it is subscribed: behind the reply, before the end.
- Of one sender, what comes on one subscription comes in its order, and once.
- A publication with an offset stands behind the last one, and is what everybody else saw there.
- A recovery begins where this client was. Official SDKs keep the position of the reply before
  they hand out the first publication of it, and an app may stop in the middle: so does this one.
- Nobody gets what he may not have: not another's direct message, not a topic that is closed to his user
  or was when a hook had said yes.
- Each command has one answer, with an error that its kind may have.
"""

from typing import TYPE_CHECKING, Any

import attrs
import trio

from broker.testing import client_frame
from broker.transport import frames
from tests.simulation.carriers import CARRIERS, Carrier, HttpStream, Plain, Said, WebSocket
from tests.simulation.ledger import Sent, number_of, payload
from tests.simulation.network import Wire

if TYPE_CHECKING:
    from tests.simulation.world import World

ERRORS: dict[str, frozenset[int]] = {
    "connect": frozenset((100, 101, 103, 109, 110)),
    "subscribe": frozenset((100, 102, 103, 105, 106, 112)),
    "unsubscribe": frozenset(),
    "publish": frozenset((100, 102, 103, 111)),
    "history": frozenset((100, 103, 108, 112)),
    "presence": frozenset((100, 103, 106, 108)),
    "presence_stats": frozenset((100, 103, 108)),
    "call": frozenset((100, 103, 104, 400)),
    "request": frozenset((100, 102, 103, 106, 111, 400, 503, 504)),
    "reply": frozenset((100, 103, 107)),
    "will": frozenset((100, 102, 103, 106)),
}
"""The error replies that each kind of command may have here."""

_SILENT = {"heartbeat", "slow", "server"}
"""Who may end a connection of which nothing comes any more: the server where a message is not whole."""


@attrs.define(eq=False)
class Conn:
    """One connection that a client has asked for, from its request to its close hook."""

    number: int
    client: "Client"
    wire: Wire
    carrier: Carrier
    node: int
    token: str
    fd: int = 0
    causes: set[str] = attrs.field(factory=set)
    """Who may have ended it, by what has happened: the initiators that would be true."""
    codes: set[int] = attrs.field(factory=set)
    """What it has said in a Close frame."""
    let_in: bool = False
    users: list[tuple[int, str]] = attrs.field(factory=list)
    closes: int = 0
    is_open: bool = False
    """It has connected."""
    harmed: bool = False
    """It stalled, or something else kept it from all that is its."""
    rested: bool = False
    """It was here at the last rest, and nothing has happened to it since."""
    will: int = 0
    without_echo: set[str] = attrs.field(factory=set)
    """Topics of which it did not want what it published itself."""
    direct: dict[tuple[str, str], int] = attrs.field(factory=dict)
    """What has come last to it by its own name, from each sender."""

    def could_be(self, since: int) -> set[str]:
        """The users that it may have been since that count of changes."""
        found = {user for at, user in self.users if at > since}
        before = [user for at, user in self.users if at <= since]
        return found | set(before[-1:])


@attrs.define(eq=False)
class Sub:
    """A subscription of one connection."""

    name: str
    is_on: bool = True
    """False once its end was asked for."""
    group: str = ""
    tag: str = ""
    positioned: bool = False
    newest: dict[tuple[str, str], int] = attrs.field(factory=dict)
    seen: list[int] = attrs.field(factory=list)
    """Since the last rest."""
    may_get_retained: bool = False
    retained: set[str] = attrs.field(factory=set)
    rested: bool = False
    place: int = 0
    """How much its node's witness had told at that rest."""


@attrs.define(eq=False)
class Spot:
    """Where a client is in one topic. Kept beyond its connection."""

    epoch: str
    offset: int


@attrs.frozen
class Asked:
    kind: str
    topic: str = ""
    since: int = 0
    number: int = 0
    sub: Said = attrs.field(factory=dict)
    limit: int = 0


class Client:
    def __init__(self, world: "World", number: int) -> None:
        self.world = world
        self.ledger = world.ledger
        self.number = number
        self.conn: Conn | None = None
        self.spots: dict[str, Spot] = {}
        self.wanted: dict[str, Said] = {}
        self.subs: dict[str, Sub] = {}
        self.asked: dict[int, Asked] = {}
        self.keys_used: list[Sent] = []
        self.stops_after = -1
        """After so many publications of the next recovery the app stops."""
        self._last_id = 1
        self._session = self._node = ""
        self._outgoing: list[bytes] = []
        self._request: tuple[Wire, bytearray] | None = None
        self._half_read: list[Wire] = []

    # what it does

    def join(self, kind: str, token: str, at_once: bool, node: int, wire: Wire) -> None:
        assert self.conn is None
        world = self.world
        carrier = CARRIERS[kind](world.new_number())
        conn = Conn(carrier.number, self, wire, carrier, node, token)
        self.conn = world.conns[carrier.number] = conn
        self.subs, self.asked, self._last_id = {}, {}, 1
        self._session, self._outgoing = "", []
        connect: Said = {"id": 1, "connect": {"token": token} if token else {}}
        if kind != "plain":
            self.asked[1] = Asked("connect", since=self.ledger.changes)
        more: list[Said] = []
        if kind == "uni_sse":
            more = [{"channel": topic} for topic in self.wanted]
            for topic in self.wanted:
                self.asked[-len(self.asked)] = Asked("subscribe", topic, self.ledger.changes)
        elif at_once and kind not in ("plain", "sse_get"):
            more = [self._subscribing(topic, **how) for topic, how in self.wanted.items()]
        wire.send(carrier.begin(connect, more))

    @property
    def speaks(self) -> bool:
        """Whether it may send commands now."""
        conn = self.conn
        return conn is not None and conn.is_open and conn.carrier.has_commands

    @property
    def open_asked(self) -> list[Asked]:
        """What it has asked the broker itself, and is not answered."""
        if self.conn is None or not self.conn.is_open:
            return []
        return [asked for asked in self.asked.values() if asked.kind != "request"]

    @property
    def fd(self) -> int:
        return self.conn.fd if self.conn is not None else 0

    def command(self, kind: str, method: str, fields: Said, **asked: Any) -> Said:
        self._last_id += 1
        self.asked[self._last_id] = Asked(kind, since=self.ledger.changes, **asked)
        return {"id": self._last_id, method: fields}

    def say(self, *commands: Said) -> None:
        conn = self.conn
        if conn is None or not commands:
            return
        message = conn.carrier.write(commands)
        if conn.carrier.by_requests:
            self._outgoing.append(message)
            self._next_request()
        else:
            conn.wire.send(message)

    def subscribe(self, topic: str, **how: Any) -> None:
        self.wanted[topic] = how
        waits = any(a.kind == "subscribe" and a.topic == topic for a in self.asked.values())
        if self.speaks and topic not in self.subs and not waits:
            self.say(self._subscribing(topic, **how))

    def _subscribing(
        self, topic: str, data: Any = None, group: str = "", tag: str = "", fresh: bool = False
    ) -> Said:
        fields: Said = {"channel": topic}
        if group:
            fields["data"] = {"group": group}
        else:
            fields["recoverable"] = True
            if data is not None:
                fields["data"] = data
            spot = None if fresh else self.spots.get(topic)
            if spot is not None:
                fields |= {"recover": True, "epoch": spot.epoch, "offset": spot.offset}
        if tag:
            fields["tf"] = {"key": "k", "cmp": "eq", "val": tag}
        return self.command("subscribe", "subscribe", fields, topic=topic, sub=fields)

    def unsubscribe(self, topic: str) -> None:
        sub = self.subs.get(topic)
        if self.speaks and sub is not None and sub.is_on:
            self.wanted.pop(topic, None)
            sub.is_on = False
            self.say(self.command("unsubscribe", "unsubscribe", {"channel": topic}, topic=topic))

    def publish(self, topic: str, count: int, how: str, large: bool = False) -> None:
        """`how`: with replies in one message, one by one, or without replies."""
        if not self.speaks:
            return
        commands = []
        for _ in range(count):
            sent = self.ledger.send(topic, self.sender)
            fields = {"channel": topic, "data": payload(sent.number, large)}
            if how == "silent":
                commands.append({"publish": fields})
            else:
                made = self.command("publish", "publish", fields, topic=topic, number=sent.number)
                commands.append(made)
        if how == "one by one":
            for command in commands:
                self.say(command)
        else:
            self.say(*commands)

    @property
    def sender(self) -> str:
        assert self.conn is not None
        return f"client {self.conn.number}"

    def publish_by_call(
        self, topic: str, *, key: str = "", again: bool = False, echo: bool = True
    ) -> None:
        """By the broker's own rpc method, with a report; `again` repeats the last one with a key."""
        if not self.speaks:
            return
        assert self.conn is not None
        sent = None
        if again and self.keys_used and not self.conn.will:
            sent = self.keys_used[-1]
            key = sent.once[2] if sent.once else ""
            topic = sent.topic
            if sent.sender != self.sender or sent.number <= self.ledger.keys_from:
                sent = None
        if sent is None:
            user = self.conn.users[-1][1] if self.conn.users else ""
            owner = f"user {user}" if user else f"fd {self.fd}"
            once = (owner, topic, key) if key else None
            left_out = () if echo else (self.fd,)
            sent = self.ledger.send(topic, self.sender, once=once, not_to=left_out)
            if once is not None:
                self.keys_used.append(sent)
        if not echo:
            self.conn.without_echo.add(topic)
        params: Said = {"topic": topic, "data": sent.number, "echo": echo, "report": True}
        if key:
            params["key"] = key
        fields = {"method": "publish", "data": params}
        self.say(self.command("publish", "rpc", fields, topic=topic, number=sent.number))

    def call(self, method: str, data: Any) -> None:
        if self.speaks:
            self.say(self.command("call", "rpc", {"method": method, "data": data}, number=data))

    def ask(self, to: str, seconds: float) -> None:
        """Request something of another client."""
        if self.speaks and to != f"fd:{self.fd}":
            sent = self.ledger.send(to, self.sender)
            data = {"to": to, "data": sent.number, "seconds": seconds}
            fields = {"method": "request", "data": data}
            self.say(self.command("request", "rpc", fields, topic=to, number=sent.number))

    def leave_will(self, topic: str, retain: bool) -> None:
        if self.speaks:
            assert self.conn is not None
            sent = self.ledger.send(topic, f"will {self.world.new_number()}", not_to=(self.fd,))
            data = {"topic": topic, "data": sent.number, "retain": retain}
            fields = {"method": "will", "data": data}
            self.say(self.command("will", "rpc", fields, topic=topic, number=sent.number))

    def read_history(self, topic: str, limit: int) -> None:
        if self.speaks:
            fields = {"channel": topic, "limit": limit}
            self.say(self.command("history", "history", fields, topic=topic, limit=limit))

    def read_presence(self, topic: str, kind: str) -> None:
        if self.speaks:
            self.say(self.command(kind, kind, {"channel": topic}, topic=topic))

    def say_plain(self, text: str) -> None:
        conn = self.conn
        if conn is not None and conn.is_open and isinstance(conn.carrier, Plain):
            conn.wire.send(conn.carrier.write([{"text": text}]))

    def close(self, code: int) -> None:
        """Say goodbye, where there is a way to say it."""
        conn = self.conn
        if conn is None or not isinstance(conn.carrier, WebSocket):
            return
        conn.causes.add("client")
        conn.codes.add(code)
        conn.wire.send(client_frame(frames.CLOSE, code.to_bytes(2, "big")))

    def drop(self, how: str, quarters: int) -> None:
        """Lose the connection, and of what has come all but the first `quarters`."""
        if how == "vanish" and self.world.is_real:
            how = "reset"  # half a minute until it is missed
        conn = self.conn
        if conn is None:
            return
        data = conn.wire.read()
        self._hear(conn, data[: len(data) * quarters // 4])
        if self.conn is not conn:
            return
        self._lose(conn, how)

    def _lose(self, conn: Conn, how: str) -> None:
        conn.causes |= {"network"} | (_SILENT if how == "vanish" else set())
        getattr(conn.wire, how)()
        if how == "half_close":  # the rest still comes, and nobody is there
            self.world.orphans.append(conn.wire)
        self._forget()

    def _forget(self) -> None:
        """The connection is over."""
        if self._request is not None:
            self.world.orphans.append(self._request[0])
            self._request = None
        self.conn = None
        self.subs, self.asked = {}, {}
        self._outgoing = []

    # what it hears

    def pump(self) -> bool:
        """Take what has come; whether there was anything."""
        conn, moved = self.conn, False
        if self._request is not None:
            moved = self._pump_request()
        if conn is not None and self.conn is conn and not conn.wire.is_stalled:
            data = conn.wire.read()
            if data:
                moved = True
                self._hear(conn, data)
            if self.conn is conn and conn.wire.has_ended:
                moved = True
                conn.wire.reset()
                self._forget()
        return moved

    def _hear(self, conn: Conn, data: bytes) -> None:
        self.world.note(data)
        for said in conn.carrier.hear(data):
            if self.conn is not conn:
                return
            self._hear_one(conn, said)
        if self.conn is conn and conn.carrier.refused:
            assert conn.carrier.refused in (403, 503), conn.carrier.refused
            self._forget()
            conn.wire.reset()
        elif self.conn is conn and conn.carrier.close is not None:
            code, _ = conn.carrier.close
            answer = b"" if code == 1005 else code.to_bytes(2, "big")
            conn.wire.send(client_frame(frames.CLOSE, answer))
            conn.causes.add("network")
            self._forget()

    def _hear_one(self, conn: Conn, said: Said) -> None:
        if not said:
            if conn.carrier.speaks:
                self.say({})
        elif "pong" in said:
            conn.wire.send(client_frame(frames.PONG, said["pong"]))
        elif "text" in said:
            conn.is_open = True
            self.world.checks.plain(conn, said["text"])
        elif "push" in said:
            self._hear_push(conn, said["push"])
        else:
            self._hear_reply(conn, said)

    def _hear_reply(self, conn: Conn, said: Said) -> None:
        assert said["id"] in self.asked, f"an answer to nothing: {said}"
        asked = self.asked.pop(said["id"])
        error = said.get("error")
        if error is not None:
            code = error["code"]
            if asked.kind == "publish":
                self.ledger.refused.add(asked.number)
            if code not in ERRORS[asked.kind]:
                raise AssertionError(f"{asked.kind} of {asked.topic!r} was refused: {error}")
            if asked.kind in ("publish", "subscribe"):
                self.world.checks.refusal(conn, asked, code)
            return
        getattr(self, f"_{asked.kind}_done")(conn, asked, said)

    def _connect_done(self, conn: Conn, asked: Asked, said: Said) -> None:
        reply = said["connect"]
        assert not conn.is_open, "connected twice"
        conn.is_open = True
        conn.fd = int(reply["client"])
        self._session, self._node = reply.get("session", ""), reply.get("node", "")
        self.world.checks.connected(conn)
        for topic in reply.get("subs", {}):
            if topic.startswith("fd:"):
                assert topic == f"fd:{conn.fd}", "another's fd"
            elif topic.startswith("user:"):
                assert topic[5:] in conn.could_be(asked.since), f"{topic} is another's"
            else:
                self.subs[topic] = Sub(topic)
        self._next_request()

    def _subscribe_done(self, conn: Conn, asked: Asked, said: Said) -> None:
        topic, reply, world = asked.topic, said["subscribe"], self.world
        assert topic not in self.subs, "subscribed twice"
        world.checks.may_subscribe(conn, asked)
        fields = asked.sub
        group = (fields.get("data") or {}).get("group", "") if fields else ""
        sub = Sub(topic, group=group, tag=fields.get("tf", {}).get("val", "") if fields else "")
        sub.positioned = reply.get("positioned", False)
        self.subs[topic] = sub
        if not sub.positioned:
            sub.may_get_retained = not group
            return
        epoch, offset = reply["epoch"], reply.get("offset", 0)
        missed = reply.get("publications", [])
        assert reply.get("was_recovering", False) == fields.get("recover", False)
        if reply.get("recovered"):
            assert (epoch, offset) == (fields["epoch"], fields.get("offset", 0)), "not from there"
            world.checks.recovered(conn, topic, epoch, offset, missed, sub)
        else:
            assert not missed, "publications without a recovery"
            sub.may_get_retained = True
        self.spots[topic] = Spot(epoch, offset)
        stops, self.stops_after = (self.stops_after, -1) if missed else (-1, self.stops_after)
        for count, publication in enumerate(missed):
            if count == stops:
                self._lose(conn, "reset")
                return
            self._see(conn, sub, topic, publication, live=False)

    def _unsubscribe_done(self, conn: Conn, asked: Asked, said: Said) -> None:
        self.subs.pop(asked.topic, None)

    def _publish_done(self, conn: Conn, asked: Asked, said: Said) -> None:
        number = asked.number
        self.ledger.acknowledged[number] = trio.current_time()
        self.world.checks.published(conn, asked)
        if "rpc" in said:
            report = said["rpc"]["data"]
            assert report["matched"] == report["queued"] + report["dropped"], report
            assert len(report["failed"]) <= report["dropped"]

    def _history_done(self, conn: Conn, asked: Asked, said: Said) -> None:
        reply, topic = said["history"], asked.topic
        self.world.checks.may_read(conn, asked)
        publications = reply.get("publications", [])
        self.world.checks.length(publications, asked.limit)
        for before, one in zip([None, *publications], publications, strict=False):
            if before is not None:
                assert one["offset"] == before["offset"] + 1, "a hole in the history"
            self.ledger.saw(topic, reply["epoch"], one["offset"], number_of(one["data"]))
        if publications:
            assert publications[-1]["offset"] <= reply["offset"]

    def _presence_done(self, conn: Conn, asked: Asked, said: Said) -> None:
        self.world.checks.may_read(conn, asked)
        for client, info in said["presence"].get("presence", {}).items():
            assert info["client"] == client
            self.world.checks.present(conn, int(client))

    def _presence_stats_done(self, conn: Conn, asked: Asked, said: Said) -> None:
        self.world.checks.may_read(conn, asked)

    def _call_done(self, conn: Conn, asked: Asked, said: Said) -> None:
        assert said["rpc"]["data"] == {"called": asked.number}

    def _request_done(self, conn: Conn, asked: Asked, said: Said) -> None:
        answer = said["rpc"]["data"]
        assert answer == {"answer": asked.number}, f"{asked.number} was answered with {answer}"

    def _reply_done(self, conn: Conn, asked: Asked, said: Said) -> None:
        pass

    def _will_done(self, conn: Conn, asked: Asked, said: Said) -> None:
        conn.will = asked.number

    def _hear_push(self, conn: Conn, push: Said) -> None:
        if "disconnect" in push:
            return
        if "message" in push:
            self.world.checks.message(conn, push["message"]["data"])
            return
        topic = push["channel"]
        if "unsubscribe" in push:
            if topic.startswith("user:"):
                return
            if -1 in self.asked or not conn.carrier.speaks:  # one way: the answer to its wish
                self._forget_wish(topic)
            else:
                assert topic in self.subs, f"the end of no subscription: {topic}"
            sub = self.subs.get(topic)
            if sub is None or sub.is_on:  # else it crosses our own, whose reply is to come
                self.subs.pop(topic, None)
        elif "subscribe" in push:
            if topic.startswith("user:"):
                assert topic[5:] in conn.could_be(0)
            elif not conn.carrier.speaks:
                self._forget_wish(topic)
                self.subs[topic] = Sub(topic, may_get_retained=True)
        elif "pub" in push:
            self._hear_pub(conn, topic, push["pub"])
        else:
            assert "join" in push or "leave" in push, push

    def _forget_wish(self, topic: str) -> None:
        for number, asked in list(self.asked.items()):
            if number < 0 and asked.topic == topic:
                del self.asked[number]

    def _hear_pub(self, conn: Conn, name: str, publication: Said) -> None:
        if name.startswith(("fd:", "user:")):
            self._hear_direct(conn, name, publication)
            return
        sub = self.subs.get(name)
        assert sub is not None, f"a publication on {name} without a subscription"
        if "reply_to" in publication.get("tags", {}):
            self._answer(conn, publication)
        elif not sub.is_on or publication.get("channel", "").startswith("by."):
            return
        elif publication.get("tags", {}).get("retained"):
            self._hear_retained(conn, sub, publication)
        else:
            topic = publication.get("channel") or name
            self._see(conn, sub, topic, publication)

    def _hear_direct(self, conn: Conn, name: str, publication: Said) -> None:
        if "reply_to" in publication.get("tags", {}):
            self._answer(conn, publication)
            return
        sent = self.ledger.sent[number_of(publication["data"])]
        assert sent.topic == name, f"{sent.number} was for {sent.topic}"
        if name.startswith("fd:"):
            assert name == f"fd:{conn.fd}", f"what was for {name}"
        else:
            users = conn.could_be(sent.at)
            assert name[5:] in users, f"what was for {name} came to {users}"
        key = name, sent.sender
        assert conn.direct.get(key, 0) < sent.number, "a sender's order, to one client"
        conn.direct[key] = sent.number

    def _answer(self, conn: Conn, publication: Said) -> None:
        """Answer who asks; twice out of three times."""
        number, tags = number_of(publication["data"]), publication["tags"]
        data: Said = {"reply_to": tags["reply_to"]}
        if number % 3:
            data["data"] = {"answer": number}
        else:
            data["error"] = {"code": 400, "message": "no"}
        if number % 7:
            self.say(self.command("reply", "rpc", {"method": "reply", "data": data}))

    def _hear_retained(self, conn: Conn, sub: Sub, publication: Said) -> None:
        topic = publication.get("channel") or sub.name
        assert sub.may_get_retained, "retained, and nothing new"
        assert topic not in sub.retained, "retained, twice"
        sub.retained.add(topic)
        sent = self.ledger.sent[number_of(publication["data"])]
        assert sent.topic == topic
        self.world.checks.rights(conn, sub, sent, topic)

    def _see(self, conn: Conn, sub: Sub, topic: str, publication: Said, live: bool = True) -> None:
        number, offset = number_of(publication["data"]), publication.get("offset", 0)
        sent = self.ledger.sent[number]
        assert sent.topic == topic, f"{number} was for {sent.topic}, and came on {topic}"
        assert not live or conn.fd not in sent.not_to, f"{number} was not for fd {conn.fd}"
        if sub.tag:
            tags = sent.tags or {}
            assert tags.get("k") == sub.tag, f"{number} has the tags {tags}, asked for {sub.tag}"
        self.world.checks.rights(conn, sub, sent, topic)
        key = topic, sent.sender
        newest = sub.newest.get(key, 0)
        assert newest < number, f"{number} of {sent.sender} came behind {newest} on {sub.name}"
        sub.newest[key] = number
        sub.seen.append(number)
        if sub.group:
            self.world.checks.group(conn, sub, sent)
        if sub.positioned:
            spot = self.spots[topic]
            if sub.tag or topic in conn.without_echo:
                assert offset > spot.offset, "offsets only grow"
            else:
                assert offset == spot.offset + 1, f"{offset} behind {spot.offset} on {topic}"
            spot.offset = offset
            self.ledger.saw(topic, spot.epoch, offset, number)

    # requests to /emulation

    def _next_request(self) -> None:
        """Send the next message, if none is on its way: two at once have no order."""
        conn = self.conn
        if conn is None or not self._outgoing or self._request is not None or not self._session:
            return
        carrier = conn.carrier
        assert isinstance(carrier, HttpStream)
        wire = self.world.new_wire(conn.node, conn.wire.sliced)
        wire.send(carrier.emulate(self._session, self._node, self._outgoing.pop(0)))
        self._request = wire, bytearray()

    def _pump_request(self) -> bool:
        assert self._request is not None
        wire, came = self._request
        data = wire.read()
        came += data
        if not wire.has_ended:
            return bool(data)
        self._request = None
        self.world.note(bytes(came))
        status = bytes(came[9:12])
        assert status in (b"", b"204", b"404", b"503"), bytes(came)
        self._next_request()
        return True
