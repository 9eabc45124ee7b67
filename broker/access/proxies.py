"""Proxies of ours: the peers that may say for whom they ask.

Anybody can send `X-Forwarded-For`. It tells something only where the peer that sent it is known to
write it itself: a proxy that the settings name, and in the header that they name. A client may have made up
any other header of the kind, because its proxy passes on headers that it does not know.

Rules:

1. A peer is trusted by its address alone, and none is by default.
2. Of the addresses that a proxy passes on, the last one that is no proxy's own is the client's: all before it
   came from the client.
"""

import ipaddress
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Final, Self, TypeAlias

import attrs

from broker.config.settings import is_loopback
from broker.core.hosts import normal_host, split_port

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

UNIX: Final = "unix"
"""Stands for every peer on a Unix socket: the permissions of its directory say who reaches it."""

FORWARDED_FOR: Final = "x-forwarded-for"
FORWARDED: Final = "forwarded"
REAL_IP: Final = "x-real-ip"

_SET_BY_PROXIES: Final = re.compile(
    r"forwarded|x-(original-)?forwarded-.+|.+-address|(.+-)?ip"
).fullmatch


def is_set_by_proxies(header: str) -> bool:
    """Whether a header, in lower case, is one by which proxies say for whom they ask: `forwarded`,
    `x-forwarded-*`, `x-real-ip`, `cf-connecting-ip` and all others that end in `-ip` or `-address`."""
    return _SET_BY_PROXIES(header) is not None


def was_passed_on(headers: Mapping[str, str]) -> bool:
    """Whether a request shows that a proxy has passed it on, by a header of proxies or a name of elsewhere
    in `host`. A client of that proxy may hide it, and one of this machine may pretend it."""
    if any(is_set_by_proxies(name) or name == "via" for name in headers):
        return True
    named = headers.get("host", "")
    try:
        return bool(named) and not is_loopback(normal_host(split_port(named)[0]))
    except ValueError:
        return True


class ClientAddress(str):
    """The address of a client, as a proxy of ours has passed it on; `via` is the proxy's own.

    Where both are the same, the proxy has said by the PROXY protocol that it knows none.
    """

    __slots__ = ("via",)

    via: str

    @property
    def is_known(self) -> bool:
        return self != self.via

    def __new__(cls, address: str, via: str) -> Self:
        made = super().__new__(cls, address)
        made.via = via
        return made


def peer_of(address: str) -> str:
    """The address of the peer that has opened the connection: of the proxy, where one has passed on the
    client's."""
    return address.via if isinstance(address, ClientAddress) else address


@attrs.frozen
class TrustedProxies:
    """The proxies that the settings name. `trusted_proxies` makes one."""

    networks: tuple[Network, ...]
    unix: bool
    header: str = FORWARDED_FOR
    """Where they write for whom they ask, in lower case."""

    def trusts(self, peer: str) -> bool:
        """Whether a connection's peer, `HOST:PORT` or `unix`, is one of them."""
        if not self.networks:
            return self.unix and peer == UNIX
        host = host_of(peer)
        return self.unix and peer == UNIX if host is None else self._is_ours(host)

    def address_of(self, peer: str, header: Callable[[str], str | None]) -> str:
        """The address of the client that is behind a connection: a `ClientAddress` where a proxy of
        ours has passed it on, else the peer's. `header` looks one up by its lower-case name."""
        if not self.trusts(peer):
            return peer
        if isinstance(peer, ClientAddress) and not peer.is_known:
            return peer  # it passes on bytes: what stands in them is the client's own word
        client = self.client_in(header(self.header) or "")
        return peer if client is None else ClientAddress(str(client), peer)

    def client_in(self, passed_on: str) -> Address | None:
        """The address of the client in what a proxy has passed on; None where there is none, or one
        that cannot be read."""
        split = _split_forwarded if self.header == FORWARDED else _split_list
        for text in reversed(split(passed_on)):
            address = host_of(text)
            if address is None or not self._is_ours(address):
                return address
        return None

    def party_of(self, user: str, address: str, alone: str) -> str:
        """The party that something counts for: its user, else the address that it comes from, else,
        where no address tells people apart, `alone`: over a Unix socket, or where a proxy has not said.

        Of IPv6 the first 64 bits count as one address, because one subscriber has so many. A connection from
        this machine is as a rule one that a proxy passes on.
        """
        if user:
            return f"user {user!r}"
        client = None if self.trusts(address) else host_of(address)
        if client is None or client.is_loopback:
            return alone
        if isinstance(client, ipaddress.IPv6Address):
            return f"address {ipaddress.IPv6Network((client, 64), strict=False)}"
        return f"address {client}"

    def _is_ours(self, address: Address) -> bool:
        return any(address in network for network in self.networks)


@lru_cache(maxsize=16)  # a broker has one, and another after a reload
def trusted_proxies(entries: tuple[str, ...], header: str = FORWARDED_FOR) -> TrustedProxies:
    """The proxies of the settings `trusted_proxies` and `proxy_header`, which have been checked."""
    networks = tuple(ipaddress.ip_network(entry) for entry in entries if entry != UNIX)
    return TrustedProxies(networks, UNIX in entries, header)


def _split_list(passed_on: str) -> list[str]:
    return [text.strip() for text in passed_on.split(",")]


# RFC 7239 section 4: `for=192.0.2.43;proto=http, for="[2001:db8::17]:4711"`. In quotes there may be a comma,
# and a `for=` of the one who named the host.
_PIECE: Final = re.compile(r'([^ \t,;="]+)=("(?:[^"\\]|\\.)*"|[^ \t,;"]*)|([,;])|[ \t]+')


def _split_forwarded(passed_on: str) -> list[str]:
    """The values of `for=`, one for each element, and "" where there is none; "" alone for a text that is no
    such list. Linear."""
    found, at = [""], 0
    while at < len(passed_on):
        piece = _PIECE.match(passed_on, at)
        if piece is None:
            return [""]
        at = piece.end()
        if piece[3] == ",":
            found.append("")
        elif piece[1] is not None and piece[1].lower() == "for":
            found[-1] = piece[2].strip('"')
    return found


def split_address(text: str) -> tuple[str, int]:
    """Host and port of an address as text, without brackets; 0 and "" where there is none."""
    host = host_of(text)
    if host is None:
        return "", 0
    found = _PORT(text) if "]" in text or text.count(":") == 1 else None
    return str(host), int(found[1]) if found else 0


_PORT: Final = re.compile(r":([0-9]+)$").search
_BRACKETED: Final = re.compile(r"\[([^]]*)\](?::[0-9]*)?").fullmatch
_WITH_PORT: Final = re.compile(r"([0-9.]+):[0-9]+").fullmatch


def host_of(text: str) -> Address | None:
    """The address in `192.0.2.7`, `192.0.2.7:80`, `2001:db8::7` or `[2001:db8::7]:80`; None for what
    is none, such as `unix`. An IPv4 address that is written as one of IPv6 is one of IPv4."""
    found = _BRACKETED(text) or _WITH_PORT(text)
    try:
        address = ipaddress.ip_address(found[1] if found else text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address.scope_id is not None:  # which link it is on, as fe80::1%eth0
            return ipaddress.IPv6Address(int(address))
    return address
