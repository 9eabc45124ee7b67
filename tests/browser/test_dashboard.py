"""The dashboard in a real browser, as operators use it and as strangers would misuse it."""

import json
import re
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.engines.servers import BINARIES, Server, serving

pytestmark = pytest.mark.browser

AXE = (Path(__file__).parent / "vendor" / "axe-4.14.1.js").read_text("utf-8")
KEY, VIEW, API = "the-key-of-operators", "the-key-to-look", "the-key-of-backends"

PAGES = {
    "overview": ".u-wrap",
    "connections": "tbody tr",
    "connections/2": ".meters",
    "topics": "tbody tr",
    "topics/news": ".publication",
    "closed": "tbody tr",
    "trace/topic/news": ".lines li",
    "tree": ".tree li li",
    "budgets": "tbody tr",
    "engine": "tbody tr",
    "config": "tbody tr",
}

NASTY = "<img src=x onerror=alert(1)>\"'`${1}</script>\u202e\u200b"
"""What a stranger may choose for a name, a topic, a payload."""

PEOPLE = """
    async ([url, name]) => {
        const line = new Centrifuge(url, { name: name.slice(0, 60), data: {} });
        await new Promise((resolve) => { line.on("connected", resolve); line.connect(); });
        for (const topic of ["news", name]) {
            const listener = line.newSubscription(topic);
            await new Promise((resolve, reject) => {
                listener.on("subscribed", resolve); listener.on("unsubscribed", resolve); listener.subscribe();
            });
        }
        await line.publish("news", { text: name });
        return [...document.querySelectorAll("img")].length;
    }
"""


@pytest.fixture
def broker(start_broker: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("BROKER_ADMIN_KEY", KEY)
    monkeypatch.setenv("BROKER_ADMIN_VIEW_KEY", VIEW)
    monkeypatch.setenv("BROKER_API_KEY", API)
    return start_broker()


@pytest.fixture
def stranger(broker: Any, context: Any) -> Any:
    """fd 2, beside the page that it came with: it calls itself what nobody should. And fd 3, which has
    gone again with a reason of that kind."""
    page = context.new_page()
    page.goto(broker.http)
    page.locator("#state[data-state=connected]").wait_for()
    name = re.sub(r"[\u200b\u202e ]", "", NASTY)
    page.evaluate(PEOPLE, [f"{broker.ws}/connection/websocket", name])
    page.evaluate(
        "(url) => new Promise((done) => { const w = new WebSocket(url); w.onopen = () => {"
        " w.close(4321, '<b>bye</b>'); }; w.onclose = done; })",
        broker.ws,
    )
    return page


class Desk:
    """An operator's tab, and everything that went wrong in it."""

    def __init__(self, context: Any, broker: Any, key: str = KEY, page: str = "") -> None:
        self.broker = broker
        self.page = context.new_page()
        self.wrong: list[str] = []
        self.requests: list[Any] = []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: self.wrong.append(dialog.message))
        self.page.on("request", self._note_request)
        self.page.on(
            "console", lambda said: self.wrong.append(said.text) if said.type == "error" else None
        )
        self.page.add_init_script(
            "addEventListener('securitypolicyviolation', (e) => console.error('CSP ' + e.violatedDirective))"
        )
        self.page.goto(f"{broker.http}/admin{page}")
        if key:
            self.log_in(key)

    def _note_request(self, request: Any) -> None:
        self.requests.append(request)

    def log_in(self, key: str) -> None:
        self.page.get_by_label("Key").fill(key)
        self.page.get_by_label("Key").press("Enter")
        self.page.locator("#nav a").first.wait_for()

    def go(self, name: str) -> None:
        self.page.evaluate("(to) => { location.hash = to }", f"#/{name}")
        self.page.locator(f"#view {PAGES[name]}").first.wait_for(state="attached")

    def axe(self) -> list[str]:
        self.page.evaluate(AXE)
        found = self.page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
        return [
            f"{each['id']}: {node['html'][:200]} {node['failureSummary'][:200]}"
            for each in found["violations"]
            for node in each["nodes"]
        ]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_page_works_is_accessible_and_shows_text_of_strangers_as_text(
    theme: str, chromium: Any, broker: Any, stranger: Any
) -> None:
    context = chromium.new_context(viewport={"width": 1280, "height": 800}, color_scheme=theme)
    context.set_default_timeout(8000)
    desk = Desk(context, broker, key="")
    assert desk.axe() == []
    desk.log_in(KEY)
    for name in PAGES:
        desk.go(name)
        assert desk.axe() == [], name
        assert desk.page.locator("#view img, #view script, #view b b").count() == 0, name
    assert desk.wrong == []
    assert all(each.url.startswith(broker.http) for each in desk.requests)
    context.close()


