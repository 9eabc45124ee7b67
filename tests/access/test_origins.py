"""Which pages may connect, and under which names of ours."""

from pathlib import Path

import pytest

from broker.access.origins import page_policy
from broker.config.settings import Config
from broker.testing import handshake
from broker.transport.head import parse_head

HERE = "testserver:9501"
OPEN = Config(host="0.0.0.0")


def refusal(
    origin: str | None,
    config: Config = OPEN,
    *,
    host: str = HERE,
    loopback_bind: bool = False,
    users_matter: bool = False,
) -> str | None:
    headers = {} if origin is None else {"Origin": origin}
    head = parse_head(handshake(headers=headers, host=host))
    policy = page_policy(config, loopback_bind=loopback_bind, users_matter=users_matter)
    return policy.refusal(head)


def listed(*origins: str) -> Config:
    return Config(host="0.0.0.0", allowed_origins=origins)


def named(*hosts: str) -> Config:
    return Config(hosts=hosts)


@pytest.mark.parametrize(
    "origin, passes",
    [
        # programs, and the page's own
        (None, True),
        (f"http://{HERE}", True),
        (f"https://{HERE}", True),
        (f"HTTP://{HERE.upper()}", True),
        # other pages
        ("http://evil.example", False),
        (f"http://{HERE}.evil.example", False),
        (f"http://evil.example/{HERE}", False),
        (f"http://evil.example#{HERE}", False),
        (f"http://user@{HERE}", False),
        (f"http://{HERE} http://evil.example", False),
        ("http://testserver", False),
        ("http://testserver:9502", False),
        (f"ftp://{HERE}", False),
        (f"file://{HERE}", False),
        (HERE, False),
        (f"//{HERE}", False),
        ("http://", False),
        ("http://[", False),
        ("null", False),
        ("file://", False),
        ("", False),
    ],
)
def test_a_page_may_ask_the_host_it_came_from(origin: str | None, passes: bool) -> None:
    assert (refusal(origin) is None) is passes


@pytest.mark.parametrize("loopback_bind", [True, False])
@pytest.mark.parametrize(
    "origin, entries, passes",
    [
        ("https://example.com", ["https://example.com"], True),
        ("https://example.com", ["https://a.example", "https://example.com"], True),
        ("https://example.com", ["https://EXAMPLE.com:443"], True),
        ("https://a.b.example.com", ["https://*.example.com"], True),
        ("https://example.com", ["https://*.example.com"], False),
        ("http://example.com", ["https://example.com"], False),
        ("https://example.com:444", ["https://example.com"], False),
        ("https://www.example.com", ["https://example.com"], False),
        ("app://a", ["app://a"], True),
        ("http://evil.example", ["*"], True),
        ("null", ["*"], True),
        ("null", ["null"], True),
        ("file://", ["file://"], True),
        ("null", ["file://"], False),
        ("", ["*"], True),
    ],
)
def test_a_page_that_is_listed_may_ask_under_any_name(
    origin: str, entries: list[str], passes: bool, loopback_bind: bool
) -> None:
    told = refusal(origin, listed(*entries), loopback_bind=loopback_bind, users_matter=True)
    assert (told is None) is passes
    assert passes or (told is not None and told.startswith("origin not allowed: "))


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "http://localhost",
        "http://localhost:3000",
        "https://localhost:3000",
        "http://app.localhost",
        "http://127.0.0.1:8000",
        "http://127.8.8.8",
        "http://[::1]:8000",
    ],
)
def test_loopback_pages_pass_while_we_listen_on_loopback_only(origin: str) -> None:
    config = Config()
    assert refusal(origin, config, loopback_bind=True, host="localhost:9501") is None
    assert refusal(origin, config, loopback_bind=True, host="[::1]:9501") is None
    assert refusal(origin, config, loopback_bind=True, host="localhost") is None
    assert refusal(origin, OPEN, host="localhost:9501")
    assert refusal(origin, config, loopback_bind=True, users_matter=True, host="localhost:9501")
    # Through a proxy on this machine: the page is in the browser of somebody else.
    proxied = named("example.com")
    assert refusal(origin, proxied, loopback_bind=True, host="example.com")


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost.evil.example",
        "http://127.0.0.1.evil.example",
        "http://10.0.0.1",
        "file://",
        "app://localhost",
    ],
)
def test_no_other_page_looks_like_loopback(origin: str) -> None:
    assert refusal(origin, Config(), loopback_bind=True)
    assert refusal(origin, Config(), loopback_bind=True, host="localhost:9501")


def test_a_page_is_its_own_also_on_an_ipv6_host() -> None:
    assert refusal("http://[2001:db8::1]:9501", host="[2001:db8:0::1]:9501") is None
    assert refusal("http://[2001:db8::2]:9501", host="[2001:db8::1]:9501")


