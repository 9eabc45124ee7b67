"""A backend as others write one: a Starlette app behind Hypercorn, on a real socket."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

import pytest
import trio
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio import serve as serve_hypercorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


@asynccontextmanager
async def _serve(endpoint: Callable[[Request], Awaitable[Response]]) -> AsyncGenerator[str]:
    settings = HypercornConfig()
    settings.bind = ["127.0.0.1:0"]
    settings.errorlog = None  # or it sets the level of a logger that is everybody's
    app = Starlette(routes=[Route("/backend", endpoint, methods=["POST"])])
    done = trio.Event()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            (url,) = await nursery.start(
                partial(serve_hypercorn, app, settings, shutdown_trigger=done.wait)  # type: ignore[arg-type]
            )
            yield f"{url}/backend"
            done.set()


@pytest.fixture
def serve_backend() -> Callable[
    [Callable[[Request], Awaitable[Response]]], AbstractAsyncContextManager[str]
]:
    """Serve what is posted for as long as a block, 20 s at most; the block gets the URL."""
    return _serve
