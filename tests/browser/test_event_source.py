"""A page without an SDK: `EventSource` of a real browser, which comes back by itself to where it was."""

import json
import re
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import PATIENCE, Process

pytestmark = pytest.mark.browser

KEY = "k" * 20

LISTEN = """() => {
window.said = [];
window.ids = [];
const source = new EventSource("/connection/uni_sse?topic=news&topic=caf%C3%A9");
source.onmessage = (event) => {
  const push = JSON.parse(event.data);
  window.ids.push(event.lastEventId);
  if (push.connect) window.fd = Number(push.connect.client);
  if (push.subscribe) window.said.push([push.channel, push.subscribe.recovered ?? null]);
  const missed = push.subscribe ? push.subscribe.publications ?? [] : [];
  for (const pub of push.pub ? [push.pub] : missed) window.said.push([push.channel, pub.data]);
};
}"""


def call(broker: Process, method: str, **params: object) -> Any:
    request = urllib.request.Request(
        f"{broker.http}/api/{method}",
        json.dumps(params).encode(),
        {"X-API-Key": KEY, "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return json.load(answer)["result"]


def test_an_event_source_that_lost_its_connection_misses_nothing(
    context: Any, start_broker: Callable[..., Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROKER_API_KEY", KEY)
    broker = start_broker()
    page = context.new_page()
    page.goto(f"{broker.http}/healthz")  # any page of this origin
    page.evaluate(LISTEN)
    page.wait_for_function("window.said.length === 2")
    call(broker, "publish", channel="news", data=1)
    call(broker, "publish", channel="caf\u00e9", data={"offset": 7})
    page.wait_for_function("window.said.length === 4")
    assert page.evaluate("window.said") == [
        *(["news", None], ["caf\u00e9", None]),
        *(["news", 1], ["caf\u00e9", {"offset": 7}]),
    ]
    first = page.evaluate("window.fd")
    context.set_offline(True)
    call(broker, "disconnect", user="", client=str(first), disconnect={"code": 3000, "reason": "x"})
    for number in (2, 3):
        call(broker, "publish", channel="news", data=number)
    context.set_offline(False)
    page.wait_for_function("window.said.length === 8")
    assert page.evaluate("window.fd") > first
    assert page.evaluate("window.said.slice(4)") == [
        *(["news", True], ["news", 2], ["news", 3], ["caf\u00e9", True]),
    ]
    last_id = page.evaluate("window.ids.at(-1)")
    assert re.fullmatch(r"news:\w+:3,caf%C3%A9:\w+:1", last_id), last_id
