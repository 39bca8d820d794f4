"""Telling systemd how we are: the datagrams of sd_notify(3)."""

import os
import socket

__all__ = ["notify"]


def notify(state: str) -> None:
    """Send ``state``, for instance "READY=1"; does nothing when nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.sendto(state.encode(), address)
        except OSError:
            pass  # whoever asked to be told is gone; that is no reason to stop serving
