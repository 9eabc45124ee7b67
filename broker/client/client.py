"""The client: its requests, and the task that keeps it connected."""

import itertools
import logging
import math
import re
import ssl
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Literal, cast, overload

import attrs
import trio
import trio_websocket

from broker.client.address import OpenStream, host_header, opener, split_url
from broker.client.backoff import RECONNECT_MOST_SECONDS, backoff
from broker.client.checked_stream import MAX_MESSAGE_BYTES, CheckedStream
from broker.client.link import Link
from broker.client.loss import LOSSES, Lost, TooLarge, explain, foreign, shorten
from broker.client.subscription import Held, Inbox, Join, Leave, Messages, Subscription, again
from broker.client.wire import (
    HistoryResult,
    PresenceResult,
    Push,
    Reply,
    StatsResult,
    Subscribed,
    encode,
    read_lines,
    read_reply,
)
from broker.core.messages import ClientInfo, Fd, Position, Publication
from broker.core.topics import mistaken_for_pattern
from broker.errors import (
    CannotConnect,
    ClientError,
    CloseCode,
    ConnectionLost,
    RequestFailed,
    Unavailable,
)
from broker.version import VERSION

CONNECT_SECONDS = 10.0
"""From the first packet to the connect reply. A phone on a bad network needs about four."""

CLOSE_SECONDS = 2.0
"""How long leaving waits for the broker's Close: long enough for a slow line, short enough for
somebody who has pressed Ctrl-C."""

PING_GRACE_SECONDS = 10.0
"""Added to the ping interval the broker names. The official clients have the same."""

LINES_A_TURN = 64
"""Replies, pushes or recovered publications between two turns of the app's tasks: about 1 ms."""

_NAME = "trio-broker"

_log = logging.getLogger("broker.client")


@attrs.frozen
class History:
    """Kept publications, and the position of the newest one the topic ever had."""

    publications: tuple[Publication, ...]
    position: Position


@attrs.frozen
class PresenceStats:
    """How many connections, and how many different users, are subscribed to a topic."""

    num_clients: int
    num_users: int


