"""How a command talks to a broker: the options that all have, the connection, errors of one line."""

import functools
import io
import logging
import re
import signal
import ssl
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeVar

import attrs
import click
import trio

from broker import logs
from broker.cli.errors import INTERRUPTED, Mistake, Refusal, single_cause
from broker.core.names import DIRECT, direct_fd
from broker.core.topics import mistaken_for_pattern
from broker.errors import (
    CannotConnect,
    ClientError,
    CloseCode,
    Refused,
    RequestFailed,
    Unavailable,
)

if TYPE_CHECKING:
    from broker.client import Client
    from broker.client.http_api import ApiClient

_T = TypeVar("_T")

DEFAULT_URL: Final = "ws://localhost:9501"

ANSWER_SECONDS: Final = 30.0
"""As long as a request to the HTTP API may take, besides what it says it waits for."""

URL_VARIABLE: Final = "BROKER_URL"
TOKEN_VARIABLE: Final = "BROKER_TOKEN"
CA_VARIABLE: Final = "BROKER_CA"
API_KEY_VARIABLE: Final = "BROKER_API_KEY"


NOTHING: Final[Mapping[str, object]] = MappingProxyType({})


@attrs.frozen
class Target:
    """A broker, and what opens it."""

    url: str
    token: str = attrs.field(default="", repr=False)
    ca: Path | None = None
    api_key: str = attrs.field(default="", repr=False)

    def ssl_context(self) -> ssl.SSLContext | None:
        """For `--ca`; None for the system's certificates. Raises `Mistake`."""
        if self.ca is None:
            return None
        try:
            return ssl.create_default_context(cafile=self.ca)
        except ssl.SSLError as error:
            raise Mistake(f"{self.ca}: no certificates in PEM: {error.reason}") from None
        except OSError as error:
            raise Mistake(f"{self.ca}: cannot read it: {error.strerror}") from None


def check_text(_: click.Context, __: click.Parameter, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # the system's way to hand on bytes that are no text
        raise click.BadParameter(f"{text!r} is not UTF-8") from None
    return text


def read_fd(text: str) -> int:
    """The fd of an argument: its type. Raises `click.BadParameter`."""
    with suppress(Refused):
        fd = direct_fd(f"{DIRECT}{text}")
        assert fd is not None
        return fd
    raise click.BadParameter(f"{text!r} is no fd: expected a number from 1 on")


def check_name(_: click.Context, __: click.Parameter, name: str) -> str:
    """As `check_text`, of a topic; says so where it looks like a pattern and is none."""
    check_text(_, __, name)
    if hint := mistaken_for_pattern(name):
        click.echo(logs.escape(f"note: {hint}"), err=True)
    return name


def _check_url(_: click.Context, __: click.Parameter, url: str) -> str:
    if not url.startswith(("ws://", "wss://")):
        raise click.BadParameter(f"{url!r} is not like ws://host:9501 or wss://host")
    return url


def _check_api_url(_: click.Context, __: click.Parameter, url: str) -> str:
    if not url.startswith(("ws://", "wss://", "http://", "https://")):
        raise click.BadParameter(f"{url!r} is not like ws://host:9501 or https://host")
    return url


def _options(check: Callable[..., str], what: str) -> dict[str, Any]:
    return {
        "url": click.option(
            "--url", default=DEFAULT_URL, show_default=True, callback=check,
            envvar=URL_VARIABLE, show_envvar=True, help="The broker's address.",
        ),
        "token": click.option(
            "--token", default="", callback=check_text, envvar=TOKEN_VARIABLE, show_envvar=True,
            help="Token to connect with, if the app asks for one.",
        ),
        "api_key": click.option(
            "--api-key", default="", callback=check_text, envvar=API_KEY_VARIABLE, show_envvar=True,
            help=f"The broker's api_key{what}. Others see a command line: better in the variable.",
        ),
        "ca": click.option(
            "--ca", type=click.Path(path_type=Path), envvar=CA_VARIABLE, show_envvar=True,
            help="PEM file with the certificates to trust, in place of the system's.",
        ),
    }  # fmt: skip


def _with(names: tuple[str, ...], options: dict[str, Any]) -> Callable[[Callable[..., None]], Any]:
    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:  # as click has them: the options of a command say which
            target = Target(**{name: given.pop(name) for name in names})
            command(target=target, **given)

        decorated: Callable[..., None] = run
        for name in reversed(names):
            decorated = options[name](decorated)
        return decorated

    return decorate


as_client: Callable[[Callable[..., None]], Any] = _with(
    ("url", "token", "ca"), _options(_check_url, "")
)
"""Gives a command the options of a client; it gets a `Target`."""

as_client_or_backend: Callable[[Callable[..., None]], Any] = _with(
    ("url", "token", "ca", "api_key"), _options(_check_url, ", for what only a backend may")
)

as_backend: Callable[[Callable[..., None]], Any] = _with(
    ("url", "api_key", "ca"), _options(_check_api_url, "")
)
"""Gives a command the options of one that uses the HTTP API; it gets a `Target`."""

json_option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--json", "as_json", is_flag=True, help="JSON, one object a line."
)


