"""`nodes` and `stats` of several, against brokers in processes of their own, and against what is none."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from broker.cli.main import main
from tests.conftest import Process
from tests.engines.servers import BINARIES, serving


def run(*arguments: str, command: str = "nodes", key: str = "s3cret") -> Result:
    return CliRunner().invoke(main, [command, *arguments], env={"BROKER_API_KEY": key})


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
        lines = run("--url", one.http, command="stats").stdout.splitlines()
        assert lines[0].split() == ["nodes", "2", "of", "2"]
        assert lines[-3].split()[:3] == ["NODE", "UP", "CONNECTIONS"]
        assert [line.split()[0] for line in lines[-2:]] == ["one", "two"]
        of_two = run("--url", one.http, "--node", "two", "--json", command="stats").stdout
        assert json.loads(of_two)["node"] == "two"
        looks = run("--url", one.http, "--count", "1", "--json", command="top").stdout
        assert [each["node"] for each in json.loads(looks)["rates_by_node"]] == ["one", "two"]


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


def test_sums_without_a_node_say_so() -> None:
    counted = dict.fromkeys(
        [
            "connections",
            "connections_max",
            "users",
            "topics",
            "patterns",
            "subscriptions",
            "published",
            "delivered",
            "gaps",
            "messages_received",
            "bytes_received",
            "messages_queued",
            "bytes_queued",
            "messages_dropped",
        ],
        1,
    )
    lists: dict[str, Any] = {"connections_by": [], "closed": [], "refused": {}, "errors": {}}
    one = {"node": "one", "version": "1", "uptime": 5.0, "draining": False, **counted, **lists}
    one["memory"] = {"held": 1, "limit": 2}
    silent = {"node": "tw\x1bo", "id": "2", "alive": False, "reason": "x"}
    nodes = [{**one, "id": "1", "alive": True}, silent]
    with answering(200, json.dumps({"result": {**one, "nodes": nodes}}).encode()) as url:
        for options in ((), ("--json",)):
            result = run("--url", url, *options, command="stats")
            assert result.exit_code == 1
            assert "\x1b" not in result.output
            assert result.stderr == "Error: no answer from tw\\x1bo\n"
        lines = run("--url", url, command="stats").stdout.splitlines()
    assert lines[0].split(maxsplit=1) == ["nodes", r"1 of 2, without tw\x1bo"]
    assert lines[-1].split()[:3] == [r"tw\x1bo", "no", "answer"]
