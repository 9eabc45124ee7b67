"""The configurations that the pages print are run: with the programs that they are for, as other users."""

import http.client
import json
import os
import pwd
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import attrs
import pytest
import trustme
from websockets.sync.client import connect
from websockets.typing import Origin

from broker import Config
from broker.config.loading import load
from tests.conftest import PATIENCE
from tests.ports import free_port

ROOT = Path(__file__).parent.parent
HOWTO = ROOT / "docs" / "howto"

Missing = Callable[[str], NoReturn]

CLIENT = "127.0.0.2"

START_SECONDS = 60
"""Until a program that is not up has failed: long, as many tests may share a processor."""

APP = """
import trio
from broker import Broker, Config
broker = Broker(Config(log_format="json"))

@broker.on_message
async def tell(connection, frame):
    broker.push(connection.fd, f"{connection.remote_host} {connection.peer_address} {connection.path}")
"""


def blocks(page: str, language: str) -> list[str]:
    """All code of one language that a page shows."""
    text = (HOWTO / page).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@attrs.frozen
class Place:
    """Where a configuration finds what it names."""

    directory: Path
    port: int
    broker_port: int
    trust: ssl.SSLContext

    def fill(self, text: str) -> str:
        """The configuration with the paths and ports of this test."""
        for name, here in (
            ("/run/broker/broker.sock", self.directory / "broker.sock"),
            ("/etc/ssl/example.com", self.directory),
            ("/etc/haproxy/example.com.pem", self.directory / "all.pem"),
            ("127.0.0.1:9501", f"127.0.0.1:{self.broker_port}"),
            ("listen 443", f"listen {self.port}"),
            ("bind :443", f"bind 127.0.0.1:{self.port}"),
        ):
            text = text.replace(name, str(here))
        return text

    def settings(self, text: str, *more: str) -> Path:
        """A file of settings of the broker."""
        path = self.directory / "broker.toml"
        port = "" if "unix" in text else f"port = {self.broker_port}\n"
        path.write_text(port + self.fill("".join([text, *more])))
        return path

    def talk(self, path: str = "/connection/websocket") -> str:
        """What the app says of a client that comes by way of the proxy, from a page of its own. It lies
        about its address, which is not that of the proxy."""
        with (
            socket.create_connection(("127.0.0.1", self.port), source_address=(CLIENT, 0)) as sock,
            connect(
                f"wss://example.com:{self.port}{path}",
                sock=sock,
                ssl=self.trust,
                # As a browser has it: with the port, which nginx leaves out of `$host`.
                origin=Origin(f"https://example.com:{self.port}"),
                additional_headers={"X-Forwarded-For": "6.6.6.6", "Forwarded": "for=6.6.6.6"},
                open_timeout=PATIENCE,
            ) as client,
        ):
            client.send("who am I")
            return str(client.recv(PATIENCE))


