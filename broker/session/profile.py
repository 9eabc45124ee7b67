"""A connection as an app sees it: who it is and where it comes from. Nothing here does anything.

The session is asked for what it knows (user, claims, subscriptions); the rest is as it was at the handshake.
"""

from collections.abc import Mapping
from time import time as wall_clock
from typing import Any, Final

from broker.access.proxies import peer_of, split_address
from broker.core.messages import ConnectionInfo, Fd, Transport
from broker.protocols.centrifuge_json import CENTRIFUGE_JSON
from broker.protocols.centrifuge_protobuf import CENTRIFUGE_PROTOBUF
from broker.protocols.codec import Codec
from broker.protocols.plain import PLAIN
from broker.routing.recipients import Peer
from broker.transport.head import Head, read_cookies, read_fields, read_list, read_query
from broker.transport.lane import Traffic

SUBPROTOCOLS: Final[Mapping[str, Codec]] = {
    codec.name: codec for codec in (CENTRIFUGE_JSON, CENTRIFUGE_PROTOBUF)
}
"""Subprotocols that a WebSocket handshake may ask for; without one a peer is plain, or speaks JSON."""


class Asked:
    """The part of a request for a connection that hooks may read."""

    __slots__ = ("_data", "_field_lines", "_target", "address", "peer_address", "transport")

    def __init__(self, head: Head, address: str, transport: Transport) -> None:
        self._data: dict[str, Any] | None = None
        self.address: str = str(address)  # and no more of what else it may know
        self.peer_address: str = peer_of(address)
        self.transport = transport
        self._target = head.target
        self._field_lines = head.field_lines

    @property
    def data(self) -> dict[str, Any]:
        """The app's own, whatever it puts there."""
        if self._data is None:
            self._data = {}
        return self._data

    @property
    def path(self) -> str:
        return self._target.partition("?")[0]

    @property
    def query(self) -> str:
        return self._target.partition("?")[2]

    @property
    def params(self) -> Mapping[str, str]:
        return read_query(self.query)

    @property
    def headers(self) -> Mapping[str, str]:
        """The header fields of the handshake, read anew each time: only their bytes are kept, because 676
        empty ones take 66 KiB in a dict, and most apps never look."""
        return read_fields(self._field_lines)

    @property
    def cookies(self) -> Mapping[str, str]:
        return read_cookies(self.headers.get("cookie", ""))

    @property
    def subprotocols(self) -> tuple[str, ...]:
        return read_list(self.headers.get("sec-websocket-protocol", ""))

    @property
    def remote_host(self) -> str:
        return split_address(self.address)[0]

    @property
    def remote_port(self) -> int:
        return split_address(self.address)[1]


class Profile(Asked):
    """The part of a connection that hooks may read. `peer` is there once the connection runs."""

    __slots__ = ("opened_at", "peer", "subprotocol", "traffic")

    peer: Peer
    traffic: Traffic

    def __init__(self, head: Head, address: str, transport: Transport) -> None:
        super().__init__(head, address, transport)
        self.opened_at: float = wall_clock()
        self.subprotocol: str | None = None

    @property
    def fd(self) -> Fd:
        return self.peer.fd

    @property
    def user(self) -> str:
        """The user that the app or a token named; "" for nobody in particular."""
        return self.peer.user

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

    @property
    def waiting(self) -> int:
        """Bytes that wait in its outbox."""
        return self.peer.outbox.bytes

    def info(self) -> ConnectionInfo:
        """A snapshot of what is known of this connection."""
        return ConnectionInfo(**self.facts())

    def facts(self) -> dict[str, Any]:
        """The fields of `info`, by their names."""
        traffic, peer = self.traffic, self.peer
        outbox = peer.outbox
        return {
            "fd": peer.fd,
            "user": peer.user,
            "address": self.address,
            "path": self.path,
            "transport": self.transport,
            "protocol": self.protocol,
            "opened_at": self.opened_at,
            "topics": tuple(peer.subscriptions),
            "app_name": peer.app_name,
            "app_version": peer.app_version,
            "last_received_at": self.opened_at + traffic.heard_at - traffic.began_at,
            "last_sent_at": self.opened_at + max(0.0, outbox.sent_at - traffic.began_at),
            "bytes_received": traffic.bytes,
            "messages_received": traffic.messages,
            "bytes_queued": self.waiting,
            "messages_queued": outbox.messages,
        }
