"""Chat in two terminals: a line is for the room, /to FD TEXT for one person, /who lists all.

Like this, and the same with another name; /quit or Ctrl-D ends it::

    python clients/chat.py --room lobby --name Alice

A line that begins with a slash is a command or a mistake, and never goes to the room: what was
meant for one person is not to be read by all. Begin with // to say something that has a slash.
"""

import argparse
import io
import os
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it from here on, without a word

import trio

from broker.client import Client, Join, Leave, Subscription, open_client, run
from broker.core.messages import Publication
from broker.errors import ClientError, ConnectionLost, RequestFailed
from broker.logs import escape

HELP = "/to FD TEXT, /who or /quit; begin with // to say it to the room"
SLASHES = "/\uff0f\u2044\u2215\u29f8"  # what keyboards and autocorrection make of it, too


def fields(message: Publication) -> dict[str, object]:
    try:
        value = message.value
    except ValueError:  # nested too deeply
        value = "(something that cannot be shown)"
    return value if isinstance(value, dict) else {"text": value}


def said(message: Publication, form: str) -> str:
    known = fields(message)
    fd = message.info.client if message.info else "server"
    # What others write is text: it moves no cursor and starts no line.
    return escape(form.format(fd=fd, name=known.get("name", "somebody"), text=known.get("text")))


async def show_room(room: str, people: Subscription[Publication | Join | Leave]) -> None:
    async for item in people:
        if isinstance(item, Publication):
            print(f"[{room}] {said(item, '{name}({fd}): {text}')}", flush=True)
        else:
            came = "joined" if isinstance(item, Join) else "left"
            print(f"[{room}] {escape(item.info.client)} {came}", flush=True)


async def show_direct(client: Client) -> None:
    async for message in client.messages:
        if "text" not in fields(message):
            continue  # the page on / asks new people for their names this way
        print(said(message, "(direct from {fd}) {text}"), flush=True)


async def obey(line: str, client: Client, topic: str, name: str) -> None:
    text = line.strip().lstrip(" \t\ufeff\u200b\u200e\u200f")  # invisible, and pasted along
    if not text:
        return
    if text[0] not in SLASHES or text[1:2] in tuple(SLASHES):
        line = text[1:] if text[0] in SLASHES else line
        await client.publish(topic, {"name": name, "text": line})
        return
    match text.split(maxsplit=2):
        case ["/who"]:
            here = sorted(await client.presence(topic), key=lambda fd: (len(fd), fd))
            print("here:", escape(" ".join(here)), flush=True)
        case ["/to", fd, private] if fd.isdecimal() and len(fd) < 20 and int(fd):
            await client.push(int(fd), {"name": name, "text": private})
        case ["/to", fd] if fd.isdecimal():
            print(f"(not sent: the text for {fd} is missing: /to {fd} TEXT)", flush=True)
        case ["/to", *_]:
            print("(not sent: /to needs the number of one person: /to FD TEXT; /who)", flush=True)
        case [word, *_]:
            # ascii(): a letter that only looks like the right one shows.
            print(f"(not sent: {word!a} is no command: {HELP})", flush=True)


async def try_to_obey(line: str, client: Client, topic: str, name: str) -> None:
    try:
        await obey(line, client, topic, name)
    except RequestFailed as error:
        print(f"(refused: {escape(error.message)})", flush=True)
    except ConnectionLost:
        print("(the connection was lost: perhaps it was not sent)", flush=True)


def text_of(argument: str) -> str:
    return argument.encode(errors="replace").decode()  # bytes on the command line that are no text


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
                    await try_to_obey(line.decode(errors="replace"), client, topic, name)
            await try_to_obey(typed.decode(errors="replace"), client, topic, name)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Chat in two terminals.")
    parser.add_argument("--room", default="lobby")
    parser.add_argument("--name", default="somebody")
    parser.add_argument("--url", default="ws://localhost:9501")
    args = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show it all
    failure = None
    try:
        run(main, args.url, text_of(args.room), text_of(args.name))
    except* ClientError as errors:
        failure = escape(f"chat: {errors.exceptions[0]}")
    sys.exit(failure)
