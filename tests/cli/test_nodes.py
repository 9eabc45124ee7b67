"""`python -m broker nodes`, against brokers in processes of their own, and against what is none."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from click.testing import CliRunner, Result

from broker.cli.main import main
from tests.conftest import Process
from tests.engines.servers import BINARIES, serving


def run(*arguments: str, key: str = "s3cret") -> Result:
    return CliRunner().invoke(main, ["nodes", *arguments], env={"BROKER_API_KEY": key})


def test_it_lists_the_nodes_that_share_a_redis(
    tmp_path: Path, start_broker: Callable[..., Process]
) -> None:
    for name in ("one", "two"):
        text = f'api_key = "s3cret"\nname = "{name}"\n'
        (tmp_path / f"{name}.toml").write_text(text, "utf-8")
    with serving(BINARIES["valkey"], tmp_path) as server:
        engine = "--engine", f"redis+unix://{server.socket}"
        one = start_broker("--config", str(tmp_path / "one.toml"), *engine)
        start_broker("--config", str(tmp_path / "two.toml"), *engine)
        result = run("--url", one.http)
        assert result.exit_code == 0, result.output
        head, first, second = result.stdout.splitlines()
        assert head.split()[:3] == ["NODE", "STATE", "CONNECTIONS"]
        assert [line.split()[:3] for line in (first, second)] == [
            ["one", "alive", "0"],
            ["two", "alive", "0"],
        ]
        lines = run("--url", one.http, "--json").stdout.splitlines()
        assert [json.loads(line)["uid"] for line in lines] == ["one", "two"]


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """A server that answers every request so."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


NODE = {"num_clients": 1234, "num_users": 2, "num_subs": 3, "num_channels": 4, "version": "1"}


def test_a_node_that_does_not_answer_is_named() -> None:
    nodes = [
        {"uid": "one", "alive": True, "uptime": 90061, **NODE},
        {"uid": "tw\x1bo", "alive": False, "uptime": 0, **NODE},
    ]
    body = json.dumps({"result": {"nodes": nodes}}).encode()
    with answering(200, body) as url:
        result = run("--url", url)
    assert result.exit_code == 1
    assert "1234" in result.stdout
    assert "no answer" in result.stdout
    assert "\x1b" not in result.output
    assert "no answer from tw\\x1bo" in result.stderr
