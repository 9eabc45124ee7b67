"""What a connection carries out where it reads, and what it leaves to a task that may wait."""

import json
from typing import Any

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from trio.testing import MockClock, lockstep_stream_pair, wait_all_tasks_blocked

from broker import Broker, Close, Config, Connection, Frame, Initiator, TokenRules, TopicRules
from broker.access.keys import Key
from broker.access.minting import mint
from broker.access.tokens import Tokens
from broker.testing import Network, Peer, client_frame, open_test_broker
from broker.transport.frames import BINARY, CLOSE, PING, PONG, TEXT


def count_tasks() -> int:
    """All tasks of this run."""
    tasks, waiting = 0, [trio.lowlevel.current_root_task()]
    while waiting:
        task = waiting.pop()
        if task is not None:
            tasks += 1
            waiting += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return tasks


async def pong_to(peer: Peer) -> tuple[int, bytes]:
    await peer.send(client_frame(PING, b"?"))
    return await peer.receive_frame()


async def test_a_client_that_nobody_has_to_be_asked_about_costs_one_task(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker()) as net:
        await wait_all_tasks_blocked()
        before = count_tasks()
        for number in range(1, 4):
            peer = await net.open_client()
            await peer.request(subscribe={"channel": "news"})
            await peer.request(publish={"channel": "news", "data": 1})
            await wait_all_tasks_blocked()
            assert count_tasks() == before + number


async def test_what_comes_first_waits_for_the_open_hook(autojump_clock: MockClock) -> None:
    broker, may_go_on = Broker(), trio.Event()

    @broker.on_open
    async def wait(connection: Connection) -> None:
        await may_go_on.wait()

    async with open_test_broker(broker) as net:
        peer = await net.open_websocket()
        await peer.send_json({"id": 1, "connect": {}})
        await wait_all_tasks_blocked()
        info = broker.connection_info(peer.fd)
        assert info is not None
        assert info.protocol == "plain"
        assert await pong_to(peer) == (PONG, b"?")
        may_go_on.set()
        assert (await peer.receive_json())["connect"]["client"] == str(peer.fd)


async def test_a_hook_for_what_came_with_the_close_has_close_seconds(
    autojump_clock: MockClock,
) -> None:
    broker, cancelled_at = Broker(), []

    @broker.on_message
    async def hang(connection: Connection, frame: Frame) -> None:
        try:
            await trio.sleep_forever()
        finally:
            cancelled_at.append(trio.current_time())

    async with open_test_broker(broker) as net:
        peer = await net.open_plain()
        began = trio.current_time()
        await peer.send(client_frame(TEXT, b"?") + client_frame(CLOSE))
        await peer.receive_eof()
        assert cancelled_at == [began + broker.config.close_seconds]


COMMANDS: list[tuple[str, str, dict[str, object]]] = [
    ("connect", "connect", {}),
    ("subscribe", "subscribe", {"channel": "a"}),
    ("publish", "publish", {"channel": "a", "data": 1}),
    ("presence", "presence", {"channel": "a"}),
    ("presence", "presence_stats", {"channel": "a"}),
    ("history", "history", {"channel": "a"}),
    ("rpc", "rpc", {"method": "mine", "data": 1}),
    ("publish", "rpc", {"method": "publish", "data": {"topic": "a", "data": 1}}),
    ("message", "send", {"data": 1}),
]


@pytest.mark.parametrize(("hook", "method", "request_"), COMMANDS, ids=str)
async def test_while_a_hook_waits_pings_are_answered_and_nothing_overtakes(
    hook: str, method: str, request_: dict[str, object], autojump_clock: MockClock
) -> None:
    broker, may_go_on = Broker(), trio.Event()

    async def wait(*_: object) -> None:
        await may_go_on.wait()

    async with open_test_broker(broker) as net:
        other = await net.open_client()
        peer = await (net.open_websocket() if method == "connect" else net.open_client())
        getattr(broker, f"on_{hook}")(wait)
        await peer.send_json({"id": 0 if method == "send" else 2, method: request_})
        assert await pong_to(peer) == (PONG, b"?")
        await peer.send_json({"publish": {"channel": f"fd:{other.fd}", "data": "behind"}})
        with trio.move_on_after(5) as silence:
            await other.receive_json()
        assert silence.cancelled_caught
        may_go_on.set()
        push = (await other.receive_json())["push"]
        assert push["pub"]["data"] == "behind"


