"""The pages about the JavaScript SDK: their code, as a module of a page in a real browser, with the SDK that the broker serves."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest

from tests.conftest import HMAC_SECRET, Process

pytestmark = pytest.mark.browser

PAGES = Path(__file__).parents[2] / "docs" / "javascript"


def code(page: str) -> str:
    """The first block with a function, for a script: exports are names of the page."""
    blocks = re.findall(r"```javascript\n(.*?)```", (PAGES / page).read_text("utf-8"), re.DOTALL)
    (module,) = (block for block in blocks if "\nexport " in block)
    exports = re.findall(r"^export (?:async )?function (\w+)", module, re.MULTILINE)
    plain = re.sub(r"^export ", "", module, flags=re.MULTILINE)
    return plain + "".join(f"window.{name} = {name};" for name in exports)


def used(page: str) -> str:
    """The last block of a page, which uses that function, with the broker of the test."""
    blocks = re.findall(r"```javascript\n(.*?)```", (PAGES / page).read_text("utf-8"), re.DOTALL)
    last: str = blocks[-1]
    address = '"ws://localhost:9501/connection/websocket"'
    assert address in last
    return last.replace(address, "url")


class Tab:
    """A page of the broker's origin, with the SDK by its script tag and the code of some pages."""

    def __init__(self, context: Any, broker: Process, *pages: str) -> None:
        self.page = context.new_page()
        self.page.goto(f"{broker.http}/healthz")
        (tag,) = re.findall(
            r'<script src="http://localhost:9501(/\S+)">', (PAGES / "index.md").read_text("utf-8")
        )
        self.page.add_script_tag(url=broker.http + tag)
        for page in pages:
            self.page.add_script_tag(content=f"{{{code(page)}}}")
        self.page.evaluate(
            "url => { window.url = url; window.said = []; window.say = (...a) => said.push(a.length > 1 ? a : a[0]); }",
            f"{broker.ws}/connection/websocket",
        )

    def run(self, script: str) -> Any:
        return self.page.evaluate(f"async () => {{{script}}}")

    def wait(self, condition: str) -> None:
        self.page.wait_for_function(condition)


@pytest.fixture
def broker(start_broker: Callable[..., Process]) -> Process:
    return start_broker()


CONNECT = "window.c = new Centrifuge(url); c.connect(); await c.ready();"


def test_the_first_page_chats(context: Any, broker: Process) -> None:
    one, other = Tab(context, broker, "index.md"), Tab(context, broker, "index.md")
    for tab in (one, other):
        tab.run("window.room = chat(url, say);")
        tab.wait("said.some(text => text.startsWith('I am fd'))")
    one.wait("true")
    other.run("await room.say('hello');")
    for tab in (one, other):
        tab.wait("said.includes('fd 2: hello')")
    third = Tab(context, broker, "index.md")
    third.run("console.log = say;" + used("index.md"))
    for tab in (one, other, third):
        tab.wait("said.includes('fd 3: hello')")
    other.run("room.leave();")
    other.wait("said.includes('gone: 0 disconnect called')")


def test_who_is_here_is_shown_as_they_come_and_go(context: Any, broker: Process) -> None:
    one, other = Tab(context, broker, "presence.md"), Tab(context, broker, "presence.md")
    for tab in (one, other):
        tab.run(CONNECT + "whoIsHere(c, 'room:1', say);")
        tab.wait("said.length > 0")
    for tab in (one, other):
        tab.wait("JSON.stringify(said.at(-1)) === '[1,2]'")
    other.run("c.disconnect();")
    one.wait("JSON.stringify(said.at(-1)) === '[1]'")
    # It was away itself, and was told of nobody meanwhile.
    one.run("c.disconnect();")
    other.run("c.connect(); await c.ready();")
    one.run("c.connect();")
    one.wait("said.at(-1).length === 2")


def test_history_comes_page_by_page(context: Any, broker: Process) -> None:
    tab = Tab(context, broker, "history.md")
    tab.run(
        CONNECT + "window.t = c.newSubscription('a'); t.subscribe(); await t.ready();"
        "for (let n = 1; n <= 7; n++) await t.publish(n);"
    )
    found = tab.run(
        "const last = await lastOnes(t, 3); const pages = [last.publications];"
        "for (let n = 0; n < 4; n++) pages.push(await last.older());"
        "return pages.map(page => page.map(each => each.data));"
    )
    assert found == [[5, 6, 7], [2, 3, 4], [1], [], []]


def test_what_was_missed_comes_once_and_in_order(context: Any, broker: Process) -> None:
    reader, writer = Tab(context, broker, "recovery.md"), Tab(context, broker)
    writer.run(CONNECT)
    reader.run(
        CONNECT
        + "window.t = withoutGaps(c, 'a', data => say(data), () => say('reload')); await t.ready();"
    )
    writer.run("await c.publish('a', 1);")
    reader.wait("said.length === 1")
    reader.run("c.disconnect();")
    writer.run("for (const n of [2, 3]) await c.publish('a', n);")
    reader.run("c.connect();")
    reader.wait("said.length === 3")
    writer.run("await c.publish('a', 4);")
    reader.wait("said.length === 4")
    assert reader.page.evaluate("said") == [1, 2, 3, 4]
    reader.run("c.disconnect();")
    writer.run("for (let n = 0; n < 150; n++) await c.publish('a', n);")  # more than is kept
    reader.run("c.connect();")
    reader.wait("said.at(-1) === 'reload'")


def test_a_token_is_fetched_and_without_a_login_nobody_comes_back(
    context: Any, start_broker: Callable[..., Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROKER_TOKENS_HMAC_SECRET", HMAC_SECRET)
    tab = Tab(context, start_broker(), "tokens.md")
    token = jwt.encode({"sub": "mei"}, HMAC_SECRET, "HS256")
    tab.run(
        "window.c = connectAs(Centrifuge, url,"
        f" async () => new Response(JSON.stringify({{token: '{token}'}})), () => say('login'));"
        "await c.ready();"
    )
    tab.run(
        "window.d = connectAs(Centrifuge, url, async () => new Response('', {status: 403}),"
        " () => say('login'));"
    )
    tab.wait("said.includes('login') && d.state === 'disconnected'")
    assert tab.page.evaluate("c.state") == "connected"
    tab.page.route("**/login", lambda route: route.fulfill(body="log in"))
    tab.page.route("**/token", lambda route: route.fulfill(status=403))
    with tab.page.expect_request("**/token") as asked:
        tab.run(used("tokens.md"))
    assert asked.value.method == "POST"
    tab.page.wait_for_url("**/login")
