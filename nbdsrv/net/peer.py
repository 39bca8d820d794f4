"""Who a connected socket leads to, as far as the kernel and TLS know."""

import ipaddress
import socket
import ssl
import struct
from dataclasses import replace

from nbdsrv.export.access import Peer, subject_of

__all__ = ["identified", "peer_of"]

_CREDENTIALS = struct.Struct("3i")
"""struct ucred: pid, uid, gid; unix(7), SO_PEERCRED."""


def peer_of(sock: socket.socket) -> Peer:
    """The other end of a socket; an empty Peer for what tells nothing (a pipe pair, a dead one)."""
    try:
        if sock.family == socket.AF_UNIX:
            data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            pid, uid, gid = _CREDENTIALS.unpack(data)
            return Peer(uid=uid, gid=gid, pid=pid)
        if sock.family in {socket.AF_INET, socket.AF_INET6}:
            address, port, *_ = sock.getpeername()
            return Peer(address=_plain(address), port=port)
    except OSError:
        pass  # gone before it was looked at
    return Peer()


def identified(peer: Peer, sock: ssl.SSLSocket) -> Peer:
    """The same peer once TLS has verified its certificate; unchanged if it showed none.

    Raises:
        ConnectionError: a certificate that OpenSSL accepts and that cannot be understood.
    """
    encoded = sock.getpeercert(binary_form=True)
    if encoded is None:
        return peer
    from cryptography import x509  # loaded by now: ``server_context`` has seen to it

    try:
        name = x509.load_der_x509_certificate(encoded).subject
        return replace(peer, subject=name.rfc4514_string(), names=subject_of(name))
    except ValueError as error:
        raise ConnectionError(f"the client's certificate cannot be read: {error}") from error


def _plain(address: str) -> str:
    """Without zone; an IPv4 address that came through an IPv6 socket is an IPv4 address."""
    bare = address.partition("%")[0]
    parsed = ipaddress.ip_address(bare)
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return str(mapped or parsed)
