"""What a disk is called in a point, where nobody says.

============================== ===========
SOURCE                         name
============================== ===========
``/vms/web.qcow2``             ``web``
``nbd://host/vm1/sda``         ``sda``
``nbd://host``                 ``disk``
``repo:/path#vm1/sda@latest``  ``sda``
``/vms/web.raw~p2``            ``web-p2``
============================== ===========
"""

import os

from nbdsrv.export.grammar import Kind, Source

__all__ = ["disk_name"]

UNNAMED = "disk"


def disk_name(source: Source) -> str:
    """The name a disk has by default."""
    if source.kind is Kind.NBD:
        name = _of_export(source)
    elif source.kind is Kind.IMAGE:
        path = source.location
        if not os.path.lexists(path):  # a snapshot or a member may be named behind it
            path = path.partition("#")[0].partition("@")[0] or path
        name = os.path.splitext(os.path.basename(path.rstrip("/")))[0]
    else:
        name = source.selector.rpartition("@")[0] or source.selector.partition("@")[0]
        name = name.rpartition("/")[2]
    name = name or UNNAMED
    return name if source.partition is None else f"{name}-p{source.partition}"


def _of_export(source: Source) -> str:
    from protocol.uri import UriError, parse

    try:
        export = parse(source.location).export
    except UriError:
        return UNNAMED  # what is wrong with it is told when it is opened
    return (export.rpartition("@")[0] or export).rstrip("/").rpartition("/")[2]
