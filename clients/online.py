"""A backend that knows who is online, as the broker tells it by webhooks. Nothing to install.

    export BROKER_API_KEY=$(openssl rand -hex 16) BROKER_WEBHOOKS_SECRET=whsec_$(openssl rand -base64 32)
    python clients/online.py &
    BROKER_WEBHOOKS_URL=http://localhost:8000/events python -m broker

`verify`, `Online` and `Nodes` are what a backend of yours needs as well.
"""

import base64
import hmac
import json
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from email.message import Message
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any

Page = dict[str, Any]


def verify(secret: str, headers: "Mapping[str, str] | Message", body: bytes, now: float) -> bool:
    """Whether a request was signed with the secret, less than five minutes ago."""
    request_id, stamp = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    if not stamp.isdigit() or abs(now - int(stamp)) > 300:
        return False
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.digest(key, f"{request_id}.{stamp}.".encode() + body, "sha256")
    ours = f"v1,{base64.b64encode(digest).decode()}"
    return hmac.compare_digest(ours, headers.get("webhook-signature", ""))


class Online:
    """The connections of one broker, or of one node of several. `fetch` asks its API for those beyond an fd."""

    def __init__(self, fetch: Callable[[int], Page]) -> None:
        self._fetch = fetch
        self.connections: dict[int, dict[str, Any]] = {}
        self.epoch = ""
        self.seq = 0

    def apply(self, event: dict[str, Any]) -> None:
        """Learn what has happened. Twice the same changes nothing."""
        kind, seq = event["kind"], event["seq"]
        if kind == "started" and event["epoch"] != self.epoch:
            self.connections, self.epoch, self.seq = {}, event["epoch"], 0
        elif event["epoch"] != self.epoch or (kind == "lost" and seq > self.seq):
            self.look()
        if event["epoch"] != self.epoch or seq <= self.seq:
            return  # of a broker that is gone, or known
        if kind == "stopped":
            self.connections.clear()
        elif "fd" in event:
            self._change(event["fd"], kind, event)
        self.seq = seq

    def _change(self, fd: int, kind: str, event: dict[str, Any]) -> None:
        new = {"protocol": "plain", "topics": set(), "seq": 0}
        connection = self.connections.setdefault(fd, new)
        if event["seq"] <= connection["seq"]:
            return  # known from a page that was read later
        connection["user"] = event["user"]
        if kind == "connected":
            connection["protocol"] = event["protocol"].removeprefix("centrifuge-")
        elif kind == "subscribed":
            connection["topics"].add(event["topic"])
        elif kind == "unsubscribed":
            connection["topics"].discard(event["topic"])
        elif kind == "disconnected":
            del self.connections[fd]

    def look(self) -> None:
        """Ask the broker, page by page: what it says is true after event `seq` of the page.

        For who has just started as well, as the next event may be long in coming.
        """
        page = self._fetch(0)
        self.connections, self.epoch, self.seq = {}, page["epoch"], page["seq"]
        while page["connections"] and page["epoch"] == self.epoch:
            for fd, info in page["connections"].items():
                self.connections[int(fd)] = {
                    "user": info["user"],
                    "protocol": info["protocol"],
                    "topics": set(info["topics"]),
                    "seq": page["seq"],
                }
            page = self._fetch(max(self.connections))


class Nodes:
    """The connections of all nodes of a broker, each by its own events. `fetch` asks any node for those of
    one, by its name, beyond an fd; "" stands for all."""

    def __init__(self, fetch: Callable[[str, int], Page]) -> None:
        self._fetch = fetch
        self.nodes: dict[str, Online] = {}

    @property
    def connections(self) -> dict[int, dict[str, Any]]:
        return {fd: c for node in self.nodes.values() for fd, c in node.connections.items()}

    def apply(self, event: dict[str, Any]) -> None:
        """Learn what has happened. Twice the same changes nothing."""
        self._node(event["node"]).apply(event)
        if event["kind"] == "died":
            dead = self._node(event["dead"])
            if dead.epoch == event["dead_epoch"]:  # else it is back already
                dead.connections.clear()

    def look(self) -> None:
        """Ask who is there, for who has just started."""
        page = self._fetch("", 0)
        for name in page.get("nodes") or [page["node"]]:
            self._node(name).look()

    def _node(self, name: str) -> Online:
        return self.nodes.setdefault(name, Online(partial(self._fetch, name)))


def main() -> None:
    """Print who is online after each request, until Ctrl-C."""
    key, secret = os.environ.get("BROKER_API_KEY", ""), os.environ["BROKER_WEBHOOKS_SECRET"]
    broker = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:9501"
    port = int(sys.argv[2]) if len(sys.argv) > 2 else 8000

    def fetch(node: str, after: int) -> Page:
        params = json.dumps({"node": node, "after": after, "limit": 1000}).encode()
        headers = {"X-API-Key": key}
        request = urllib.request.Request(f"{broker}/api/connections", params, headers)
        with urllib.request.urlopen(request, timeout=5) as response:
            page: Page = json.load(response)["result"]
            return page

    online, lock = Nodes(fetch), Lock()
    with suppress(OSError, KeyError):  # a broker that starts after us begins with `started`
        online.look()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status = 204
            if not verify(secret, self.headers, body, time.time()):
                status = 401
            else:
                with lock:  # a request that the broker gave up may still be at work
                    for event in json.loads(body)["events"]:
                        online.apply(event)
                    users = [c["user"] or f"fd {fd}" for fd, c in online.connections.items()]
                shown = [user if user.isprintable() else repr(user) for user in users]
                print("online:", ", ".join(shown) or "nobody", flush=True)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("localhost", port), Handler) as server:
        print("listening on port", server.server_port, flush=True)
        server.serve_forever()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word
    main()