async def test_while_a_key_is_fetched_pings_are_answered(autojump_clock: MockClock) -> None:
    may_go_on = trio.Event()
    private = ed25519.Ed25519PrivateKey.generate()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    class Issuer:
        def known(self, kid: str) -> Key | None:
            return None

        async def key(self, kid: str) -> Key | None:
            await may_go_on.wait()
            return None

    rules = TokenRules()
    async with open_test_broker(Broker()) as net:
        net.node.services.tokens = Tokens(rules, (), lambda: 0.0, Issuer())
        peer = await net.open_websocket()
        token = mint({"sub": "a"}, pem, "EdDSA", kid="one")
        await peer.send_json({"id": 1, "connect": {"token": token}})
        await wait_all_tasks_blocked()
        assert await pong_to(peer) == (PONG, b"?")
        may_go_on.set()
        code, _ = await peer.receive_close()
        assert code == 3500


# publishes that come together: carried out at once, or one by one, and never otherwise


async def published(net: Network, *payloads: bytes, topic: str = "news") -> list[Any]:
    """What a subscriber gets of these messages, sent in one write: their pushes, without frames."""
    reader = await net.open_client()
    await reader.request(subscribe={"channel": topic})
    writer = await net.open_client()
    await writer.request(publish={"channel": topic, "data": "opened"})
    await writer.send(b"".join([client_frame(TEXT, payload) for payload in payloads]))
    got: list[Any] = []
    while True:
        with trio.move_on_after(1) as silence:
            got += map(json.loads, (await reader.receive_text()).split("\n"))
        if silence.cancelled_caught:
            return [push["push"]["pub"] | {"channel": push["push"]["channel"]} for push in got[1:]]


def a_publish(data: object, topic: str = "news") -> bytes:
    return json.dumps({"publish": {"channel": topic, "data": data}}, ensure_ascii=False).encode()


TOGETHER: dict[str, tuple[list[bytes], list[object]]] = {
    "one": ([a_publish(1)], [1]),
    "two": ([a_publish(1), a_publish(2)], [1, 2]),
    "as many as have a template": ([a_publish(n) for n in range(4)], [0, 1, 2, 3]),
    "more than history keeps": ([a_publish(n) for n in range(250)], list(range(250))),
    "a percent sign": ([a_publish("100 %d %b")] * 5, ["100 %d %b"] * 5),
    "not ASCII": ([a_publish("ü"), a_publish("客户端")], ["ü", "客户端"]),
    "two in one message": ([a_publish(1), a_publish(2) + b"\n" + a_publish(3)], [1, 2, 3]),
    "lines within": ([a_publish(1), a_publish({"a": 2}).replace(b" ", b"\n")], [1, {"a": 2}]),
    "a line too many": ([a_publish(1) + b"\n", a_publish(2), a_publish(3)], [1, 2, 3]),
    "without data": ([a_publish(1), b'{"publish":{"channel":"news"}}', a_publish(3)], [1, 3]),
    "another topic between": ([a_publish(1), a_publish(2, "b"), a_publish(3)], [1, 3]),
    "a topic that is none": ([a_publish(1), a_publish(2, "a.*"), a_publish(3)], [1, 3]),
    "another command between": ([a_publish(1), b'{"id":7,"rpc":{}}', a_publish(3)], [1, 3]),
    "an answer to a ping between": ([a_publish(1), b"{}", a_publish(3)], [1, 3]),
}


@pytest.mark.parametrize("case", TOGETHER)
async def test_publishes_that_come_together_arrive_one_by_one(
    case: str, autojump_clock: MockClock
) -> None:
    payloads, expected = TOGETHER[case]
    async with open_test_broker(Broker()) as net:
        got = await published(net, *payloads)
        assert [pub["data"] for pub in got] == expected
        assert [pub["offset"] for pub in got] == list(range(2, 2 + len(expected)))
        assert {pub["info"]["client"] for pub in got} == {"2"}
        # One that opened the topic, and in one case another to a topic of its own.
        others = case == "another topic between"
        assert net.broker.stats().published == 1 + len(expected) + others


async def test_publishes_to_a_reader_of_a_pattern_name_their_topic_however_many_come(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker()) as net:
        reader = await net.open_client()
        await reader.request(subscribe={"channel": "news.*"})
        writer = await net.open_client()
        await writer.request(publish={"channel": "news.a", "data": 0})
        await reader.receive_json()
        await writer.send(client_frame(TEXT, a_publish(1, "news.a")) * 5)
        for _ in range(5):
            push = (await reader.receive_json())["push"]
            assert (push["channel"], push["pub"]["channel"]) == ("news.*", "news.a")
            assert push["pub"]["tags"] == {"topic": "news.a"}


