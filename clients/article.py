"""The tutorial's client: says hello over a plain WebSocket, prints the answer, closes 5 s later.

In one terminal, then in another::

    python -m broker --port 9501 --log-format article
    python clients/article.py
"""

import argparse
import math
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it from here on, without a word

import trio
from trio_websocket import ConnectionClosed, HandshakeError, open_websocket_url


async def main(url: str, wait: float = 5) -> None:
    # Around it all: a `connect_timeout` does not end a handshake that the server never answers.
    with trio.fail_after(10) as connecting:
        async with open_websocket_url(url, disconnect_timeout=5) as ws:
            connecting.deadline = math.inf
            print("client：打开连接", flush=True)
            try:
                await ws.send_message("client：hello，服务端")
                answer = str(await ws.get_message())
                if not answer.isprintable():  # text moves no cursor and starts no line
                    answer = repr(answer)
                print("client：接收到服务端的消息", answer, flush=True)
                await trio.sleep(wait)
            except ConnectionClosed:
                pass  # the server closed first; the last line is the same
    print("client：关闭连接", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The tutorial's client.")
    parser.add_argument("--url", default="ws://localhost:9501")
    parser.add_argument("--wait", type=float, default=5, help="seconds from answer to close")
    args = parser.parse_args()
    status: str | int = 0
    try:
        trio.run(main, args.url, args.wait)
    except* (HandshakeError, ValueError) as errors:
        reason: BaseException = errors
        while below := getattr(reason, "exceptions", [reason.__cause__])[0]:
            reason = below
        text = str(reason) or type(reason).__name__
        status = f"cannot connect to {args.url}: {text if text.isprintable() else repr(text)}"
    except* trio.TooSlowError:
        status = f"cannot connect to {args.url}: no answer within 10 s"
    sys.exit(status)