def with_client(target: Target, work: "Callable[[Client], Awaitable[None]]") -> None:
    """Run `work` with a client; an error on the way becomes one line."""
    from broker.client import open_client

    log_to_stderr()
    context = target.ssl_context()

    async def run(_: None) -> None:
        async with open_client(target.url, token=target.token, ssl_context=context) as client:
            await work(client)

    run_as_client(run, None)


def with_api(target: Target, work: "Callable[[ApiClient], Awaitable[None]]") -> None:
    """The same with the HTTP API."""
    from broker.client.http_api import open_api

    if not target.api_key:
        raise Mistake(
            "this needs the broker's api_key: set BROKER_API_KEY, or give it by --api-key"
        )
    context = target.ssl_context()

    async def run(_: None) -> None:
        async with open_api(target.url, target.api_key, ssl_context=context) as api:
            await work(api)

    run_as_client(run, None)


async def ask(
    api: "ApiClient", method: str, params: Mapping[str, object] = NOTHING, wait: float = 0.0
) -> Any:
    """Call a method of the HTTP API, that may wait so many seconds before it answers. Raises as
    `ApiClient.call` does, and `Refusal` where no answer comes in time."""
    with trio.move_on_after(ANSWER_SECONDS + wait):
        return await api.call(method, params)
    raise Refusal(f"{api.url}: no answer to {method} within {ANSWER_SECONDS + wait:g} s")


def log_to_stderr() -> None:
    """Have what the client logs, such as reconnects, on stderr in lines of text."""
    handler = logging.StreamHandler()
    handler.setFormatter(EscapedLines("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("broker").setLevel(logging.INFO)


class EscapedLines(logging.Formatter):
    """One line per record, whatever stands in it."""

    def format(self, record: logging.LogRecord) -> str:
        return logs.escape(super().format(record))


def run_as_client(run: Callable[[_T], Awaitable[None]], argument: _T) -> None:
    """Run Trio until it ends, or Ctrl-C ends it; a broker that is away or refuses becomes one line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8
    from broker.client.running import until_signal

    try:
        if trio.run(until_signal(partial(run, argument), (signal.SIGINT,))):
            sys.exit(INTERRUPTED)
    except (Exception, KeyboardInterrupt, BaseExceptionGroup) as error:
        cause = single_cause(error)
        if isinstance(cause, KeyboardInterrupt):
            sys.exit(INTERRUPTED)
        if isinstance(cause, ClientError):
            if isinstance(cause, CannotConnect):
                raise Mistake(f"{cause}; {_way_out(str(cause))}") from error
            if type(cause) is ClientError:  # the root class: the request cannot be carried out
                raise Mistake(str(cause)) from error
            raise Refusal(_told(cause)) from error
        if cause is not error and isinstance(cause, Exception):
            raise cause from None  # click knows its own, and a closed pipe
        raise


def _told(error: ClientError) -> str:
    if isinstance(error, RequestFailed):
        return refusal_text(error)
    if isinstance(error, Unavailable) and error.code == CloseCode.INVALID_TOKEN:
        return f"{error}; give a valid one by --token or {TOKEN_VARIABLE}: the broker's log says what was wrong"
    return str(error)


def _way_out(reason: str) -> str:
    if "certificate verify failed" in reason.lower():
        return "name the authority that has signed its certificate by --ca"
    if "WRONG_VERSION_NUMBER" in reason:
        return "without TLS there, an address begins with ws:// or http://"
    if _SPEAKS_TLS.search(reason):
        return (
            "if TLS is spoken there, an address begins with wss://; else name a broker with --url"
        )
    return "start a broker there, or name another with --url"


_SPEAKS_TLS: Final = re.compile(
    r" ws://.*(HTTP 400|closed before the WebSocket handshake was answered\Z)"
)
"""Signs of a port with TLS for a client without: our brokers and other servers answer 400, some close."""


def check_all_answered(silent: Sequence[str]) -> None:
    """Raise `Refusal` where nodes of these names have not answered: what was printed is not of all."""
    if silent:
        raise Refusal(f"no answer from {', '.join(silent)}")


def refusal_text(error: RequestFailed) -> str:
    again = " (trying again may help)" if error.temporary else ""
    return f"the broker refused: {error.message} ({error.code}){again}"