def test_every_page_fits_a_phone(chromium: Any, broker: Any, stranger: Any) -> None:
    context = chromium.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
    context.set_default_timeout(8000)
    desk = Desk(context, broker)
    for name in PAGES:
        desk.go(name)
        width = desk.page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390, name
    assert desk.axe() == []
    context.close()


def test_a_wrong_key_is_refused_and_kept_nowhere(context: Any, broker: Any) -> None:
    desk = Desk(context, broker, key="")
    desk.page.get_by_label("Key").fill("a guess")
    desk.page.get_by_role("button", name="Log in").click()
    desk.page.get_by_text("wrong key").wait_for()
    assert desk.page.evaluate("sessionStorage.length") == 0
    assert not desk.page.locator("#app").is_visible()


def test_the_key_stands_in_no_address_no_cookie_and_no_storage_but_this_tabs(
    context: Any, broker: Any
) -> None:
    desk = Desk(context, broker)
    desk.go("overview")
    for request in desk.requests:
        assert KEY not in request.url
        assert KEY not in str(request.headers)
    assert KEY not in desk.page.url
    assert context.cookies() == []
    assert KEY not in desk.page.evaluate("JSON.stringify(localStorage)")
    desk.page.reload()  # it stays for this tab
    desk.page.locator("#nav a").first.wait_for()
    other = Desk(context, broker, key="")
    other.page.get_by_label("Key").wait_for()
    desk.page.get_by_role("button", name="Log out").click()
    desk.page.get_by_label("Key").wait_for()
    assert desk.page.evaluate("sessionStorage.length") == 0


def test_somebody_elses_page_gets_nothing_of_a_browser_that_is_logged_in(
    context: Any, broker: Any, tmp_path: Path
) -> None:
    """Neither by a WebSocket, nor in a frame, nor by a form."""
    desk = Desk(context, broker)
    desk.go("overview")
    evil = context.new_page()
    evil.route(
        "http://evil.example/**",
        lambda route: route.fulfill(
            content_type="text/html",
            body=f"<iframe src='{broker.http}/admin'></iframe>",
        ),
    )
    evil.goto("http://evil.example/")
    opened = evil.evaluate(
        "(url) => new Promise((done) => { const w = new WebSocket(url);"
        " w.onopen = () => done('open'); w.onerror = () => done('refused'); })",
        f"{broker.ws}/admin/websocket",
    )
    assert opened == "refused"
    frame = evil.frames[1]
    assert frame.locator("#key, #nav").count() == 0


def test_an_operator_kicks_pushes_publishes_and_unsubscribes(
    context: Any, broker: Any, stranger: Any
) -> None:
    desk = Desk(context, broker)
    desk.go("topics/news")
    desk.page.get_by_role("button", name="Publish").click()
    desk.page.get_by_label("JSON").fill("no json")
    dialog = desk.page.get_by_role("dialog")
    dialog.get_by_role("button", name="Publish").click()
    dialog.get_by_text("That is no JSON").wait_for()
    desk.page.get_by_label("JSON").fill('{"from": "an operator"}')
    dialog.get_by_role("button", name="Publish").click()
    desk.page.get_by_text("published: 1 of 1").wait_for()
    desk.page.locator(".publication pre", has_text="an operator").first.wait_for()
    desk.go("connections/2")
    desk.page.get_by_role("button", name="Push").click()
    desk.page.get_by_role("dialog").get_by_role("button", name="Push").click()
    desk.page.get_by_text("pushed to fd 2").wait_for()
    rows = desk.page.locator("tr", has_text="news")
    rows.get_by_role("button", name="Unsubscribe").click()
    desk.page.get_by_role("dialog").get_by_role("button", name="Unsubscribe").click()
    desk.page.get_by_text("fd 2 is unsubscribed").wait_for()
    rows.wait_for(state="detached")
    desk.page.get_by_role("button", name="Disconnect").click()
    desk.page.get_by_label("Reason").fill(NASTY)
    desk.page.keyboard.press("Escape")  # who thought better of it
    assert desk.page.get_by_text("open", exact=True).is_visible()
    desk.page.get_by_role("button", name="Disconnect").click()
    desk.page.get_by_label("Reason").fill(NASTY)
    desk.page.get_by_role("dialog").get_by_role("button", name="Disconnect").click()
    desk.page.get_by_text("How it ended").wait_for()
    assert "\\u202e\\u200b" in desk.page.inner_text("#view")
    assert desk.page.locator("#view img").count() == 0
    assert desk.wrong == []


