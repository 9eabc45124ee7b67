"""The pages, as people meet them: in a real browser, against a broker of its own process."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest

from tests.conftest import HMAC_SECRET

pytestmark = pytest.mark.browser

CLIENTS = Path(__file__).parents[2] / "clients"

# Lines that both sides of the article print, to the letter.
CLIENT_LINES = ["client：打开连接", "client：接收到服务端的消息 this is server", "client：关闭连接"]
SERVER_LINES = [
    "websocket服务器启动成功",
    "握手成功 fd1",
    "接收客户端消息: 1:client：hello，服务端,opcode:1,fin:1",
    "客户端 1 关闭",
]


class Tab:
    """One tab with the chat page, and everything that went wrong in it."""

    def __init__(self, context: Any, url: str, name: str = "") -> None:
        self.page = context.new_page()
        self.wrong: list[str] = []
        self.requests: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", self._note)
        self.page.goto(url)
        self.wait_for("#state", "connected")
        if name:
            self.page.get_by_label("Your name").fill(name)
            self.page.get_by_label("Your name").press("Enter")

    def _note(self, said: Any) -> None:
        if said.type == "error":
            self.wrong.append(said.text)

    @property
    def fd(self) -> int:
        found = re.fullmatch(r"you are fd (\d+)", self.page.inner_text("#me"))
        assert found is not None
        return int(found[1])

    def say(self, text: str, to: int | str = "") -> None:
        self.page.get_by_label("To fd").fill(str(to))
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.get_by_role("button", name="Send").click()

    def wait_for(self, selector: str, text: str) -> Any:
        """The element that says `text`, and nothing else, once it is there."""
        found = self.page.locator(selector).filter(has_text=re.compile(f"^{re.escape(text)}$"))
        found.first.wait_for()
        return found

    def shows(self, *messages: str) -> None:
        """These messages are here, or soon will be, and no others: who, to whom, what."""
        from playwright.sync_api import expect

        shown = self.page.locator("#messages li:not(.note)")
        expect(shown).to_have_text(list(messages), use_inner_text=True)


@pytest.fixture
def two_tabs(context: Any, start_broker: Callable[..., Any]) -> tuple[Tab, Tab]:
    broker = start_broker()
    return Tab(context, broker.http, "Mei"), Tab(context, broker.http, "Jonas")


def test_two_tabs_chat(two_tabs: tuple[Tab, Tab]) -> None:
    mei, jonas = two_tabs
    mei.say("Hello from the first tab")
    jonas.shows(f"Mei · fd {mei.fd} Hello from the first tab")
    jonas.say("And hello from the second")
    for tab in two_tabs:
        tab.shows(
            f"Mei · fd {mei.fd} Hello from the first tab",
            f"Jonas · fd {jonas.fd} And hello from the second",
        )
        assert tab.wrong == []


def test_each_sees_who_is_here_by_name(two_tabs: tuple[Tab, Tab]) -> None:
    mei, jonas = two_tabs
    for tab, other in ((mei, jonas), (jonas, mei)):
        name = "Jonas" if other is jonas else "Mei"
        tab.wait_for("#people li", f"{name} fd {other.fd}")
        tab.wait_for("#count", "(2)")
    gone = jonas.fd
    jonas.page.close()
    mei.wait_for("#messages .note", f"Jonas · fd {gone} left")
    mei.wait_for("#count", "(1)")


def test_a_direct_message_reaches_one_fd_only(
    context: Any, start_broker: Callable[..., Any]
) -> None:
    broker = start_broker()
    mei, jonas, third = (Tab(context, broker.http) for _ in range(3))
    mei.say("for your eyes only", to=jonas.fd)
    jonas.shows(f"fd {mei.fd} → you for your eyes only")
    mei.shows(f"you → fd {jonas.fd} for your eyes only")
    # A person in the list fills in the number.
    jonas.page.get_by_role("button", name=f"fd {mei.fd}").click()
    assert jonas.page.get_by_label("To fd").input_value() == str(mei.fd)
    # The public message comes to the third as well, and is all it got.
    jonas.say("for all")
    third.shows(f"fd {jonas.fd} for all")


def test_what_commands_and_backends_send_is_shown_whatever_it_is(
    context: Any, start_broker: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROKER_API_KEY", "s3cret")
    broker = start_broker()
    tab = Tab(context, broker.http)
    for channel in (f"fd:{tab.fd}", "room.lobby"):
        for data in ("only for you", {"text": "said"}, {"sun": True}, None, {"text": None}):
            body = {"channel": channel, "data": data}
            answer = context.request.post(
                f"{broker.http}/api/publish", data=body, headers={"X-API-Key": "s3cret"}
            )
            assert "error" not in answer.json()
    pushed = {"fd": tab.fd, "data": {"text": "pushed"}}
    context.request.post(f"{broker.http}/api/push", data=pushed, headers={"X-API-Key": "s3cret"})
    said = ("only for you", "said", '{"sun":true}', "null", "null")
    shown = [*(f"server → you {each}" for each in said), *(f"server {each}" for each in said)]
    tab.shows(*shown, "server → you pushed")
    assert tab.wrong == []


def test_where_a_token_is_required_the_page_asks_for_one_and_keeps_it(
    context: Any, start_broker: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROKER_TOKENS_HMAC_SECRET", HMAC_SECRET)
    broker = start_broker()
    page = context.new_page()
    page.goto(broker.http)
    field = page.get_by_label("Token")
    field.wait_for()
    field.fill("no.such.token")
    field.press("Enter")
    page.get_by_text("Give a token that is valid").first.wait_for()
    field.fill(jwt.encode({"sub": "mei"}, HMAC_SECRET, "HS256"))
    field.press("Enter")
    page.locator("#state[data-state=connected]").wait_for()
    page.locator("#people li").wait_for()  # the room has been entered
    page.reload()
    page.locator("#state[data-state=connected]").wait_for()


def test_the_page_asks_for_no_token_where_none_is_needed(two_tabs: tuple[Tab, Tab]) -> None:
    mei, _ = two_tabs
    assert not mei.page.get_by_label("Token").is_visible()


def test_a_message_to_nobody_is_given_back(context: Any, start_broker: Callable[..., Any]) -> None:
    tab = Tab(context, start_broker().http)
    tab.say("anybody?", to=999)
    tab.wait_for("#messages .bad", "Nobody here is fd 999.")
    assert tab.page.get_by_label("Message", exact=True).input_value() == "anybody?"


SLIPS = ["bob", "0", "00", "-1", "1.5", "1e3", "fd:1", "1 2", "٣", "9" * 30]
"""Texts that somebody may put into "To" who means one person."""


@pytest.mark.parametrize("by", ["button", "Enter", "script"])
def test_a_slip_in_to_sends_nothing_and_keeps_the_text(
    by: str, context: Any, start_broker: Callable[..., Any]
) -> None:
    broker = start_broker()
    mei, jonas = Tab(context, broker.http), Tab(context, broker.http)
    if by == "script":  # a browser, or an extension, that does not check the pattern
        mei.page.evaluate("document.querySelector('#say').noValidate = true")
    for to in SLIPS:
        mei.page.get_by_label("To fd").fill(to)
        mei.page.get_by_label("Message", exact=True).fill("secret")
        if by == "Enter":
            mei.page.get_by_label("To fd").press("Enter")
        else:
            mei.page.get_by_role("button", name="Send").click()
        if by == "script":
            mei.wait_for(
                "#messages .bad",
                f"Not sent: “{to}” is no fd: a number such as 7, or empty for everybody.",
            )
        assert mei.page.get_by_label("Message", exact=True).input_value() == "secret"
        assert mei.page.get_by_label("To fd").input_value() == to
    mei.say("for all", to="  ")
    jonas.shows(f"fd {mei.fd} for all")
    mei.shows(f"fd {mei.fd} for all")


def test_to_is_empty_after_a_message_so_that_the_next_is_for_all(two_tabs: tuple[Tab, Tab]) -> None:
    mei, jonas = two_tabs
    mei.say("psst", to=f" {jonas.fd} ")
    jonas.shows(f"Mei · fd {mei.fd} → you psst")
    assert mei.page.get_by_label("To fd").input_value() == ""
    mei.page.get_by_label("Message", exact=True).fill("for all")
    mei.page.get_by_role("button", name="Send").click()
    jonas.shows(f"Mei · fd {mei.fd} → you psst", f"Mei · fd {mei.fd} for all")


def test_a_message_to_somebody_who_has_gone_comes_back_with_its_to(
    two_tabs: tuple[Tab, Tab],
) -> None:
    mei, jonas = two_tabs
    gone = jonas.fd
    jonas.page.close()
    mei.wait_for("#count", "(1)")
    for _ in range(2):  # pressing Send again does not send it to all either
        mei.page.get_by_label("To fd").fill(str(gone))
        mei.page.get_by_label("Message", exact=True).fill("//secret")
        mei.page.get_by_role("button", name="Send").click()
        mei.wait_for("#messages .bad", f"Nobody here is fd {gone}.")
        mei.page.wait_for_function("document.querySelector('#text').value !== ''")
        assert mei.page.get_by_label("To fd").input_value() == str(gone)
        assert mei.page.get_by_label("Message", exact=True).input_value() == "//secret"
        mei.page.evaluate("document.querySelector('#messages').replaceChildren()")
    mei.shows()


def test_a_refused_message_does_not_mix_with_the_one_being_written(
    context: Any, start_broker: Callable[..., Any]
) -> None:
    tab = Tab(context, start_broker().http)
    # The answer comes once the next message is begun.
    tab.page.evaluate("""
        () => {
            const send = WebSocket.prototype.send;
            window.held = [];
            WebSocket.prototype.send = function (data) { held.push(() => send.call(this, data)); };
        }
    """)
    tab.say("secret", to=999)
    tab.page.get_by_label("Message", exact=True).fill("for all, later")
    tab.page.evaluate("held.forEach((go) => go())")
    tab.wait_for("#messages .bad", "Nobody here is fd 999. You wrote: secret")
    assert tab.page.get_by_label("To fd").input_value() == ""
    assert tab.page.get_by_label("Message", exact=True).input_value() == "for all, later"


def test_a_line_that_begins_with_a_slash_is_not_sent_unless_it_is_doubled(
    two_tabs: tuple[Tab, Tab],
) -> None:
    mei, jonas = two_tabs
    for slip in ("/to 2 secret", " /msg secret", "／to 2 secret", "/"):
        mei.say(slip)
        mei.wait_for(
            "#messages .bad",
            "Not sent: a slash is no command here. Write to one person with “To fd”; "
            "begin with // to send it as text.",
        )
        assert mei.page.get_by_label("Message", exact=True).input_value() == slip
    mei.say("//to 2 is what I typed")
    jonas.shows(f"Mei · fd {mei.fd} /to 2 is what I typed")


def test_text_of_people_is_never_markup(two_tabs: tuple[Tab, Tab]) -> None:
    mei, jonas = two_tabs
    nasty = "<img src=x onerror=document.title='owned'><b>bold</b>"
    mei.page.get_by_label("Your name").fill("<i>Mei")
    mei.page.get_by_label("Your name").press("Enter")
    mei.say(nasty)
    jonas.shows(f"<i>Mei · fd {mei.fd} {nasty}")
    jonas.wait_for("#people li", f"<i>Mei fd {mei.fd}")
    assert jonas.page.locator("#messages img, #messages li b b, #people i").count() == 0
    assert jonas.page.title() == "trio-broker"


def test_rooms_are_apart_and_who_comes_later_reads_what_was_said(
    context: Any, start_broker: Callable[..., Any]
) -> None:
    broker = start_broker()
    mei, jonas = Tab(context, broker.http), Tab(context, broker.http)
    mei.page.get_by_label("Room").fill("tea & cake.*")
    mei.page.get_by_role("button", name="Go").click()
    mei.wait_for("#count", "(1)")
    mei.say("only in here")
    mei.shows(f"fd {mei.fd} only in here")
    jonas.say("in the lobby")
    jonas.shows(f"fd {jonas.fd} in the lobby")
    jonas.page.get_by_label("Room").fill(mei.page.get_by_label("Room").input_value())
    jonas.page.get_by_role("button", name="Go").click()
    jonas.shows(f"fd {mei.fd} only in here")
    mei.shows(f"fd {mei.fd} only in here")


def test_a_tab_that_was_cut_off_recovers_what_it_missed(
    context: Any, start_broker: Callable[..., Any]
) -> None:
    broker = start_broker()
    lines: list[Any] = []

    def through(socket: Any) -> None:
        socket.connect_to_server()
        lines.append(socket)

    context.route_web_socket("**/connection/websocket", through)
    mei, jonas = Tab(context, broker.http), Tab(context, broker.http)
    before = mei.fd
    jonas.say("one")
    mei.shows(f"fd {jonas.fd} one")
    lines[0].close(code=3000, reason="cable cut")
    mei.wait_for("#state", "connecting")
    jonas.say("two")
    jonas.say("three")
    mei.wait_for("#state", "connected")
    mei.shows(*(f"fd {jonas.fd} {word}" for word in ("one", "two", "three")))
    assert mei.fd > before


FAILS = """
    window.WebSocket = class {
        constructor() { setTimeout(() => this.onclose({ code: 1006, reason: "" })); }
        close() {}
    };
