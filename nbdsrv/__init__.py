"""nbdsrv: an NBD server, proxy and client for backup and instant restore of virtual machines.

As a library: ``async with nbdsrv.connect(uri) as disk`` and ``nbdsrv.stream`` (``source.library``),
imported when they are first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbdsrv.source.library import connect, stream

__all__ = ["__version__", "connect", "stream"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in {"connect", "stream"}:
        from nbdsrv.source import library

        return getattr(library, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