def test_who_may_only_look_sees_no_buttons_and_may_not_act_by_hand(
    context: Any, broker: Any, stranger: Any
) -> None:
    desk = Desk(context, broker, VIEW)
    for name in ("connections/2", "topics/news", "topics"):
        desk.go(name)
        assert desk.page.locator("[data-act]").count() == 0, name
    desk.page.evaluate(
        "() => { const b = document.createElement('button'); b.dataset.act = 'kick'; b.dataset.fd = 2;"
        " document.body.append(b); b.click(); }"
    )
    desk.page.get_by_role("dialog").get_by_role("button", name="Disconnect").click()
    desk.page.get_by_text("permission denied").wait_for()


def test_the_keyboard_is_enough(context: Any, broker: Any, stranger: Any) -> None:
    desk = Desk(context, broker)
    desk.go("overview")
    page = desk.page
    page.reload()
    page.locator(".u-wrap").first.wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Connections"
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Connections", level=1).wait_for()
    page.locator("tbody tr").first.wait_for()
    page.locator("#view:focus").wait_for()
    page.get_by_role("link", name="2", exact=True).focus()
    page.wait_for_timeout(2500)  # a refresh takes nobody's focus away
    assert page.evaluate("document.activeElement.textContent") == "2"
    page.keyboard.press("Enter")
    page.locator(".meters").wait_for()


def test_search_finds_and_says_when_there_is_nothing(
    context: Any, broker: Any, stranger: Any
) -> None:
    from playwright.sync_api import expect

    desk = Desk(context, broker)
    desk.go("connections")
    search = desk.page.get_by_role("searchbox")
    search.fill("topic:news")
    expect(desk.page.locator("tbody tr")).to_have_count(1)
    search.fill("topic:nothing")
    desk.page.get_by_text("No connection is like that").wait_for()
    expect(desk.page.get_by_role("link", name="How fd")).to_have_count(0)
    search.fill("4711")
    desk.page.get_by_role("link", name="How fd 4711 ended").click()
    expect(desk.page).to_have_url(re.compile("#/connections/4711$"))


def test_charts_and_traces_are_live(context: Any, broker: Any, stranger: Any) -> None:
    desk = Desk(context, broker)
    desk.go("trace/topic/news")
    desk.page.get_by_text("tracing topic news").wait_for()
    body = json.dumps({"channel": "news", "data": {"text": NASTY}}).encode()
    request = urllib.request.Request(
        f"{broker.http}/api/publish", body, {"X-API-Key": API, "Content-Type": "application/json"}
    )
    urllib.request.urlopen(request).close()
    desk.page.locator(".lines li.published", has_text="onerror").wait_for()
    assert desk.page.locator(".lines img").count() == 0
    desk.go("overview")
    before = desk.page.locator(".plot").first.get_attribute("aria-label")
    assert before is not None
    assert before.startswith("Messages a second: delivered ")
    assert desk.page.evaluate("document.querySelectorAll('.u-wrap canvas').length") == 4
    assert desk.wrong == []


def test_a_line_that_is_cut_comes_back_by_itself(context: Any, broker: Any) -> None:
    lines: list[Any] = []

    def through(socket: Any) -> None:
        socket.connect_to_server()
        lines.append(socket)

    context.route_web_socket("**/admin/websocket", through)
    desk = Desk(context, broker)
    desk.go("overview")
    lines[0].close(code=3000, reason="cable cut")
    desk.page.locator("#line[data-state=connecting]").wait_for()
    desk.page.locator("#line[data-state=connected]").wait_for()
    assert len(lines) == 2


