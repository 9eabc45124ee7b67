"""Pages and answers of the broker's port for requests that do not ask for a WebSocket.

Rule 1  The app's `on_request` hook is asked first, so `/` can be the app's own page; a request
        that it leaves is ours. Only `/healthz` and `/readyz` are not its to answer.
Rule 2  The page asks nothing of any other host, and its policy (CSP) holds it to that.
"""

import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path

import attrs
import structlog
import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
)
from starlette.routing import Mount, Route, Router
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from broker.access.operators import DOOR, PAGE
from broker.hooks import EndsProcess
from broker.http.access_log import MOST
from broker.http.api import Api, peer_of
from broker.http.asyncapi import PATH as ASYNCAPI
from broker.http.asyncapi import asyncapi
from broker.http.metrics import Metrics, exposition
from broker.http.openapi import PATH as OPENAPI
from broker.http.openapi import openapi
from broker.http.worker_metrics import exposition_of_all
from broker.node import Node
from broker.transport.head import route_of

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker.http")

HERE = Path(__file__).parent

Endpoint = Callable[[Request], Awaitable[Response]]

SECURITY = {
    # The page may load from this very port and open WebSockets to it; it is framed by nobody.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
OPERATORS_PAGE = {
    # No text becomes markup here, whatever a script does: trusted types allow none to make any.
    "Content-Security-Policy": SECURITY["Content-Security-Policy"]
    + "; require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Robots-Tag": "noindex",
}
"""Besides `SECURITY`, of the page behind which everything can be seen and done."""
ASK_EACH_TIME = {"Cache-Control": "no-cache"}  # the answer is a 304 while nothing has changed
KEEP_FOR_A_YEAR = {"Cache-Control": "public, max-age=31536000, immutable"}


class _Assets(StaticFiles):
    """Files under `static`; those under `vendor` carry their version in their name."""

    def file_response(
        self,
        full_path: str | os.PathLike[str],
        stat_result: os.stat_result,
        scope: Scope,
        status_code: int = 200,
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        versioned = Path(full_path).parent.name == "vendor"
        response.headers.update(SECURITY | (KEEP_FOR_A_YEAR if versioned else ASK_EACH_TIME))
        return response


@attrs.frozen
class _Health:
    """`/healthz` and `/readyz`. Anybody may ask for them at any rate, so they look at no connection."""

    node: Node

    async def alive(self, request: Request) -> Response:
        if self.node.draining:
            return JSONResponse({"status": "draining"}, HTTPStatus.SERVICE_UNAVAILABLE)
        failing = self._failing
        if failing:  # sessions and reading go on, so it is no reason to take the broker out
            return JSONResponse({"status": "degraded", "reason": f"nothing is kept: {failing}"})
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        node, failing = self.node, self._failing
        if node.draining or node.services.leaving:
            reason = "the broker stops"
        elif failing and node.router.engine.durability == "shared":
            reason = f"nothing is kept: {failing}"  # another node may be better off
        else:
            return JSONResponse({"status": "ready"})
        body = {"status": "not ready", "reason": reason}
        return JSONResponse(body, HTTPStatus.SERVICE_UNAVAILABLE)

    @property
    def _failing(self) -> str:
        return self.node.router.engine.statistics().failing


@attrs.frozen
class _Pages:
    """Pages, and what is said on the paths that are for WebSockets."""

    node: Node

    async def page(self, request: Request) -> Response:
        if not self.node.config.demo_page:
            return _text(HTTPStatus.NOT_FOUND, "Nothing is here.")
        return FileResponse(HERE / "pages" / "index.html", headers=SECURITY | ASK_EACH_TIME)

    async def admin(self, request: Request) -> Response:
        if not self.node.services.operators.enabled:
            text = "The dashboard is off: set admin_key, or BROKER_ADMIN_KEY, to turn it on."
            return _text(HTTPStatus.NOT_FOUND, text)
        headers = SECURITY | OPERATORS_PAGE | ASK_EACH_TIME
        file, prefix = HERE / "pages" / "admin.html", self.node.config.path_prefix
        if not prefix:
            return FileResponse(file, headers=headers)
        # With and without a slash at its end the page is the same, so its links are none of its place.
        text = await trio.Path(file).read_text("utf-8")
        return HTMLResponse(text.replace('="/static/', f'="{prefix}/static/'), headers=headers)

    async def admin_door(self, request: Request) -> Response:
        enabled = self.node.services.operators.enabled
        return await (self.upgrade_required if enabled else self.admin)(request)

    async def upgrade_required(self, request: Request) -> Response:
        return _text(
            HTTPStatus.UPGRADE_REQUIRED,
            "This path speaks WebSocket: open it with `new WebSocket(...)` or a Centrifuge "
            "client. There is a page to try it at /.",
            {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"},
        )


def http_app(node: Node) -> Starlette:
    """The ASGI app of a node: `/healthz` and `/readyz`, the app's hook, and behind it what we have ourselves:
    `/`, `/static`, `/api`, `/metrics`, `/admin`, 426 on the WebSocket paths, 404. A hook that raises costs its peer a 500; the
    server logs it.
    """
    health = _Health(node)
    ours = Router(
        _routes(node),
        # A redirect would name the scheme and host that a proxy asked us for.
        redirect_slashes=False,
        default=_nowhere,
    )

    async def hook_first(scope: Scope, receive: Receive, send: Send) -> None:
        if node.hooks.request is None:
            await ours(scope, receive, send)
            return
        try:
            response = await node.hooks.request(Request(scope, receive, send))
        except EndsProcess:
            response = _text(HTTPStatus.SERVICE_UNAVAILABLE, "The server is shutting down.")
        if response is None:
            await ours(scope, receive, send)
            return
        # A response runs code of the app too: its stream, and its work after that.
        with suppress(EndsProcess), node.hooks.contained("request"):
            await response(scope, receive, send)

    return Starlette(
        routes=[
            Route("/healthz", health.alive),
            Route("/readyz", health.ready),
            Mount("/", hook_first),
        ]
    )


async def _nowhere(scope: Scope, receive: Receive, send: Send) -> None:
    """404, and a line of the log: it may be a mistyped path of a WebSocket."""
    reason, peer = f"nothing is at {scope['path'][:MOST]}", peer_of(Request(scope))
    log.info("refused", status=HTTPStatus.NOT_FOUND.value, reason=reason, peer=peer)
    await _text(HTTPStatus.NOT_FOUND, "Nothing is here. The page is at /.")(scope, receive, send)


def _routes(node: Node) -> list[Route | Mount]:
    """The broker's own routes, path by path."""
    pages, api = _Pages(node), Api(node)

    async def metrics() -> bytes:
        return await (exposition_of_all if node.others else exposition)(node)

    def both(path: str, answer: Endpoint, methods: list[str]) -> list[Route]:
        """A slash at the end makes no difference, as for WebSockets."""
        return [Route(each, answer, methods=methods) for each in (path, f"{path}/")]

    every_method = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
    described = api.described(lambda: openapi(node.config.path_prefix))
    return [
        Route("/", pages.page),
        Mount("/static", _Assets(directory=HERE / "static")),
        *both("/api/{method}", api.__call__, ["POST"]),
        Route(OPENAPI, described, methods=["GET"]),
        Route(ASYNCAPI, api.described(lambda: asyncapi(node.config)), methods=["GET"]),
        *both("/metrics", Metrics(node, metrics).__call__, ["GET"]),
        *both(PAGE, pages.admin, ["GET"]),
        *both(DOOR, pages.admin_door, every_method),
        *(
            route
            for path in map(route_of, node.config.websocket_paths)
            if path != "/" and not path.endswith("/*")
            for route in both(path, pages.upgrade_required, every_method)
        ),
    ]


def _text(status: HTTPStatus, text: str, headers: Mapping[str, str] | None = None) -> Response:
    return PlainTextResponse(f"{text}\n", status, {**SECURITY, **(headers or {})})
