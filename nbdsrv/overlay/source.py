"""What an overlay's base was called, so that it is found again from anywhere, and stays the same.

::

    disk.qcow2~p1              /srv/vms/disk.qcow2~p1              from any directory
    repo:backup#vm1/sda        repo:/srv/backup#vm1/sda@01M8AC...  the very point, for ``latest``
                                                                   may be another one by now
"""

import os
from dataclasses import replace

from nbdsrv.export.grammar import Kind, Source, parse_source
from nbdsrv.overlay.description import Description

__all__ = ["absolute", "base_source", "pinned"]


def absolute(source: Source) -> str:
    """The same SOURCE, with the path from the root."""
    local = source.kind is Kind.IMAGE or (
        source.kind is Kind.REPOSITORY and not source.scheme.endswith("+s3")
    )
    if not local:
        return source.text
    text = os.path.abspath(source.location)
    if source.scheme:
        text = f"{source.scheme}:{text}"
    if source.selector:
        text += f"#{source.selector}"
    return text if source.partition is None else f"{text}~p{source.partition}"


def pinned(source: Source, found: Description | None) -> Source:
    """The SOURCE of the very disk an overlay was made over; as it is where there is none yet."""
    if found is None or not found.selector or source.kind is not Kind.REPOSITORY:
        return source
    return replace(source, selector=found.selector)


def base_source(found: Description) -> Source:
    """The SOURCE of an overlay's base, as it says. Raises ConfigError if that makes no sense."""
    return pinned(parse_source(found.source), found)
