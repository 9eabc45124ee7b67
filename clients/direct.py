"""Direct messages: wait for them, or send DATA to the connection FD.

In one terminal, which prints its fd, say 3; then in another::

    python clients/direct.py
    python clients/direct.py 3 hello
"""

import argparse
import io
import json
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it from here on, without a word

from broker.client import open_client, run
from broker.errors import ClientError
from broker.logs import escape


def value(text: str) -> object:
    text.encode()  # or a ValueError: bytes that are no text
    try:
        return json.loads(text)
    except ValueError:
        return text


async def main(url: str, fd: int | None, data: object) -> None:
    async with open_client(url) as client:
        if fd is not None:
            await client.push(fd, data)
            return
        print(f"fd {client.fd}", flush=True)
        async for message in client.messages:
            sender = message.info.client if message.info else "server"
            print(escape(f"from {sender}: {message.data.decode()}"), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Wait for direct messages, or send one.")
    parser.add_argument("fd", metavar="FD", type=int, nargs="?", help="send to this connection")
    parser.add_argument("data", metavar="DATA", type=value, nargs="?", help="JSON or text")
    parser.add_argument("--url", default="ws://localhost:9501")
    args = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show it all
    if args.fd is not None and args.data is None:
        parser.error("DATA is missing: what shall be sent to FD?")
    status: str | int = 0
    try:
        run(main, args.url, args.fd, args.data)
    except* ClientError as errors:
        status = escape(f"direct: {errors.exceptions[0]}")
    sys.exit(status)
