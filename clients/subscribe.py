"""Print what is published on a TOPIC, or on all that match a PATTERN: topic, offset, data.

It comes back by itself when the broker restarts. `--history` begins with what the broker keeps::

    python clients/subscribe.py news --history
    python clients/subscribe.py 'news.>'
"""

import argparse
import io
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it from here on, without a word

from broker.client import open_client, run
from broker.core.messages import Publication
from broker.errors import ClientError
from broker.logs import escape


def show(publication: Publication) -> None:
    # What others publish is text: it moves no cursor and starts no line.
    line = f"{publication.topic} {publication.offset} {publication.data.decode()}"
    print(escape(line), flush=True)


async def main(url: str, topic: str, history: bool = False) -> None:
    async with open_client(url) as client:
        since = None
        if history:
            kept = await client.history(topic)
            since = kept.position  # go on exactly there
            for publication in kept.publications:
                show(publication)
        async with client.subscribe(topic, since=since) as subscription:
            async for publication in subscription:
                show(publication)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print what is published on TOPIC.")
    parser.add_argument("topic", metavar="TOPIC", help="a topic, or a pattern such as news.*")
    parser.add_argument("--history", action="store_true", help="begin with what is kept")
    parser.add_argument("--url", default="ws://localhost:9501")
    args = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show it all
    status: str | int = 0
    try:
        run(main, args.url, args.topic, args.history)
    except* ClientError as errors:
        status = escape(f"subscribe: {errors.exceptions[0]}")
    sys.exit(status)
