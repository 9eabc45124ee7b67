"""Chat in two terminals: a line is for the room, /to FD TEXT for one person, /who lists all.

Like this, and the same with another name; /quit or Ctrl-D ends it::

    python clients/chat.py --room lobby --name Alice
"""

import argparse
import os
import sys

import trio

from broker.client import Client, Join, Leave, Subscription, open_client
from broker.core.messages import Publication
from broker.errors import ClientError, RequestFailed


def said(message: Publication, form: str) -> str:
    value = message.value if isinstance(message.value, dict) else {"text": message.value}
    fd = message.info.client if message.info else "server"
    return form.format(fd=fd, name=value.get("name", "somebody"), text=value.get("text"))


async def show_room(room: str, people: Subscription[Publication | Join | Leave]) -> None:
    async for item in people:
        if isinstance(item, Publication):
            print(f"[{room}] {said(item, '{name}({fd}): {text}')}", flush=True)
        else:
            came = "joined" if isinstance(item, Join) else "left"
            print(f"[{room}] {item.info.client} {came}", flush=True)


async def show_direct(client: Client) -> None:
    async for message in client.messages:
        if isinstance(message.value, dict) and "text" not in message.value:
            continue  # the page on / asks new people for their names this way
        print(said(message, "(direct from {fd}) {text}"), flush=True)


async def obey(line: str, client: Client, topic: str, name: str) -> None:
    try:
        match line.split(maxsplit=2):
            case ["/who"]:
                print("here:", *sorted(await client.presence(topic), key=int), flush=True)
            case ["/to", fd, text] if fd.isdecimal():
                await client.push(int(fd), {"name": name, "text": text})
            case [_, *_]:
                await client.publish(topic, {"name": name, "text": line})
    except RequestFailed as error:
        print(f"(refused: {error.message})", flush=True)


async def main(url: str, room: str, name: str) -> None:
    topic, typed = f"room.{room}", b""
    async with open_client(url) as client, client.subscribe(topic, join_leave=True) as people:
        print(f"you are {name}({client.fd}) in {room}", flush=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(show_room, room, people)
            nursery.start_soon(show_direct, client)
            # A thread waits for the keyboard, so that nothing else does.
            while data := await trio.to_thread.run_sync(os.read, 0, 4096, abandon_on_cancel=True):
                *lines, typed = (typed + data).split(b"\n")
                for line in lines:
                    if line.strip() == b"/quit":
                        nursery.cancel_scope.cancel()
                    await obey(line.decode(errors="replace"), client, topic, name)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Chat in two terminals.")
    parser.add_argument("--room", default="lobby")
    parser.add_argument("--name", default="somebody")
    parser.add_argument("--url", default="ws://localhost:9501")
    args = parser.parse_args()
    failure = None
    try:
        trio.run(main, args.url, args.room, args.name)
    except* ClientError as errors:
        failure = f"chat: {errors.exceptions[0]}"
    except* KeyboardInterrupt:
        pass
    sys.exit(failure)
