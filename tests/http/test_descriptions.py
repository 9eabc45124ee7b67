"""The descriptions of the broker: OpenAPI of its API, AsyncAPI of its topics, both against their specifications."""

import json
from math import inf
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from trio.testing import MockClock

from broker import Broker, Config, TokenRules, TopicPattern, TopicRules
from broker.http.api import PARAMETERS, Api
from broker.http.asyncapi import asyncapi
from broker.http.openapi import openapi
from broker.testing import Network, open_test_broker
from tests.http.test_api import KEY, ask, call, listener, served

SCHEMA = json.loads((Path(__file__).parent / "vendor" / "asyncapi-3.0.0.json").read_text("utf-8"))


def written(document: object) -> Any:
    """As somebody reads it."""
    return msgspec.json.decode(msgspec.json.encode(document))


def answers(method: str) -> Any:
    """A validator of the answers of one method."""
    document = written(openapi())
    operation = document["paths"][f"/api/{method}"]["post"]
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    root = {**schema, "components": document["components"]}
    _close(root)
    return Draft202012Validator(root)


def _close(schema: Any) -> None:
    """Nothing may be in an answer that is not in its description; of three there is more."""
    if isinstance(schema, list):
        for each in schema:
            _close(each)
    if isinstance(schema, dict):
        for each in schema.values():
            _close(each)
        is_open = schema.get("title") in ("Stats", "NodeStats", "ClosedDetails")
        if "properties" in schema and "additionalProperties" not in schema and not is_open:
            schema["additionalProperties"] = False


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


REQUESTS: list[tuple[str, dict[str, object]]] = [
    ("publish", {"channel": "a", "data": 1, "tags": {"k": "v"}}),
    ("publish", {"channel": "a", "b64data": "MQ==", "report": True}),
    ("publish", {"channel": "a"}),
    ("broadcast", {"channels": ["a", "b", "\n"], "data": None}),
    ("subscribe", {"user": "mei", "channel": "more"}),
    ("unsubscribe", {"user": "mei", "channel": "more"}),
    ("refresh", {"client": "1", "expire_at": 2**40}),
    ("presence", {"channel": "a"}),
    ("presence_stats", {"channel": "a"}),
    ("history", {"channel": "a", "limit": -1}),
    ("channels", {}),
    ("info", {}),
    ("push", {"fd": 1, "data": {}}),
    ("connections", {}),
    ("connection", {"fd": 1}),
    ("connection", {"fd": 9}),
    ("trace", {"fd": 1}),
    ("trace", {}),
    ("trace_read", {"trace": "none"}),
    ("trace_end", {"trace": "none"}),
    ("stats", {}),
    ("stats", {"rows": 3}),
    ("config", {}),
    ("history_remove", {"channel": "a"}),
    ("batch", {"commands": [{"publish": {"channel": "a", "data": 1}}, {"info": {}}, {"none": {}}]}),
    ("disconnect", {"user": "mei"}),
    ("closed_connections", {}),
]


async def test_what_methods_answer_is_what_is_described(autojump_clock: MockClock) -> None:
    async with served() as net, await listener(net, "a", user="mei"):
        for method, params in REQUESTS:
            answer = await call(net, method, **params)
            errors = [
                f"{error.json_path}: {error.message}"
                for error in answers(method).iter_errors(answer)
            ]
            assert errors == [], (method, params, answer)


async def test_what_a_trace_has_seen_is_described(autojump_clock: MockClock) -> None:
    async with served() as net, await listener(net, "a", user="mei"):
        trace = (await call(net, "trace", topic="a"))["result"]["trace"]
        await call(net, "publish", channel="a", data=1)
        answer = await call(net, "trace_read", trace=trace, wait=1)
        assert answer["result"]["entries"]
        assert list(answers("trace_read").iter_errors(answer)) == []


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

CONFIGS = [
    Config(),
    Config(host="::1", port=1, path_prefix="/x", websocket_paths=("/rooms/*", "/新/a b", "/")),
    Config(
        topics=TopicRules(may_publish="none"),
        namespaces={
            "chat": TopicRules(may_subscribe="users"),
            "新闻 x": TopicRules(history_ttl=inf),
            "a b": TopicRules(may_publish="subscribers"),
            "a_b": TopicRules(),
        },
        patterns=(
            TopicPattern("news.*.{x}.>", TopicRules(may_subscribe="none")),
            TopicPattern("one", TopicRules()),
        ),
        tokens=TokenRules(hmac_secret="s" * 32),
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_description_of_topics_is_asyncapi(config: Config) -> None:
    document = written(asyncapi(config))
    validator = jsonschema.validators.validator_for(SCHEMA)(SCHEMA)
    assert [error.message for error in validator.iter_errors(document)] == []
    assert "ssss" not in json.dumps(document)


def test_rights_and_rules_of_topics_are_described() -> None:
    document = written(asyncapi(CONFIGS[2]))
    channels = document["channels"]
    assert [channel["address"] for channel in channels.values()] == [
        *("news.{part1}.%7Bx%7D.{part2}", "one", "chat:{name}", "新闻 x:{name}"),
        *("a b:{name}", "a_b:{name}", "{topic}"),
    ]
    operations = document["operations"]
    assert "publish_topics" not in operations
    assert operations["subscribe_topics"]["action"] == "send"
    assert "subscribe_pattern1" not in operations
    assert "clients with a user may" in operations["subscribe_namespace1_chat"]["summary"]
    assert channels["topics"]["x-rules"]["may_publish"] == "none"
    assert document["servers"]["root"]["security"]


def test_the_schema_tells_right_from_wrong() -> None:
    document = written(asyncapi(Config()))
    document["operations"]["publish_topics"]["action"] = "publish"
    validator = jsonschema.validators.validator_for(SCHEMA)(SCHEMA)
    assert list(validator.iter_errors(document))
