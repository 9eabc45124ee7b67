"""Subscriptions and messages: what arrives, once and in order, over lost lines."""

import json
import random
from contextlib import suppress
from typing import Any

import pytest
import trio
import trio_websocket
from trio.testing import MockClock, lockstep_stream_pair, wait_all_tasks_blocked

from broker.client import (
    INBOX_MESSAGES,
    Join,
    Leave,
    Subscription,
    open_client,
)
from broker.client.testing import KEPT, URL, FakeBroker, FakePeer, pub
from broker.core.messages import ClientInfo, Position, Publication
from broker.errors import ClientError, RequestFailed


async def take(subscription: Subscription[Publication], count: int) -> list[object]:
    return [(await anext(subscription)).value for _ in range(count)]


async def test_missed_publications_arrive_once_and_in_order(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.subscriber() as (subscription, peer):
        await peer.publish(1, 2)
        await wait_all_tasks_blocked()
        await peer.drop()
        peer = await fake.greet()
        result = KEPT | {"publications": [pub(3), pub(4)], "offset": 4, "recovered": True}
        asked = await peer.answer("subscribe", **result)
        assert (asked["recover"], asked["offset"], asked["epoch"]) == (True, 2, "e")
        await peer.publish(4, 5)
        await wait_all_tasks_blocked()
        await peer.drop()
        peer = await fake.greet()
        asked = await peer.answer("subscribe", **KEPT | {"offset": 5, "recovered": True})
        assert asked["offset"] == 5
        await peer.publish(6)

        assert await take(subscription, 1) == ["n1"]
        assert subscription.position == Position(1, "e")
        assert await take(subscription, 5) == ["n2", "n3", "n4", "n5", "n6"]
        assert subscription.position == Position(6, "e")
        assert subscription.recovered
        assert subscription.gaps == 0


async def test_a_client_that_has_seen_nothing_recovers_from_offset_0(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.subscriber() as (subscription, peer):
        await peer.drop()
        peer = await fake.greet()
        result = KEPT | {"publications": [pub(1)], "offset": 1, "recovered": True}
        asked = await peer.answer("subscribe", **result)
        assert (asked["recover"], asked["offset"]) == (True, 0)
        assert await take(subscription, 1) == ["n1"]


async def test_a_gap_is_counted_where_it_is_and_not_before(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.subscriber() as (subscription, peer):
        await peer.publish(1)
        await wait_all_tasks_blocked()
        await peer.drop()
        peer = await fake.greet()
        await peer.answer("subscribe", **KEPT | {"epoch": "f", "offset": 40, "recovered": False})
        await peer.publish(41)
        await wait_all_tasks_blocked()
        assert await take(subscription, 1) == ["n1"]
        assert subscription.gaps == 0
        assert await take(subscription, 1) == ["n41"]
        assert subscription.gaps == 1
        assert not subscription.recovered
        assert subscription.position == Position(41, "f")


async def test_without_history_each_reconnect_is_a_gap(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        peer.soon("subscribe")
        async with client.subscribe("news") as subscription:
            assert subscription.gaps == 0
            await peer.drop()
            peer = await fake.greet()
            assert "recover" not in await peer.answer("subscribe")
            await peer.publish(0)
            assert await take(subscription, 1) == ["n0"]
            assert subscription.gaps == 1
            assert subscription.position is None


async def test_since_recovers_from_a_saved_position(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        result = KEPT | {"publications": [pub(9)], "offset": 9, "recovered": True}
        peer.soon("subscribe", **result)
        async with client.subscribe("news", since=Position(8, "e")) as subscription:
            assert subscription.recovered
            assert subscription.position == Position(8, "e")
            assert await take(subscription, 1) == ["n9"]
            assert subscription.position == Position(9, "e")
            assert subscription.gaps == 0
        await peer.answer("unsubscribe")

        peer.soon("subscribe", **KEPT | {"offset": 9, "recovered": False})
        async with client.subscribe("news", since=Position(8, "d")) as subscription:
            assert not subscription.recovered
            assert subscription.position == Position(9, "e")
            assert subscription.gaps == 1


async def test_insufficient_state_subscribes_again_and_recovers(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.subscriber() as (subscription, peer):
        await peer.publish(1)
        await peer.send({"push": {"channel": "news", "unsubscribe": {"code": 2500}}})
        result = KEPT | {"publications": [pub(2)], "offset": 2, "recovered": True}
        assert (await peer.answer("subscribe", **result))["offset"] == 1
        assert await take(subscription, 2) == ["n1", "n2"]
        assert subscription.gaps == 0


async def test_unsubscribed_by_the_broker_ends_the_iteration(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        peer.soon("subscribe", **KEPT)
        async with client.subscribe("news") as subscription:
            await peer.publish(1)
            end = {"channel": "news", "unsubscribe": {"code": 2000, "reason": "kicked"}}
            await peer.send({"push": end})
            assert await take(subscription, 1) == ["n1"]
            for _ in range(2):
                with pytest.raises(RequestFailed, match="2000: kicked"):
                    await anext(subscription)
            peer.soon("subscribe", **KEPT)
            async with client.subscribe("news"):
                pass  # the topic is free again


async def test_a_refused_subscription_raises_when_entered(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        fake.nursery.start_soon(peer.refuse, "subscribe", 103)
        with pytest.raises(RequestFailed, match="103"):
            async with client.subscribe("secret"):
                pytest.fail("subscribed")


async def test_refused_after_a_reconnect_ends_the_iteration(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.subscriber() as (subscription, peer):
        await peer.drop()
        await (await fake.greet()).refuse("subscribe", 103)
        with pytest.raises(RequestFailed, match="103"):
            await anext(subscription)


async def test_a_temporary_refusal_is_asked_again(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):

        async def serve() -> None:
            for _ in range(5):
                await peer.refuse("subscribe", 100, temporary=True)
            await peer.answer("subscribe", **KEPT)

        fake.nursery.start_soon(serve)
        async with client.subscribe("news"):
            pass


async def test_subscribing_survives_a_drop_before_the_reply(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):

        async def serve() -> None:
            await peer.expect("subscribe")
            await peer.drop()
            again = await fake.greet()
            assert "recover" not in await again.answer("subscribe", **KEPT)
            await again.publish(1)

        fake.nursery.start_soon(serve)
        async with client.subscribe("news") as subscription:
            assert await take(subscription, 1) == ["n1"]
            assert subscription.gaps == 0


async def test_one_subscription_per_topic_and_leaving_unsubscribes(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        peer.soon("subscribe", **KEPT)
        async with client.subscribe("news") as subscription:
            with pytest.raises(ClientError, match="already subscribed to 'news'"):
                async with client.subscribe("news"):
                    pytest.fail("subscribed twice")
        assert (await peer.expect("unsubscribe"))["unsubscribe"] == {"channel": "news"}
        with pytest.raises(StopAsyncIteration):
            await anext(subscription)
        await peer.publish(1)  # was on its way
        peer.soon("subscribe", **KEPT)
        async with client.subscribe("news") as subscription:
            await peer.publish(2)
            assert await take(subscription, 1) == ["n2"]


async def test_cancelled_while_subscribing_unsubscribes(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        with trio.move_on_after(1):
            async with client.subscribe("news"):
                pytest.fail("subscribed")
        await peer.answer("subscribe", **KEPT)
        await peer.expect("unsubscribe")
        peer.soon("subscribe", **KEPT)
        async with client.subscribe("news"):
            pass


async def test_a_pattern_gives_the_concrete_topics(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        peer.soon("subscribe", **KEPT)
        async with client.subscribe("news.*") as subscription:
            for topic, offset in (("news.a", 7), ("news.b", 2)):
                one = pub(offset) | {"channel": topic}
                await peer.send({"push": {"channel": "news.*", "pub": one}})
            got = [await anext(subscription) for _ in range(2)]
            assert [(each.topic, each.offset) for each in got] == [("news.a", 7), ("news.b", 2)]


async def test_join_and_leave_come_in_order_with_publications(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        asked: list[Any] = []

        async def serve() -> None:
            asked.append(await peer.answer("subscribe", **KEPT))
            somebody = {"info": {"client": "3", "user": ""}}
            await peer.send({"push": {"channel": "news", "join": somebody}})
            await peer.publish(1)
            await peer.send({"push": {"channel": "news", "leave": somebody}})

        fake.nursery.start_soon(serve)
        async with client.subscribe("news", join_leave=True) as subscription:
            items = [await anext(subscription) for _ in range(3)]
        assert asked[0]["join_leave"] is True
        assert items == [
            Join("news", ClientInfo("3")),
            Publication("news", b'"n1"', None, 1),
            Leave("news", ClientInfo("3")),
        ]


async def test_a_slow_consumer_stops_the_reading_and_loses_nothing(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    fake.pair = lockstep_stream_pair
    count = 4 * INBOX_MESSAGES
    sent = 0
    async with fake.subscriber() as (subscription, peer), trio.open_nursery() as nursery:

        async def flood() -> None:
            nonlocal sent
            for offset in range(1, count + 1):
                await peer.publish(offset)
                sent = offset

        nursery.start_soon(flood)
        await trio.sleep(100)
        # Beyond the bound: what trio-websocket holds, and what is in its hands.
        assert INBOX_MESSAGES <= sent <= INBOX_MESSAGES + 3
        assert await take(subscription, count) == [f"n{n}" for n in range(1, count + 1)]
        assert len(fake.dials) == 1


async def test_a_consumer_may_ask_while_far_more_waits_than_the_bound(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    count = 4 * INBOX_MESSAGES
    async with fake.client() as (client, peer):
        peer.soon("subscribe", **KEPT)
        async with client.subscribe("news") as subscription:
            for offset in range(1, count + 1):
                await peer.publish(offset)
            await wait_all_tasks_blocked()
            assert await take(subscription, 1) == ["n1"]
            peer.soon("publish")
            with trio.fail_after(5):
                await client.publish("echo", 1)
            assert len(await take(subscription, count - 1)) == count - 1


async def test_messages_are_direct_messages_and_what_the_server_pushes(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        direct = {"data": "hello", "info": {"client": "3", "user": "al"}}
        await peer.send(
            {"push": {"channel": "fd:1", "pub": direct}},
            {"push": {"message": {"data": {"a": 1}}}},
            {"push": {"channel": "user:al", "subscribe": {}}},
            {"push": {"channel": "user:al", "pub": {"data": 2}}},
            {"push": {"channel": "stray", "pub": {"data": 3}}},
            {"push": {"channel": "user:al", "unsubscribe": {"code": 2000}}},
            {"push": {"channel": "user:al", "pub": {"data": 4}}},
            {"push": {"message": {"data": 5}}},
        )
        got = [await anext(client.messages) for _ in range(4)]
        assert got[0] == Publication("fd:1", b'"hello"', ClientInfo("3", "al"))
        assert [(each.topic, each.value) for each in got[1:]] == [
            ("fd:1", {"a": 1}),
            ("user:al", 2),
            ("fd:1", 5),
        ]


async def test_messages_nobody_asked_for_do_not_stop_the_client(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        for number in range(INBOX_MESSAGES + 10):
            await peer.send({"push": {"message": {"data": number}}})
        peer.soon("publish")
        await client.publish("news", 1)
        assert client.messages.dropped == 10
        assert (await anext(client.messages)).value == 10


# Recovery, however the broker replies to it.


class KeepingBroker:
    """A broker that keeps all it published to `news`, and replies to a recovery with the offset that
    was asked for, as Centrifugo does, or with the newest one."""

    def __init__(self, fake: FakeBroker, style: str) -> None:
        self.fake = fake
        self.style = style
        self.newest = 0
        self.asked: list[int] = []
        self.peer: FakePeer | None = None

    async def serve(self) -> None:
        while True:
            with suppress(trio_websocket.ConnectionClosed):
                peer = await self.fake.greet()
                while True:
                    text = str(await peer.ws.get_message())
                    for command in map(json.loads, text.split("\n")):
                        await self.reply(peer, command)

    async def reply(self, peer: FakePeer, command: dict[str, Any]) -> None:
        if "subscribe" not in command:
            await peer.send({"id": command["id"], "unsubscribe": {}})
            return
        result = KEPT | {"offset": self.newest}
        if command["subscribe"].get("recover"):
            asked = command["subscribe"]["offset"]
            self.asked.append(asked)
            result |= {
                "recovered": True,
                "publications": [pub(each) for each in range(asked + 1, self.newest + 1)],
                "offset": asked if self.style == "asked" else self.newest,
            }
        self.peer = peer  # from here on publications are pushed behind the reply
        await peer.send({"id": command["id"], "subscribe": result})

    async def publish(self, count: int) -> None:
        for _ in range(count):
            self.newest += 1
            if self.peer is not None:
                with suppress(trio_websocket.ConnectionClosed):
                    await self.peer.publish(self.newest)

    async def drop(self) -> None:
        if self.peer is not None:
            peer, self.peer = self.peer, None
            await peer.drop()


STYLES = ["asked", "newest"]


@pytest.mark.parametrize("style", STYLES)
async def test_a_line_that_drops_at_the_first_of_three_recovered_gives_the_other_two_once(
    fake: FakeBroker, autojump_clock: MockClock, style: str
) -> None:
    broker = KeepingBroker(fake, style)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(broker.serve)
        async with (
            open_client(URL, open_stream=fake.open_stream) as client,
            client.subscribe("news") as subscription,
        ):
            await broker.drop()
            await broker.publish(3)
            assert await take(subscription, 1) == ["n1"]
            assert subscription.position == Position(1, "e")
            await broker.drop()
            await broker.publish(1)
            await trio.sleep(30)
            assert subscription.recovered
            assert await take(subscription, 3) == ["n2", "n3", "n4"]
            assert subscription.position == Position(4, "e")
            assert subscription.gaps == 0
            assert broker.asked == [0, 3]
            with trio.move_on_after(30):
                pytest.fail(f"twice: {await anext(subscription)}")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("style", STYLES)
async def test_each_comes_once_and_in_order_whenever_the_line_drops(
    fake: FakeBroker, autojump_clock: MockClock, style: str, seed: int
) -> None:
    chance = random.Random(seed)
    broker = KeepingBroker(fake, style)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(broker.serve)
        async with (
            open_client(URL, open_stream=fake.open_stream) as client,
            client.subscribe("news") as subscription,
        ):
            for expected in range(1, 101):
                await broker.publish(chance.randrange(1, 4))
                if chance.random() < 0.4:
                    await broker.drop()
                if chance.random() < 0.3:
                    await trio.sleep(chance.choice([0, 0.1, 30]))
                if chance.random() < 0.3:
                    await broker.drop()  # perhaps in the middle of a recovery
                assert await take(subscription, 1) == [f"n{expected}"]
                assert subscription.position == Position(expected, "e")
            assert subscription.gaps == 0
            assert subscription.recovered
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("style", STYLES)
async def test_a_program_that_starts_anew_from_its_position_misses_nothing(
    fake: FakeBroker, autojump_clock: MockClock, style: str, seed: int
) -> None:
    chance = random.Random(seed)
    broker = KeepingBroker(fake, style)
    got: list[object] = []
    position = Position(0, "")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(broker.serve)
        while len(got) < 60:
            await broker.publish(chance.randrange(1, 5))
            async with (
                open_client(URL, open_stream=fake.open_stream) as client,
                client.subscribe("news", since=position) as subscription,
            ):
                assert subscription.recovered
                for _ in range(chance.randrange(0, broker.newest - len(got) + 1)):
                    got += await take(subscription, 1)
                    if chance.random() < 0.3:
                        await broker.drop()
                assert subscription.gaps == 0
                assert subscription.position is not None
                position = subscription.position
        nursery.cancel_scope.cancel()
    assert got == [f"n{offset}" for offset in range(1, len(got) + 1)]


async def test_a_recovery_in_another_epoch_is_a_gap_whatever_it_is_called(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.subscriber() as (subscription, peer):
        await peer.publish(1, 2)
        await wait_all_tasks_blocked()
        await peer.drop()
        peer = await fake.greet()
        await peer.answer("subscribe", **KEPT | {"epoch": "f", "offset": 7, "recovered": True})
        await peer.publish(8)
        assert await take(subscription, 3) == ["n1", "n2", "n8"]
        assert subscription.gaps == 1
        assert not subscription.recovered
        assert subscription.position == Position(8, "f")


@pytest.mark.parametrize("offset", [0, 1, 4])
async def test_a_recovery_that_replies_with_an_older_offset_moves_nothing_back(
    fake: FakeBroker, autojump_clock: MockClock, offset: int
) -> None:
    async with fake.subscriber() as (subscription, peer):
        await peer.publish(1, 2, 3, 4, 5)
        await wait_all_tasks_blocked()
        await peer.drop()
        peer = await fake.greet()
        await peer.answer("subscribe", **KEPT | {"offset": offset, "recovered": True})
        await peer.publish(4, 5, 6)
        await peer.drop()
        peer = await fake.greet()
        assert (await peer.answer("subscribe", **KEPT | {"recovered": True}))["offset"] == 6
        assert await take(subscription, 6) == [f"n{each}" for each in range(1, 7)]


async def test_offsets_may_jump_ahead_and_do_not_go_back(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.subscriber() as (subscription, peer):
        await peer.publish(1, 5, 3, 5, 2**63 - 1, 6)  # 2 to 4 were not for us
        assert await take(subscription, 3) == ["n1", "n5", f"n{2**63 - 1}"]
        with trio.move_on_after(1):
            pytest.fail(f"went back: {await anext(subscription)}")
        assert subscription.position == Position(2**63 - 1, "e")


async def test_a_publication_of_another_topic_moves_no_position(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.subscriber() as (subscription, peer):
        for one in (pub(9) | {"channel": "other"}, pub(1) | {"channel": "news"}):
            await peer.send({"push": {"channel": "news", "pub": one}})
        assert await take(subscription, 2) == ["n9", "n1"]
        assert subscription.position == Position(1, "e")


async def test_half_a_surrogate_pair_arrives_as_it_was_sent(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.subscriber() as (subscription, peer):
        await peer.ws.send_message(
            r'{"push":{"channel":"news","pub":{"data":"\uD83d \\ud83d \ud83d\ude00","offset":1}}}'
        )
        publication = await anext(subscription)
        assert publication.data == rb'"\uD83d \\ud83d \ud83d\ude00"'
        assert publication.value == "\ufffd \\ud83d \U0001f600"