"""
"""A network that lets no WebSocket pass: what the page sees is a connection that fails."""

BLOCKED = {
    "fails": (FAILS, "http_stream"),
    "throws": ("window.WebSocket = class { constructor() { throw Error(); } }", "http_stream"),
    "is not there": ("delete window.WebSocket", "http_stream"),
    "nor are streams": ("delete window.WebSocket; delete window.ReadableStream", "sse"),
}
"""How a page may be without WebSocket, and what it then uses."""


@pytest.mark.parametrize("how", BLOCKED)
def test_without_websocket_the_chat_goes_over_plain_http(
    how: str, context: Any, start_broker: Callable[..., Any]
) -> None:
    script, transport = BLOCKED[how]
    context.add_init_script(script)
    broker = start_broker()
    mei, jonas = Tab(context, broker.http, "Mei"), Tab(context, broker.http, "Jonas")
    mei.say("No socket needed")
    said = f"Mei · fd {mei.fd} No socket needed"
    jonas.shows(said)
    jonas.say("你好", to=mei.fd)
    mei.shows(said, f"Jonas · fd {jonas.fd} → you 你好")
    mei.wait_for("#people li", f"Jonas fd {jonas.fd}")
    for tab in (mei, jonas):
        streams = [url for url in tab.requests if "/connection/" in url]
        assert [url.split("?")[0] for url in streams] == [f"{broker.http}/connection/{transport}"]
        assert f"{broker.http}/emulation" in tab.requests
        assert tab.wrong == []
    gone = jonas.fd
    jonas.page.close()
    mei.wait_for("#messages .note", f"Jonas · fd {gone} left")


def test_the_page_asks_nothing_of_any_other_host(
    context: Any, start_broker: Callable[..., Any]
) -> None:
    broker = start_broker()
    tab = Tab(context, broker.http)
    assert len(tab.requests) >= 6
    assert all(url.startswith(f"{broker.http}/") for url in tab.requests)
    assert tab.wrong == []


def test_the_page_fits_a_phone(context: Any, start_broker: Callable[..., Any]) -> None:
    tab = Tab(context, start_broker().http)
    tab.page.set_viewport_size({"width": 360, "height": 640})
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 360
    assert tab.page.get_by_role("button", name="Send").is_visible()


OPEN = 1  # WebSocket.readyState

KEEP_SOCKETS = """
    window.sockets = [];
    window.WebSocket = class extends WebSocket {
        constructor(...args) { super(...args); window.sockets.push(this); }
    };
