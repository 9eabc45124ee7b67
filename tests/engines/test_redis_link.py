"""The connections to Redis: who is there, and whether it is who it says."""

import random
import ssl
import time
from pathlib import Path

import attrs
import pytest
import trio
import trio.lowlevel
import trustme

from broker.config.engine_url import RedisUrl
from broker.engines.redis import open_redis
from broker.errors import ConfigError
from broker.testing import Witness
from tests.engines.conftest import ONE, ROOM
from tests.engines.servers import Proxy, Server


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, nobody gives up because of that."""
    monkeypatch.setattr("broker.engines.redis_outgoing.PUBLISH_SECONDS", 100)
    monkeypatch.setattr("broker.engines.redis_log.PATIENCE_SECONDS", 100)
    monkeypatch.setattr("broker.engines.redis.FETCH_SECONDS", 100)


async def test_a_server_over_tls_has_to_be_who_it_says(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    listeners = await trio.open_ssl_over_tcp_listeners(0, context, host="127.0.0.1")
    port = listeners[0].transport_listener.socket.getsockname()[1]  # type: ignore[attr-defined]
    url = RedisUrl((("localhost", port),), tls=True, ca=tmp_path / "ca.pem")
    async with Proxy(server, random.Random(3)).serving_on(listeners):
        async with open_redis(url, ROOM, ROOM, time.time) as engine:
            witness = Witness(engine)
            async with engine.running(witness):
                await witness.published("a", b"1")
        monkeypatch.setattr("broker.engines.redis.OPEN_SECONDS", 0.3)
        for wrong in (
            attrs.evolve(url, ca=None),
            attrs.evolve(url, hosts=(("127.0.0.1", port),)),
        ):
            with pytest.raises(ConfigError, match="no Redis at"):
                async with open_redis(wrong, ROOM, ROOM, time.time):
                    raise AssertionError
    with pytest.raises(ConfigError, match="engine: ca: "):
        async with open_redis(attrs.evolve(url, ca=tmp_path / "none"), ROOM, ROOM, time.time):
            raise AssertionError


async def test_a_redis_that_is_not_there_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.engines.redis.OPEN_SECONDS", 0.3)
    with pytest.raises(ConfigError, match=r"no Redis at .*redis\.sock"):
        async with open_redis(Server(ONE, tmp_path).url, ROOM, ROOM, time.time):
            raise AssertionError
