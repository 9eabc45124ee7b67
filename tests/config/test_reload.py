"""A config that changes under way: what changes for those who are here, and that nobody goes."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import structlog
from structlog.testing import capture_logs
from trio.testing import MockClock, lockstep_stream_pair, wait_all_tasks_blocked
from websockets.sync.client import connect

from broker import (
    Broker,
    Config,
    ConfigError,
    PushResult,
    TokenRules,
    TopicPattern,
    TopicRules,
    logs,
)
from broker.access.minting import mint
from broker.config.reload import FIXED, Settings, merge
from broker.testing import Closed, handshake, open_test_broker
from tests.conftest import code_of


def test_fixed_settings_stay_and_all_others_change() -> None:
    old = Config(port=1, host="a", max_topics=5)
    new = Config(port=2, host="a", max_topics=6, allowed_origins=("*",))
    change = merge(old, new)
    assert change.config == attrs.evolve(new, port=1)
    assert change.made == ("allowed_origins", "max_topics")
    assert change.refused == ("port",)


def test_fixed_names_are_settings() -> None:
    assert set(FIXED) <= {field.name for field in attrs.fields(Config)}


def test_each_change_has_a_version_and_is_told_right_away() -> None:
    settings, seen = Settings(Config(port=1)), []
    for _ in "12":
        settings.watch(lambda: seen.append((settings.version, settings.config.max_topics)))
    change = settings.replace(Config(port=2, max_topics=6))
    assert settings.config is change.config
    assert settings.config == Config(port=1, max_topics=6)
    assert (change.made, change.refused) == (("max_topics",), ("port",))
    assert seen == [(1, 6)] * 2
    settings.replace(Config(port=1, max_topics=6))  # even if nothing is other than it was
    assert settings.version == 2


async def test_rules_change_for_those_who_are_connected(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        peer, other = await net.open_client(), await net.open_client()
        publish = {"publish": {"channel": "chat:a", "data": 1}}
        await peer.request(subscribe={"channel": "chat:a", "join_leave": True})
        await other.request(subscribe={"channel": "chat:a"})
        assert await code_of(peer, **publish) == 0
        net.broker.reload(Config(topics=TopicRules(may_publish="none")))
        assert await code_of(peer, **publish) == 103
        net.broker.reload(Config(namespaces={"other": TopicRules()}))
        assert await code_of(peer, **publish) == 102
        # A subscriber stays one, and may leave.
        assert await code_of(other, unsubscribe={"channel": "chat:a"}) == 0
        net.broker.reload(Config())
        assert await code_of(peer, **publish) == 0
        assert {info.fd for info in net.broker.connections()} == {peer.fd, other.fd}


async def test_limits_change_for_those_who_are_connected(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_client()
        publish = {"publish": {"channel": "a.b", "data": 1}}
        assert await code_of(peer, **publish) == 0
        net.broker.reload(Config(message_rate=0.1, message_burst=1))
        assert [await code_of(peer, **publish) for _ in range(2)] == [0, 111]
        net.broker.reload(Config(max_topics=1, max_topic_bytes=3, history_max_limit=1))
        assert await code_of(peer, **publish) == 0
        assert await code_of(peer, subscribe={"channel": "a"}) == 0
        assert await code_of(peer, subscribe={"channel": "b"}) == 106
        assert await code_of(peer, publish={"channel": "abcd", "data": 1}) == 107


async def test_the_room_of_those_who_read_slowly_changes(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        stalled = await net.open_client(lockstep_stream_pair)

        async def push_ten() -> set[PushResult]:
            results = set()
            for number in range(10):
                await wait_all_tasks_blocked()
                results.add(net.broker.push(stalled.fd, number))
            return results

        assert await push_ten() == {PushResult.QUEUED}
        net.broker.reload(Config(outbox_messages=4))
        assert PushResult.CLOSED in await push_ten()


async def test_the_room_of_those_who_read_stays_as_it_was_reloaded(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_client()
        outbox = net.outbox(peer.fd)
        for size in (2**21, 2**12):
            net.broker.reload(Config(outbox_bytes=size))
            assert (outbox.max_bytes, outbox.replies_wait) == (size, False)
            await peer.request(presence={"channel": "a"})
            assert outbox.max_bytes == size


async def test_nobody_recovers_across_a_time_without_history(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        kept = {}
        for topic in ("off", "on"):
            net.broker.publish_nowait(topic, 1)
            kept[topic] = (await net.broker.history(topic))[1]
        none = TopicPattern("off", TopicRules(history_size=0))
        net.broker.reload(Config(patterns=(none,)))
        for topic in kept:
            net.broker.publish_nowait(topic, 2)
        net.broker.reload(Config())
        peer = await net.open_client()
        recovered = {}
        for topic, position in kept.items():
            since = {"recover": True, "offset": position.offset, "epoch": position.epoch}
            reply = await peer.request(subscribe={"channel": topic, **since})
            recovered[topic] = reply["subscribe"]["recovered"]
        assert recovered == {"off": False, "on": True}


async def test_origins_and_the_number_of_connections_change_for_those_who_come(
    autojump_clock: MockClock,
) -> None:
    async def status(origin: str) -> str:
        peer = await net.connect()
        await peer.send(handshake("/", {"Origin": origin}))
        return (await peer.receive_head()).split()[1]

    async with open_test_broker(Broker()) as net:
        assert await status("https://a.example") == "403"
        net.broker.reload(Config(allowed_origins=("https://a.example",)))
        assert await status("https://a.example") == "101"
        net.broker.reload(Config(allowed_origins=("https://a.example",), max_connections=1))
        assert await status("https://a.example") == "503"


async def test_settings_that_cannot_change_are_named_in_one_warning(
    autojump_clock: MockClock,
) -> None:
    broker = Broker(Config(port=9501))
    async with open_test_broker(broker) as net:
        with capture_logs() as lines:
            net.broker.reload(Config(port=9502, host="0.0.0.0", max_topics=7))
        (warning,) = [line for line in lines if line["log_level"] == "warning"]
        assert warning["event"] == "not_reloaded"
        assert warning["settings"] == ["host", "port"]
        assert (broker.config.port, broker.config.max_topics) == (9501, 7)


async def test_before_it_serves_everything_may_change(autojump_clock: MockClock) -> None:
    broker = Broker()
    broker.reload(Config(port=9502))
    assert broker.config.port == 9502


@pytest.mark.usefixtures("logging_restored")
def test_the_level_of_our_own_logging_changes_and_nobody_elses(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = structlog.get_logger("broker")
    logs.configure_if_unset("json", "info")
    log.debug("quiet")
    logs.reconfigure("json", "debug")
    log.debug("loud")
    assert '"loud"' in (said := capsys.readouterr().err)
    assert "quiet" not in said
    structlog.reset_defaults()
    structlog.configure(processors=[structlog.processors.KeyValueRenderer()])
    logs.reconfigure("json", "error")
    log.info("theirs")
    assert "event='theirs'" in capsys.readouterr().out
    structlog.reset_defaults()
    logs.configure("json", "info")
    logs.reconfigure("json", "error")
    log.warning("not this")
    assert capsys.readouterr().err == ""


def test_sighup_reloads_the_file_and_keeps_connections(
    start_broker: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "broker.toml"
    file.write_text("max_topics = 5\n")
    running = start_broker("--config", str(file), "--log-format", "json")

    def hang_up() -> list[Any]:
        """Ask for a reload; what was said about it."""
        running.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 10
        said = ""
        while "reload" not in said or not said.endswith("\n"):
            assert time.monotonic() < deadline
            time.sleep(0.02)  # a foreign process: no clock of ours moves it
            said += capfd.readouterr().err
        return [line for line in map(json.loads, said.splitlines()) if "reload" in line["event"]]

    with connect(running.ws) as peer:

        def code_of(command: str) -> Any:
            peer.send(command)
            return json.loads(peer.recv()).get("error", {}).get("code", 0)

        assert code_of('{"id":1,"connect":{}}') == 0
        publish = '{"id":2,"publish":{"channel":"a","data":1}}'
        assert code_of(publish) == 0
        file.write_text('port = 1\n[topics]\nmay_publish = "none"\n')
        # The port was given as an option, which overrides the file: that is no change.
        (line,) = hang_up()
        assert (line["event"], line["settings"]) == ("reloaded", ["max_topics", "topics"])
        assert code_of(publish) == 103
        file.write_text('backlog = 7\n[topics]\nmay_publish = "none"\n')
        line, *_ = hang_up()
        assert (line["event"], line["level"]) == ("not_reloaded", "warning")
        assert line["settings"] == ["backlog"]
        file.write_text("max_topics = 0\n")
        (line,) = hang_up()
        assert (line["event"], line["level"]) == ("reload_failed", "error")
        assert line["detail"].startswith(f"{file}: max_topics is 0: must be at least 1; the broker")
        assert code_of(publish) == 103
    running.stop()


@pytest.mark.usefixtures("logging_restored")
async def test_the_log_level_changes_for_those_who_are_connected(
    autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_plain()
        for level, said in (("debug", True), ("info", False)):
            net.broker.reload(Config(log_level=level))  # type: ignore[arg-type]
            await peer.send_text(f"at {level}")
            await wait_all_tasks_blocked()
            assert (f"at {level}" in capsys.readouterr().err) is said
        net.broker.reload(Config(max_message_bytes=10))
        other = await net.open_plain()
        await other.send_text("more than ten")
        assert (await other.receive_close())[0] == 1009


async def test_less_room_for_retained_values_counts_at_once(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        for topic in ("a", "b"):
            net.broker.publish_nowait(topic, 1, retain=True)
            await wait_all_tasks_blocked()
        net.broker.reload(Config(retained_bytes=1400))
        for topic, count in (("a", 0), ("b", 1)):
            async with net.broker.subscribe(topic) as messages:
                assert messages.bytes_waiting == count


async def test_keys_of_tokens_are_read_again(autojump_clock: MockClock, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a" * 32)
    rules = TokenRules(hmac_secret_file=secret)
    async with open_test_broker(Broker(Config(tokens=rules))) as net:

        async def enters_with(key: str) -> bool:
            token = mint({"sub": "ann"}, (key * 32).encode(), "HS256")
            async with await net.open_websocket() as peer:
                await peer.send_json({"id": 1, "connect": {"token": token}})
                try:
                    return "connect" in await peer.receive_json()
                except Closed:
                    return False

        assert await enters_with("a")
        secret.write_text("b" * 32)
        assert await enters_with("a"), "not read before it is said"
        await net.broker.reload_files()
        assert await enters_with("b")
        assert not await enters_with("a")
        # A rule that may change, and a key beside it.
        await net.broker.reload_files(Config(tokens=TokenRules(hmac_secret="c" * 32)))
        assert await enters_with("c")
        assert net.broker.config.tokens.hmac_secret == "c" * 32
        # One that may not: tokens would no longer count.
        with capture_logs() as lines:
            await net.broker.reload_files(Config(max_topics=9))
        assert [each["settings"] for each in lines if each["event"] == "not_reloaded"] == [
            ["tokens"]
        ]
        assert net.broker.config.max_topics == 9
        assert not await enters_with("a")
        secret.unlink()
        broken = Config(tokens=rules, max_topics=10)
        with pytest.raises(ConfigError, match="cannot read"):
            await net.broker.reload_files(broken)
        assert net.broker.config.max_topics == 9
        assert await enters_with("c")


async def test_before_it_serves_files_are_not_read(tmp_path: Path) -> None:
    broker = Broker()
    await broker.reload_files(Config(tokens=TokenRules(hmac_secret_file=tmp_path / "no")))
    assert broker.config.tokens.configured