"""


class Article:
    """A page on which time stands still but for `wait`; what it prints, and its last socket."""

    def __init__(self, context: Any) -> None:
        self.page = context.new_page()
        self.printed: list[str] = []
        self.page.on("console", lambda said: self.printed.append(said.text))
        self.page.add_init_script(KEEP_SOCKETS)
        self.page.clock.install(time=0)
        self.page.clock.pause_at(1)

    def wait(self, milliseconds: int) -> None:
        self.page.clock.fast_forward(milliseconds)

    def is_open(self) -> bool:
        state: int = self.page.evaluate("sockets.at(-1).readyState")
        return state == OPEN


def test_the_article_is_printed_to_the_letter_on_both_sides(
    context: Any, start_broker: Callable[..., Any]
) -> None:
    broker = start_broker("--log-format", "article")
    article = Article(context)
    article.page.goto(f"{(CLIENTS / 'article.html').as_uri()}?url={broker.ws}")
    article.page.get_by_text(CLIENT_LINES[1]).wait_for()
    article.wait(4999)
    assert article.is_open()
    assert article.printed == CLIENT_LINES[:2]
    article.wait(1)
    article.page.get_by_text(CLIENT_LINES[2]).wait_for()
    assert article.printed == CLIENT_LINES
    assert article.page.inner_text("#log").splitlines() == CLIENT_LINES
    assert broker.stop().splitlines() == SERVER_LINES


def test_the_demo_on_the_page_prints_the_same(
    context: Any, start_broker: Callable[..., Any]
) -> None:
    article = Article(context)
    article.page.goto(start_broker().http)
    article.page.get_by_role("button", name="Run").click()
    log = article.page.locator("#log")
    log.get_by_text(CLIENT_LINES[1]).wait_for()
    article.wait(4999)
    assert article.is_open()
    article.wait(1)
    log.get_by_text(CLIENT_LINES[2]).wait_for()
    assert article.printed == CLIENT_LINES
    assert log.locator("li").all_inner_texts() == CLIENT_LINES


@pytest.mark.parametrize("script", ["", *(script for script, _ in BLOCKED.values())])
def test_the_sample_chat_works_from_a_file(
    script: str, context: Any, start_broker: Callable[..., Any]
) -> None:
    context.add_init_script(script)
    broker = start_broker()
    pages = [context.new_page() for _ in range(2)]
    for fd, page in enumerate(pages, 1):
        page.goto(f"{(CLIENTS / 'chat.html').as_uri()}?broker={broker.http}")
        page.get_by_text(f"you are fd {fd}").wait_for()
    one, two = pages
    one.get_by_label("Message").fill("hello")
    one.get_by_role("button").click()
    two.get_by_text("fd 1: hello", exact=True).wait_for()
    two.get_by_label("To fd").fill("1")
    two.get_by_label("Message").fill("psst")
    two.get_by_role("button").click()
    one.get_by_text("fd 2 to you: psst", exact=True).wait_for()
    assert two.get_by_label("To fd").input_value() == ""
    for to, text, answer in (
        ("bob", "secret", "not sent: “bob” is no fd, which is a number such as 7"),
        ("0", "secret", "not sent: “0” is no fd, which is a number such as 7"),
        ("99", "secret", "not sent to fd 99: no connection has fd 99: secret"),
        ("", "/to 1 secret", "not sent: to write to one person use “To fd”; begin with // to"),
    ):
        two.get_by_label("To fd").fill(to)
        two.get_by_label("Message").fill(text)
        two.get_by_role("button").click()
        two.get_by_text(answer).wait_for()
        two.wait_for_function("document.querySelector('#text').value !== ''")
        assert two.get_by_label("To fd").input_value() == to
        assert two.get_by_label("Message").input_value() == text
    two.get_by_label("Message").fill("//me waves")
    two.get_by_role("button").click()
    one.get_by_text("fd 2: /me waves", exact=True).wait_for()
    assert "secret" not in one.inner_text("#messages")


def test_a_browser_that_opens_the_websocket_path_is_told_what_it_is(
    context: Any, start_broker: Callable[..., Any]
) -> None:
    page = context.new_page()
    answer = page.goto(f"{start_broker().http}/connection/websocket")
    assert answer.status == 426
    assert "speaks WebSocket" in page.inner_text("body")


COMPRESSED = """() => new Promise((resolve, reject) => {
  const socket = new WebSocket(`ws://${location.host}/connection/websocket`);
  const text = "one and the same ".repeat(2000);
  const say = (...commands) => socket.send(commands.map(c => JSON.stringify(c)).join("\\n"));
  socket.onopen = () => say({id: 1, connect: {}}, {id: 2, subscribe: {channel: "news"}},
                            {id: 3, publish: {channel: "news", data: {text}}});
  socket.onmessage = ({data}) => {
    for (const line of data.split("\\n")) {
      const pub = JSON.parse(line).push?.pub;
      if (pub) resolve([socket.extensions, pub.data.text === text]);
    }
  };
  socket.onclose = ({code}) => reject(new Error(`closed with ${code}`));
})"""


def test_messages_go_compressed_both_ways_where_the_settings_say_so(
    context: Any, start_broker: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROKER_COMPRESSION", "true")
    page = context.new_page()
    page.goto(start_broker().http)
    extensions, is_what_was_sent = page.evaluate(COMPRESSED)
    assert extensions.startswith("permessage-deflate")
    assert is_what_was_sent is True
