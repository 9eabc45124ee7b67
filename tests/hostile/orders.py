"""The clients' side of a process that runs beside others: orders by stdin, a line each, answers of JSON by stdout."""

import json
import os
import sys
from collections.abc import AsyncGenerator

import trio


async def orders() -> AsyncGenerator[bytes]:
    """The orders as they come, until nobody gives any more."""
    pending = b""
    async for data in trio.lowlevel.FdStream(os.dup(0)):
        pending += data
        *lines, pending = pending.split(b"\n")
        for line in lines:
            yield line


def answer(values: object) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()
