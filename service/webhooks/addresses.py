"""Which IP addresses a webhook may reach: public ones, and those that the operator allows."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_NAT64 = ip_network("64:ff9b::/96")
_UNICAST = ip_network("2000::/3")
_NOT_PUBLIC = tuple(ip_network(text) for text in ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20"))
"""Special networks that some versions of `ipaddress` take for global."""


def networks_of(entries: Sequence[str]) -> list[Network]:
    """Return the networks among the entries of an allow-list; the others are host names."""
    networks: list[Network] = []
    for entry in entries:
        with suppress(ValueError):
            networks.append(ip_network(entry, strict=False))
    return networks


def may_reach(literal: str, networks: Sequence[Network], *, is_private_name: bool) -> bool:
    """Return whether a webhook may be sent to an address.

    Args:
        literal: the address.
        networks: allowed even if they are private.
        is_private_name: whether the name that led to the address is one of private networks. Then
            only allowed networks are reached.
    """
    address = ip_address(literal)
    if _lies_in(address, networks):
        return True
    return all(
        _lies_in(end, networks) or (_is_public(end) and not is_private_name)
        for end in _destinations(address)
    )


def _lies_in(address: Address, networks: Iterable[Network]) -> bool:
    return any(address in network for network in networks)


def _destinations(address: Address) -> tuple[Address, ...]:
    """Return where packets to an address go: to the IPv4 addresses in it, or else to itself."""
    if isinstance(address, IPv4Address):
        return (address,)
    if address in _NAT64:
        return (IPv4Address(int(address) & 0xFFFFFFFF),)
    embedded = address.ipv4_mapped or address.sixtofour
    return (embedded,) if embedded is not None else address.teredo or (address,)


def _is_public(address: Address) -> bool:
    if not address.is_global or address.is_multicast or _lies_in(address, _NOT_PUBLIC):
        return False
    return isinstance(address, IPv4Address) or address in _UNICAST
