"""Telling systemd how we are, and having it keep our sockets: the datagrams of sd_notify(3).

::

    READY=1  STATUS=...  RELOADING=1  STOPPING=1  WATCHDOG=1
    FDSTORE=1  FDNAME=...            + descriptors: kept for the next process of this service
    FDSTOREREMOVE=1  FDNAME=...      no longer
"""

import array
import os
import socket
from collections.abc import Sequence

__all__ = ["is_listened_to", "notify"]

PATIENCE_S = 0.1
"""Seconds for a queue that is full: who reads it makes room in less, who does not never will, and
the event loop waits."""


def notify(state: str, descriptors: Sequence[int] = ()) -> None:
    """Send ``state``, for instance "READY=1"; does nothing when nobody listens.

    Descriptors go with it as duplicates: ours stay open, and ours.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(PATIENCE_S)
        try:
            # Not socket.send_fds: Python's ignores the address.
            rights = array.array("i", descriptors).tobytes()
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if descriptors else []
            sock.sendmsg([state.encode()], ancillary, 0, address)
        except OSError:
            pass  # whoever asked to be told is gone, or hangs; that is no reason to stop serving


def is_listened_to() -> bool:
    """Did somebody ask to be told?"""
    return bool(os.environ.get("NOTIFY_SOCKET"))
