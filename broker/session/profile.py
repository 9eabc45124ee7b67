"""A connection as an app sees it: who it is and where it comes from. Nothing here does anything.

What its session knows (user, claims, subscriptions) is asked of that; the rest is as it was at the
handshake.
"""

from collections.abc import Mapping
from time import time as wall_clock
from typing import Any, Final

from broker.core.messages import ConnectionInfo, Fd, Transport
from broker.protocols.centrifuge_json import CENTRIFUGE_JSON
from broker.protocols.centrifuge_protobuf import CENTRIFUGE_PROTOBUF
from broker.protocols.codec import Codec
from broker.protocols.plain import PLAIN
from broker.routing.recipients import Peer
from broker.transport.head import Head, read_fields

SUBPROTOCOLS: Final[Mapping[str, Codec]] = {
    codec.name: codec for codec in (CENTRIFUGE_JSON, CENTRIFUGE_PROTOBUF)
}
"""Subprotocols that a WebSocket handshake may ask for; without one a peer is plain, or speaks JSON."""


class Profile:
    """What hooks may read of one peer. `peer` is there once the connection runs."""

    __slots__ = (
        "_field_lines",
        "address",
        "data",
        "opened_at",
        "path",
        "peer",
        "subprotocol",
        "transport",
    )

    peer: Peer

    def __init__(self, head: Head, address: str, transport: Transport) -> None:
        self.data: dict[str, Any] = {}
        self.address = address
        self.path = head.path
        self._field_lines = head.field_lines
        self.opened_at = wall_clock()
        self.transport = transport
        self.subprotocol: str | None = None
        if transport == "websocket":
            offered = head.subprotocols
            self.subprotocol = next((p for p in offered if p in SUBPROTOCOLS), None)

    @property
    def fd(self) -> Fd:
        return self.peer.fd

    @property
    def user(self) -> str:
        """The user that the app or a token named; "" for nobody in particular."""
        return self.peer.user

    @property
    def headers(self) -> Mapping[str, str]:
        """The header fields of the handshake, read anew each time: what is kept of them is their bytes,
        as 676 empty ones take 66 KiB in a dict, and most apps never look."""
        return read_fields(self._field_lines)

    @property
    def claims(self) -> Mapping[str, object]:
        """The claims of the client's token, `meta` among them; empty without one."""
        return self.peer.claims

    @property
    def protocol(self) -> str:
        """`plain` until a Centrifuge `connect` was accepted."""
        return PLAIN.name if self.peer.codec is None else self.peer.codec.name

    @property
    def is_established(self) -> bool:
        """Whether the connection is neither closing nor gone."""
        return self.peer.is_established

    def info(self) -> ConnectionInfo:
        """A snapshot of what is known of this connection."""
        return ConnectionInfo(
            self.fd,
            self.user,
            self.address,
            self.path,
            self.transport,
            self.protocol,
            self.opened_at,
            tuple(self.peer.subscriptions),
            self.peer.app_name,
            self.peer.app_version,
        )
