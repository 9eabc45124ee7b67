"""Plain publications of backends: another way, and the same bytes."""

import json
from collections.abc import Sequence
from functools import partial

import msgspec
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw
from trio.testing import MockClock, assert_no_checkpoints, wait_all_tasks_blocked

from broker import Broker, Config, TopicRules
from broker.core.messages import Position
from broker.core.work import BURST, COMMAND, WRITE
from broker.engines import memory
from broker.http import api as api_module
from broker.http.api import Api
from broker.http.publications import (
    TOGETHER,
    Content,
    Publish,
    Row,
    plain_data,
    plain_results,
    publication_of,
    read_plain,
    read_plain_command,
)
from broker.protocols.json_text import written
from broker.testing import open_test_broker

CONFIG = Config(
    api_key="k",
    namespaces={"kept": TopicRules(retain=True), "gone": TopicRules(history_size=0)},
    max_topic_bytes=40,
)
LISTENED = ("t", "kept:t", "gone:t")
HARD: Sequence[bytes] = (
    *(b'{"channel":"t"}', b'{"channel":"t","data":null}', b'{"data":1}', b"[]", b"null", b"{}"),
    *(b'{"channel":5,"data":1}', b'{"channel":"t","data":1,"channel":"kept:t"}', b'{"channel":'),
    *(b'{"channel":"t","data":"\\ud83d"}', b'{"channel":"t","data":"\xff"}', b'{"channel":"\xff"}'),
    b'{"channel":"\\ud83d","data":1}',
    b'{"channel":"t","data":[1,\n {"a": 2}\n]}',
    b'{"channel":"t","data":1,"tags":{"a":"b"}}',
    b'{"channel":"t","data":1,"tags":{}}',
    b'{"channel":"t","data":1,"tags":null,"skip_history":null}',
    b'{"channel":"t","data":1,"skip_history":true}',
    b'{"channel":"t","data":1,"idempotency_key":"once"}',
    b'{"channel":"t","data":1,"retain":true}',
    b'{"channel":"t","data":1,"exclude":[1]}',
    b'{"channel":"t","data":1,"report":true}',
    b'{"channel":"t","b64data":"MQ=="}',
    b'{"channel":"t","data":1,"b64data":"!"}',
    b'{"channel":"t","data":1,"more":{"a":[]}}',
    b'{"channel":"t","data":1e999}',
    b'{"channel":"t","data":' + b"[" * 2000 + b"]" * 2000 + b"}",
)
names = st.sampled_from(
    [*LISTENED, "t", "t", "nobody", "un:known", "a.*", "", "x" * 41, "fd:1", "fd:9"]
)
plain_ones = st.builds(
    lambda name, data: json.dumps({"channel": name, "data": data}).encode(),
    names,
    st.none() | st.integers() | st.text(max_size=5) | st.lists(st.booleans(), max_size=2),
)
publishes = plain_ones | plain_ones | st.sampled_from(HARD)
commands = (
    publishes.map(lambda params: b'{"publish":%b}' % params)
    | publishes.map(lambda params: b' { "publish" : %b , "publish":%b}\n' % (params, params))
    | st.sampled_from(
        [
            *(b'{"publish":{"channel":"t","data":1},"info":{}}', b'{"publish":null}', b"{}", b"1"),
            *(b'{"nothing":{}}', b'{"presence_stats":{"channel":"t"}}'),
            b'{"history":{"channel":"t","limit":-1}}',
            b'{"broadcast":{"channels":["t","gone:t","a.*","fd:1","t"],"data":[1]}}',
        ]
    )
)
requests = (
    publishes.map(lambda body: ("publish", body))
    | st.lists(commands, max_size=8).map(
        lambda each: ("batch", b'{"commands":[%b]}' % b",".join(each))
    )
    | st.lists(names, max_size=5).map(
        lambda each: ("broadcast", json.dumps({"channels": each, "data": [1]}).encode())
    )
)


async def answers(asked: Sequence[tuple[str, bytes]], *, plainly: bool) -> list[object]:
    """The answers to these requests, all that a subscriber gets, and all that is kept afterwards."""
    seen: list[object] = []
    async with open_test_broker(Broker(CONFIG)) as net, await net.open_client() as peer:
        for name in LISTENED:
            await peer.request(subscribe={"channel": name})
        api = Api(net.node)
        for method, body in asked:
            share = net.node.new_share()
            if plainly and method == "publish":
                answer = api.answer_now(body, share)
                if answer is not None:
                    seen.append((200, answer))
                    continue
            response = await api.answer(method, body, share)
            seen.append((int(response.status), response.body))
        while True:
            with trio.move_on_after(0.1) as silence:
                seen += (await peer.receive_text()).split("\n")
            if silence.cancelled_caught:
                break
        for name in LISTENED:
            publications, _ = await net.broker.history(name)
            seen += publications
        statistics = net.broker.stats()
        seen += [statistics.published, statistics.namespaces, statistics.retained.values]
    return seen