async def test_an_empty_message_among_publishes_ends_the_connection(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_client()
        for _ in range(2):  # the first opens the topic
            await peer.send(client_frame(TEXT, a_publish(1)) * 3)
        await peer.send(client_frame(TEXT, a_publish(1)) + client_frame(TEXT, b""))
        assert (await peer.receive_close())[0] == 3501


async def test_who_is_answered_is_answered_for_each(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_client()
        await peer.request(publish={"channel": "a", "data": 0})
        sent = [{"id": n, "publish": {"channel": "a", "data": n}} for n in range(2, 9)]
        await peer.send(b"".join([client_frame(TEXT, json.dumps(c).encode()) for c in sent]))
        replies = [json.loads(line) for line in (await peer.receive_text()).split("\n")]
        assert [reply["id"] for reply in replies] == list(range(2, 9))


async def test_text_that_is_not_utf_8_ends_the_connection_in_binary_frames_too(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_client()
        await peer.request(publish={"channel": "news", "data": 0})
        broken = a_publish("?").replace(b"?", b"\xff")
        await peer.send(b"".join(client_frame(BINARY, each) for each in (a_publish(1), broken)))
        assert (await peer.receive_close())[0] == 3501


async def test_direct_messages_to_who_has_gone_are_no_offence(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        sender, receiver = await net.open_client(), await net.open_client()
        message = client_frame(TEXT, a_publish("hi", f"fd:{receiver.fd}"))
        await sender.send(message * 3)
        for _ in range(3):
            await receiver.receive_json()
        await receiver.aclose()
        await sender.send(message * 3)
        assert await pong_to(sender) == (PONG, b"?")


# a reply that is larger than the outbox: its peer is served on when it has taken it, and heard all along

LARGE = Config(outbox_bytes=10_000, topics=TopicRules(history_size=100))


async def ask_for_much(net: Network, *behind: object) -> Peer:
    """A client that asks for 40,000 bytes, and for more behind it, and takes none of it."""
    for number in range(40):
        net.broker.publish("news", f"{number:01000}")
    peer = await net.open_client(lockstep_stream_pair)
    many = {"id": 2, "history": {"channel": "news", "limit": -1}}
    await peer.send_json(many, *behind)
    await wait_all_tasks_blocked()
    return peer


@pytest.mark.parametrize("behind", [(), ({"id": 3, "history": {"channel": "news"}},)])
async def test_while_a_large_reply_waits_its_peer_is_heard(
    behind: tuple[object, ...], autojump_clock: MockClock
) -> None:
    broker, ends = Broker(LARGE), []

    @broker.on_close
    async def note(connection: Connection, close: Close) -> None:
        ends.append((trio.current_time(), close.code, close.initiator))

    async with open_test_broker(broker) as net:
        peer = await ask_for_much(net, *behind)
        began = trio.current_time()
        await peer.send_json({"id": 4, "presence": {"channel": "news"}})
        await peer.send_close(4000, "bye")
        await trio.sleep(20)
        # It had `close_seconds` to take the reply before what it asked for behind it is dropped, and
        # as many for the rest of what is queued.
        grace = 2 * broker.config.close_seconds
        assert ends == [(began + grace, 4000, Initiator.CLIENT)]


async def test_what_comes_behind_a_large_reply_is_served_once_in_its_order(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker(LARGE)) as net:
        reader = await net.open_client()
        await reader.request(subscribe={"channel": "b"})
        peer = await ask_for_much(
            net,
            {"publish": {"channel": "b", "data": 1}},
            {"id": 3, "history": {"channel": "news", "limit": -1}},
            {"publish": {"channel": "b", "data": 2}},
        )
        for number in (3, 4):
            await peer.send(client_frame(TEXT, a_publish(number, "b")))
        await peer.send_json({"id": 5, "presence": {"channel": "news"}})
        await wait_all_tasks_blocked()
        ids: list[int] = []
        while len(ids) < 3:
            ids += [json.loads(line)["id"] for line in (await peer.receive_text()).split("\n")]
        assert ids == [2, 3, 5]
        got: list[Any] = []
        while len(got) < 4:
            got += map(json.loads, (await reader.receive_text()).split("\n"))
        assert [push["push"]["pub"]["data"] for push in got] == [1, 2, 3, 4]