@pytest.fixture
def place() -> Iterator[Place]:
    # Not tmp_path: nobody else may enter that.
    with tempfile.TemporaryDirectory(prefix="trio-broker-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        authority, trust = trustme.CA(), ssl.create_default_context()
        authority.configure_trust(trust)
        issued = authority.issue_cert("example.com")
        issued.cert_chain_pems[0].write_to_path(directory / "fullchain.pem")
        issued.private_key_pem.write_to_path(directory / "privkey.pem")
        issued.private_key_and_cert_chain_pem.write_to_path(directory / "all.pem")
        for path in directory.iterdir():
            path.chmod(0o644)
        yield Place(directory, free_port(), free_port(), trust)


@contextmanager
def running(
    command: list[str], is_up: Callable[[], bool], **options: object
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a program for a block, which begins when it is up."""
    process = subprocess.Popen(command, **options)  # type: ignore[call-overload]
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_up():
            assert process.poll() is None, f"{command[0]} has ended"
            assert time.monotonic() < deadline, f"{command[0]} does not answer"
            time.sleep(0.02)  # a foreign process: no clock of ours moves it
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(PATIENCE)
        finally:
            process.kill()


def accepts(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port)):
            return True
    except ConnectionRefusedError:
        return False


@contextmanager
def broker(place: Place, settings: Path) -> Iterator["subprocess.Popen[bytes]"]:
    (place.directory / "app.py").write_text(APP)
    is_unix = "unix" in tomllib.loads(settings.read_text())

    def is_up() -> bool:
        return (place.directory / "broker.sock").exists() if is_unix else accepts(place.broker_port)

    with running(
        [sys.executable, "-m", "broker", "--config", str(settings), "app:broker"],
        is_up,
        cwd=place.directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        yield process


@pytest.fixture
def program(missing: Missing) -> Callable[[str], str]:
    def find(name: str) -> str:
        # Debian has servers where only root's PATH leads.
        found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
        return found or missing(f"{name} is not installed (Debian: {name})")

    return find


@pytest.fixture
def as_other(missing: Missing) -> Callable[[str], str]:
    """The name of another user, which a proxy runs as; only root may start that."""

    def check(name: str) -> str:
        try:
            pwd.getpwnam(name)
        except KeyError:
            missing(f"there is no user {name}")
        if os.getuid() != 0:
            pytest.skip("only root may start a proxy as another user")
        return name

    return check


def nginx(program: str, place: Place, server: str, user: str) -> list[str]:
    """The command that runs nginx with this, whose workers are another user."""
    path = place.directory / "nginx.conf"
    temporary = "".join(
        f"{kind}_temp_path {place.directory}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    path.write_text(
        f"user {user};\ndaemon off;\npid {place.directory}/nginx.pid;\nerror_log stderr;\n"
        f"events {{}}\nhttp {{\naccess_log off;\n{temporary}\n{place.fill(server)}\n}}\n"
    )
    return [program, "-p", str(place.directory), "-c", str(path)]


def test_nginx_as_its_own_user_reaches_the_unix_socket(
    place: Place, program: Callable[[str], str], as_other: Callable[[str], str]
) -> None:
    settings, _ = blocks("nginx.md", "toml")
    server, _ = blocks("nginx.md", "nginx")
    command = nginx(program("nginx"), place, server, as_other("www-data"))
    with (
        broker(place, place.settings(settings)),
        running(command, lambda: accepts(place.port)),
    ):
        for _ in range(3):  # on a connection that nginx keeps, too
            assert place.talk() == f"{CLIENT} unix /connection/websocket"
        # It is the mode, and no other: as the umask has it nginx may not.
        (place.directory / "broker.sock").chmod(0o755)
        with pytest.raises(Exception, match="502"):
            place.talk()


def test_the_ten_minutes_of_the_page_end_as_it_says(
    place: Place, program: Callable[[str], str], as_other: Callable[[str], str]
) -> None:
    """With a certificate that is made as it is printed, and the request that is printed."""
    (settings, _), (server, _) = blocks("nginx.md", "toml"), blocks("nginx.md", "nginx")
    text = (HOWTO / "deploy.md").read_text("utf-8")
    make = re.search(r"^ +openssl req .*\\\n.*$", text, re.MULTILINE)
    ask = re.search(r"^curl .+$", text, re.MULTILINE)
    answer = re.search(r"^`(\{.+\})` is the answer", text, re.MULTILINE)
    assert make is not None
    assert ask is not None
    assert answer is not None
    program("openssl")
    program("curl")
    subprocess.run(["sh", "-c", place.fill(make[0])], check=True, capture_output=True)
    command = nginx(program("nginx"), place, server, as_other("www-data"))
    here = place.fill(ask[0]).replace(":443:", f":{place.port}:")
    here = here.replace("//example.com/", f"//example.com:{place.port}/")
    with (
        broker(place, place.settings(settings)),
        running(command, lambda: accepts(place.port)),
    ):
        done = subprocess.run(
            ["sh", "-c", here], check=True, capture_output=True, text=True, timeout=PATIENCE
        )
    assert done.stdout == answer[1]


def test_nginx_with_a_path_of_its_own(
    place: Place, program: Callable[[str], str], as_other: Callable[[str], str]
) -> None:
    settings, prefix = blocks("nginx.md", "toml")
    server, location = blocks("nginx.md", "nginx")
    whole = re.sub(r"    location / \{.*?\n    \}\n", lambda _: location, server, flags=re.DOTALL)
    assert whole != server
    command = nginx(program("nginx"), place, whole, as_other("www-data"))
    with (
        broker(place, place.settings(settings, prefix)),
        running(command, lambda: accepts(place.port)),
    ):
        expected = f"{CLIENT} unix /connection/websocket"
        assert place.talk("/chat/connection/websocket") == expected
        page = http.client.HTTPSConnection("127.0.0.1", place.port, context=place.trust)
        page.sock = place.trust.wrap_socket(
            socket.create_connection(("127.0.0.1", place.port)), server_hostname="example.com"
        )
        page.request("GET", "/chat/static/page.css", headers={"Host": "example.com"})
        assert page.getresponse().status == 200
        page.close()


@pytest.mark.parametrize("which", ["as HTTP", "as bytes"])
def test_haproxy(place: Place, program: Callable[[str], str], which: str) -> None:
    haproxy, number = program("haproxy"), which == "as bytes"
    path = place.directory / "haproxy.cfg"
    path.write_text(place.fill(blocks("deploy.md", "text")[number]))
    subprocess.run([haproxy, "-c", "-f", path], check=True, capture_output=True)
    settings = place.settings(blocks("deploy.md", "toml")[number])
    with (
        broker(place, settings),
        running([haproxy, "-db", "-f", str(path)], lambda: accepts(place.port)),
    ):
        host, peer, at = place.talk().split()
    assert (host, at) == (CLIENT, "/connection/websocket")
    assert peer.startswith("127.0.0.1:")


def test_haproxy_takes_out_a_broker_that_is_about_to_stop(
    place: Place, program: Callable[[str], str]
) -> None:
    haproxy, path = program("haproxy"), place.directory / "haproxy.cfg"
    text = place.fill(blocks("deploy.md", "text")[0]).replace("inter 2s", "inter 100ms")
    path.write_text(text)
    # Longer than on the page, where nobody else has the processor.
    text = blocks("deploy.md", "toml")[0].replace(
        "drain_notice_seconds = 5", "drain_notice_seconds = 60"
    )
    assert "= 60" in text
    settings = place.settings(text)

    def status() -> int:
        page = http.client.HTTPSConnection("127.0.0.1", place.port, context=place.trust)
        page.sock = place.trust.wrap_socket(
            socket.create_connection(("127.0.0.1", place.port)), server_hostname="example.com"
        )
        page.request("GET", "/healthz", headers={"Host": "example.com"})
        answer = page.getresponse().status
        page.close()
        return answer

    with (
        broker(place, settings) as process,
        running([haproxy, "-db", "-f", str(path)], lambda: accepts(place.port)),
    ):
        deadline = time.monotonic() + PATIENCE
        while status() != 200:
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGTERM)
        # Within the notice, and so before the broker refuses anybody.
        while status() != 503:
            assert time.monotonic() < deadline
        assert accepts(place.broker_port)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 1


def test_caddy_as_its_own_user_reaches_the_unix_socket(
    place: Place, program: Callable[[str], str], as_other: Callable[[str], str]
) -> None:
    caddy, user = program("caddy"), as_other("caddy")
    (text,) = blocks("deploy.md", "caddy")
    path = place.directory / "Caddyfile"
    files = f"tls {place.directory}/fullchain.pem {place.directory}/privkey.pem"
    # A certificate by ACME is not to be had in a test.
    path.write_text(
        "{\n    admin off\n    auto_https off\n}\n"
        + place.fill(text).replace(
            "example.com {", f"https://example.com:{place.port} {{\n    {files}"
        )
    )
    home = place.directory / "home"
    home.mkdir()
    shutil.chown(home, user)
    with (
        broker(place, place.settings(blocks("deploy.md", "toml")[2])),
        running(
            [caddy, "run", "--adapter", "caddyfile", "--config", str(path)],
            lambda: accepts(place.port),
            user=user,
            group=user,
            extra_groups=[],
            env={"HOME": str(home), "XDG_DATA_HOME": str(home), "XDG_CONFIG_HOME": str(home)},
            stderr=subprocess.DEVNULL,
        ),
    ):
        assert place.talk() == f"{CLIENT} unix /connection/websocket"


# systemd


def test_the_units_are_what_systemd_takes(place: Place, missing: Missing) -> None:
    if shutil.which("systemd-analyze") is None:
        missing("systemd-analyze is not installed (Debian: systemd)")
    units = {}
    for text in blocks("systemd.md", "ini"):
        name = Path(text.splitlines()[0].removeprefix("# ")).name
        text = text.replace("/opt/broker/venv/bin/python", sys.executable)
        units[name] = place.directory / name
        units[name].write_text(text)
    assert set(units) == {"broker.service", "broker.socket"}
    done = subprocess.run(
        ["systemd-analyze", "verify", *units.values()], check=False, capture_output=True
    )
    ours = [line for line in done.stderr.decode().splitlines() if str(place.directory) in line]
    assert (done.returncode, ours) == (0, []), done.stderr.decode()
    closed = ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=20"]
    rated = subprocess.run(
        [*closed, units["broker.service"]], check=False, capture_output=True, text=True
    )
    (overall,) = re.findall(r"Overall exposure level for broker.service: (\S+)", rated.stdout)
    text = (HOWTO / "systemd.md").read_text("utf-8")
    assert (rated.returncode, f"gives the unit {overall} of 10" in text) == (0, True), rated.stdout


def test_a_stop_is_told_to_the_main_process_alone() -> None:
    """Workers get a SIGTERM of their supervisor, and a second one would cut their clients."""
    service, _ = blocks("systemd.md", "ini")
    assert "\nKillMode=mixed\n" in service


def test_each_line_that_shuts_the_unit_off_is_explained() -> None:
    service, _ = blocks("systemd.md", "ini")
    shutting = service.partition("StateDirectory=broker\n")[2].partition("LimitNOFILE=")[0]
    (table,) = re.findall(
        r"\| line \|.*\n\| --- .*\n((?:\|.*\n)+)", (HOWTO / "systemd.md").read_text("utf-8")
    )
    rows = [row.split("|")[1] for row in table.splitlines()]
    explained = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert explained == {*re.findall(r"^(\w+)=", shutting, re.MULTILINE), "DynamicUser"}


# all settings that pages show


@pytest.mark.parametrize("page", ["nginx.md", "deploy.md"])
def test_all_settings_that_a_page_shows_are_right(page: str, tmp_path: Path) -> None:
    shown = blocks(page, "toml")
    assert len(shown) >= 2
    for text in shown:
        path = tmp_path / "broker.toml"
        path.write_text(text)
        load(path, {}, environ={})


# Kubernetes, and containers


def test_the_manifests_set_what_there_is_and_leave_time_to_stop() -> None:
    (text,) = blocks("deploy.md", "yaml")
    plain = dict(re.findall(r'name: (BROKER_\w+), value: "([^"]*)"', text))
    secret = re.findall(r"- name: (BROKER_\w+)\n", text)
    values = {"BROKER_ENGINE": "memory", "BROKER_TOKENS_HMAC_SECRET": "x" * 32}
    config = load(None, {}, environ={**{each: values.get(each, "x") for each in secret}, **plain})
    unset = attrs.evolve(Config(), tokens=config.tokens)
    changed = [
        field.name
        for field in attrs.fields(Config)
        if getattr(config, field.name) != getattr(unset, field.name)
    ]
    assert len(changed) + ("engine" not in changed) + 1 == len(plain) + len(secret)
    grace = int(re.findall(r"terminationGracePeriodSeconds: (\d+)", text)[0])
    stop = config.drain_notice_seconds + config.drain_seconds + config.webhooks.flush_seconds + 1
    assert grace > stop
    period, failures = re.findall(r"periodSeconds: (\d+)\n\s+failureThreshold: (\d+)", text)[0]
    assert config.drain_notice_seconds > int(period) * int(failures)
    assert {*re.findall(r"path: (/\w+)", text)} == {"/readyz", "/healthz"}


def test_the_container_runs_as_nobody_and_asks_what_there_is() -> None:
    text = (ROOT / "Containerfile").read_text("utf-8")
    assert re.search(r"^USER 65532:65532$", text, re.MULTILINE)
    assert "/readyz" in text
    extras = re.findall(r"'\.\[([\w,]+)\]'", text)[0].split(",")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(extras) <= set(project["optional-dependencies"])


def test_what_the_container_has_copied_is_enough_to_build(tmp_path: Path) -> None:
    text = (ROOT / "Containerfile").read_text("utf-8")
    for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE):
        *names, into = line.split()
        for name in names:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, tmp_path / into)
            else:
                shutil.copy(ROOT / name, tmp_path / into)
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel"]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    assert len([*(tmp_path / "dist").glob("*.whl")]) == 1


@pytest.mark.parametrize("environ", [{}, {"BROKER_PORT": "0"}], ids=["9501", "another port"])
def test_the_container_is_healthy_at_its_port(environ: dict[str, str]) -> None:
    text = (ROOT / "Containerfile").read_text("utf-8")
    port = free_port()
    if environ:
        environ = {"BROKER_PORT": str(port)}
    else:
        text = text.replace("9501", str(port))
    found = re.search(r"^HEALTHCHECK .*\\\n +CMD (\[.+\])$", text, re.MULTILINE)
    assert found is not None
    program, *arguments = json.loads(found[1])
    assert program == "python"
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environ}

    def health() -> int:
        check = [sys.executable, *arguments]
        return subprocess.run(
            check, env=env, check=False, capture_output=True, timeout=PATIENCE
        ).returncode

    assert health() == 1
    command = [sys.executable, "-m", "broker", "--port", str(port)]
    with running(command, lambda: accepts(port), env=env):
        assert health() == 0
