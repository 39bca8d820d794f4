"""What a check is handed: a fresh directory, images, our server, and a clean end.

Rule: whatever a check sets up (mounts, processes, servers) is undone when its context closes,
in reverse order, whether it passed or not. A server that does not leave with exit code 0 on
SIGTERM, or that printed a traceback, fails the check even where the peer was content.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from conformance import process
from conformance.image import MIB, Image, Span, standard_layout
from conformance.server import Server, Tls

__all__ = ["Context"]

KEEP_VARIABLE = "NBDSRV_KEEP_FAILED"
"""Set it, and what a failed check leaves is copied beside its directory before that is removed."""


class Context:
    """One check's world. Use as a context manager; not shared between checks."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        # Short on purpose: a Unix socket's path may have 107 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="nbdsrv-"))
        self._stack.callback(shutil.rmtree, self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Ended without the check's own error, or a server's complaint would take its place.
        if error is None:
            self._stack.close()
            return
        if os.environ.get(KEEP_VARIABLE):
            error.add_note(f"kept in {self.directory.with_suffix('.kept')}")
            shutil.copytree(self.directory, self.directory.with_suffix(".kept"), symlinks=True)
        try:
            self._stack.close()
        except Exception as later:  # noqa: BLE001 - whatever it is, the check's error is the news
            error.add_note(f"then, while cleaning up: {later}")

    def at_end(self, function: Callable[..., object], *arguments: object) -> None:
        """Call this when the check is over, before everything registered earlier."""
        self._stack.callback(function, *arguments)

    def image(
        self,
        name: str = "disk.img",
        size: int = 32 * MIB,
        spans: tuple[Span, ...] | None = None,
    ) -> Image:
        """A new image with the standard layout, or the one given."""
        layout = standard_layout(size) if spans is None else spans
        return Image(self.directory / name, size, layout).create()

    def serve(
        self,
        image: Image | None = None,
        *,
        source: str | None = None,
        exports: Mapping[str, Image] | None = None,
        listen: Sequence[str] = ("unix",),
        write: bool = False,
        tls: Tls | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Server:
        """Start ``nbdsrv serve`` and wait until it accepts connections.

        Args:
            image: the single source, which is also the default export.
            source: the same for what is no image: a repository.
            exports: further exports by name.
            listen: any of "unix", "tcp" and "tcp6" (loopback, a free port).
            write: serve writable.
            tls: certificates and mode, or None for plaintext only.
            environment: variables added to ours.

        Raises:
            CheckFailedError: it ended, or printed no URI in time.
        """
        server = Server(
            self.directory,
            sources=[*([] if image is None else [image.path]), *([source] if source else [])],
            exports={name: each.path for name, each in (exports or {}).items()},
            listen=listen,
            write=write,
            tls=tls,
            environment=environment,
        )
        self.at_end(server.close)
        server.start()
        return server

    def run(
        self,
        *arguments: str | Path,
        timeout_s: float = 30,
        code: int | None = 0,
        environment: Mapping[str, str] | None = None,
    ) -> process.Finished:
        """Run a peer in the check's directory; see :func:`conformance.process.run`."""
        return process.run(
            arguments,
            directory=self.directory,
            timeout_s=timeout_s,
            code=code,
            environment=environment,
        )
