"""The descriptions of the broker: OpenAPI of its API, AsyncAPI of its topics, both against their specifications."""

import json

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from trio.testing import MockClock

from broker import Broker, Config, TopicRules
from broker.http.api import PARAMETERS, Api
from broker.http.asyncapi import asyncapi
from broker.http.openapi import openapi
from broker.testing import Network, open_test_broker
from tests.http.conftest import KEY, ask, served, written


async def get(net: Network, path: str, key: str) -> tuple[int, bytes]:
    async with await net.connect() as peer:
        await peer.send(f"GET {path} HTTP/1.1\r\nHost: a\r\nX-API-Key: {key}\r\n\r\n".encode())
        head = await peer.receive_head()
        return int(head.split()[1]), await peer.receive_eof()


# OpenAPI


def test_the_description_is_openapi() -> None:
    assert list(OpenAPIV31SpecValidator(written(openapi())).iter_errors()) == []


async def test_every_method_is_described(autojump_clock: MockClock) -> None:
    async with served() as net:
        methods = Api(net.broker.node)._methods
    assert methods.keys() == PARAMETERS.keys()
    paths = written(openapi("/chat"))["paths"]
    assert paths.keys() == {f"/api/{method}" for method in (*methods, "batch")}
    assert written(openapi("/chat"))["servers"] == [{"url": "/chat"}]


@pytest.mark.parametrize("name", ["openapi", "asyncapi"])
async def test_a_description_is_told_to_who_has_the_key(
    autojump_clock: MockClock, name: str
) -> None:
    config = Config(api_key=KEY, path_prefix="/x", namespaces={"chat": TopicRules()})
    async with open_test_broker(Broker(config)) as net:
        path = f"/x/api/{name}.json"
        assert (await get(net, path, "wrong"))[0] == 401
        status, body = await get(net, path, KEY)
        assert status == 200
        described = openapi("/x") if name == "openapi" else asyncapi(config)
        assert json.loads(body) == written(described)
    async with open_test_broker(Broker()) as net:
        assert (await get(net, f"/api/{name}.json", KEY))[0] == 404


async def test_nothing_is_posted_to_a_description(autojump_clock: MockClock) -> None:
    async with served() as net:
        status, body = await ask(net, "openapi.json", b"{}")
        assert (status, body.split(b";")[0]) == (404, b"No such method")


# AsyncAPI
