"""Answers of the port to requests for no WebSocket."""

import json
import logging
import re
from pathlib import Path

import h11
import pytest
import structlog
import trio
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from trio.testing import MockClock, memory_stream_pair

from broker import Broker, Config, Refused
from broker.http.asgi import http_app
from broker.http.server import HttpServer
from broker.node import Node
from broker.testing import open_test_broker
from broker.transport.head import Request as HeadAndBehind
from broker.transport.head import parse_head
from tests.conftest import Disk


async def ask(
    broker: Broker, path: str, method: str = "GET", **fields: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one answer of a broker that serves."""
    async with open_test_broker(broker) as net:
        return await ask_node(net.node, path, method, **fields)


async def ask_node(
    node: Node, path: str, method: str = "GET", **fields: str
) -> tuple[int, dict[str, str], bytes]:
    """The same of a node, through the real server and a real parser."""
    client = h11.Connection(h11.CLIENT)
    headers = [("Host", "localhost:9501"), *((k.replace("_", "-"), v) for k, v in fields.items())]
    sent = client.send(h11.Request(method=method, target=path, headers=headers))
    assert sent is not None
    client.send(h11.EndOfMessage())
    asked = HeadAndBehind(parse_head(sent), b"")
    ours, theirs = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(HttpServer(http_app(node)).serve, theirs, asked)
        async for data in ours:
            client.receive_data(bytes(data))
        client.receive_data(b"")
        await ours.aclose()
    answer = client.next_event()
    assert isinstance(answer, h11.Response)
    body = b""
    while isinstance(event := client.next_event(), h11.Data):
        body += event.data
    named = {name.decode(): value.decode() for name, value in answer.headers}
    return answer.status_code, named, body


async def test_the_page_is_at_the_root_and_held_to_this_port() -> None:
    status, headers, body = await ask(Broker(), "/")
    assert status == 200
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert headers["cache-control"] == "no-cache"
    assert headers["x-content-type-options"] == "nosniff"
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert b"<title>trio-broker</title>" in body


async def test_the_page_refers_to_nothing_but_files_that_are_here() -> None:
    _, _, body = await ask(Broker(), "/")
    links = [
        piece.split('"')[0]
        for mark in ('src="', 'href="')
        for piece in body.decode().split(mark)[1:]
    ]
    assert len(links) >= 5
    for link in links:
        assert link.startswith("static/")
        status, headers, _ = await ask(Broker(), f"/{link}")
        assert status == 200
        assert headers["x-content-type-options"] == "nosniff"


async def test_an_asset_is_asked_for_again_unless_its_name_has_its_version() -> None:
    _, own, _ = await ask(Broker(), "/static/chat.js")
    assert own["cache-control"] == "no-cache"
    status, _, body = await ask(Broker(), "/static/chat.js", If_None_Match=own["etag"])
    assert (status, body) == (304, b"")
    _, vendor, _ = await ask(Broker(), "/static/vendor/centrifuge-5.8.0.js")
    assert "immutable" in vendor["cache-control"]


@pytest.mark.parametrize(
    "path", ["/static/../app.py", "/static/%2e%2e/app.py", "/static//etc/passwd"]
)
async def test_only_assets_are_served(path: str) -> None:
    assert (await ask(Broker(), path))[0] == 404


async def test_health_is_503_while_draining() -> None:
    async with open_test_broker(Broker()) as net:
        status, _, body = await ask_node(net.node, "/healthz")
        assert (status, json.loads(body)) == (200, {"status": "ok"})
    status, _, body = await ask_node(net.node, "/healthz")
    assert (status, json.loads(body)) == (503, {"status": "draining"})


async def test_a_broker_that_stops_is_not_ready() -> None:
    async with open_test_broker(Broker()) as net:
        status, _, body = await ask_node(net.node, "/readyz")
        assert (status, json.loads(body)) == (200, {"status": "ready"})
    status, _, body = await ask_node(net.node, "/readyz")
    assert (status, json.loads(body)["reason"]) == (503, "the broker stops")


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_the_websocket_path_says_426_and_what_to_do(method: str) -> None:
    status, headers, body = await ask(Broker(), "/connection/websocket", method)
    assert status == 426
    assert headers["upgrade"] == "websocket"
    assert b"WebSocket" in body


@pytest.mark.parametrize("configured", ["/ws", "/ws/"])
@pytest.mark.parametrize("path", ["/ws", "/ws/"])
async def test_a_slash_at_the_end_redirects_nobody(configured: str, path: str) -> None:
    assert (await ask(Broker(Config(websocket_paths=(configured,))), path))[0] == 426


async def test_the_health_says_that_nothing_can_be_kept_and_stays_200(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    broker = Broker(Config(engine=f"sqlite:{tmp_path / 'log.db'}"))
    broker.run_blocking = disk = Disk()
    async with open_test_broker(broker) as net:
        disk.failure = "database or disk is full"
        with pytest.raises(Refused):
            await broker.publish("a", 1)
        status, _, body = await ask_node(net.node, "/healthz")
        reason = "nothing is kept: database or disk is full"
        assert (status, json.loads(body)) == (200, {"status": "degraded", "reason": reason})
        assert (await ask_node(net.node, "/readyz"))[0] == 200, "there is no other"
        disk.failure = ""
        await trio.sleep(2)
        assert (await ask_node(net.node, "/healthz"))[2] == b'{"status":"ok"}'


@pytest.mark.parametrize("path", ["/nothing", "/nothing/", "/static", "/healthz/", "/readyz/"])
async def test_other_paths_are_404(path: str) -> None:
    assert (await ask(Broker(), path))[0] == 404


async def test_a_path_that_leads_nowhere_leaves_a_line_without_its_query() -> None:
    with structlog.testing.capture_logs() as lines:
        await ask(Broker(), "/conection/websocket?token=secret")
    [line] = [line for line in lines if line["event"] == "refused"]
    assert (line["status"], line["reason"]) == (404, "nothing is at /conection/websocket")


async def test_the_app_is_asked_first_and_what_it_leaves_is_ours() -> None:
    broker = Broker()
    asked = []

    @broker.on_request
    async def answer(request: Request) -> Response | None:
        asked.append(f"{request.method} {request.url.path}")
        return JSONResponse({"mine": True}) if request.url.path in ("/", "/mine") else None

    for method, path in (("DELETE", "/mine"), ("GET", "/")):
        status, _, body = await ask(broker, path, method)
        assert (status, json.loads(body)) == (200, {"mine": True})
    assert (await ask(broker, "/other"))[0] == 404
    assert (await ask(broker, "/static/chat.js"))[0] == 200
    assert (await ask(broker, "/connection/websocket"))[0] == 426
    assert (await ask(broker, "/healthz"))[0] == 200
    left = ["GET /other", "GET /static/chat.js", "GET /connection/websocket"]
    assert asked == ["DELETE /mine", "GET /", *left]


async def test_the_page_is_only_read() -> None:
    assert (await ask(Broker(), "/", "POST"))[0] == 405


async def test_a_hook_that_raises_costs_500_and_one_log_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker = Broker()

    @broker.on_request
    async def broken(request: Request) -> Response | None:
        raise RuntimeError("on purpose")

    assert (await ask(broker, "/mine"))[0] == 500
    [record] = caplog.records
    assert (record.name, record.levelno) == ("broker.http", logging.ERROR)


# the page


async def test_the_page_can_be_switched_off_and_an_app_s_own_stays() -> None:
    assert (await ask(Broker(), "/"))[0] == 200
    assert (await ask(Broker(Config(demo_page=False)), "/"))[0] == 404
    broker = Broker(Config(demo_page=False))

    @broker.on_request
    async def mine(request: Request) -> Response:
        return PlainTextResponse("mine")

    status, _, body = await ask(broker, "/")
    assert (status, body) == (200, b"mine")


def luminance(colour: str) -> float:
    """As WCAG 2 defines it."""
    digits = colour.removeprefix("#")
    if len(digits) == 3:
        digits = "".join(digit * 2 for digit in digits)
    channels = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    red, green, blue = (
        c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_what_can_be_typed_in_has_a_border_that_can_be_seen() -> None:
    """WCAG 2.2, 1.4.11: 3:1 for the parts of what a person works with, in light and in dark."""
    css = (Path(__file__).parents[2] / "broker" / "http" / "static" / "page.css").read_text("utf-8")
    themes = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    assert len(themes) == 2
    for theme in themes:
        colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]+)", theme))
        for behind in ("page", "card"):
            assert contrast(colours["edge"], colours[behind]) >= 3
            for text in ("ink", "soft", "bad"):
                assert contrast(colours[text], colours[behind]) >= 4.5
    rules = dict(re.findall(r"^([a-z., ]+) \{ (.*?) \}", css, re.MULTILINE))
    assert "var(--edge)" in rules["input, button"]
    assert "var(--edge)" in rules["button.quiet"]


def test_what_can_be_typed_in_at_the_dashboard_has_one_too() -> None:
    path = Path(__file__).parents[2] / "broker" / "http" / "static" / "admin" / "admin.css"
    css = path.read_text("utf-8")
    colours = {
        name: (light, dark)
        for name, light, dark in re.findall(r"--([a-z-]+): light-dark\((#\w+), (#\w+)\)", css)
    }
    for theme in (0, 1):
        for behind in ("page", "card", "raised"):
            assert contrast(colours["edge"][theme], colours[behind][theme]) >= 3
            for text in ("ink", "soft", "faint", "bad", "warn", "good"):
                assert contrast(colours[text][theme], colours[behind][theme]) >= 4.5
    rules = dict(re.findall(r"^([a-z., ]+) \{ (.*?) \}", css, re.MULTILINE))
    assert "border: 1px solid var(--edge)" in rules["button, .button, input, select, textarea"]
    # Whatever takes it away again is no field to type in.
    for selector, rule in re.findall(r"^ *([^{}\n]+) \{ (.*?) \}", css, re.MULTILINE):
        if re.search(r"\b(input|select|textarea)\b", selector):
            assert "border-color" not in rule, selector


# the dashboard

HERE = Path(__file__).parents[2] / "broker" / "http"
ADMIN = [HERE / "pages" / "admin.html", *sorted((HERE / "static" / "admin").iterdir())]


@pytest.mark.parametrize("path", ["/admin", "/admin/", "/admin/websocket"])
async def test_without_a_key_there_is_no_dashboard(path: str) -> None:
    status, _, body = await ask(Broker(), path)
    assert status == 404
    assert b"BROKER_ADMIN_KEY" in body


@pytest.mark.parametrize("field", ["admin_key", "admin_view_key"])
async def test_the_dashboard_is_held_to_this_port_and_to_text(field: str) -> None:
    for path in ("/admin", "/admin/"):
        broker = Broker(Config(**{field: "some-key"}))  # type: ignore[arg-type]
        status, headers, body = await ask(broker, path)
        assert status == 200
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "require-trusted-types-for 'script'; trusted-types 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-opener-policy"] == "same-origin"
        assert "set-cookie" not in headers
        assert b"some-key" not in body


async def test_the_dashboards_door_says_426() -> None:
    assert (await ask(Broker(Config(admin_key="some-key")), "/admin/websocket"))[0] == 426


async def test_the_app_may_have_an_admin_page_of_its_own() -> None:
    broker = Broker(Config(admin_key="some-key"))

    @broker.on_request
    async def answer(request: Request) -> Response | None:
        return JSONResponse({"mine": True}) if request.url.path == "/admin" else None

    assert (await ask(broker, "/admin"))[2] == b'{"mine":true}'


async def test_the_dashboard_refers_to_nothing_but_files_that_are_here() -> None:
    links = re.findall(r'(?:src|href)="(/[^"]*)"', ADMIN[0].read_text("utf-8"))
    assert len(links) >= 5
    imported = [
        f"/static/admin/{name}"
        for path in ADMIN[1:]
        for name in re.findall(r'from "\./([^"]*)"', path.read_text("utf-8"))
    ]
    assert len(imported) >= 5
    for link in {*links, *imported}:
        assert (await ask(Broker(), link))[0] == 200, link


MARKUP = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|eval\(|"
    r"new Function|javascript:|DOMParser|srcdoc|https?://(?!www\.w3\.org/2000/svg)"
)


@pytest.mark.parametrize("path", ADMIN, ids=lambda path: path.name)
def test_the_dashboard_makes_no_markup_of_text_and_has_nothing_inline(path: Path) -> None:
    text = path.read_text("utf-8")
    assert not MARKUP.findall(text)
    if path.suffix == ".html":
        assert not re.findall(r"\bstyle=|\bon\w+=|<style|<script(?![^>]*\bsrc=)", text)