class Client:
    """A connection to the broker that comes back by itself; made by `open_client`.

    Methods that ask the broker wait for its reply. They raise `RequestFailed` for an error
    reply, `ConnectionLost` when the connection drops in between, and `Unavailable` once it is
    gone for good. Called while reconnecting, or while 1,000 commands or 4 MiB are queued, they
    wait: the caller brings the deadline. Cancelling one leaves the client usable; the request may
    still be carried out.

    A broker that does not keep to the protocol, or sends more than is taken at once, is a lost
    connection like any other: the log tells why, requests raise `ConnectionLost` with 1002, 1008
    or 1009, and the next connection is tried after a wait.

    `data` is any value that JSON can hold, or `msgspec.Raw` for ready JSON; `TypeError` for what JSON
    cannot, such as a set, with nothing sent.
    """

    def __init__(
        self,
        url: str,
        address: tuple[str, int, str],
        open_stream: OpenStream,
        headers: Sequence[tuple[bytes, bytes]],
    ) -> None:
        self.url = url
        self._held = Held()
        self.messages: Messages = Messages(self._wake_reader, self._held)
        """Publications for this fd, as an async iterator."""
        self._host, self._port, self._resource = address
        self._open_stream = open_stream
        self._headers = headers
        self._hello: dict[str, object] = {}
        self._fd: Fd = 0
        self._first = True
        self._link: Link | None = None
        self._end: Unavailable | None = None
        self._changed = trio.Event()
        self._subscriptions: dict[str, Subscription[Any]] = {}
        self._crowded: set[Inbox] = set()
        self._reader_wake: trio.Event | None = None
        self._stopped = trio.Event()
        self._life = trio.CancelScope()

    @property
    def fd(self) -> Fd:
        """The number of this connection on the broker; another one after each reconnect."""
        return self._fd

    @property
    def connected(self) -> bool:
        """Whether there is a connection now; False while reconnecting and once it is gone."""
        return self._link is not None and self._end is None

    async def publish(self, topic: str, data: object, *, reply: bool = True) -> None:
        """Publish `data` to everybody who subscribed to `topic`.

        With `reply=False` the command is only queued: fastest, at most once, and nobody tells
        you when it is refused. It waits when 1,000 commands are queued already.
        """
        params = {"channel": topic, "data": data}
        if reply:
            await self._request("publish", params)
        else:
            await self._send_only("publish", params)

    async def push(self, fd: Fd, data: object) -> None:
        """Send `data` to the one connection `fd`; `RequestFailed` 102 if there is no such fd."""
        await self.publish(f"fd:{fd}", data)

    async def send(self, data: object) -> None:
        """Send `data` to the server's app. There is no reply."""
        await self._send_only("send", {"data": data})

    async def rpc(self, method: str, data: object = None) -> object:
        """Call `method` of the server's app and return its answer.

        `ClientError` if the answer is nested so deeply that Python cannot hold it.
        """
        reply = await self._request("rpc", {"method": method, "data": data})
        if reply.rpc is None:
            return None
        try:
            return Publication(method, bytes(reply.rpc.data)).value
        except ValueError as error:
            raise ClientError(f"the answer of {method!r}: {error}") from error

    async def history(
        self,
        topic: str,
        *,
        limit: int | None = None,
        since: Position | None = None,
        reverse: bool = False,
    ) -> History:
        """The publications that `topic` keeps, oldest first, or newest first with `reverse`.

        `limit` None means all, 0 the position alone. `since` leaves out all up to that position
        (with `reverse`: from it on); `RequestFailed` 112 if that is not kept any more.
        """
        params: dict[str, object] = {"channel": topic, "limit": -1 if limit is None else limit}
        if since is not None:
            params["since"] = {"offset": since.offset, "epoch": since.epoch}
        if reverse:
            params["reverse"] = True
        result = (await self._request("history", params)).history or HistoryResult()
        try:
            publications = tuple(pub.freeze(topic) for pub in result.publications)
        except Lost as error:
            raise ClientError(f"the history of {topic!r}: {error.reason}") from error
        return History(publications, Position(result.offset, result.epoch))

    async def presence(self, topic: str) -> dict[str, ClientInfo]:
        """The subscribers of `topic`, by fd in decimal."""
        result = (await self._request("presence", {"channel": topic})).presence or PresenceResult()
        return {client: info.freeze() for client, info in result.presence.items()}

    async def presence_stats(self, topic: str) -> PresenceStats:
        """How many are subscribed to `topic`."""
        reply = await self._request("presence_stats", {"channel": topic})
        result = reply.presence_stats or StatsResult()
        return PresenceStats(result.num_clients, result.num_users)

    @overload
    def subscribe(
        self,
        topic: str,
        *,
        recoverable: bool = True,
        join_leave: Literal[False] = False,
        since: Position | None = None,
        group: str = "",
    ) -> AbstractAsyncContextManager[Subscription[Publication]]: ...

    @overload
    def subscribe(
        self,
        topic: str,
        *,
        recoverable: bool = True,
        join_leave: Literal[True],
        since: Position | None = None,
        group: str = "",
    ) -> AbstractAsyncContextManager[Subscription[Publication | Join | Leave]]: ...

    def subscribe(
        self,
        topic: str,
        *,
        recoverable: bool = True,
        join_leave: bool = False,
        since: Position | None = None,
        group: str = "",
    ) -> AbstractAsyncContextManager[Subscription[Any]]:
        """Subscribe to a topic or a pattern (`news.*`, `news.>`) for the time of a block.

        Subscribed when entered; raises `RequestFailed` when the broker refuses, and
        `ClientError` when this client holds a subscription to the same topic already.

        `recoverable`: after a reconnect, get what was published meanwhile, where the topic
        keeps history. `since`: begin with what was published after that position.
        `join_leave`: the iterator also yields `Join` and `Leave`. `group`: each publication goes
        to one member of this queue group; there is nothing to recover then.
        """
        return self._subscribe(
            Subscription(
                topic,
                recoverable=recoverable,
                join_leave=join_leave,
                since=since,
                group=group,
                taken=self._wake_reader,
                held=self._held,
            )
        )

    @asynccontextmanager
    async def _subscribe(
        self, subscription: Subscription[Any]
    ) -> AsyncGenerator[Subscription[Any], None]:
        topic = subscription.topic
        self._check()
        if hint := mistaken_for_pattern(topic):
            _log.warning("%s", hint)
        if topic in self._subscriptions:
            raise ClientError(
                f"already subscribed to {topic!r}: iterate over that subscription, "
                "or open another client"
            )
        self._subscriptions[topic] = subscription
        try:
            # Without a link, the next one subscribes us.
            if self._link is not None:
                self._link.nursery.start_soon(self._join, self._link, subscription)
            await subscription._settled.wait()
            if subscription._error is not None:
                raise again(subscription._error)
            yield subscription
        finally:
            if self._subscriptions.get(topic) is subscription:
                del self._subscriptions[topic]
                if self._link is not None and subscription._requested is self._link:
                    # Nobody waits for the reply; it only has to get there before anything later.
                    number, _ = self._link.ask("unsubscribe", {"channel": topic})
                    self._link.forget(number)
            subscription._inbox.discard()

    # Requests.

    def _check(self) -> None:
        if self._end is not None:
            raise again(self._end)

    async def _wait_link(self) -> Link:
        await trio.lowlevel.checkpoint()
        while self._link is None or self._end is not None:
            self._check()
            await self._changed.wait()
        return self._link

    async def _wait_outbox(self) -> Link:
        """A connection on which one more command may be queued."""
        link = await self._wait_link()
        while link.full:
            await link.room.wait()
            link = await self._wait_link()
        return link

    async def _request(self, method: str, params: Mapping[str, object]) -> Reply:
        return await self._ask(await self._wait_outbox(), method, params)

    async def _ask(
        self,
        link: Link,
        method: str,
        params: Mapping[str, object],
        subscription: Subscription[Any] | None = None,
    ) -> Reply:
        number, pending = link.ask(method, params, subscription)
        self._wake_reader()
        try:
            await pending.done.wait()
        finally:
            link.forget(number)
        if pending.lost is not None:
            self._check()
            raise ConnectionLost(pending.lost.code, pending.lost.reason)
        reply = pending.reply
        assert reply is not None
        if reply.error is not None:
            error = reply.error
            raise RequestFailed(error.code, shorten(error.message), error.temporary)
        return reply

    async def _send_only(self, method: str, params: Mapping[str, object]) -> None:
        line = encode({method: params})
        (await self._wait_outbox()).post(line)

    async def _join(self, link: Link, subscription: Subscription[Any], pause: float = 0.0) -> None:
        """Subscribe on this link; asks again while the broker says that it may help."""
        await trio.sleep(pause)
        for attempt in itertools.count():
            while link.full:
                await link.room.wait()
            if self._subscriptions.get(subscription.topic) is not subscription:
                return
            subscription._requested = link
            try:
                await self._ask(link, "subscribe", subscription._params(), subscription)
            except ConnectionLost:
                return  # the next link asks again
            except RequestFailed as error:
                if not error.temporary:
                    self._end_subscription(subscription, error)
                    return
            else:
                return
            await trio.sleep(backoff(attempt))

    def _end_subscription(self, subscription: Subscription[Any], error: ClientError) -> None:
        if self._subscriptions.get(subscription.topic) is subscription:
            del self._subscriptions[subscription.topic]
        subscription._fail(error)

    # The reader.

    def _wake_reader(self) -> None:
        if self._reader_wake is not None:
            self._reader_wake.set()

    async def _wait_room(self, link: Link) -> None:
        """Pause while a consumer is behind, unless somebody waits for a reply."""
        while (self._crowded or self._held.much) and not link.pending and not link.closing:
            self._crowded = {inbox for inbox in self._crowded if inbox.full}
            if self._crowded or self._held.much:
                self._reader_wake = trio.Event()
                await self._reader_wake.wait()
                self._reader_wake = None
        if self._held.too_much and not link.closing:
            raise Lost(
                CloseCode.POLICY_VIOLATION,
                f"{self._held.bytes:,} bytes wait to be taken by the app, and the broker still "
                "owes a reply behind them",
            )

    async def _read(self, link: Link) -> None:
        """Handle what arrives until the connection ends; always raises."""
        while True:
            # The interval counts only while we read: a pause of ours is not the broker's silence.
            silence = link.ping + PING_GRACE_SECONDS if link.ping else math.inf
            with trio.move_on_after(silence) as listening:
                message = await link.ws.get_message()
            if listening.cancelled_caught:
                raise Lost(CloseCode.NO_PONG, f"nothing heard from the broker for {silence:g} s")
            if not link.closing:
                await self._handle_message(link, message)

    async def _handle_message(self, link: Link, message: str | bytes) -> None:
        if isinstance(message, bytes):
            raise foreign("a binary message")
        if not message:
            raise foreign("an empty message")
        for number, line in enumerate(read_lines(message), 1):
            reply = read_reply(line)
            if reply is None:
                link.post_pong()
            elif reply.id:
                await self._handle_reply(link, reply)
            elif reply.push is not None:
                self._handle_push(link, reply.push)
            if number % LINES_A_TURN == 0:
                await trio.lowlevel.checkpoint()
                await self._wait_room(link)
        await self._wait_room(link)

    async def _handle_reply(self, link: Link, reply: Reply) -> None:
        pending = link.take_pending(reply.id, reply)
        if pending is None:
            return
        if pending.method == "connect" and self._end is None:
            await self._take_up_own(self._welcome(link, reply))
        pending.reply = reply
        pending.done.set()
        if reply.subscribe is not None and pending.subscription is not None:
            # Here and not in the task that waits: publications may follow in this message.
            pending.subscription._granted = link
            pending.subscription._granted_at = trio.current_time()
            await self._take_up(pending.subscription, reply.subscribe)

    async def _take_up(self, subscription: Subscription[Any], result: Subscribed) -> None:
        """Deliver what a subscribe reply holds. Cut off, the next recovery goes on from there."""
        subscription._subscribed(result)
        for number, pub in enumerate(result.publications, 1):
            subscription._deliver(pub)
            if number % LINES_A_TURN == 0:
                await trio.lowlevel.checkpoint()
        subscription._caught_up(result)
        self._note(subscription._inbox)

    async def _take_up_own(self, subs: Mapping[str, Subscribed]) -> None:
        """Deliver what a connect reply holds of the topics that the server has subscribed us to."""
        number = 0
        for topic, result in subs.items():
            for pub in result.publications:
                self.messages._published(topic, pub)
                if (number := number + 1) % LINES_A_TURN == 0:
                    await trio.lowlevel.checkpoint()
            self.messages._took_up(topic, result)
        self._note_messages()

    def _welcome(self, link: Link, reply: Reply) -> Mapping[str, Subscribed]:
        if reply.error is not None:
            error = reply.error
            raise Lost(error.code, error.message, final=not error.temporary)
        client = "" if reply.connect is None else reply.connect.client
        # 19 digits are 64 bits.
        if reply.connect is None or not re.fullmatch("[0-9]{1,19}", client):
            raise foreign("the connect reply gives no fd")
        self._fd = int(client)
        link.welcomed = True
        link.ping, link.pong = reply.connect.ping, reply.connect.pong
        for topic in (f"fd:{self._fd}", *reply.connect.subs):
            link.server_topics.add(topic)
        self.messages._reconnected()
        for topic, result in reply.connect.subs.items():
            if topic != f"fd:{self._fd}":
                self.messages._began(topic, result)
        self._link = link
        link.came_up()
        self._notify()
        for subscription in self._subscriptions.values():
            link.nursery.start_soon(self._join, link, subscription)
        return reply.connect.subs

    def _handle_push(self, link: Link, push: Push) -> None:
        topic = push.channel
        subscription = self._subscriptions.get(topic)
        if subscription is not None and subscription._granted is not link:
            subscription = None  # on its way since an earlier subscription to the same topic
        if push.disconnect is not None:
            code = push.disconnect.code
            if not 1000 <= code <= 4999:
                raise foreign(f"a disconnect with the code {code}")
            raise Lost(code, push.disconnect.reason)
        if not link.welcomed:
            raise foreign("a push before the connect reply")
        if push.message is not None:
            self.messages._deliver(Publication(f"fd:{self._fd}", bytes(push.message.data)))
            self._note_messages()
        elif push.subscribe is not None:
            link.server_topics.add(topic)
            self.messages._began(topic, push.subscribe)
        elif subscription is None:
            if push.pub is not None and topic in link.server_topics:
                self.messages._published(topic, push.pub)
                self._note_messages()
            elif push.unsubscribe is not None:
                link.server_topics.discard(topic)
                self.messages._ended(topic)
        elif push.pub is not None:
            subscription._deliver(push.pub)
            self._note(subscription._inbox)
        elif push.join is not None:
            subscription._inbox.put(Join(topic, push.join.info.freeze()))
            self._note(subscription._inbox)
        elif push.leave is not None:
            subscription._inbox.put(Leave(topic, push.leave.info.freeze()))
            self._note(subscription._inbox)
        elif push.unsubscribe is not None:
            subscription._granted = None
            if push.unsubscribe.code >= 2500:
                pause = subscription._pause_before_next(trio.current_time())
                link.nursery.start_soon(self._join, link, subscription, pause)
            else:
                reason = shorten(push.unsubscribe.reason) or "unsubscribed by the broker"
                self._end_subscription(subscription, RequestFailed(push.unsubscribe.code, reason))

    def _note(self, inbox: Inbox) -> None:
        if inbox.full:
            self._crowded.add(inbox)

    def _note_messages(self) -> None:
        if self.messages._wanted:
            self._note(self.messages._inbox)

    # The life of the client.

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _finish(self, end: Unavailable) -> None:
        if self._end is None:
            self._end = end
            for subscription in self._subscriptions.values():
                subscription._fail(end)
            self.messages._fail(end)
            self._notify()
            self._wake_reader()

    async def _live(self, task_status: trio.TaskStatus[None]) -> None:
        """Run until `_life` is cancelled, and once connected by nothing else: who cancels the block of
        `open_client` still wants it to say goodbye."""

        def came_up() -> None:
            if self._first:
                self._first = False
                self._life.shield = True
                task_status.started()

        with self._life:
            await self._run(came_up)

    async def _run(self, came_up: Callable[[], None]) -> None:
        """Keep a connection until the client is closed or sent away; `came_up` is called for each.

        Raises only before the first connection, when there is nobody else to tell.
        """
        attempt = 0
        try:
            while True:
                began = trio.current_time()
                lost = await self._hold_link(came_up)
                if self._end is not None:
                    return
                if lost.final:
                    end = Unavailable(lost.code, lost.reason)
                    if self._first:
                        raise end
                    self._finish(end)
                    return
                if self._first:
                    if not 1000 <= lost.code < 3000:  # the broker's own word: it is there
                        raise RequestFailed(lost.code, lost.reason, temporary=True)
                    raise CannotConnect(f"cannot connect to {self.url}: {lost.reason}")
                if trio.current_time() - began >= RECONNECT_MOST_SECONDS:
                    attempt = 0  # it worked; a broker that only greets is not hammered
                pause = backoff(attempt)
                attempt += 1
                _log.info(
                    "%s: connection lost (%d: %r), next try in %.1f s",
                    self.url, lost.code, lost.reason, pause,
                )  # fmt: skip
                await trio.sleep(pause)
        finally:
            self._stopped.set()

    async def _hold_link(self, came_up: Callable[[], None]) -> Lost:
        """Connect, serve the connection until it ends, and return how it ended."""
        lost: Lost | None = None
        with trio.move_on_after(CONNECT_SECONDS) as opening:

            def opened() -> None:
                opening.deadline = math.inf
                came_up()

            try:
                stream = await self._open_stream(self._host, self._port)
                lost = await self._serve_stream(stream, opened)
            except* LOSSES as group:
                lost = explain(group)
        return lost or Lost(CloseCode.ABNORMAL, f"no answer within {CONNECT_SECONDS:g} s")

    async def _serve_stream(self, stream: trio.abc.Stream, opened: Callable[[], None]) -> Lost:
        """Speak over a stream until it ends, and close it; return, or raise, how it ended."""
        link: Link | None = None
        lost: Lost | None = None
        checked = CheckedStream(stream)
        try:
            async with trio.open_nursery() as nursery:
                ws = await trio_websocket.wrap_client_stream(
                    nursery,
                    # Any stream will do; the annotation there is narrower than the code.
                    cast("trio.SocketStream", checked),
                    host_header(self._host, self._port),
                    self._resource,
                    extra_headers=list(self._headers),
                    max_message_size=MAX_MESSAGE_BYTES,
                    receive_buffer_size=None,
                )
                link = Link(ws, nursery, opened)
                nursery.start_soon(link.write)
                subs = self.messages._to_recover()
                link.ask("connect", {**self._hello, "subs": subs} if subs else self._hello)
                try:
                    await self._read(link)
                except (Lost, trio_websocket.ConnectionClosed) as error:
                    lost = explain(error)
                if link.closing:
                    await link.written.wait()
                nursery.cancel_scope.cancel()
        except* LOSSES as group:
            lost = lost or explain(group)
        finally:
            # The fault found first says more than the one that broke the stream after it.
            lost = checked.lost or lost
            await trio.aclose_forcefully(stream)
            # Last, so that nothing waits between this and the word that it is for good.
            if link is not None:
                self._lose(link, lost)
        return lost or Lost(CloseCode.ABNORMAL, "connection closed")

    def _lose(self, link: Link, lost: Lost | None) -> None:
        if self._link is link:
            self._link = None
        lost = lost or Lost(CloseCode.ABNORMAL, "connection closed")
        if isinstance(lost, TooLarge):
            if not link.welcomed:
                self.messages._give_up_recovery()
            for subscription in self._subscriptions.values():
                if subscription._requested is link and subscription._granted is not link:
                    subscription._give_up_recovery()
        for pending in link.pending.values():
            pending.lost = lost
            pending.done.set()
        link.pending.clear()
        link.room.set()

    async def _close(self) -> None:
        """Send what is queued, close with 1000 and wait for the broker's Close."""
        link = self._link
        self._finish(Unavailable(CloseCode.NORMAL, "closed here"))
        if link is not None:
            link.finish()
            self._wake_reader()
            await self._stopped.wait()