# names that lead here


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:9501", "EVIL.example.", "localhost.evil.example"),
        *("127.0.0.1.evil.example", "xn--ls8h.la", "a..b", "evil", "127.1"),
    ],
)
@pytest.mark.parametrize(
    "config, loopback_bind, users_matter",
    [
        (Config(), True, False),
        (Config(), True, True),
        (OPEN, False, True),
        (Config(host="broker.example"), False, True),
        (listed("https://app.example"), False, False),
        (Config(host="0.0.0.0", hosts=("broker.example",)), False, False),
        (Config(unix=Path("/run/b.sock")), True, False),
    ],
    ids=["loopback", "loopback with users", "users", "users, by name", "origins", "hosts", "unix"],
)
def test_a_page_may_not_have_its_own_name_lead_here(
    config: Config, loopback_bind: bool, users_matter: bool, host: str
) -> None:
    told = refusal(
        f"http://{host}",
        config,
        host=host,
        loopback_bind=loopback_bind,
        users_matter=users_matter,
    )
    assert told is not None
    if host.startswith("evil.example"):
        assert told.startswith("host not ours: evil.example, ")
        assert 'hosts = ["evil.example"]' in told
        assert "BROKER_HOSTS=evil.example" in told


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:9501", "LOCALHOST.", "app.localhost", "127.0.0.1:9501", "[::1]:9501",
     "192.168.1.5", "[2001:db8::1]:9501"],
)  # fmt: skip
def test_no_page_can_have_these_names_lead_elsewhere(host: str) -> None:
    origin = f"http://{host.rstrip('.')}"
    assert refusal(origin, Config(), host=host, loopback_bind=True, users_matter=True) is None


@pytest.mark.parametrize(
    "config, host",
    [
        (Config(host="broker.example"), "broker.example:9501"),
        (Config(host="straße.de"), "xn--strae-oqa.de"),
        (listed("https://app.example:8443"), "app.example"),
        (listed("https://*.app.example"), "ws.app.example:9501"),
        (named("example.com"), "example.com:1"),
        (named("EXAMPLE.com"), "Example.com"),
        (named("*.example.com"), "a.b.example.com"),
        (named("example.com:9501"), "example.com:9501"),
        (named("*"), "evil.example"),
        (listed("*"), "evil.example"),
        # A browser comes under no name that is not in our certificate.
        (Config(tls_cert=Path("a.pem"), tls_key=Path("a.key")), "example.com"),
    ],
)
def test_a_page_of_ours_passes_under_a_name_of_ours(config: Config, host: str) -> None:
    assert refusal(f"https://{host}", config, host=host, users_matter=True) is None


@pytest.mark.parametrize(
    "config, host",
    [
        (named("example.com:9501"), "example.com:9502"),
        (named("*.example.com"), "example.com"),
        (listed("app://evil.example"), "evil.example"),
        (Config(host="::1"), "example.com"),
    ],
)
def test_other_names_are_not_ours(config: Config, host: str) -> None:
    assert refusal(f"https://{host}", config, host=host, users_matter=True)


@pytest.mark.parametrize(
    "config, host, origin, passes",
    [
        # `Host $host` leaves out the port of the proxy
        (named("example.com"), "example.com", "https://example.com", True),
        (named("example.com"), "example.com", "https://example.com:8443", True),
        (named("example.com:8443"), "example.com", "https://example.com:8443", True),
        (named("example.com:8443"), "example.com", "https://example.com:8444", False),
        (named("example.com:8443"), "example.com", "https://example.com", True),
        (named("*.example.com"), "a.example.com", "https://a.example.com:8443", True),
        (named("*"), "example.com", "https://example.com:8443", True),
        (listed("https://example.com:8443"), "example.com", "https://example.com:8443", True),
        (listed("https://example.com:8443"), "example.com", "https://example.com:8444", False),
        (OPEN, "example.com", "https://example.com:8443", False),
        # `Host $host:$server_port` adds one that browsers leave out
        (named("example.com"), "example.com:443", "https://example.com", True),
        (named("example.com"), "example.com:80", "https://example.com", False),
        # reached without a proxy, ports tell pages apart
        (named("example.com"), "example.com:9501", "http://example.com:3000", False),
        (named("example.com"), "example.com:9501", "http://www.example.com:9501", False),
        # `Host` is not passed on at all
        (listed("https://example.com"), "broker:9501", "https://example.com", True),
        (named("example.com"), "broker:9501", "https://example.com", False),
    ],
)
def test_a_proxy_may_leave_the_port_out(
    config: Config, host: str, origin: str, passes: bool
) -> None:
    assert (refusal(origin, config, host=host, users_matter=True) is None) is passes


def test_a_refused_page_is_told_both_names() -> None:
    told = refusal("https://example.com", host="broker")
    assert told == (
        "origin not allowed: https://example.com is neither in allowed_origins nor the page's own "
        "under the host 'broker'"
    )


def test_a_page_whose_port_was_left_out_is_told_the_setting_too() -> None:
    told = refusal("https://example.com:8443", host="example.com")
    assert told is not None
    assert told.startswith("host not ours: example.com:8443, ")
    assert 'hosts = ["example.com:8443"]' in told


# without an Origin


def request(line: str, *fields: str) -> bytes:
    return "\r\n".join([f"{line} HTTP/1.1", *fields, "", ""]).encode()


@pytest.mark.parametrize(
    "raw, passes",
    [
        # Browsers name the origin in all but a page's GET of its own host.
        (handshake(host="evil.example"), True),
        (request("POST /", "Host: evil.example"), True),
        (request("GET /", "Host: evil.example"), False),
        (request("HEAD /", "Host: evil.example"), False),
        (request("GET /", "Host: localhost:9501"), True),
        (request("GET /", "Host: 10.0.0.7"), True),
        (b"GET / HTTP/1.0\r\n\r\n", True),
    ],
)
def test_a_get_without_an_origin_may_be_a_page_s_own(raw: bytes, passes: bool) -> None:
    head = parse_head(raw)
    policy = page_policy(Config(), loopback_bind=True, users_matter=False)
    assert (policy.refusal(head) is None) is passes
    everybodys = page_policy(OPEN, loopback_bind=False, users_matter=False)
    assert everybodys.refusal(head) is None
