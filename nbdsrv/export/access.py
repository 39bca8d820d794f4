"""Who may use an export, and how.

::

    Peer (address | uid, gid, pid; certificate)  ──>  Access.allows  ──>  Grant.NONE  READ  WRITE
                                                       rule, rule, rule: the first that matches

A rule matches when everything it names matches: the subject of the certificate the peer proved to
hold the key of, the address it connects from, the uid or gid the kernel says it has on a Unix
socket. What a connection cannot show never matches: rules for addresses pass Unix sockets by, and
rules for subjects all connections without a client certificate.
"""

import ipaddress
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from nbdsrv.errors import ConfigError

if TYPE_CHECKING:  # at run time where it is used: it takes 50 ms, of every command's start
    from cryptography import x509

__all__ = ["EVERYBODY", "Access", "Grant", "Peer", "Rule", "parse_subject"]

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Subject = frozenset[tuple[str, str]]
"""(object identifier, value) of each part of a distinguished name."""


class Grant(IntEnum):
    """What somebody may do; a larger one contains the smaller ones."""

    NONE = 0
    READ = 1
    WRITE = 2


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end.

    Attributes:
        address: numeric IP address, of a TCP connection; IPv4 within IPv6 is written as IPv4.
        port: likewise.
        uid: of the process that connected to a Unix socket; with ``gid`` and ``pid``.
        subject: of the client's certificate, as RFC 4514 writes it; "" without one.
        names: the same in parts, for rules.
    """

    address: str | None = None
    port: int = 0
    uid: int | None = None
    gid: int | None = None
    pid: int | None = None
    subject: str = ""
    names: Subject = frozenset()

    @property
    def place(self) -> str:
        """For people: ``192.0.2.7:40112``, ``uid 1000 (pid 4711)``."""
        if self.address is not None:
            bracketed = f"[{self.address}]" if ":" in self.address else self.address
            return f"{bracketed}:{self.port}"
        return "a socket" if self.uid is None else f"uid {self.uid} (pid {self.pid})"

    def facts(self) -> dict[str, object]:
        """For logs: what is known, by name."""
        known: dict[str, object] = {
            "address": self.address,
            "port": self.port or None,
            "uid": self.uid,
            "gid": self.gid,
            "pid": self.pid,
            "subject": self.subject or None,
        }
        return {name: value for name, value in known.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of an access list; None matches everything.

    Attributes:
        subject: parts that must all be in the certificate's subject.
        network: the peer's address lies in it.
        grant: what who matches may do.
    """

    subject: Subject | None = None
    network: Network | None = None
    uid: int | None = None
    gid: int | None = None
    grant: Grant = Grant.WRITE

    def matches(self, peer: Peer) -> bool:
        """Does it speak of this peer?"""
        if self.subject is not None and not self.subject <= peer.names:
            return False
        if self.uid is not None and self.uid != peer.uid:
            return False
        if self.gid is not None and self.gid != peer.gid:
            return False
        if self.network is None:
            return True
        return peer.address is not None and _within(peer.address, self.network)


@dataclass(frozen=True, slots=True)
class Access:
    """An access list.

    Attributes:
        rules: asked in order; the first that matches decides. None: everybody may.
        hidden: those who may not are told that there is no such export, and do not see it listed;
            otherwise they see it, and are refused by policy.
    """

    rules: tuple[Rule, ...] | None = None
    hidden: bool = True

    def allows(self, peer: Peer) -> Grant:
        """What this peer may do."""
        if self.rules is None:
            return Grant.WRITE
        return next((rule.grant for rule in self.rules if rule.matches(peer)), Grant.NONE)


EVERYBODY = Access()


def parse_subject(text: str) -> Subject:
    """The parts of a distinguished name as RFC 4514 writes it: ``CN=web1,O=Example``.

    Raises:
        ConfigError: it is none.
    """
    from cryptography import x509

    try:
        name = x509.Name.from_rfc4514_string(text)
    except (ValueError, KeyError) as error:
        reason = f"{text!r} is no subject; expected for instance CN=web1,O=Example"
        raise ConfigError(reason) from error
    parts = subject_of(name)
    if not parts:
        raise ConfigError("an empty subject would match every certificate")
    return parts


def subject_of(name: "x509.Name") -> Subject:
    """The parts of a certificate's subject."""
    return frozenset(
        (part.oid.dotted_string, value if isinstance(value := part.value, str) else value.hex())
        for part in name
    )


def _within(address: str, network: Network) -> bool:
    try:
        return ipaddress.ip_address(address) in network
    except ValueError:
        return False