@asynccontextmanager
async def open_client(
    url: str,
    *,
    token: str = "",
    name: str = _NAME,
    version: str = "",
    data: object = None,
    headers: Iterable[tuple[str, str]] = (),
    ssl_context: ssl.SSLContext | None = None,
    open_stream: OpenStream | None = None,
) -> AsyncGenerator[Client, None]:
    """Connect to the broker at `url` for the time of a block.

    `token` and `data` go with the connect command, `headers` with the HTTP request. `name` and `version` are
    what your program calls itself, in logs and on the dashboard: this package and its version if it says nothing.
    `ssl_context` is for `wss` URLs (None: the system's certificates). `open_stream` replaces how
    the broker is reached, TLS included: a Unix socket, a proxy, a memory stream.

    Connected when entered. Raises `Unavailable` when the broker refuses for good, `RequestFailed`
    when it does so for now, and `CannotConnect`, naming the URL, when it cannot be reached within
    10 s or what answers is no broker; `ClientError` for a URL that is none. From then on a lost
    connection is made again after a random wait, and subscriptions recover what they missed.

    Leaving sends what is queued and closes with 1000; it waits at most 2 s for the broker, also
    when cancelled. An exception of the block comes out as it is, not in an exception group.
    """
    address = split_url(url)
    client = Client(
        url,
        address,
        open_stream or opener(url, ssl_context),
        [(key.encode("ascii"), value.encode("latin-1")) for key, value in headers],
    )
    client._hello = {"name": name}
    if version or name == _NAME:
        client._hello["version"] = version or VERSION
    if token:
        client._hello["token"] = token
    if data is not None:
        client._hello["data"] = data
    raised: Exception | KeyboardInterrupt | None = None
    async with trio.open_nursery() as nursery:
        try:
            await nursery.start(client._live)
            yield client
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - raised again below
            raised = error
        finally:
            with trio.move_on_after(CLOSE_SECONDS, shield=True):
                await client._close()
            client._life.cancel()
            nursery.cancel_scope.cancel()
    if raised is not None:
        raise raised
