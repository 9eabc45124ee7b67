"""A backend that the broker asks: quick about everything but the rpc `slow`, which takes 2 s, and those
that are never done with: `silence` says nothing, `drip` a byte of a head a second, `endless` a body.

`connect` lets in whom `data` names as `user`, and shows what was forwarded of the client's headers.
"""

import json
import sys
from typing import Final

import trio

SLOW_SECONDS: Final = 2.0
WITHOUT_END: Final = ("silence", "drip", "endless")


async def _serve(stream: trio.SocketStream) -> None:
    pending = b""
    try:
        while True:
            while b"\r\n\r\n" not in pending:
                data = await stream.receive_some()
                if not data:
                    return
                pending += data
            head, _, pending = pending.partition(b"\r\n\r\n")
            fields = {
                name.strip().lower(): value.strip()
                for name, _, value in (
                    line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:]
                )
            }
            length = int(fields.get("content-length", "0"))
            while len(pending) < length:
                pending += await stream.receive_some()
            body, pending = pending[:length], pending[length:]
            kind = head.split(b" ")[1].decode().strip("/")
            asked = json.loads(body)
            if asked.get("method") in WITHOUT_END:
                await _go_on(stream, asked["method"])
                return
            answer = json.dumps({"result": await _answer(kind, asked, fields)}).encode()
            await stream.send_all(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                % (len(answer), answer)
            )
    except trio.BrokenResourceError:
        pass


async def _go_on(stream: trio.SocketStream, way: str) -> None:
    """Answer for ever, in some way. Ends when the broker does not listen any more."""
    if way == "drip":
        await stream.send_all(b"HTTP/1.1 200 OK\r\nX-Drip: ")
        while True:
            await stream.send_all(b"x")
            await trio.sleep(1)
    if way == "endless":
        await stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            await stream.send_all(b"400\r\n" + b"x" * 1024 + b"\r\n")
    await stream.receive_some()


async def _answer(kind: str, asked: dict[str, object], fields: dict[str, str]) -> object:
    if kind == "connect":
        data = asked.get("data")
        user = data.get("user", "") if isinstance(data, dict) else ""
        seen = {name: fields.get(name, "") for name in ("x-forwarded-for", "x-real-ip", "cookie")}
        return {"user": user, "data": seen}
    if kind == "rpc":
        if asked.get("method") == "slow":
            await trio.sleep(SLOW_SECONDS)
        return {"data": {}}
    return {}


def main() -> None:
    trio.run(trio.serve_tcp, _serve, int(sys.argv[1]))


if __name__ == "__main__":
    main()