def test_all_nodes_are_on_one_page_and_one_can_be_chosen(
    context: Any, tmp_path: Path, start_broker: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from playwright.sync_api import expect

    monkeypatch.setenv("BROKER_ADMIN_KEY", KEY)
    with serving(BINARIES["valkey"], tmp_path) as server:
        brokers = []
        for name in ("one", NASTY):
            monkeypatch.setenv("BROKER_NAME", name)
            brokers.append(start_broker("--engine", f"redis+unix://{server.socket}"))
        one, two = brokers
        away = context.new_page()
        away.goto(two.http)
        away.locator("#state[data-state=connected]").wait_for()
        desk = Desk(context, one)
        page = desk.page
        which = page.get_by_label("Node", exact=True)
        expect(which.locator("option")).to_have_count(3)
        expect(page.locator("tr", has_text="onerror").first).to_contain_text("Show")
        expect(page.locator(".tile").first).to_contain_text("2")  # the page itself is one of them
        assert desk.axe() == []
        desk.go("connections")
        expect(page.locator("tbody tr")).to_have_count(2)
        expect(page.locator("tbody tr", has_text="onerror")).to_have_count(1)
        which.select_option(index=2)
        expect(page.locator("tbody tr")).to_have_count(1)
        page.set_viewport_size({"width": 390, "height": 844})
        for name in ("overview", "budgets", "engine", "tree", "topics"):
            page.evaluate("(to) => { location.hash = to }", f"#/{name}")
            page.locator("#view h1").wait_for()
            expect(page.locator("#view")).to_contain_text(
                "onerror" if name != "topics" else "Topics"
            )
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
            assert desk.axe() == [], name
        desk.page.evaluate("(to) => { location.hash = to }", "#/connections")
        page.locator("tbody a").first.click()
        page.get_by_role("button", name="Disconnect").click()
        page.get_by_role("dialog").get_by_role("button", name="Disconnect").click()
        page.get_by_text("How it ended").wait_for()
        two.process.kill()
        page.evaluate("(to) => { location.hash = to }", "#/closed")
        page.get_by_text("Not all is here").wait_for()
        assert page.locator("#view img").count() == 0
        assert desk.wrong == []


def nodes_in(server: Server) -> set[str]:
    return set(
        re.findall("[0-9a-f]{12}", trio.run(server.call, "HKEYS", "{broker}:nodes").decode())
    )


def test_after_a_split_all_nodes_are_there_again_without_a_reload(
    context: Any, tmp_path: Path, start_broker: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that was declared dead goes on as another, and so does its dashboard, with a trace open."""
    from playwright.sync_api import expect

    monkeypatch.setenv("BROKER_ADMIN_KEY", KEY)
    monkeypatch.setenv("BROKER_API_KEY", API)
    with serving(BINARIES["valkey"], tmp_path) as server:
        monkeypatch.setenv("BROKER_NAME", "one")
        one = start_broker("--engine", f"redis+unix://{server.socket}")
        first = nodes_in(server)
        monkeypatch.setenv("BROKER_NAME", "two")
        two = start_broker("--engine", f"redis+unix://{server.socket}")
        pages = []
        for broker in (one, two):
            pages.append(context.new_page())
            pages[-1].goto(broker.http)
            pages[-1].locator("#state[data-state=connected]").wait_for()
        trace, desk = Desk(context, two), Desk(context, two)
        trace.page.evaluate("location.hash = '#/trace/topic/news'")
        trace.page.get_by_text("Nothing yet").wait_for()
        desk.go("connections")
        rows = desk.page.locator("tbody tr")
        expect(rows).to_have_count(4)
        before = rows.last.inner_text()
        (second,) = nodes_in(server) - first
        trio.run(
            server.call, "HDEL", "{broker}:nodes", second
        )  # as one would that takes it for dead
        expect(desk.page.get_by_text(before.split()[0], exact=True)).to_have_count(
            0, timeout=20_000
        )
        expect(rows).to_have_count(4, timeout=20_000)
        expect(rows.filter(has_text=re.compile(r"one\s*$"))).to_have_count(1)
        asked = urllib.request.Request(
            f"{one.http}/api/publish",
            b'{"channel": "news", "data": "after"}',
            {"X-API-Key": API},
        )
        urllib.request.urlopen(asked).close()
        trace.page.get_by_text("after").wait_for()
        rows.filter(has_text=re.compile(r"one\s*$")).locator("a").first.click()
        desk.page.get_by_role("button", name="Push").click()
        dialog = desk.page.get_by_role("dialog")
        dialog.locator("textarea, input").first.fill('"hello from two"')
        dialog.get_by_role("button", name="Push").click()
        expect(pages[0].locator("body")).to_contain_text("hello from two")
