"""What methods of the API answer is what is described."""

from typing import Any

from jsonschema import Draft202012Validator
from trio.testing import MockClock

from broker.http.openapi import openapi
from tests.http.conftest import call, listener, served, written


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
