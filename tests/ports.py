"""Ports for programs that must be told theirs."""

import itertools
import os
import socket
from collections.abc import Iterator
from typing import Final

# Below those that Linux gives to outgoing connections and to whoever asks for any: between the choice
# and the listening nobody is given it by chance. Processes start 101 apart.
_PORTS: Final = range(10_000, 30_000)
_FIRST: Final = os.getpid() * 101 % len(_PORTS)
_ports: Final[Iterator[int]] = itertools.cycle([*_PORTS[_FIRST:], *_PORTS[:_FIRST]])


def free_port() -> int:
    """A port that nobody listens on now, and that this process is told once in 20,000 calls."""
    while True:
        port = next(_ports)
        with socket.socket() as wanted:
            try:
                wanted.bind(("", port))
            except OSError:
                continue
        return port
