"""Proxies of ours: the peers that may say for whom they ask.

Anybody can send `X-Forwarded-For`. It tells something only where the peer that sent it is known to
write it itself: a proxy that the settings name.

Rules:

1. A peer is trusted by its address alone, and none is by default.
2. Of the addresses that a proxy passes on, the last one that is no proxy's own is the client's: what
   stands before it came from the client.
"""

import ipaddress
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Final, TypeAlias

import attrs

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

UNIX: Final = "unix"
"""Stands for every peer on a Unix socket: who reaches it is for the permissions of its directory."""

FORWARDED_FOR: Final = "x-forwarded-for"
REAL_IP: Final = "x-real-ip"

_SET_BY_PROXIES: Final = re.compile(
    r"forwarded|x-(original-)?forwarded-.+|.+-address|(.+-)?ip"
).fullmatch


def is_set_by_proxies(header: str) -> bool:
    """Whether a header, in lower case, is one by which proxies say for whom they ask: `forwarded`,
    `x-forwarded-*`, `x-real-ip`, `cf-connecting-ip` and all others that end in `-ip` or `-address`."""
    return _SET_BY_PROXIES(header) is not None


@attrs.frozen
class TrustedProxies:
    """The proxies that the settings name. `trusted_proxies` makes one."""

    networks: tuple[Network, ...]
    unix: bool

    def trusts(self, peer: str) -> bool:
        """Whether a connection's peer, `HOST:PORT` or `unix`, is one of them."""
        host = host_of(peer)
        return self.unix and peer == UNIX if host is None else self._is_ours(host)

    def client_of(self, peer: str, headers: Mapping[str, str]) -> Address | None:
        """The address of the client that is behind a connection; None where nobody knows it: over a
        Unix socket, or where a proxy passes on none that can be read. `headers` have lower-case
        names."""
        if not self.trusts(peer):
            return host_of(peer)
        passed_on = headers.get(FORWARDED_FOR) or headers.get(REAL_IP) or ""
        for text in reversed(passed_on.split(",")):
            address = host_of(text.strip())
            if address is None or not self._is_ours(address):
                return address
        return None

    def party_of(
        self, user: str, peer: str, headers: Callable[[], Mapping[str, str]], alone: str
    ) -> str:
        """The party that something counts for: its user, else the address that it comes from, else,
        where no address tells people apart, `alone`. `headers` is asked where a proxy is trusted.

        Of IPv6 the first 64 bits are one address, as one subscriber has so many. What comes from this
        machine is as a rule what a proxy passes on.
        """
        if user:
            return f"user {user!r}"
        client = self.client_of(peer, headers() if self.trusts(peer) else {})
        if client is None or client.is_loopback:
            return alone
        if isinstance(client, ipaddress.IPv6Address):
            return f"address {ipaddress.IPv6Network((client, 64), strict=False)}"
        return f"address {client}"

    def _is_ours(self, address: Address) -> bool:
        return any(address in network for network in self.networks)


@lru_cache(maxsize=16)  # a broker has one, and another after a reload
def trusted_proxies(entries: tuple[str, ...]) -> TrustedProxies:
    """The proxies of the setting of that name, whose entries have been checked."""
    networks = tuple(ipaddress.ip_network(entry) for entry in entries if entry != UNIX)
    return TrustedProxies(networks, UNIX in entries)


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
