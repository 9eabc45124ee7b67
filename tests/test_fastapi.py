"""The how-to on FastAPI, as it is printed: its settings, its backend, and a client that gets what that publishes."""

import base64
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import jwt
import pytest
import trio

from broker.client import open_client
from broker.errors import RequestFailed
from tests.conftest import PATIENCE, Process
from tests.ports import free_port

pytest.importorskip("fastapi")

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "howto" / "fastapi.md").read_text("utf-8")
SECRET = "0123456789abcdef0123456789abcdef"


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


@attrs.frozen
class Backend:
    broker: Process
    url: str

    def ask(self, path: str, user: str, body: object = None) -> Any:
        """The answer of the backend, or the status of a refusal."""
        password = {"ann": "apple", "ben": "banana"}.get(user, "wrong")
        key = base64.b64encode(f"{user}:{password}".encode()).decode()
        request = urllib.request.Request(
            f"{self.url}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Authorization": f"Basic {key}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code


@pytest.fixture
def backend(
    start_broker: Callable[..., Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Backend]:
    monkeypatch.setenv("BROKER_API_KEY", "s3cret")
    monkeypatch.setenv("BROKER_TOKENS_HMAC_SECRET", SECRET)
    (tmp_path / "broker.toml").write_text(block("toml"), "utf-8")
    (tmp_path / "backend.py").write_text(block("python"), "utf-8")
    broker = start_broker("--config", str(tmp_path / "broker.toml"))
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "hypercorn", "backend:app", "--bind", f"127.0.0.1:{port}"],
        cwd=tmp_path,
        env={**os.environ, "BROKER_API": f"{broker.http}/api"},
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 3 * PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=PATIENCE).close()
                break
            except ConnectionRefusedError:
                assert process.poll() is None, "the backend did not start"
                assert time.monotonic() < deadline
                time.sleep(0.05)  # a foreign process
        yield Backend(broker, f"http://127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait()


def test_the_backend_mints_tokens_and_publishes(backend: Backend) -> None:
    token = backend.ask("/token", "ann")["token"]
    claims = jwt.decode(token, SECRET, ["HS256"])
    assert (claims["sub"], claims["channels"]) == ("ann", ["room.7"])

    async def listen() -> object:
        with trio.fail_after(PATIENCE):
            async with open_client(backend.broker.ws, token=token) as client:
                told = await trio.to_thread.run_sync(
                    backend.ask, "/rooms/7/messages", "ben", {"text": "hello"}
                )
                assert told == {"offset": 1}
                message = await anext(client.messages)
                with pytest.raises(RequestFailed, match="103"):
                    await client.publish("room.7", "by myself")
                with pytest.raises(RequestFailed, match="103"):
                    async with client.subscribe("room.8"):
                        pass
                return message.topic, message.value

    assert trio.run(listen) == ("room.7", {"from": "ben", "text": "hello"})


def test_who_is_no_member_or_nobody_is_refused(backend: Backend) -> None:
    assert backend.ask("/token", "mallory") == 401
    assert backend.ask("/rooms/8/messages", "ann", {"text": "let me in"}) == 403
    backend.broker.stop()
    assert backend.ask("/rooms/7/messages", "ann", {"text": "nobody there"}) == 502


def shell(beginning: str) -> str:
    """The block of shell that begins so."""
    blocks = re.findall(r"```shell\n(.*?)```", PAGE, re.DOTALL)
    (found,) = (block for block in blocks if block.startswith(beginning))
    return str(found)


def test_what_is_typed_to_try_it_prints_what_the_page_says(
    backend: Backend, tmp_path: Path
) -> None:
    def fill(text: str) -> str:
        return text.replace("localhost:8000", backend.url).replace(
            "python -m", f"{sys.executable} -m"
        )

    env = {**os.environ, "PYTHONPATH": str(ROOT), "BROKER_URL": backend.broker.ws}
    with (tmp_path / "ann.txt").open("wb") as output:
        ann = subprocess.Popen(
            ["sh", "-c", f"{fill(shell('TOKEN=')).rstrip()} --count 1"], env=env, stdout=output
        )
    try:
        deadline = time.monotonic() + 3 * PATIENCE
        while ann.poll() is None:
            assert time.monotonic() < deadline
            told = subprocess.run(
                ["sh", "-c", fill(shell("curl "))], check=True, capture_output=True, text=True
            )
            assert re.fullmatch(r'\{"offset":\d+\}', told.stdout)
    finally:
        ann.kill()
        ann.wait()
    line = (tmp_path / "ann.txt").read_text("utf-8")
    assert re.sub(r"(?<=room.7 )\d+", "1", line) in PAGE
    assert line


def test_both_terminals_have_the_same_secrets(tmp_path: Path) -> None:
    make = shell("echo ").partition("python -m")[0]
    subprocess.run(["sh", "-ec", make], cwd=tmp_path, check=True)
    assert (tmp_path / "secrets.env").stat().st_mode & 0o077 == 0
    assert shell(". ./secrets.env").endswith("uvicorn backend:app --port 8000\n")
    for name in ("BROKER_API_KEY", "BROKER_TOKENS_HMAC_SECRET"):
        show = f'. ./secrets.env && env | grep "^{name}="'
        done = subprocess.run(
            ["sh", "-ec", show], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        assert len(done.stdout) == len(f"{name}=\n") + 64
