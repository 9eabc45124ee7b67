"""Publish DATA to TOPIC: JSON goes as JSON, anything else as a string.

Like this::

    python clients/publish.py news hello
    python clients/publish.py news '{"title": "hello", "n": 1}'
"""

import argparse
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


async def main(url: str, topic: str, data: object) -> None:
    async with open_client(url) as client:
        await client.publish(topic, data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Publish DATA to TOPIC.")
    parser.add_argument("topic", metavar="TOPIC")
    parser.add_argument("data", metavar="DATA", type=value)
    parser.add_argument("--url", default="ws://localhost:9501")
    args = parser.parse_args()
    status: str | int = 0
    try:
        run(main, args.url, args.topic, args.data)
    except* ClientError as errors:
        status = escape(f"publish: {errors.exceptions[0]}")
    sys.exit(status)