@settings(max_examples=40, deadline=None)
@given(st.lists(requests, max_size=6))
def test_plain_is_a_way_and_not_a_kind(asked: list[tuple[str, bytes]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "new_epoch", lambda topic: 'an "epoch"')
        run = partial(trio.run, clock=MockClock(autojump_threshold=0))
        plainly = run(partial(answers, asked, plainly=True))
        patch.setattr(api_module, "read_plain_command", lambda command: None)
        patch.setattr(Content, "is_plain", False)
        assert plainly == run(partial(answers, asked, plainly=False))


@given(plain_ones)
def test_data_is_read_and_a_result_written_as_for_all_others(params: bytes) -> None:
    publish = read_plain(params)
    assert publish is not None
    assert plain_data(publish) == publication_of(publish, "")[0]
    position = Position(7, '"\u00e9"')
    shown = {"offset": 7, "epoch": position.epoch}
    assert plain_results(b"result", position) == [written({"result": shown})]
    assert plain_results(b"result", None) == [written({"result": {}})]
    assert [
        json.loads(each)["publish"]["offset"] for each in plain_results(b"publish", position, 3)
    ] == [5, 6, 7]


@pytest.mark.parametrize(
    "params", [each for each in HARD if b'"more"' not in each and b"\n" not in each]
)
def test_what_has_an_option_or_needs_care_is_not_plain(params: bytes) -> None:
    found = read_plain(params)
    assert found is None or found == msgspec.json.decode(params, type=Publish)
    is_usual = params in (
        b'{"channel":"t","data":null}',
        b'{"channel":"t","data":1,"channel":"kept:t"}',
        b'{"channel":"t","data":1e999}',
    )
    assert (found is not None) is is_usual
    assert (read_plain_command(b'{"publish":%b}' % params) is not None) is is_usual


def test_a_row_is_of_one_topic_and_a_step_long() -> None:
    row, publish = Row("t"), Publish(channel="t", data=Raw(b"1"))
    while row.takes(publish):
        row.add(publish)
    assert TOGETHER <= row.work < TOGETHER + COMMAND
    assert len(row.contents) == len(row.publishes) > 50
    assert not Row("t").takes(Publish(channel="u", data=Raw(b"1")))


async def test_a_plain_publish_is_paid_for_and_done_now_if_there_is_room(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker(CONFIG)) as net:
        api, share, body = Api(net.node), net.node.new_share(), b'{"channel":"t","data":1}'
        await net.broker.publish("t", "the first, which costs more")
        before = net.node.router.meter.done
        with assert_no_checkpoints():
            assert api.answer_now(body, share) is not None
        price = net.node.router.meter.done - before
        assert price >= COMMAND
        assert BURST - share.left == pytest.approx(price)
        await trio.sleep(1)
        other, before = net.node.new_share(), net.node.router.meter.done
        await api.answer("publish", body, other)
        assert net.node.router.meter.done - before >= price
        published = net.broker.stats().published
        share.refill(trio.current_time())
        share.spend(BURST)
        left = share.left
        assert api.answer_now(body, share) is None
        assert net.broker.stats().published == published
        assert share.left <= left, "to find out is work as well"


@pytest.mark.parametrize(
    ("method", "body"),
    [
        ("publish", b'{"channel":"t","data":1}'),
        ("batch", b'{"commands":[{"publish":{"channel":"t","data":1}}]}'),
        ("broadcast", b'{"channels":["t"],"data":1}'),
    ],
)
async def test_the_writes_of_plain_publications_are_paid_for_by_who_asked_for_them(
    autojump_clock: MockClock, method: str, body: bytes
) -> None:
    async with open_test_broker(Broker(CONFIG)) as net:
        for _ in range(50):
            peer = await net.open_client()
            await peer.request(subscribe={"channel": "t"})
        api, share = Api(net.node), net.node.new_share()
        if method == "publish":
            assert api.answer_now(body, share) is not None
        else:
            await api.answer(method, body, share)
        left, metered = share.left, net.node.router.meter.done
        await wait_all_tasks_blocked()  # the postman has ended their run
        spent, others = left - share.left, net.node.router.meter.done - metered
        assert BURST - share.left >= 50 * WRITE
        assert spent in (0, pytest.approx(50 * WRITE)), "before the answer, or behind it"
        assert others < WRITE
